"`avlab grid` as a person meets it: the corpus from folders or zips to mosaics and lists, in fresh processes; trouble is one line each and the rest is done."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_avlab

STEPS = ("download", "alignments", "frames", "mouths", "mosaics", "format", "validate", "run")
PROMPT = "These frames show a sequence of lip movements from left to right, top to bottom. Transcribe the spoken phrase."


def grid(*args, **kw):
    return run_avlab("grid", *args, **{"timeout": 500, **kw})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Six clips of two made speakers in the corpus's folders."
    from avlab.lips.made import made_corpus

    folder = tmp_path_factory.mktemp("made")
    return folder, made_corpus(folder, 6, speakers=2)


@pytest.fixture
def copied(made, tmp_path):
    "The same in a folder that may be spoilt: (folder, clips)."
    from avlab.lips.corpus import grid_clips, grid_source

    shutil.copytree(made[0], tmp_path / "copy")
    return tmp_path / "copy", grid_clips(grid_source("nowhere", tmp_path / "copy"))


@pytest.fixture(scope="module")
def prepared(made, tmp_path_factory):
    "All steps over the made clips, in one fresh process, with `data` as a person has it."
    cwd = tmp_path_factory.mktemp("prepared")
    return cwd, grid("run", "--local-path", made[0], "--workers", 1, cwd=cwd)


def one_line(done, *parts):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("avlab: ") and "Traceback" not in done.stderr and all(p in done.stderr for p in parts), done.stderr


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_help_explains_every_parameter():
    from avlab.app.cli import load_command

    family = load_command("grid")
    assert tuple(sorted(family.commands)) == tuple(sorted(STEPS))
    for name, command in family.commands.items():
        assert command.help and all(p.help or p.name == "help" for p in command.params), name
    done = grid("mosaics", "--help")
    assert done.returncode == 0 and "Usage: avlab grid mosaics" in done.stdout and "--workers" in done.stdout
    assert grid().stdout == grid("--help").stdout


