"The live server over real sockets: who comes in, what is served, what is refused, what is said about it, and what stays secret."
import asyncio
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from conftest import ROOT

pytest.importorskip("fastapi"), pytest.importorskip("jwt"), pytest.importorskip("limits"), pytest.importorskip("websockets")

from avlab.badge import is_marked
from avlab.core import AvlabError
from avlab.protocol import HEADER, Kind, Limits, hostile, pack
from avlab.swap.client import ask_ticket, stream
from avlab.swap.house import ServeOptions
from avlab.swap.load import crowd, precoded
from avlab.swap.metrics import FAMILIES
from avlab.swap.server import Background
from avlab.swap.session import encode_jpeg
from avlab.swap.tickets import PROTOCOL, Rates, Refused

WIDE = Rates(tickets="10000/minute", connections="10000/minute", uploads="1000/minute", sessions=64, messages=(1e6, 1e6), bytes_=(1e10, 1e10))
OPEN = dict(rates=WIDE, messages=(1e6, 1e6), bytes_=(1e10, 1e10))


class Mirror:
    "Stands in for the pipeline where its work does not matter."
    wait = 0.0

    def __init__(self, source):
        self.source = source

    def process(self, frame):
        time.sleep(self.wait)
        return frame[:, ::-1], None

    def set_source(self, source):
        self.source = source

    def reset(self):
        pass

    def close(self):
        pass


class Slow(Mirror):
    wait = 0.04


def ask(url, data=None, headers=(), context=None):
    "(status, headers, body)"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=dict(headers)), timeout=20, context=context) as f:
            return f.status, f.headers, f.read()
    except urllib.error.HTTPError as e:
        return e.code, e.headers, e.read()


def talker(n=40, size=512):
    from avlab.portrait import prepare_portrait
    from avlab.talker import talk

    clip = talk(prepare_portrait("collins", size), "The words are mine.", seed=3)
    return [clip.frames[k] for k in range(n)]


