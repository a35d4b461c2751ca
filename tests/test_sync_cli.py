"`avlab sync` as a person meets it: odd clips are scored, unsuitable ones get one line each and the exit code, a folder goes on where it stopped."
import csv
import json
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from conftest import run_avlab
from test_bad_input import without_override

WORKS = ("good", "fps30", "fps60", "wrong_rate", "turned", "two", "still")
SENTENCE = dict(duration_s=1.9, before_s=0.2, after_s=0.2, size=224)


def film(path, frames, sound, stamps=None, rate=25, turn=0):
    "A clip whose time stamps, declared rate and turn are free; with `sound` empty there is an audio stream without a packet."
    import av

    with av.open(str(path), "w") as c:
        v = c.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "ultrafast"})
        v.height, v.width, v.pix_fmt, v.time_base = *frames[0].shape[:2], "yuv420p", Fraction(1, 1000)
        v.codec_context.time_base = Fraction(1, 1000)
        if turn:
            v.set_display_rotation(turn)
        a = c.add_stream("aac" if path.suffix == ".mp4" else "pcm_s16le", rate=16000, layout="mono")
        for i, x in enumerate(frames):
            f = av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24")
            f.pts, f.time_base = round(1000 * (i / 25 if stamps is None else stamps[i])), Fraction(1, 1000)
            c.mux(v.encode(f))
        c.mux(v.encode(None))
        for k in range(0, len(sound), 1024):
            s = av.AudioFrame.from_ndarray((sound[None, k : k + 1024] * 32767).astype(np.int16), "s16", "mono")
            s.sample_rate, s.pts, s.time_base = 16000, k, Fraction(1, 16000)
            c.mux(a.encode(s))
        if len(sound):
            c.mux(a.encode(None))
    return path


@pytest.fixture(scope="module")
def talks():
    "Frames and sound (16 kHz) of made faces: at 25, 30 and 60 frames a second, and somebody else who says something else."
    from avlab.sound import resample
    from avlab.talker import talk

    def made(portrait="collins", text="bin blue at f two now", **kw):
        t = talk(portrait, text, **{**SENTENCE, "seed": 3, **kw})
        return list(t.frames), resample(t.utterance.audio, t.utterance.sample_rate, 16000)

    return dict(good=made(offset_ms=80), fps30=(thirty := made(fps=30)), fps60=([f for f in thirty[0] for _ in "12"], thirty[1]), other=made("hopper", "set white in k seven soon", offset_ms=0))


