"`avlab voice` as a person meets it: a sound and a film in another voice, what the file says of itself, a killed run, and every wrong call as one line."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_avlab

LOW, HIGH = ("en-us", 30), ("en-us+f3", 60)
TEXT = "The old man bought five green boats before he went away to see the blue water."


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def voice(home):
    "`avlab voice`, with keys and consents of its own."
    return lambda *args, **kw: run_avlab("voice", *args, env={"XDG_CONFIG_HOME": str(home)}, **kw)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    "A low voice, a high one, a film of the low one, silence and noise."
    from avlab.encode import write_audio, write_video
    from avlab.speech import say

    d = tmp_path_factory.mktemp("speech")
    for name, (who, pitch) in (("low", LOW), ("high", HIGH)):
        u = say(TEXT, voice=who, pitch=pitch)
        write_audio(d / f"{name}.wav", u.audio, u.sample_rate)
    low = say(TEXT, voice=LOW[0], pitch=LOW[1])
    frames = (np.full((96, 128, 3), 3 * (k % 80), np.uint8) for k in range(round(25 * low.duration_s)))
    write_video(d / "film.mp4", frames, 25, audio=low.audio, sample_rate=low.sample_rate)
    write_video(d / "mute.mp4", (np.full((96, 128, 3), 9, np.uint8) for _ in range(10)), 25)
    write_audio(d / "silence.wav", np.zeros(16000, np.float32), 16000)
    write_audio(d / "noise.wav", np.random.default_rng(0).normal(0, 0.05, 32000), 16000)
    (d / "text.wav").write_text("these are words\n" * 30)
    return d