@pytest.fixture(scope="module")
def pictures():
    return precoded(np.random.default_rng(0).integers(0, 255, (6, 96, 96, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def real():
    "A server that really swaps."
    with Background(ServeOptions(port=0, engine="mesh", **OPEN)) as address:
        yield address


def connect(address, ticket=None, origin=None, protocols=None):
    import websockets

    protocols = protocols or [PROTOCOL, f"ticket.{ticket or ask_ticket(address)}"]
    return websockets.connect(address.replace("http", "ws") + "/live", subprotocols=protocols, origin=origin, compression=None, proxy=None, max_size=1 << 22)


def refused(address, **how):
    "The status of a refused upgrade."
    import websockets

    async def go():
        try:
            async with connect(address, **how):
                return 101
        except websockets.InvalidStatus as e:
            assert json.loads(e.response.body)["error"]
            return e.response.status_code

    return asyncio.run(go())


def test_a_talker_is_swapped(real):
    frames = talker()
    r = asyncio.run(stream(real, frames, 3, keep=5))
    assert r.order_kept and r.fps > 1 and all(is_marked(f) for _, f in r.frames)
    changed = [np.abs(f.astype(int) - frames[n % len(frames)])[150:300, 180:330].mean() for n, f in r.frames]
    assert min(changed) > 4, changed
    assert {"decode", "follow", "swap", "mark", "encode", "total"} <= set(r.stats["work_ms"])
    assert r.stats["faces"] == 1 and r.stats["queues"]["video"] <= 1


def test_the_source_can_be_changed_and_the_swap_switched_off(real):
    frames = precoded(talker(1))

    async def go():
        async with connect(real) as ws:
            say = lambda **m: ws.send(pack(Kind.CONTROL, m, sequence=0, capture_us=0))

            async def next_picture(n):
                await ws.send(pack(Kind.VIDEO, frames[0], sequence=n, capture_us=n))
                said = []
                while True:
                    m = await asyncio.wait_for(ws.recv(), 20)
                    if m[3] == Kind.VIDEO:
                        return bytes(m[HEADER.size:]), said
                    said.append(json.loads(m[HEADER.size:]))

            await say(type="hello")
            first, _ = await next_picture(1)
            await say(type="source", source="collins")
            second, said = await next_picture(2)
            assert any(m["type"] == "source" for m in said) and first != second
            await say(type="source", source="../secret")
            _, said = await next_picture(3)
            assert [m["message"] for m in said if m["type"] == "error"] == ["there is no such picture here"]
            await say(type="swap", on=False)
            assert (await next_picture(4))[0] == frames[0]

    asyncio.run(go())


def test_the_voice_is_changed(real):
    from avlab.speech import say

    u = say("the old man bought five green boats", seed=1) if "seed" in say.__code__.co_varnames else say("the old man bought five green boats")
    from avlab.audio import resample

    sound = resample(u.audio, u.sample_rate, 16000) if u.sample_rate != 16000 else u.audio
    r = asyncio.run(stream(real, precoded(talker(4)), 3, fps=10, sound=np.asarray(sound, np.float32), wishes=dict(voice=True, pitch_semitones=4)))
    assert r.stats["voice"]["state"] in ("ok", "slow") and len(r.sound_ms) > 10
    assert {"encode", "f0", "convert", "post"} <= set(r.stats["voice"])
    page = ask(f"{real}/metrics")[2].decode()
    assert re.search(r'avlab_audio_chunks_total\{result="(accepted|slow)"\} [1-9]', page) and 'avlab_voice_ms_count{stage="f0"}' in page


def test_an_upload_is_used_and_guarded(real):
    from PIL import Image
    from avlab.portrait import free_portrait

    def jpeg(picture):
        b = io.BytesIO()
        Image.fromarray(picture).save(b, "JPEG")
        return b.getvalue()

    def send(data, consent="yes"):
        status, _, body = ask(f"{real}/source", data, {"Authorization": f"Bearer {ask_ticket(real)}", "X-Consent": consent})
        return status, json.loads(body)

    face = free_portrait("collins")
    status, made = send(jpeg(face))
    assert status == 200 and made["source"].startswith("upload-") and len(made["source"]) > 20
    assert send(jpeg(face), "no")[0] == 400 and send(b"%PDF-1.4" + bytes(99))[0] == 400
    assert "2 faces" in send(jpeg(np.hstack([face, face])))[1]["error"]
    assert "no face" in send(jpeg(np.full((128, 128, 3), 99, np.uint8)))[1]["error"]
    assert ask(f"{real}/source", jpeg(face), {"X-Consent": "yes"})[0] == 403


def test_who_is_refused(pictures):
    with Background(ServeOptions(port=0, pipeline=Mirror, max_sessions=2, origins=("https://friend.example",))) as address:
        home, used = address, ask_ticket(address)
        status = json.loads(ask(f"{address}/ticket", b"", {"Origin": "https://friend.example"})[2])
        assert refused(address, ticket=used) == 101 and refused(address, ticket=used) == 403
        assert refused(address, protocols=["other"]) == 403 and refused(address, protocols=[PROTOCOL]) == 403
        assert refused(address, origin="http://evil.example") == 403
        assert refused(address, origin="https://friend.example") == 403, "its ticket was given to no page"
        assert refused(address, ticket=status["ticket"], origin="https://friend.example") == 101
        assert ask(f"{address}/live")[0] == 404 and ask(f"{address}/nothing")[0] == 404
        for bad in ("http://evil.example", "null", home.replace("http", "ftp")):
            assert ask(f"{address}/ticket", b"", {"Origin": bad})[0] == 403
        assert ask(f"{address}/", headers={"Host": "rebound.example"})[0] in (200, 403)
        assert ask(f"{address}/ticket", b"", {"Host": "rebound.example", "Origin": "http://rebound.example"})[0] == 403


def test_the_house_is_full_and_addresses_are_counted(pictures):
    with Background(ServeOptions(port=0, pipeline=Mirror, max_sessions=2, rates=Rates(tickets="12/minute", connections="6/minute", sessions=9))) as address:
        step = asyncio.run(crowd(address, pictures, 3, 1, fps=10))
        assert step.served == 2
        codes = [ask(f"{address}/ticket", b"")[0] for _ in range(12)]
        assert codes.count(429) >= 3 and codes[0] == 200
        assert "avlab_refused_total{reason=\"503\"} 1" in ask(f"{address}/metrics")[2].decode()


def test_rates_of_messages_and_bytes(pictures):
    "A flood beyond the session's rate is counted and ignored; the session lives on."
    with Background(ServeOptions(port=0, pipeline=Mirror, messages=(30, 30))) as address:
        r = asyncio.run(stream(address, pictures, 2, fps=200, window=None, acks=False))
        page = ask(f"{address}/metrics")[2].decode()
        assert 1 < r.fps < 45 and int(re.search(r'messages_invalid_total\{reason="rate"\} (\d+)', page)[1]) > 100


@pytest.mark.parametrize("how", ["too long", "wide", "broken"])
def test_rubbish_ends_the_session(how):
    with Background(ServeOptions(port=0, pipeline=Mirror, limits=Limits(video=40_000, width=128, height=128), **OPEN)) as address:

        async def go():
            import websockets

            async with connect(address) as ws:
                wide = encode_jpeg(np.zeros((200, 200, 3), np.uint8))
                try:
                    for i, m in enumerate(hostile(600, 3)):
                        await ws.send(b"AV" + bytes(120_000) if how == "too long" else pack(Kind.VIDEO, wide, sequence=i, capture_us=i) if how == "wide" else m)
                    while True:
                        await asyncio.wait_for(ws.recv(), 10)
                except websockets.ConnectionClosed as e:
                    return e.rcvd.code if e.rcvd else 1009

        assert asyncio.run(go()) in {"too long": (1009,), "wide": (1008,), "broken": (1008, 1009)}[how]
        assert json.loads(ask(f"{address}/health")[2])["status"] == "ok"


def test_ten_times_too_much(pictures):
    "Queue depth one, order, flat latency: with a stand-in that can do 25 a second and is sent 250."
    server = Background(ServeOptions(port=0, pipeline=Slow, **OPEN))
    with server as address:
        peaks, stop = [], threading.Event()

        def look():
            while not stop.is_set():
                peaks.extend((len(s.video), s.video.stats().peak) for s in list(server.house.sessions.values()))
                time.sleep(0.005)

        t = threading.Thread(target=look)
        t.start()
        r = asyncio.run(stream(address, pictures, 6, fps=250, window=None, wishes=dict(fps=60)))
        stop.set(), t.join()
    third = len(r.latency_ms) // 3
    assert max(max(p) for p in peaks) == 1 and r.order_kept and r.sent > 5 * r.shown
    assert np.median(r.latency_ms[-third:]) < 2.5 * np.median(r.latency_ms[:third]) + 60, r
    assert r.at(0.95) < 250, r


def test_a_reader_that_falls_asleep_gets_fresh_pictures(pictures):
    "Two seconds without reading: at most a window of old pictures, then new ones."
    with Background(ServeOptions(port=0, pipeline=Mirror, **OPEN)) as address:

        async def go():
            async with connect(address) as ws:
                await ws.send(pack(Kind.CONTROL, dict(type="hello", acks=True), sequence=0, capture_us=0))
                await ws.send(pack(Kind.CONTROL, dict(type="shown", sequence=0), sequence=0, capture_us=0))
                ages, end, n = [], time.monotonic() + 3, 0
                while time.monotonic() < end:
                    n += 1
                    await ws.send(pack(Kind.VIDEO, pictures[n % 6], sequence=n, capture_us=round(time.monotonic() * 1e6)))
                    if n > 50:
                        try:
                            while True:
                                m = await asyncio.wait_for(ws.recv(), 0.002)
                                if m[3] == Kind.VIDEO:
                                    ages.append(time.monotonic() - int.from_bytes(m[8:16], "big") / 1e6)
                                    await ws.send(pack(Kind.CONTROL, dict(type="shown", sequence=int.from_bytes(m[4:8], "big")), sequence=0, capture_us=0))
                        except TimeoutError:
                            pass
                    await asyncio.sleep(0.035)
                return ages

        ages = asyncio.run(go())
        assert len(ages) > 10 and sorted(ages[8:])[len(ages[8:]) // 2] < 0.2, ages


def test_metrics_say_everything(real):
    page = ask(f"{real}/metrics")[2].decode()
    assert all(f"# TYPE avlab_{name} {kind}" in page for name, (kind, _) in FAMILIES.items())
    for needed in ('frames_processed_total ', 'frames_dropped_total', 'detector_interval_frames ', 'audio_chunks_total', 'audio_accept_ratio ', 'backlog{queue="audio"}', 'backlog{queue="video"}', 'backlog{queue="outbound"}',
                   'gpu_memory_bytes{state="allocated"}', 'gpu_memory_bytes{state="reserved"}', 'gpu_memory_bytes{state="fragmented"}', 'voice_ms'):
        assert f"avlab_{needed}" in page, needed


def test_two_thousand_fuzzed_messages():
    "hypothesis writes messages that are nearly right; a proper picture still comes back afterwards."
    hypothesis = pytest.importorskip("hypothesis")
    from avlab.protocol import Door
    from avlab.swap.session import Session
    from serve_messages import JPEG, written

    given, session = [0], Session(lambda: Mirror(None), door=Door(messages=(1e9, 1e9), bytes_=(1e12, 1e12)))

    @hypothesis.settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(written())
    def fuzz(m):
        given[0] += 1
        session.receive(m)
        while session.out.take():
            pass

    with session:
        fuzz()
        assert given[0] >= 2000 and not session.error
        time.sleep(0.1)
        session.receive(pack(Kind.CONTROL, dict(type="settings", swap=True, fps=60), sequence=0, capture_us=0))
        end, found = time.monotonic() + 5, False
        while time.monotonic() < end and not found:
            session.receive(pack(Kind.VIDEO, JPEG, sequence=77, capture_us=2**63))
            time.sleep(0.05)
            while item := session.out.take():
                found |= item.kind == Kind.VIDEO and item.sequence == 77
        assert found


def test_sessions_leave_nothing_behind(pictures):
    "Visitors come and go: no thread stays, memory settles."
    server = Background(ServeOptions(port=0, pipeline=Mirror, **OPEN))
    with server as address:
        asyncio.run(crowd(address, pictures, 8, 0.2, fps=20))
        time.sleep(0.5)
        before, threads = psutil.Process().memory_info().rss, threading.active_count()
        for _ in range(2):
            asyncio.run(crowd(address, pictures, 8, 0.2, fps=20))
        end = time.monotonic() + 20
        while (server.house.sessions or server.house.addresses.sessions or threading.active_count() > threads + 3) and time.monotonic() < end:
            time.sleep(0.1)
        assert not server.house.sessions and server.house.addresses.sessions == 0
        assert threading.active_count() <= threads + 3 and psutil.Process().memory_info().rss - before < 30e6


def certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    import datetime as dt
    import ipaddress

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")]), dt.datetime.now(dt.timezone.utc)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1).not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1)).add_extension(names, False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_over_tls(tmp_path, pictures):
    cert, key = certificate(tmp_path)
    with Background(ServeOptions(port=0, pipeline=Mirror, tls_cert=cert, tls_key=key)) as address:
        assert address.startswith("https://")
        trust = ssl.create_default_context(cafile=cert)
        assert asyncio.run(stream(address, pictures, 1, fps=15, context=trust)).shown > 5
        with pytest.raises(AvlabError, match="does not answer"):
            ask_ticket(address)


def test_nothing_secret_is_printed(tmp_path):
    "`avlab serve` in a process of its own, at its most talkative: neither tickets nor the secret are in what it prints."
    secret = "a secret that is long enough, and mine"
    code = """
import logging, sys
logging.basicConfig(level="DEBUG")
from avlab.app.serve_command import serve
sys.exit(serve(port=0, json=True, engine="mesh"))"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "AVLAB_SERVE_SECRET": secret, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    try:
        address = json.loads(p.stdout.readline())["address"].replace("localhost", "127.0.0.1")
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                ask(f"{address}/health")
                break
            except OSError:
                time.sleep(0.1)
        ticket = ask_ticket(address)
        assert asyncio.run(stream(address, precoded(talker(3, 256)), 2, ticket=ticket)).shown
        assert refused(address, ticket=ticket) == 403 and refused(address, protocols=[PROTOCOL, "ticket.made.up.one"]) == 403
    finally:
        p.send_signal(signal.SIGTERM)
        out, err = p.communicate(timeout=20)
    assert not any(s in out + err for s in (ticket, secret, ticket.split(".")[2], "made.up.one")), err
    assert "session from 127.0.0.1" in err and "Traceback" not in err, err


def test_importing_the_front_door_loads_no_server():
    heavy = ("fastapi", "uvicorn", "aiortc", "torch", "mediapipe", "onnxruntime", "jwt", "limits")
    code = f"import avlab.swap, avlab.app.serve_command, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_refusals_survive_pickling():
    import pickle

    e = pickle.loads(pickle.dumps(Refused("a", "b", 429)))
    assert (str(e), e.status) == ("a. b", 429)
