"`avlab lips` as a person meets it: a sentence with its confidence, or one line that says why not; every output; real clips where they are."
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HEAVY, ROOT, run_avlab
from test_bad_input import without_override

SAID = "bin blue at f two now"
COMMANDS = ("read", "adapt", "evaluate", "train-lora", "eval-lora")


def lips(*args, **kw):
    return run_avlab("lips", *args, **{"timeout": 600, **kw})


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A network that has learned nothing, a made clip in GRID's format, and clips that can't be read."
    import torch

    from avlab.encode import write_audio, write_video
    from avlab.lips.net import LipReader, save_reader
    from avlab.media import read_frames
    from avlab.talker import save_talk, talk

    d = tmp_path_factory.mktemp("lips")
    torch.manual_seed(0)
    save_reader(LipReader(), d / "untaught.safetensors")
    (d / "broken.safetensors").write_bytes((d / "untaught.safetensors").read_bytes()[:5000])
    save_talk(talk("collins", SAID, preset="grid", seed=3), d / "bbaf2n.mp4")
    frames = list(read_frames(d / "bbaf2n.mp4"))
    noise = np.random.default_rng(0)
    write = lambda name, f, fps=25: write_video(d / f"{name}.mp4", f, fps, preset="ultrafast")
    write("small", [np.pad(f[::6, ::6], ((100, 100), (150, 150), (0, 0))) for f in frames])
    write("still", [frames[0]] * 75)
    write("noface", [noise.integers(0, 255, (96, 96, 3), np.uint8) for _ in range(50)])
    write("short", frames[20:32])
    write("long", frames * 3)
    write("slow", frames[::3], 25 / 3)
    write("fifty", [f for f in frames for _ in "12"], 50)
    write("half_gone", [f if i % 50 < 25 else np.zeros_like(f) for i, f in enumerate(frames)])
    write_audio(d / "sound.wav", np.zeros(16000, np.float32), 16000)
    (d / "text.mp4").write_text("no film at all\n" * 50)
    (d / "cut.mp4").write_bytes((d / "bbaf2n.mp4").read_bytes()[:30000])
    (d / "empty").mkdir()
    return d


@pytest.fixture
def forced(here):
    "The arguments with which the network that knows nothing speaks all the same."
    return "--model", here / "untaught.safetensors", "--force"


def one_line(done, *parts, code=1):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("avlab: ") and all(p in done.stderr for p in parts), done.stderr


def test_every_command_explains_every_parameter():
    from avlab.app.cli import load_command

    family = load_command("lips")
    assert set(COMMANDS) <= set(family.commands) and "train-lora" in lips("--help").stdout
    for name, command in family.commands.items():
        for p in command.params:
            assert p.help or p.name == "help", f"lips {name} says nothing about {p.name}"