@pytest.fixture(scope="module")
def made(voice, speech, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "new.wav"
    done = voice(speech / "low.wav", "--target", speech / "high.wav", "-o", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return out, json.loads(done.stdout)


def test_another_voice(made, speech):
    from avlab.media import read_audio
    from avlab.swap.converter import share_closed, voice_target

    out, report = made
    before, after, wanted = (read_audio(p) for p in (speech / "low.wav", out, speech / "high.wav"))
    a, b, c = (voice_target(x, 16000) for x in (before, after[6400:], wanted))
    assert len(after) == len(before)
    assert share_closed(a, b, c) >= 0.4 and abs(12 * (b.pitch - c.pitch)) < 1.5
    assert report["engine"] == "world" and abs(report["target_pitch_hz"] - c.pitch_hz) < 2


def test_it_says_what_it_is(made, home, tmp_path):
    from avlab.media import read_audio
    from avlab.swap.voice_file import tag_score

    out, report = made
    assert report["consent"] == "no record" and report["tagged"] and tag_score(read_audio(out)) > 10
    note = json.loads(out.with_name(out.name + ".consent.json").read_text())
    assert note["audible_tag"] is True and note["record"] == "" and note["voice"] == "high.wav"
    keys = {"XDG_CONFIG_HOME": str(home)}
    done = run_avlab("verify", out, "--json", env=keys)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["state"] == "valid" and said["source_type"] == "compositeSynthetic" and said["made"]["details"]["consent"] == "no record"
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.wav").write_bytes(data)
    done = run_avlab("verify", tmp_path / "changed.wav", "--json", env=keys)
    assert done.returncode == 1 and json.loads(done.stdout)["state"] == "tampered"


def test_a_film_keeps_its_picture(voice, speech, tmp_path):
    from avlab.media import probe, read_frames

    done = voice(speech / "film.mp4", "--pitch", 5, "-o", tmp_path / "new.mp4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["picture"] == "copied" and report["consent"] == "nobody is imitated" and not report["tagged"]
    assert report["target_pitch_hz"] / report["pitch_hz"] == pytest.approx(2 ** (5 / 12), abs=0.01)
    for a, b in zip(read_frames(speech / "film.mp4"), read_frames(tmp_path / "new.mp4"), strict=True):
        assert (a == b).all()
    assert abs(probe(tmp_path / "new.mp4").duration_s - probe(speech / "film.mp4").duration_s) < 0.05


def test_the_tag_goes_with_a_record_only(voice, speech, home, tmp_path):
    from avlab.media import read_audio
    from avlab.swap.voice_file import tag_score

    mine = tmp_path / "stella.wav"
    mine.write_bytes((speech / "high.wav").read_bytes() + b"")
    done = voice(speech / "low.wav", "--target", mine, "--no-mark", "-o", tmp_path / "x.wav")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "no consent record covers stella.wav" in done.stderr
    assert not (tmp_path / "x.wav").exists()
    env = {"XDG_CONFIG_HOME": str(tmp_path / "other")}
    assert run_avlab("consent", mine, "--who", "Stella", "--scope", "voice", "--what", "voice", env=env).returncode == 0
    done = run_avlab("voice", speech / "low.wav", "--target", mine, "--no-mark", "-o", tmp_path / "x.wav", "--json", env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["consent"] == "recorded" and len(report["record"]) == 24 and not report["tagged"] and tag_score(read_audio(tmp_path / "x.wav")) < 10


CASES = {
    "no file": (["gone.wav", "--pitch", 3], "gone.wav does not exist"),
    "no target": (["LOW", "--target", "gone.wav"], "gone.wav does not exist"),
    "nothing": (["LOW"], "nothing would change"),
    "text": (["TEXT", "--pitch", 3], "text, not media"),
    "mute": (["MUTE", "--pitch", 3], "has no sound"),
    "silence": (["SILENCE", "--pitch", 3], "holds no voice"),
    "noise": (["LOW", "--target", "NOISE"], "of voiced sounds"),
    "pitch": (["LOW", "--pitch", 60], "outside -24 … 24"),
    "formant": (["LOW", "--formant", 9], "outside 0.5 … 2"),
    "timbre": (["LOW", "--target", "HIGH", "--timbre", 2], "outside 0 … 1"),
    "engine": (["LOW", "--pitch", 3, "--engine", "sing"], "has no engine 'sing'"),
    "weights": (["LOW", "--pitch", 3, "--engine", "rvc"], "rvc_content.onnx"),
    "rmvpe": (["LOW", "--pitch", 3, "--f0", "rmvpe"], "rmvpe"),
    "flac": (["LOW", "--pitch", 3, "-o", "new.flac"], "can't carry the credential"),
    "mp4": (["LOW", "--pitch", 3, "-o", "new.mp4"], "has no picture"),
    "itself": (["LOW", "--pitch", 3, "-o", "LOW"], "is the recording itself"),
    "folder": (["LOW", "--pitch", 3, "-o", "deep.wav"], "is a folder"),
    "record": (["LOW", "--target", "HIGH", "--consent", "TEXT"], "not a consent record"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line(voice, speech, tmp_path, case):
    args, said = CASES[case]
    files = dict(LOW="low.wav", HIGH="high.wav", TEXT="text.wav", MUTE="mute.mp4", SILENCE="silence.wav", NOISE="noise.wav")
    (tmp_path / "deep.wav").mkdir()
    done = voice(*[speech / files[a] if a in files else a for a in args], *([] if "-o" in args else ["-o", "new.wav"]), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and [p.name for p in tmp_path.iterdir()] == ["deep.wav"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_that_looks_finished(speech, home, tmp_path, how):
    from avlab.encode import write_audio
    from avlab.media import read_audio

    long = np.tile(read_audio(speech / "low.wav"), 30)
    write_audio(tmp_path / "long.wav", long, 16000)
    env = {**os.environ, "XDG_CONFIG_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-m", "avlab.app.cli", "voice", "long.wav", "--pitch", "3", "-o", "new.wav"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 100
    while not list(tmp_path.glob(".new-*")) and child.poll() is None and time.monotonic() < waited:
        time.sleep(0.02)
    time.sleep(0.5)
    child.send_signal(how)
    child.communicate(timeout=60)
    assert child.returncode and not (tmp_path / "new.wav").exists() and not (tmp_path / "new.wav.consent.json").exists()
    if how == signal.SIGINT:
        assert [p.name for p in tmp_path.iterdir()] == ["long.wav"]


def test_memory_does_not_grow():
    "An hour of chunks is as heavy as a minute: 400 chunks, then 400 more."
    code = """
import numpy as np, psutil
from avlab.swap.converter import VoiceConverter, voice_target
t = np.arange(16000*8)/16000
sing = lambda hz: sum(np.sin(2*np.pi*k*hz*t*(1 + .001*np.sin(6*t)))/k for k in range(1, 25))*.1
c = VoiceConverter(voice_target(sing(200), 16000))
x, me, out = sing(110), psutil.Process(), 0
def run(n):
    global out
    for k in range(n): out += len(c(x[(k % 60)*2048:(k % 60 + 1)*2048]))
run(200); before = me.memory_info().rss; run(400); print(me.memory_info().rss - before, out, c.state)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    grown, out, state = done.stdout.split()
    assert int(grown) < 4e6 and int(out) == 600 * 2048, done.stdout + done.stderr
