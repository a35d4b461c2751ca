"Swapping from the command line: a killed run goes on, a changed file is noticed, and every wrong call is one line."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_avlab


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def swap(home):
    "`avlab swap`, with keys and consents of its own."
    return lambda *args, **kw: run_avlab("swap", *args, env={"XDG_CONFIG_HOME": str(home)}, **kw)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Six seconds of a made speaker."
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    done = run_avlab("talk", "hopper", "bring the same words under another face and nobody will know whose they were in the end", "-o", path, "--size", "256", "--duration", 5.3)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def made(swap, film, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "new.mp4"
    done = swap("collins", film, "-o", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return out, json.loads(done.stdout)


def test_a_film_is_swapped_and_says_so(made, film):
    from avlab.media import probe

    out, report = made
    assert report["engine"] == "mesh" and report["swapped_share"] > 0.95 and report["sound"] == "copied" and report["marked"]
    assert probe(out).frames == probe(film).frames == report["frames"]
    note = json.loads(out.with_name(out.name + ".consent.json").read_text())
    assert note["faces"][0]["who"] == "Eileen Collins" and note["visible_mark"] is True
    assert sorted(p.name for p in out.parent.iterdir()) == ["new.mp4", "new.mp4.consent.json"]


def test_the_credential_holds_until_the_film_is_changed(made, home, tmp_path):
    out, _ = made
    keys = {"XDG_CONFIG_HOME": str(home)}
    done = run_avlab("verify", out, "--json", env=keys)
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "valid", done.stderr
    data = bytearray(out.read_bytes())
    for at in (len(data) // 3, len(data) // 2, 2 * len(data) // 3):
        data[at] ^= 0x40
    (tmp_path / "changed.mp4").write_bytes(data)
    done = run_avlab("verify", tmp_path / "changed.mp4", "--json", env=keys)
    assert json.loads(done.stdout.splitlines()[0])["state"] == "tampered" and done.returncode != 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_swap_goes_on(film, home, tmp_path, how):
    "Stopped behind the first piece: the piece is kept, the second run makes the rest, nothing else is left."
    code = f"from avlab.swap.files import swap_file; r = swap_file('collins', {str(film)!r}, 'new.mp4', piece_s=1.); print(r.pieces_kept, r.frames)"
    env = {**os.environ, "XDG_CONFIG_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 100
    while not list(tmp_path.glob(".new-*.swap/00000.json")) and child.poll() is None and time.monotonic() < waited:
        time.sleep(0.01)
    child.send_signal(how)
    child.communicate(timeout=60)
    assert child.returncode and not (tmp_path / "new.mp4").exists()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    kept, frames = map(int, done.stdout.split())
    from avlab.media import probe

    assert kept >= 1 and frames == probe(film).frames == probe(tmp_path / "new.mp4").frames
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.mp4", "new.mp4.consent.json"]


def test_a_picture_and_a_preview(swap, film, material, tmp_path):
    done = swap("hopper", material / "portrait.jpg", "-o", tmp_path / "new.jpg", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["faces"] == 1, done.stderr
    done = swap("collins", film, "-o", tmp_path / "look.mp4", "--preview")
    assert done.returncode == 0 and (tmp_path / "look.jpg").stat().st_size > 5000 and not (tmp_path / "look.mp4").exists()


@pytest.mark.parametrize("case", ["no photo", "no film", "no face in the photo", "no face in the film", "a sound", "onto itself", "a suffix", "an engine", "no mark", "fidelity"])
def test_what_is_wrong_is_one_line(swap, film, material, tmp_path, case):
    from PIL import Image

    Image.fromarray(np.full((200, 200, 3), 120, np.uint8)).save(tmp_path / "wall.jpg")
    args, said = {
        "no photo": (["gone.jpg", film], "gone.jpg does not exist"),
        "no film": (["collins", "gone.mp4"], "gone.mp4 does not exist"),
        "no face in the photo": ([tmp_path / "wall.jpg", film], "no face was found"),
        "no face in the film": (["collins", material / "noface.mp4"], "no face was found in 10 frames"),
        "a sound": (["collins", material / "said.wav"], "no pictures"),
        "onto itself": (["collins", film, "-o", film], "is the film itself"),
        "a suffix": (["collins", film, "-o", "new.avi"], "no suffix that can be written"),
        "an engine": (["collins", film, "--engine", "inswapper"], "inswapper"),
        "no mark": ([material / "portrait.jpg", film, "--no-mark"], "no consent record covers"),
        "fidelity": (["collins", film, "--fidelity", "3"], "0 … 1"),
    }[case]
    done = swap(*args, *([] if "-o" in args else ["-o", "new.mp4"]), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["wall.jpg"]
