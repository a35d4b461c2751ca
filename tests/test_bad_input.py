"Every command, given what it can't use: one line that says what was wrong with which file, exit code not zero, nothing partial left."
import ctypes
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_avlab

SENTENCE = "bin blue at f two now"


def without_override():
    "Root may read everything; this process may not (PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        if libc.prctl(24, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "capability could not be dropped")


@pytest.fixture(scope="module")
def bad(material, tmp_path_factory):
    "One of each kind of bad file, named for a video, a picture and a notebook."
    d = tmp_path_factory.mktemp("bad")
    whole = (material / "clip.mp4").read_bytes()
    made = {}
    def put(name, content):
        (d / name).write_bytes(content)
        return d / name

    for suffix in ("mp4", "jpg", "ipynb"):
        (d / f"folder.{suffix}").mkdir()
        made[suffix] = dict(missing=d / f"missing.{suffix}", folder=d / f"folder.{suffix}", empty=put(f"empty.{suffix}", b""))
        made[suffix] |= dict(text=put(f"text.{suffix}", b"these are words\n" * 40), unreadable=put(f"unreadable.{suffix}", b"x" * 100))
        made[suffix]["unreadable"].chmod(0)
    made["mp4"]["picture"] = shutil.copy(material / "portrait.jpg", d / "picture.mp4")
    made["mp4"]["truncated"] = put("truncated.mp4", whole[: int(len(whole) * 0.6)])
    made["mp4"]["noise"] = put("noise.mp4", bytes((i * 7919 >> 3) & 255 for i in range(20000)))
    made["jpg"]["video"] = shutil.copy(material / "clip.mp4", d / "video.jpg")
    made["jpg"]["truncated"] = put("truncated.jpg", (material / "portrait.jpg").read_bytes()[:4000])
    return made


def calls(kind, file, out):
    "The commands that take such a file."
    if kind == "mp4":
        return [["probe", file], ["faces", file, "--csv", out / "c.csv", "--plot", out / "c.svg"], ["sync", file], ["lips", "read", file], ["align", file, SENTENCE], ["verify", file]]
    if kind == "jpg":
        return [["talk", file, SENTENCE, "-o", out / "clip.mp4"]]
    return [["run", file, "-o", out / "run"], ["sweep", file, "-p", "seed", "1,2", "-o", out / "sweep", "--workers", "1"]]


KINDS = [("mp4", k) for k in ("missing", "folder", "unreadable", "picture", "text", "truncated", "empty", "noise")]
KINDS += [("jpg", k) for k in ("missing", "folder", "unreadable", "video", "text", "truncated", "empty")]
KINDS += [("ipynb", k) for k in ("missing", "folder", "unreadable", "text", "empty")]


@pytest.mark.parametrize("kind, wrong", KINDS, ids=lambda v: v)
def test_one_line(bad, tmp_path, kind, wrong):
    file, extra = bad[kind][wrong], {}
    if wrong == "unreadable" and os.access(file, os.R_OK):
        extra = dict(preexec_fn=without_override)
        try:
            subprocess.run(["true"], check=True, **extra)
        except subprocess.SubprocessError:
            pytest.skip("this user may read every file, and the right to do so can't be dropped here")
    for args in calls(kind, file, tmp_path):
        done = run_avlab(*args, **extra)
        said = f"avlab {args[0]} on a {wrong} file: {done.returncode} {done.stdout!r} {done.stderr!r}"
        assert done.returncode in (1, 2), said
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("avlab: ") and os.path.basename(file) in done.stderr, said
        assert "Traceback" not in done.stderr and "AVLAB_DEBUG" not in done.stderr, said
        assert done.stdout == "" or args[0] == "verify", said
        assert not list(tmp_path.rglob("*")), f"{said}, left {list(tmp_path.rglob('*'))}"


@pytest.mark.parametrize("command", ["probe", "faces", "sync", "verify"])
def test_the_others_are_still_done(bad, material, command):
    good = material / "clip.mp4"
    done = run_avlab(command, bad["mp4"]["empty"], good, "--json")
    assert done.returncode != 0 and str(good) in done.stdout and "empty.mp4" in done.stderr


@pytest.mark.parametrize("out", ["folder", "file/clip.mp4", "clip.txt", "folder.mp4"])
def test_a_place_that_cant_be_written(material, tmp_path, out):
    (tmp_path / "file").write_text("a file, not a folder")
    for name in ("folder", "folder.mp4"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = run_avlab("talk", material / "portrait.jpg", SENTENCE, "-o", tmp_path / out)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "AVLAB_DEBUG" not in done.stderr, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args", [["--fps", "0"], ["--fps", "-25"], ["--size", "3"], ["--rate", "5"], ["--duration", "0"], ["--voice", "klingon"], ["--preset", "imax"]])
def test_values_that_make_no_sense(material, tmp_path, args):
    done = run_avlab("talk", material / "portrait.jpg", SENTENCE, "-o", tmp_path / "clip.mp4", *args)
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_text_that_can_not_be_said(material, tmp_path):
    for text in ("", "   ", "…"):
        done = run_avlab("talk", material / "portrait.jpg", text, "-o", tmp_path / "clip.mp4")
        assert done.returncode != 0 and done.stderr.count("\n") == 1, (text, done.stderr)
        assert not list(tmp_path.iterdir())


def test_a_portrait_without_a_face(tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 300), (90, 120, 160)).save(tmp_path / "wall.jpg")
    done = run_avlab("talk", tmp_path / "wall.jpg", SENTENCE, "-o", tmp_path / "clip.mp4")
    assert done.returncode == 1 and "face" in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["wall.jpg"]


NO_NETWORK = """
import socket, sys
def refuse(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and args[0].family != getattr(socket, "AF_UNIX", None)):
        raise RuntimeError(f"{event} {args[1:]}: this process must not use the network")
sys.addaudithook(refuse)
from avlab.app.cli import main
main(sys.argv[1:])
"""


def test_the_default_path_opens_no_socket(material, tmp_path):
    alone = ["unshare", "--net", "--map-root-user"] if shutil.which("unshare") and not subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True).returncode else []
    for args in (["talk", material / "portrait.jpg", SENTENCE, "-o", tmp_path / "clip.mp4"], ["faces", tmp_path / "clip.mp4"], ["sync", tmp_path / "clip.mp4"], ["align", tmp_path / "clip.mp4", SENTENCE], ["weights"]):
        done = subprocess.run([*alone, sys.executable, "-c", NO_NETWORK, *map(str, args)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "AVLAB_DEBUG": "1"})
        assert done.returncode == 0, done.stderr