@pytest.mark.parametrize("args", [["mosiacs"], ["mosaics", "--limit", "few"], ["run", "--speakers"], ["alignments", "s1"]])
def test_a_wrong_call_is_one_line(args):
    done = grid(*args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "--help" in done.stderr


def test_run_makes_everything(made, prepared):
    from PIL import Image

    cwd, done = prepared
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")][:4] == ["download", "alignments", "mosaics", "format"]
    for c in made[1]:
        with Image.open(cwd / f"data/grid/mosaics/{c.key}.jpg") as im:
            assert (im.size, im.format) == ((400, 240), "JPEG")
        assert (cwd / f"data/grid/alignments/{c.key}.align").read_bytes() == c.alignment.read_bytes()
    assert not (cwd / "data/grid/raw").exists() and not (cwd / "data/grid/frames").exists()


def test_the_lists_are_those_a_language_model_trains_on(made, prepared):
    from avlab.lips.corpus import split_of
    from avlab.lips.grammar import sentence_of

    cwd, _ = prepared
    seen = []
    for split in ("train", "val", "test"):
        for line in (cwd / f"data/grid_dataset_{split}.jsonl").read_text().splitlines():
            user, assistant = json.loads(line)["messages"]
            image, text = user["content"]
            name = Path(image["image"]).stem
            assert (cwd / image["image"]).is_file() and image["image"].startswith("data/grid/mosaics/") and text == {"type": "text", "text": PROMPT}
            assert (user["role"], assistant, split_of(name)) == ("user", {"role": "assistant", "content": sentence_of(name)}, split)
            seen.append(name)
    assert sorted(seen) == sorted(c.name for c in made[1])


def test_a_second_run_does_nothing_again(made, prepared):
    cwd, _ = prepared
    before = {p: p.stat().st_mtime_ns for p in (cwd / "data/grid/mosaics").rglob("*.jpg")}
    done = grid("run", "--local-path", made[0], "--workers", 1, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    steps = {s["step"]: s for s in json.loads(done.stdout)["steps"]}
    assert (steps["mosaics"]["done"], steps["mosaics"]["skipped"], steps["alignments"]["skipped"]) == (0, 6, 6)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_start_from_and_limit(made, prepared):
    cwd, _ = prepared
    done = grid("run", "--local-path", made[0], "--start-from", "format", "--limit", 4, "--json", cwd=cwd)
    assert [s["step"] for s in json.loads(done.stdout)["steps"]] == ["format", "validate"]
    assert sum(len((cwd / f"data/grid_dataset_{s}.jsonl").read_text().splitlines()) for s in ("train", "val", "test")) == 4
    one_line(grid("run", "--local-path", made[0], "--start-from", "mosaic", cwd=cwd), "no step 'mosaic'", "mosaics")


def test_alignments_print_first(made, tmp_path):
    done = grid("alignments", "--print-first", 3, "--local-path", made[0], "--dir", tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4 and lines[-1].startswith("alignments: 6 done")
    assert lines[0].startswith(f"{made[1][0].key}  frames ") or lines[0].split()[0] in {c.key for c in made[1]}
    told = json.loads(grid("alignments", "--print-first", 1, "--local-path", made[0], "--dir", tmp_path, "--json").stdout)
    assert (told["done"], told["skipped"], len(told["first"])) == (0, 6, 1) and len(told["first"][0]["words"]) == 6


def test_frames_mouths_and_the_mosaic_from_them(made, tmp_path):
    from PIL import Image

    where = ("--local-path", made[0], "--dir", tmp_path, "--limit", 1, "--workers", 1)
    for step in ("frames", "mouths", "mosaics"):
        done = grid(step, *where)
        assert (done.returncode, done.stderr) == (0, "") and f"{step}: 1 done" in done.stdout, done.stderr
    frames = sorted((tmp_path / "grid/frames").rglob("*.png"))
    mouths = sorted((tmp_path / "grid/mouth_rois").rglob("*.png"))
    assert 70 <= len(frames) <= 80 and len(mouths) == len(frames) and [p.name for p in frames][:2] == ["frame_000.png", "frame_001.png"]
    with Image.open(frames[0]) as f, Image.open(mouths[0]) as m:
        assert f.size == (360, 288) and min(m.size) > 20 and max(m.size) < 288
    assert "0 done, 1 was there" in grid("frames", *where).stdout


def test_from_zips_to_mosaics(made, tmp_path):
    "The local copy lies there as it comes from Zenodo."
    zips = tmp_path / "zips"
    zips.mkdir()
    for s in ("s1", "s2"):
        with zipfile.ZipFile(zips / f"{s}.zip", "w") as z:
            for c in made[1]:
                if c.speaker == s:
                    z.write(c.video, f"{s}/{c.video.name}")
    with zipfile.ZipFile(zips / "alignments.zip", "w") as z:
        for c in made[1]:
            z.write(c.alignment, f"alignments/{c.speaker}/{c.alignment.name}")
    done = grid("run", "--local-path", zips, "--dir", tmp_path / "data", "--speakers", "s1", "--limit", 2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "data/grid/raw/s1").glob("*.mp4"))) == 3 and len(list((tmp_path / "data/grid/mosaics").rglob("*.jpg"))) == 2
    assert not (tmp_path / "data/grid/raw/s2").exists()


def test_who_is_not_there(made, tmp_path):
    for step in ("alignments", "run", "validate"):
        one_line(grid(step, "--local-path", made[0], "--dir", tmp_path / "out", "--speakers", "s5"), "has no speaker s5", "s1, s2")
    for step in ("download", "mosaics"):
        one_line(grid(step, "--local-path", made[0], "--dir", tmp_path / "out", "--speakers", "s1", "s21"), "s21 has no video")
    one_line(grid("mosaics", "--local-path", made[0], "--dir", tmp_path / "out", "--speakers", "s99"), "no speaker 's99'")
    assert not (tmp_path / "out").exists()


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare/grid/raw/s1").mkdir(parents=True)
    for step in ("download", "run"):
        one_line(grid(step, "--local-path", tmp_path / "empty", "--dir", tmp_path / "out"), "holds no speakers' folders")
        one_line(grid(step, "--local-path", tmp_path / "gone", "--dir", tmp_path / "out"), "does not exist")
        one_line(grid(step, "--local-path", tmp_path / "bare", "--dir", tmp_path / "out"), "videos")
    nothing = {"AVLAB_DATA": str(tmp_path / "empty")}
    one_line(grid("mosaics", "--dir", tmp_path / "out", env=nothing), "holds no speakers' folders", "avlab grid download")
    one_line(grid("run", "--dir", tmp_path / "out", "--speakers", "s1", env=nothing), "AVLAB_DOWNLOADS=never")
    assert not (tmp_path / "out/grid/mosaics").exists()


def test_the_wrong_alignment_folder(copied, tmp_path):
    folder, clips = copied
    shuffled = tmp_path / "shuffled"
    for c, other in zip(clips, clips[1:] + clips[:1]):
        (shuffled / c.speaker).mkdir(parents=True, exist_ok=True)
        shutil.copy(other.alignment, shuffled / c.speaker / c.alignment.name)
    for step in ("alignments", "run"):
        done = grid(step, "--local-path", folder, "--alignments", shuffled, "--dir", tmp_path / "out")
        assert done.returncode == 1 and "6 of 6 alignments say another sentence" in done.stderr and len(done.stderr.splitlines()) == 1
    one_line(grid("alignments", "--local-path", folder, "--alignments", folder / "grid/raw", "--dir", tmp_path / "out"), "holds no alignments")
    shutil.rmtree(folder / "grid/alignments")
    one_line(grid("alignments", "--local-path", folder, "--dir", tmp_path / "out"), "no alignments")


def spoil(clips):
    "One of each kind of trouble; the last two clips stay good."
    from avlab.media import read_audio, write_video

    none, few, noisy, other = clips[:4]
    sound = read_audio(few.video)
    blank = [np.full((288, 360, 3), 90 + k, np.uint8) for k in range(75)]
    write_video(none.video, blank, 25, audio=sound, sample_rate=16000)
    write_video(few.video, blank[:20], 25, audio=sound[: 20 * 640], sample_rate=16000)
    noisy.video.write_bytes(bytes((i * 7919 >> 3) & 255 for i in range(20000)))
    other.alignment.write_text(clips[4].alignment.read_text())
    return dict(zip(("no_face", "short", "noise", "words"), (c.key for c in clips)))


def test_trouble_with_clips_is_listed_and_the_rest_is_done(copied, tmp_path):
    folder, clips = copied
    bad = spoil(clips)
    done = grid("run", "--local-path", folder, "--dir", tmp_path / "out", "--workers", 1, "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    steps = {s["step"]: s for s in json.loads(done.stdout)["steps"]}
    failed = {f["clip"]: f for f in steps["mosaics"]["failed"]}
    assert set(failed) == set(bad.values()) and failed[bad["no_face"]]["kind"] == "NoFace"
    assert [f["clip"] for f in steps["alignments"]["failed"]] == [bad["words"]]
    assert (steps["mosaics"]["done"], steps["format"]["done"]) == (2, 2)
    told = grid("mosaics", "--local-path", folder, "--dir", tmp_path / "out", "--workers", 1)
    assert told.returncode == 1 and len(told.stderr.splitlines()) == 4 and "2 were there, 4 failed" in told.stdout


def test_the_doctor_finds_spoilt_outputs(made, prepared, tmp_path):
    from PIL import Image

    shutil.copytree(prepared[0] / "data", tmp_path / "data")
    grid("format", "--local-path", made[0], cwd=tmp_path)
    assert grid("validate", "--local-path", made[0], cwd=tmp_path).returncode == 0
    first = next((tmp_path / "data/grid/mosaics").rglob("*.jpg"))
    Image.new("RGB", (320, 240)).save(first)
    with open(tmp_path / "data/grid_dataset_train.jsonl", "a") as f:
        f.write("{not json\n")
    done = grid("validate", "--local-path", made[0], "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and found["ok"] is False
    text = " ".join(f"{f['where']} {f['found']}" for f in found["findings"] if f["severity"] == "error")
    assert "320x240" in text and "JSON" in text, text


def test_a_full_disk_in_mid_run(made, tmp_path):
    "A disk for a mosaic or two: one line about the disk, what is done stays, and with room again the rest is done."
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = grid("mosaics", "--local-path", made[0], "--dir", small, "--workers", 1)
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and "Traceback" not in done.stderr and len(lines) == 1 and "disk is full" in lines[0], done.stderr
        kept = list((small / "grid/mosaics").rglob("*.jpg"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        again = grid("mosaics", "--local-path", made[0], "--dir", small, "--workers", 1)
        assert again.returncode == 0 and f"{6 - len(kept)} done" in again.stdout, again.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(made, tmp_path, how):
    command = [sys.executable, "-m", "avlab.app.cli", "grid", "mosaics", "--local-path", str(made[0]), "--dir", str(tmp_path), "--workers", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AVLAB_DOWNLOADS": "never", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 400
    while not list((tmp_path / "grid/mosaics").rglob("[!.]*.jpg")) and child.poll() is None and time.monotonic() < waited:
        time.sleep(0.02)
    child.send_signal(how)
    _, err = child.communicate(timeout=200)
    assert "Traceback" not in err
    kept = len(list((tmp_path / "grid/mosaics").rglob("[!.]*.jpg")))
    done = grid("mosaics", "--local-path", made[0], "--dir", tmp_path, "--workers", 1, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and kept >= 1 and report["done"] + report["skipped"] == 6 and report["skipped"] >= kept


@pytest.fixture
def real():
    data = Path(os.environ.get("AVLAB_DATA", "data"))
    if not (data / "grid/raw/s26").is_dir():
        pytest.skip("the GRID clips are not on this machine: AVLAB_DATA")
    return data


def test_real_clips_are_used_where_they_lie(real, tmp_path):
    before = os.stat(real / "grid").st_mtime_ns
    done = grid("run", "--speakers", "s3", "s26", "--limit", 3, "--sync", "--json", cwd=tmp_path, env={"AVLAB_DATA": str(real.absolute())})
    assert done.returncode == 0, done.stderr
    steps = {s["step"]: s for s in json.loads(done.stdout)["steps"]}
    assert (steps["mosaics"]["done"], steps["format"]["done"], steps["mosaics"]["failed"]) == (3, 3, [])
    assert len(list((tmp_path / "data/grid/mosaics").rglob("*.jpg"))) == 3 and not (tmp_path / "data/grid/raw").exists()
    assert os.stat(real / "grid").st_mtime_ns == before
    told = json.loads((tmp_path / "data/grid/manifest.json").read_text())["clips"]
    assert len(told) == 3 and all(len(c["video_sha256"]) == 64 for c in told.values())


def test_real_frames(real, tmp_path):
    done = grid("frames", "--speakers", "s3", "--dir", tmp_path, "--workers", 1, env={"AVLAB_DATA": str(real.absolute())})
    assert done.returncode == 0 and len(list((tmp_path / "grid/frames/s3/sbia1a").glob("frame_*.png"))) == 75
