"The promises of the metric bundle, in fresh processes: packages that are really absent, weights that never come, clips that hold nothing. None, never an exception."
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

ONLY_HERE = """
import sys
def refuse(event, args):
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost", None): raise RuntimeError(f"{args[0]} must not be asked for")
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"): raise RuntimeError(f"{args[1]} must not be reached")
sys.addaudithook(refuse)
"""

MEASURE = """
import importlib.util, json
gone = json.loads(sys.argv[1])
assert not [n for n in gone if importlib.util.find_spec(n)], "they are still there"
from avlab.sync.bundle import compute_lse_metrics, compute_metrics
heavy = sorted({"torch", "librosa", "mediapipe", "av", "cv2", "scipy", "transformers"} & set(sys.modules))
import numpy as np
frames = list(np.random.default_rng(0).integers(0, 255, (12, 96, 96, 3), np.uint8))
lse = compute_lse_metrics(frames, sys.argv[3])
print(json.dumps(dict(heavy=heavy, lse=lse, bundle=compute_metrics(sys.argv[2]).to_json())))
"""


def fresh(script, *args, site=None, **env):
    "The last line that a new interpreter prints, as JSON; with `site`, that folder takes the place of site-packages."
    full = {**os.environ, "OMP_NUM_THREADS": "1", "AVLAB_DOWNLOADS": "never", "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *([site] if site else [])])), **{k: str(v) for k, v in env.items()}}
    done = subprocess.run([sys.executable, *(["-S"] if site else []), "-c", ONLY_HERE + script, *map(str, args)], capture_output=True, text=True, env=full, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def site_without(folder, *names):
    "A site directory that holds links to everything installed here but these."
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for p in Path(place).iterdir():
            top = p.name.split("-")[0].split(".")[0].lower()
            if p.suffix != ".pth" and top not in names and not (folder / p.name).exists():
                (folder / p.name).symlink_to(p)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A models folder with the architecture's random weights under the published name."
    torch = pytest.importorskip("torch")
    from avlab.sync.syncnet import random_syncnet

    folder = tmp_path_factory.mktemp("models")
    torch.save(random_syncnet(0).state_dict(), folder / "syncnet_v2.pth")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A portrait that speaks, and clips that hold too little."
    from avlab.encode import write_audio, write_video
    from avlab.talker import talk

    d = tmp_path_factory.mktemp("clips")
    film = talk("collins", "Bin blue at f two now.", size=256, seed=3)
    frames, voice, rate = list(film.frames), film.utterance.audio, film.utterance.sample_rate
    write_audio(d / "voice.wav", voice, rate)
    write_audio(d / "silence.wav", np.zeros(3 * 16000), 16000)
    write_audio(d / "noise.wav", 0.1 * np.random.default_rng(0).normal(size=3 * 16000), 16000)
    write_audio(d / "blip.wav", voice[: rate // 10], rate)
    write_video(d / "talk.mp4", frames, 25, audio=voice, sample_rate=rate)
    write_video(d / "mute.mp4", frames[:30], 25)
    write_video(d / "quiet.mp4", frames, 25, audio=np.zeros(len(voice), np.float32), sample_rate=rate)
    write_video(d / "short.mp4", frames[:5], 25, audio=voice[: rate // 5], sample_rate=rate)
    write_video(d / "wall.mp4", (np.full((128, 128, 3), 90 + i % 9, np.uint8) for i in range(60)), 25, audio=voice, sample_rate=rate)
    (d / "text.mp4").write_text("this is no film\n" * 20)
    (d / "empty.mp4").write_bytes(b"")
    return d


def test_torch_is_absent(tmp_path, clips, weights):
    r = fresh(MEASURE, json.dumps(["torch"]), clips / "talk.mp4", clips / "voice.wav", site=site_without(tmp_path, "torch", "functorch", "torchgen"), AVLAB_MODELS=weights)
    assert r["heavy"] == [] and r["lse"] == [None, None]
    b = r["bundle"]
    assert b["status_badge"] == "good" and b["face_present_ratio"] == 1 and b["mouth_audio_corr"] > 0.4
    assert b["lse_d"] is None and b["offset_ms"] is None and "torch" in b["missing"]["lse_d"], b["missing"]


def test_librosa_is_absent(tmp_path, clips, weights):
    "It is not needed: the numbers are there."
    r = fresh(MEASURE, json.dumps(["librosa"]), clips / "talk.mp4", clips / "voice.wav", site=site_without(tmp_path, "librosa"), AVLAB_MODELS=weights)
    assert r["heavy"] == [] and np.isfinite(r["lse"]).all() and r["bundle"]["lse_d"] > 0


def test_mediapipe_is_absent(tmp_path, clips, weights):
    r = fresh(MEASURE, json.dumps(["mediapipe"]), clips / "talk.mp4", clips / "voice.wav", site=site_without(tmp_path, "mediapipe"), AVLAB_MODELS=weights)
    b = r["bundle"]
    assert np.isfinite(r["lse"]).all() and b["frame_count"] > 40 and b["blur_score"] > 0
    assert b["status_badge"] == "check" and b["face_present_ratio"] is None and b["lse_d"] is None and "mediapipe is not installed" in b["missing"]["face_present_ratio"]


@pytest.mark.parametrize("gone", [["cv2"], ["scipy"], ["silero_vad"], ["soxr"], ["av"], ["torch", "librosa", "mediapipe", "cv2", "scipy", "silero_vad", "av", "transformers"]], ids="+".join)
def test_others_are_absent(tmp_path, clips, weights, gone):
    r = fresh(MEASURE, json.dumps(gone), clips / "talk.mp4", clips / "voice.wav", site=site_without(tmp_path, *gone), AVLAB_MODELS=weights)
    b, needed = r["bundle"], ("blur_score", "face_present_ratio", "lse_d", "audio_duration_ms")
    assert all(b[k] is not None or b["missing"][k] for k in needed)
    assert any(n in b["missing"].get(k, "").replace("-", "_") for k in needed for n in gone), b["missing"]
    assert b["status_badge"] == ("failed" if "av" in gone else "check" if {"cv2", "soxr"} & set(gone) else "good")


NOTHING = """
from avlab.sync.bundle import compute_lse_metrics, compute_metrics
import json, pathlib
import numpy as np
d = pathlib.Path(sys.argv[1])
crops = list(np.random.default_rng(0).integers(0, 255, (12, 96, 96, 3), np.uint8))
def lse(*a): return compute_lse_metrics(*a)
print(json.dumps(dict(fine=lse(crops, d/"voice.wav"), five=lse(crops[:5], d/"voice.wav"), none=lse([], d/"voice.wav"), gone=lse(crops, d/"nowhere.wav"), text=lse(crops, d/"text.mp4"),
    mute=lse(crops, d/"mute.mp4"), silence=lse(crops, d/"silence.wav"), noise=lse(crops, d/"noise.wav"), blip=lse(crops, d/"blip.wav"), fps=lse(crops, d/"voice.wav", 0), nan=lse(crops, d/"voice.wav", float("nan")),
    grey=lse([c[..., 0] for c in crops], d/"voice.wav"), words=lse(["no picture"]*20, d/"voice.wav"), nothing=lse(None, None), rate=lse(crops, d/"voice.wav", "fast"),
    bundles={p: compute_metrics(d/p).to_json() for p in ("mute.mp4", "quiet.mp4", "short.mp4", "wall.mp4", "text.mp4", "empty.mp4", "nowhere.mp4", "voice.wav")},
    other=compute_metrics(d/"talk.mp4", d/"nowhere.wav").to_json(), none_at_all=compute_metrics(None).to_json(), number=compute_metrics(3, 4).to_json())))
"""


def test_clips_that_hold_nothing(clips, weights):
    r = fresh(NOTHING, clips, AVLAB_MODELS=weights)
    assert np.isfinite(r.pop("fine")).all()
    b, other, none_at_all, number = r.pop("bundles"), r.pop("other"), r.pop("none_at_all"), r.pop("number")
    assert r == dict.fromkeys(r, [None, None])
    assert {k: v["status_badge"] for k, v in b.items()} | {"None": none_at_all["status_badge"], "3": number["status_badge"]} == {"mute.mp4": "check",
        "quiet.mp4": "check", "short.mp4": "bad", "wall.mp4": "bad", "text.mp4": "failed", "empty.mp4": "failed", "nowhere.mp4": "failed", "voice.wav": "failed", "None": "failed", "3": "failed"}
    assert all(v["lse_d"] is None and v["missing"]["lse_d"] and "\n" not in v["missing"]["lse_d"] for v in [*b.values(), other, none_at_all, number])
    assert "no sound" in b["mute.mp4"]["missing"]["lse_d"] and "no speech" in b["quiet.mp4"]["missing"]["lse_d"] and "no face" in b["wall.mp4"]["missing"]["lse_d"]
    assert other["frame_count"] > 40 and other["audio_duration_ms"] is None and "nowhere.wav" in other["missing"]["audio_duration_ms"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def do_GET(self):
        s = self.server
        s.asked += 1
        if s.status != 200:
            return self.send_error(s.status)
        self.send_response(200)
        self.send_header("Content-Length", len(s.body))
        self.send_header("Content-Type", s.kind)
        self.end_headers()
        self.wfile.write(s.body[: s.drop])


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.asked, s.status, s.kind, s.body, s.drop, s.handle_error = 0, 200, "application/octet-stream", bytes(100_000), None, lambda *a: None
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    yield s
    s.shutdown()


FETCH = """
import dataclasses, json
import avlab.weights as w
known = dict(w.manifest())
known["syncnet_v2"] = dataclasses.replace(known["syncnet_v2"], **json.loads(sys.argv[1]))
w.manifest = lambda path=None: known
from avlab.sync.bundle import compute_lse_metrics, compute_metrics
import numpy as np
crops = np.random.default_rng(0).integers(0, 255, (12, 96, 96, 3), np.uint8)
lse = [compute_lse_metrics(crops, sys.argv[3]) for _ in range(2)]
print(json.dumps(dict(lse=lse, bundle=compute_metrics(sys.argv[2]).to_json())))
"""


def entry(server, **changes):
    return json.dumps(dict(url=f"http://127.0.0.1:{server.server_port}/syncnet_v2.model", bytes=len(server.body), sha256=hashlib.sha256(server.body).hexdigest()) | changes)


@pytest.mark.parametrize("trouble", ["dropped", "missing", "busy", "page", "other bytes", "nobody"])
def test_a_download_that_fails(tmp_path, clips, server, trouble):
    "None, the reason in the report, a few requests at most, nothing left under the final name."
    changes = {}
    if trouble == "dropped":
        server.drop = 3000
    elif trouble in ("missing", "busy"):
        server.status = 404 if trouble == "missing" else 503
    elif trouble == "page":
        server.kind = "text/html"
    elif trouble == "other bytes":
        changes["sha256"] = "0" * 64
    else:
        changes["url"] = "http://127.0.0.1:9/x"
    r = fresh(FETCH, entry(server, **changes), clips / "talk.mp4", clips / "voice.wav", AVLAB_DOWNLOADS="auto", AVLAB_MODELS=tmp_path / "models", AVLAB_CACHE=tmp_path / "cache")
    assert r["lse"] == [[None, None]] * 2 and r["bundle"]["lse_d"] is None and r["bundle"]["status_badge"] == "good"
    said = r["bundle"]["missing"]["lse_d"]
    assert "syncnet_v2" in said and "\n" not in said and len(said) < 500, said
    assert (server.asked == 0) == (trouble == "nobody") and server.asked <= 2, "one process asks once"
    assert not [p for p in (tmp_path / "models").rglob("syncnet_v2.*") if p.suffix in (".model", ".pth")]


def test_never_means_never(tmp_path, clips, server):
    r = fresh(FETCH, entry(server), clips / "talk.mp4", clips / "voice.wav", AVLAB_MODELS=tmp_path / "models", AVLAB_CACHE=tmp_path / "cache")
    assert r["lse"] == [[None, None]] * 2 and server.asked == 0 and "syncnet_v2 is not on this machine" in r["bundle"]["missing"]["lse_d"]


def test_fetched_on_first_use(tmp_path, clips, server, weights):
    server.body = (weights / "syncnet_v2.pth").read_bytes()
    r = fresh(FETCH, entry(server), clips / "talk.mp4", clips / "voice.wav", AVLAB_DOWNLOADS="auto", AVLAB_MODELS=tmp_path / "models", AVLAB_CACHE=tmp_path / "cache")
    assert server.asked == 1 and (tmp_path / "models" / "syncnet_v2.model").exists()
    assert np.isfinite(r["lse"]).all() and r["bundle"]["lse_d"] > 0 and r["bundle"]["lse_weights_sha256"] == hashlib.sha256(server.body).hexdigest()


def test_a_file_that_is_not_syncnet(tmp_path, clips):
    (tmp_path / "syncnet_v2.pth").write_bytes(bytes(2000))
    r = fresh(MEASURE, "[]", clips / "talk.mp4", clips / "voice.wav", AVLAB_MODELS=tmp_path)
    assert r["lse"] == [None, None] and "syncnet_v2.pth" in r["bundle"]["missing"]["lse_d"]


def the_reference(frames, audio, state, vshift=15):
    "The published procedure to the letter, one window and one distance at a time."
    import cv2
    import python_speech_features as psf
    import torch
    from avlab.sync.syncnet import SyncNet

    net = SyncNet()
    net.load_state_dict(state)
    net.eval()
    cepstra = np.stack(psf.mfcc(np.clip(np.round(audio * 32768), -32768, 32767).astype(np.int16), 16000), 1)
    big = [cv2.resize(f, (224, 224)).astype(np.float32) for f in frames]
    n = min(len(frames), len(audio) // 640) - 5
    with torch.no_grad():
        see = [net.forward_lip(torch.from_numpy(np.stack(big[i : i + 5]).transpose(3, 0, 1, 2)[None].copy())) for i in range(n)]
        hear = [net.forward_aud(torch.from_numpy(cepstra[None, None, :, 4 * i : 4 * i + 20].astype(np.float32))) for i in range(n)]
        padded = [torch.zeros(1, 1024)] * vshift + hear + [torch.zeros(1, 1024)] * vshift
        apart = np.array([[torch.nn.functional.pairwise_distance(see[i], padded[i + k], eps=1e-6).item() for k in range(2 * vshift + 1)] for i in range(n)])
    mean = apart.mean(0)
    return mean.min(), np.median(mean) - mean.min()


COMPUTE = """
import json, numpy as np
from avlab.sync.bundle import compute_lse_metrics
frames = np.load(sys.argv[1])
print(json.dumps([compute_lse_metrics(frames, sys.argv[2]), compute_lse_metrics((f for f in frames.astype(np.float32)), sys.argv[2], fps=25),
    compute_lse_metrics(frames.repeat(2, 0), sys.argv[2], fps=50.0)]))
"""


@pytest.mark.parametrize("size", [(224, 224), (150, 181)])
def test_equal_to_the_reference(tmp_path, clips, weights, size):
    pytest.importorskip("python_speech_features")
    import cv2
    import torch
    from avlab.media import read_audio, read_frames

    frames = np.stack([cv2.resize(f, size[::-1])[..., ::-1] for f in read_frames(clips / "talk.mp4", stop=1.0)])
    np.save(tmp_path / "frames.npy", frames)
    want = the_reference(frames, read_audio(clips / "voice.wav"), torch.load(weights / "syncnet_v2.pth", weights_only=True))
    for found in fresh(COMPUTE, tmp_path / "frames.npy", clips / "voice.wav", AVLAB_MODELS=weights):
        assert np.isfinite(found).all() and np.abs(np.array(found) - want).max() < 1e-4, (found, want)