@pytest.fixture(scope="module")
def clips(talks, tmp_path_factory):
    "Name -> file: seven that are scored, and the broken and unsuitable ones."
    from PIL import Image

    from avlab.encode import write_audio, write_video

    d, made = tmp_path_factory.mktemp("clips"), {}
    frames, sound = talks["good"]
    small = np.stack(frames)[:, ::8, ::8]
    t = np.arange(len(sound)) / 16000
    tones = 0.2 * sum(np.sin(2 * np.pi * f * t) for f in (220, 277.2, 329.6)) * (0.6 + 0.4 * np.sin(2 * np.pi * 2 * t))
    write = lambda name, f, s, fps=25: write_video(d / f"{name}.mp4", f, fps, audio=s, sample_rate=16000 if s is not None else None, preset="ultrafast")

    made["good"] = write("good", frames, sound)
    for fps in (30, 60):
        made[f"fps{fps}"] = write(f"fps{fps}", *talks[f"fps{fps}"], fps)
    made["wrong_rate"] = film(d / "wrong_rate.mkv", frames, sound, rate=50)
    made["turned"] = film(d / "turned.mp4", [np.rot90(f, -1) for f in frames], sound, turn=90)
    other = talks["other"][0]
    made["two"] = write("two", [np.hstack([a, other[min(i, len(other) - 1)]]) for i, a in enumerate(frames)], sound)
    made["still"] = write("still", [frames[0]] * len(frames), sound)

    whole = made["good"].read_bytes()
    put = lambda name, content: (d / name).write_bytes(content) and d / name
    made["missing"] = d / "missing.mp4"
    (d / "empty.mp4").touch()
    made["empty"] = d / "empty.mp4"
    made["text"] = put("text.mp4", b"these are words\n" * 40)
    made["noise"] = put("noise.mp4", bytes((i * 7919 >> 3) & 255 for i in range(20000)))
    made["truncated"] = put("truncated.mp4", whole[: len(whole) // 3])
    Image.fromarray(frames[0]).save(d / "picture.jpg")
    made["picture"] = d / "picture.jpg"
    made["no_audio"] = write("no_audio", frames, None)
    made["audio_only"] = shutil.copy(write_audio(d / "audio_only.m4a", sound, 16000), d / "audio_only.mp4")
    made["silence"] = write("silence", frames, np.zeros_like(sound))
    made["tones"] = write("tones", frames, tones)
    made["hiss"] = write("hiss", frames, np.random.default_rng(0).normal(0, 0.05, len(sound)))
    made["no_face"] = write("no_face", [np.full_like(frames[0], 60 + i) for i in range(len(frames))], sound)
    made["small_face"] = write("small_face", [np.pad(x, ((98, 98), (98, 98), (0, 0)), constant_values=120) for x in small], sound)
    made["three_frames"] = write("three_frames", frames[:3], sound[: 3 * 640])
    made["one_second"] = write("one_second", frames[:25], sound[: 25 * 640])
    made["face_leaves"] = write("face_leaves", frames[:20] + [np.full_like(frames[0], 90)] * 45, np.pad(sound, (0, 16000)))
    made["zero_audio"] = film(d / "zero_audio.mkv", frames, sound[:0])
    made["damaged"] = put("damaged.mp4", whole[: len(whole) // 5] + bytes(len(whole) * 3 // 5) + whole[len(whole) // 5 + len(whole) * 3 // 5 :])
    return made


@pytest.fixture(scope="module")
def scored(clips, tmp_path_factory):
    "All of them in one fresh process."
    table = tmp_path_factory.mktemp("out") / "faces.csv"
    done = run_avlab("sync", *map(str, clips.values()), "--json", "--csv", table)
    return done, {r["path"]: r for r in map(json.loads, done.stdout.splitlines())}, table


def test_nothing_but_lines(scored, clips):
    done, reports, _ = scored
    bad = [n for n in clips if n not in WORKS]
    assert len(bad) >= 18 and done.returncode == 1
    assert "Traceback" not in done.stderr and "AVLAB_DEBUG" not in done.stderr
    assert [p for p in reports] == [str(clips[n]) for n in WORKS]
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad) + 1 and all(line.startswith("avlab: ") for line in lines), done.stderr
    assert lines[-1] == f"avlab: {len(bad)} of {len(clips)} files failed"


REASONS = dict(missing="does not exist", empty="empty", text="", noise="", truncated="", picture="", no_audio="no sound", audio_only="no pictures", silence="speech",
    tones="speech", hiss="speech", no_face="no face", small_face="face", three_frames="3 frames", one_second="25 frames", face_leaves="face", zero_audio="no sound", damaged="")


@pytest.mark.parametrize("name", REASONS)
def test_each_says_why(scored, clips, name):
    done, _, _ = scored
    line = [line for line in done.stderr.splitlines() if clips[name].name in line]
    assert len(line) == 1 and REASONS[name] in line[0] and len(line[0]) < 400, done.stderr


@pytest.mark.parametrize("name", WORKS)
def test_odd_clips_are_scored(scored, clips, name):
    r = scored[1][str(clips[name])]
    assert {"offset_frames", "offset_ms", "direction", "confidence", "confidence_scale", "lse_d", "lse_c", "model", "weights_sha256", "protocol", "fps"} <= r.keys()
    assert r["confidence_scale"] == "probability" and 0 <= r["confidence"] <= 1 and r["protocol"] == "avlab" and len(r["tracks"]) == (2 if name == "two" else 1)
    assert abs(r["fps"] - {"fps30": 30, "fps60": 60}.get(name, 25)) < 0.5
    assert (r["lse_d"] is None) == (r["lse_c"] is None) == any(w.startswith("LSE-D") for w in r["warnings"])


@pytest.mark.parametrize("name, planted", [("good", 2), ("fps30", 0), ("fps60", 0), ("wrong_rate", 2), ("turned", 2), ("two", 2)])
def test_planted_offsets_are_found(scored, clips, name, planted):
    r = scored[1][str(clips[name])]
    assert abs(r["offset_frames"] - planted) <= 1, (r["direction"], r["confidence"])
    assert r["offset_ms"] == 40 * r["offset_frames"]


def test_a_mouth_that_does_not_move_is_uncertain(scored, clips):
    r = scored[1]
    assert r[str(clips["still"])]["confidence"] < 0.5 < r[str(clips["good"])]["confidence"]


def test_the_csv_has_a_row_for_each_face(scored, clips):
    rows = list(csv.DictReader(scored[2].open()))
    assert [r["path"] for r in rows] == [str(clips[n]) for n in WORKS for _ in range(2 if n == "two" else 1)]
    assert {"id", "offset_frames", "offset_ms", "direction", "confidence", "low_ms", "high_ms", "lse_d", "lse_c", "speaking", "model", "protocol"} <= rows[0].keys()


def test_a_table_and_a_plot(clips, tmp_path):
    from PIL import Image

    done = run_avlab("sync", clips["good"], "--plot", tmp_path / "out.png")
    assert (done.returncode, done.stderr) == (0, "")
    head, row, *notes = done.stdout.splitlines()
    assert head.split() == ["file", "frames", "offset", "confidence", "LSE-D", "LSE-C", "faces"] and row.startswith(str(clips["good"]))
    assert any("the probability that the offset is right" in n for n in notes)
    assert Image.open(tmp_path / "out.png").size[0] > 1000 and [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_an_unreadable_file_is_one_line(clips, tmp_path):
    locked = shutil.copy(clips["good"], tmp_path / "locked.mp4")
    locked.chmod(0)
    try:
        subprocess.run(["true"], check=True, preexec_fn=without_override)
    except subprocess.SubprocessError:
        pytest.skip("this user may read every file, and the right to do so can't be dropped here")
    done = run_avlab("sync", locked, clips["empty"], preexec_fn=without_override)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 3) and "locked.mp4 may not be read" in done.stderr, done.stderr


@pytest.mark.parametrize("args, said", [(["FOLDER"], "holds no video"), (["a.mp4", "b.mp4", "--plot", "out.png"], "--plot takes one clip"), (["a.mp4", "--plot", "out.pdf"], "out.pdf"),
    (["a.mp4", "--csv", "FOLDER"], "FOLDER"), (["a.mp4", "--protocol", "lse"], "syncnet-demo"), (["a.mp4", "--model", "lipnet"], "lipnet")])
def test_a_call_that_makes_no_sense(tmp_path, args, said):
    (tmp_path / "FOLDER").mkdir()
    done = run_avlab("sync", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and said in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["FOLDER"]


def test_a_folder_goes_on_where_it_stopped(clips, tmp_path):
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    shutil.copy(clips["good"], folder / "one.mp4")
    shutil.copy(clips["empty"], folder / "more" / "two.mp4")
    first = run_avlab("sync", folder, "--workers", 1, "--json", cwd=tmp_path)
    assert first.returncode == 1 and first.stderr.splitlines()[-1] == "avlab: 1 of 2 files failed" and "two.mp4" in first.stderr, first.stderr
    shutil.rmtree(folder / "more")
    again = run_avlab("sync", folder, "--json", cwd=tmp_path, timeout=60)
    assert (again.returncode, again.stderr, again.stdout) == (0, "", first.stdout)
    assert (tmp_path / "runs/sync/ledger.db").exists()