def test_the_help_and_the_rooms_load_nothing_heavy():
    code = f"""
import sys, avlab.lips.decoding, avlab.lips.evaluation, avlab.lips.reader, avlab.lips.captions, avlab.lips.predictions
from avlab.app.cli import main
try: main(["lips", "read", "--help"])
except SystemExit as e: assert e.code == 0
print("loaded", *sorted(set({HEAVY!r}) & {{m.split(".")[0] for m in sys.modules}}))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded", done.stderr


def test_a_guess_is_refused(here):
    one_line(lips("read", here / "bbaf2n.mp4", "--model", here / "untaught.safetensors"), "bbaf2n.mp4", "confidence")


def test_every_method_gives_a_transcript(here):
    from avlab.lips.reader import read_lips

    for method in ("slots", "frames", "greedy", "ctc"):
        t = read_lips(here / "bbaf2n.mp4", method=method, model=here / "untaught.safetensors", force=True)
        assert t.method == method and (len(t.words) == 6 or method == "greedy")


def test_forced_it_speaks_in_every_form_and_says_what_speaks_against_it(here, forced, tmp_path):
    from avlab.media import probe

    shutil.copy(here / "bbaf2n.mp4", tmp_path)
    done = lips("read", "bbaf2n.mp4", *forced, "--json", "--srt", "a.srt", "--csv", "a.csv", "--text", "a.txt", "--annotate", "words.mp4", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert {"path", "text", "words", "confidence", "alternatives", "engine", "model", "weights_sha256", "method", "fps", "duration_s", "warnings", "seconds"} <= told.keys()
    assert len(told["words"]) == 6 and told["text"] == " ".join(w["word"] for w in told["words"])
    assert all(0 <= w["start_s"] < w["end_s"] <= 3 and 0 <= w["confidence"] <= 1 for w in told["words"])
    assert all(a["end_s"] <= b["start_s"] for a, b in zip(told["words"], told["words"][1:]))
    assert any("confidence" in w for w in told["warnings"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.srt", "a.txt", "bbaf2n.mp4", "words.mp4"]
    rows, srt = list(csv.DictReader((tmp_path / "a.csv").open())), (tmp_path / "a.srt").read_text()
    assert (tmp_path / "a.txt").read_text() == told["text"] + "\n" and [r["word"] for r in rows] == told["text"].split() and " --> " in srt and told["text"] in srt
    was, made = probe(tmp_path / "bbaf2n.mp4"), probe(tmp_path / "words.mp4")
    assert (made.frames, made.fps, made.width, bool(made.audio_codec)) == (was.frames, was.fps, was.width, True) and made.height > was.height
    assert abs(made.duration_s - was.duration_s) < 0.1


def test_the_annotated_film_shows_words_only_when_they_begin(here, tmp_path):
    from avlab.lips.captions import annotate
    from avlab.lips.reader import Transcript, TranscriptWord
    from avlab.media import read_frames

    words = tuple(TranscriptWord(w, 0.5 + 0.3 * k, 0.75 + 0.3 * k, 0.9) for k, w in enumerate(SAID.split()))
    t = Transcript(path=str(here / "fifty.mp4"), text=SAID, words=words, confidence=0.5, engine="video", model="x", weights_sha256="0" * 64, method="grammar", fps=50.0, duration_s=3.0)
    frames = list(read_frames(annotate(t, tmp_path / "w.mp4", box=False)))
    dark = [int((f[290:, :, :] < 128).any(2).sum()) for f in frames]
    first = next(i for i, n in enumerate(dark) if n > 20)
    assert len(frames) == 150 and abs(first - 25) <= 1 and dark[149] > 2 * dark[30]


def test_any_rate_and_any_folder_and_a_bad_clip_among_good_ones(here, forced, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("bbaf2n.mp4", "fifty.mp4", "text.mp4"):
        shutil.copy(here / name, folder)
    done = lips("read", folder, here / "gone.mp4", *forced, "--json", "--srt", tmp_path / "subtitles")
    one, fifty = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr.count("\n")) == (1, 3) and "text.mp4" in done.stderr and "gone.mp4" in done.stderr and "2 of 4 files failed" in done.stderr
    assert sorted(p.name for p in (tmp_path / "subtitles").iterdir()) == ["bbaf2n.srt", "fifty.srt"]
    assert fifty["fps"] == 50 and any("50 frames a second were brought to 25" in w for w in fifty["warnings"])
    assert all(abs(a["start_s"] - b["start_s"]) < 0.09 for a, b in zip(one["words"], fifty["words"]) if a["word"] == b["word"])


BAD = {
    "small": ("pixels high",), "still": ("lips hardly move",), "noface": ("no face",), "short": ("can't hold six words",), "long": ("more than one sentence", "start"),
    "slow": ("8.33 frames a second are too few",), "half_gone": ("of the frames",), "text": ("not media",), "cut": ("cut.mp4",),
}


def test_what_can_not_be_read_says_why(here):
    done = lips("read", *(here / f"{name}.mp4" for name in BAD), "--model", here / "untaught.safetensors")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (1, "", len(BAD) + 1) and f"{len(BAD)} of {len(BAD)} files failed" in lines[-1]
    for line, (name, parts) in zip(lines, BAD.items()):
        assert line.startswith("avlab: ") and f"{name}.mp4" in line and all(p in line for p in parts), line


@pytest.mark.parametrize(
    "args, part",
    [
        (["sound.wav"], "no pictures"), (["empty"], "no video"), (["bbaf2n.mp4", "--start", 2, "--stop", 1], "no piece of time"), (["bbaf2n.mp4", "--start", 9], "six words"),
        (["bbaf2n.mp4", "--method", "beam"], "Choose from: grammar"), (["bbaf2n.mp4", "--engine", "ear"], "Choose from: video"), (["bbaf2n.mp4", "--model", "gone.safetensors"], "does not exist"),
        (["bbaf2n.mp4", "--model", "broken.safetensors"], "does not hold a lip reader"), (["bbaf2n.mp4", "--csv", "a.xls"], ".csv"), (["bbaf2n.mp4", "--srt", "a.doc"], ".srt"),
        (["bbaf2n.mp4", "still.mp4", "--srt", "a.srt"], "there are 2 clips"), (["bbaf2n.mp4", "--annotate", "a.gif"], ".mp4"), (["bbaf2n.mp4", "--device", "cuda:7"], "not active"),
        (["bbaf2n.mp4", "--quantize-4bit", "--engine", "video"], "vlm"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(here, args, part):
    before = sorted(p.name for p in here.iterdir())
    args = args if "--model" in map(str, args) or "ear" in args else [*args, "--model", "untaught.safetensors"]
    one_line(lips("read", *args, cwd=here), part)
    assert sorted(p.name for p in here.iterdir()) == before


def test_without_an_adapter_the_language_model_says_how_to_get_one(here, tmp_path):
    env = {"AVLAB_MODELS": str(tmp_path), "AVLAB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = lips("read", here / "bbaf2n.mp4", "--engine", "vlm", env=env, cwd=tmp_path)
    one_line(done, "vlm")


def test_a_folder_that_may_not_be_written_is_known_before_any_work(here, forced, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    root = dict(preexec_fn=without_override) if os.geteuid() == 0 else {}
    done = lips("read", here / "bbaf2n.mp4", *forced, "--srt", locked / "a.srt", **root)
    locked.chmod(0o700)
    one_line(done, "can't be written")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Four made clips in the corpus's folders; one of them is no film."
    from avlab.lips.made import made_corpus

    d = tmp_path_factory.mktemp("corpus")
    clips = made_corpus(d, 4, speakers=2)
    clips[-1].video.write_bytes(b"no film at all" * 100)
    return d, clips


def test_evaluate_counts_everything_and_goes_on_where_it_stopped(here, corpus, tmp_path):
    folder, clips = corpus
    args = ("evaluate", "--split", "all", "--local-path", folder, "--model", here / "untaught.safetensors", "--out", tmp_path / "out", "--workers", 1)
    done = lips(*args, cwd=tmp_path)
    assert done.returncode == 1 and clips[-1].key in done.stderr and done.stderr.count("\n") == 1
    assert "WER %" in done.stdout and "a guess from the grammar: WER 81.0 %" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "predictions_video.csv").open()))
    assert len(rows) == 4 and [r["name"] for r in rows if not r["grammar"]] == [clips[-1].name]
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    wrong = sum(a != b for r in rows for a, b in zip(r["truth"].split(), (r["grammar"].split() or [""] * 6)))
    assert abs(numbers["readers"]["video"]["grammar"]["wer"] - wrong / 24) < 1e-9 and len(numbers["weights"]) == 64
    before = rows
    again = lips(*args, "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["video, grammar"]["clips"] == 4
    assert list(csv.DictReader((tmp_path / "out" / "predictions_video.csv").open())) == before
    counted = lips("evaluate", "--predictions", tmp_path / "out" / "predictions_video.csv", "--out", tmp_path / "counted", "--json")
    assert abs(json.loads(counted.stdout)["grammar"]["wer"] - wrong / 24) < 1e-9


@pytest.mark.parametrize(
    "args, part",
    [
        (["--split", "exam"], "Choose from: train"), (["--speakers", "s21"], "s21 has no video"), (["--speakers", "s99"], "no speaker"), (["--limit", 0], "limit 0"),
        (["--engine", "ear"], "Choose from: video"), (["--predictions", "gone.csv"], "does not exist"),
    ],
)
def test_a_wrong_evaluation_is_one_line(corpus, here, tmp_path, args, part):
    more = [] if "--predictions" in args else ["--local-path", corpus[0], "--split", "all"][: 2 if "--split" in args else 4]
    one_line(lips("evaluate", *more, *args, "--model", here / "untaught.safetensors", cwd=tmp_path), part)


def test_a_table_that_is_none_names_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("name,speaker,truth,greedy,grammar,confidence\nbbaf2n,s1,bin blue at f two now,x,y,1\nbbaf2n,s1\n")
    one_line(lips("evaluate", "--predictions", "a.csv", cwd=tmp_path), "line 3")


def has(name):
    return (ROOT / "nbs" / "runs" / f"{name}.ipynb").exists()


@pytest.mark.skipif(not has("train_lora"), reason="nbs/runs/train_lora.ipynb is not there yet")
def test_the_language_model_is_taught_by_a_command(tmp_path):
    pytest.importorskip("peft")
    from avlab.lips.lines import write_dataset_lines
    from PIL import Image

    rng, mosaics = np.random.default_rng(0), []
    for k, text in enumerate([SAID, "lay green by m eight soon"]):
        path = tmp_path / "data" / f"m{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (240, 400, 3), np.uint8)).save(path, quality=95)
        mosaics.append((path, text))
    for split in ("train", "val", "test"):
        write_dataset_lines(tmp_path / "data" / f"grid_dataset_{split}.jsonl", mosaics)
    env = {"AVLAB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = lips("train-lora", "--model", "tiny", "--dataset-dir", tmp_path / "data", "--output-dir", tmp_path / "out", "--max-steps", 2, "--max-samples", 2, "--batch-size", 2, "--json", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "final-adapter" / "adapter_config.json").exists() and json.loads(done.stdout)["metrics"]
    seen = lips("eval-lora", "--adapter-dir", tmp_path / "out" / "final-adapter", "--dataset-dir", tmp_path / "data", "--output-dir", tmp_path / "eval", "--max-samples", 2, "--json", env=env, cwd=tmp_path)
    assert seen.returncode == 0, seen.stderr


# real clips, with the real network

DATA = Path(os.environ.get("AVLAB_DATA", "data"))


def weights():
    from avlab.weights import manifest, missing

    return missing("avlab_lips") if "avlab_lips" in manifest() else "avlab_lips is not in the manifest"


@pytest.fixture(scope="module")
def real():
    "A few validation clips of speaker s1."
    if weights():
        pytest.skip(weights())
    if not (DATA / "grid" / "raw" / "s1").is_dir():
        pytest.skip("the GRID clips are not on this machine: AVLAB_DATA")
    from avlab.lips.corpus import grid_clips, grid_source, split_of

    return [c for c in grid_clips(grid_source("nowhere", DATA), ["s1"]) if split_of(c.name) == "val"][::16]


def test_real_clips_are_read_in_a_fresh_process(real, tmp_path):
    from avlab.lips.grammar import sentence_of

    done = lips("read", *(c.video for c in real), "--json", "--annotate", tmp_path / "films", cwd=tmp_path)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    truth = {str(c.video): sentence_of(c.name).split() for c in real}
    wrong = [a != b["word"] for t in told for a, b in zip(truth[t["path"]], t["words"])]
    assert len(told) >= len(real) - 1 and np.mean(wrong) <= 0.1, done.stderr
    assert len(list((tmp_path / "films").iterdir())) == len(told)
    from avlab.lips.alignment import read_alignment

    by = {str(c.video): read_alignment(c.alignment, "s1") for c in real if c.alignment}
    late = [abs(w["start_s"] - a.start_frame / 25) for t in told if t["path"] in by for w, a in zip(t["words"], by[t["path"]].words)]
    assert np.median(late) <= 0.08


def test_the_reader_reads_the_picture_not_the_name_nor_the_sound(real, tmp_path):
    "The frames of one clip, with the name and the sound of another."
    from avlab.encode import write_video
    from avlab.lips.grammar import sentence_of
    from avlab.lips.reader import read_lips
    from avlab.media import read_audio, read_frames

    shown, named = real[0], real[1]
    path = write_video(tmp_path / f"{named.name}.mp4", read_frames(shown.video), 25, audio=read_audio(named.video), sample_rate=16000)
    right = lambda text, clip: sum(a == b for a, b in zip(text.split(), sentence_of(clip.name).split()))
    found = read_lips(path, force=True).text
    assert right(found, shown) >= 5 > right(found, named)


def test_other_speakers_are_read_or_refused_but_not_boldly_wrong(real):
    from avlab.lips.grammar import sentence_of

    clips = sorted((DATA / "grid" / "raw" / "s26").glob("*.m*"))[:6]
    if not clips:
        pytest.skip("speaker s26 is not on this machine")
    done = lips("read", *clips, "--json")
    bold = [t for t in map(json.loads, done.stdout.splitlines()) if t["confidence"] > 0.6 and t["text"] != sentence_of(Path(t["path"]).stem)]
    assert len(bold) <= 1 and "Traceback" not in done.stderr
