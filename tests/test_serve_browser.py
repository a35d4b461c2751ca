"The live page in a real Chromium whose camera is a talker clip: it connects, swaps, shows pictures that change, survives a restart, and says what is wrong."
import json
import os
import signal
import subprocess
import sys
from urllib.parse import urlparse

import numpy as np
import pytest
from conftest import ROOT
from test_site import CHROMIUM, FLAGS, NARROW, WIDE
from test_sync_demo import free_port, shot

for needed in ("fastapi", "jwt", "limits", "websockets", "playwright"):
    pytest.importorskip(needed)
if CHROMIUM is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

CODE = """
import sys
from avlab.swap.house import ServeOptions
from avlab.swap.server import serve
serve(ServeOptions(port=int(sys.argv[1]), engine="mesh"), lambda address: print(address, flush=True))"""


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    "A talking face as a camera film, and her voice as a microphone's."
    import av
    from avlab.audio import resample
    from avlab.encode import write_audio
    from avlab.portrait import prepare_portrait
    from avlab.talker import talk

    folder = tmp_path_factory.mktemp("camera")
    clip = talk(prepare_portrait("collins", (640, 480), face_share=0.36), "The face is another, the words are mine.", seed=3)
    with av.open(str(folder / "camera.mjpeg"), "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 640, 480, "yuvj420p", 40_000_000
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        for f in clip.frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(f, "rgb24").reformat(format="yuvj420p")))
        out.mux(stream.encode())
    u = clip.utterance
    write_audio(folder / "voice.wav", np.tile(resample(u.audio, u.sample_rate, 48000) if u.sample_rate != 48000 else u.audio, 3), 48000)
    return folder


class Server:
    "A server process that can be killed and started again on its port."

    def __init__(self):
        self.port, self.process = free_port(), None
        self.address = f"http://localhost:{self.port}"

    def start(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", CODE, str(self.port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        assert self.process.stdout.readline()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    s = Server()
    s.start()
    yield s
    s.kill()


@pytest.fixture(scope="module")
def chromium(camera):
    from playwright.sync_api import sync_playwright

    fake = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={camera / 'camera.mjpeg'}", f"--use-file-for-fake-audio-capture={camera / 'voice.wav'}",
            "--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS + fake)
        yield b
        b.close()


@pytest.fixture(scope="module")
def page(chromium, server):
    page = chromium.new_context(permissions=["camera", "microphone"], viewport=WIDE).new_page()
    page.asked, page.said = [], []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("websocket", lambda w: page.asked.append(w.url))
    page.on("pageerror", lambda e: page.said.append(str(e)))
    page.goto(server.address)
    page.locator("#sources [role=radio]").nth(1).wait_for(timeout=20000)
    yield page
    page.close()


def live(page, timeout=20000):
    page.locator("body[data-state=live]").wait_for(timeout=timeout)


def pixels(page, *canvases):
    "What canvases show at one moment, (64, 64, 3) each."
    code = "ids => ids.map((id) => { const c = document.createElement('canvas'); c.width = c.height = 64; const d = c.getContext('2d'); d.drawImage(document.getElementById(id), 0, 0, 64, 64); return [...d.getImageData(0, 0, 64, 64).data]; })"
    found = [np.array(x).reshape(64, 64, 4)[..., :3] for x in page.evaluate(code, list(canvases))]
    return found if len(found) > 1 else found[0]


def test_it_waits_for_a_click(page):
    assert "Nothing is kept" in page.locator("#told").inner_text() and page.evaluate("!document.getElementById('camera').srcObject")
    shot(page, "serve_idle")


def test_it_connects_and_swaps(page):
    page.locator("#start").click()
    live(page)
    page.wait_for_timeout(1500)
    before, after = pixels(page, "before", "after")
    face, edge = np.s_[20:44, 22:42], np.s_[:8, :]
    assert np.abs(before[edge] - after[edge]).mean() < 6 < np.abs(before[face] - after[face]).mean()
    shot(page, "serve_live")


def test_the_pictures_move_and_are_on_time(page):
    n, first = page.evaluate("avlabLive.count.shown"), pixels(page, "after")
    page.wait_for_timeout(1300)
    assert page.evaluate("avlabLive.count.shown") - n > 8 and np.abs(pixels(page, "after") - first).max() > 12
    assert int(page.locator("#latency").inner_text()) < 3000 and float(page.locator("#fps").inner_text()) > 1
    assert "px" in page.locator("#quality").inner_text() and page.locator("#work i").count() >= 4


def soon(page, true, tries=40):
    "Whether something becomes true in ten seconds: the two pictures are of moments a little apart."
    return any(true() or page.wait_for_timeout(250) for _ in range(tries))


def test_another_face_and_no_face(page):
    hopper = pixels(page, "after")[20:44, 22:42].mean((0, 1))
    page.locator("#sources [role=radio]").nth(1).click()
    page.locator("#credit", has_text="Collins").wait_for(timeout=10000)
    assert soon(page, lambda: np.abs(pixels(page, "after")[20:44, 22:42].mean((0, 1)) - hopper).max() > 2)
    page.locator("#sources [role=radio]").nth(0).click()
    page.locator("label", has=page.locator("#swap")).click()
    assert soon(page, lambda: np.abs(np.subtract(*pixels(page, "before", "after"))).mean() < 4)
    page.locator("label", has=page.locator("#swap")).click()


def test_views(page):
    page.locator("#slider").evaluate("s => { s.value = 20; s.dispatchEvent(new Event('input')); }")
    page.get_by_role("radio", name="Side by side").click()
    boxes = [page.locator(f"#{c}").bounding_box() for c in ("before", "after")]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] + 1 and boxes[0]["width"] > 200
    shot(page, "serve_both")
    page.get_by_role("radio", name="Slider").click()


def test_an_upload_needs_a_word_and_one_face(page, tmp_path):
    from PIL import Image
    from avlab.portrait import free_portrait

    page.locator("#sources .add").click()
    page.get_by_text("Tick the line below first").wait_for(timeout=3000)
    page.locator("#consent").check()
    Image.fromarray(np.full((200, 200, 3), 120, np.uint8)).save(tmp_path / "wall.jpg")
    page.locator("#file").set_input_files(str(tmp_path / "wall.jpg"))
    page.get_by_text("no face was found").wait_for(timeout=10000)
    Image.fromarray(free_portrait("collins")[:, ::-1]).save(tmp_path / "me.png")
    page.locator("#file").set_input_files(str(tmp_path / "me.png"))
    page.get_by_text("Your picture, kept in memory").wait_for(timeout=15000)
    page.locator("#message").wait_for(state="hidden")


def test_the_voice_goes_the_same_way(page):
    page.locator("label", has=page.locator("#hear")).click()
    page.locator("#voicenumbers", has_text="ratio").wait_for(timeout=15000)
    page.wait_for_timeout(1500)
    heard = page.evaluate("avlabLive.playout.positionUs()")
    late = page.evaluate("performance.now()") - heard / 1e3
    assert 20 < late < 900, f"{late} ms"
    shot(page, "serve_voice")
    page.locator("label", has=page.locator("#hear")).click()


def test_the_clock_has_the_same_rules_as_python(page):
    "Three thousand events through avlab.live.Sync and the page's own: every verdict agrees."
    from avlab.live import Sync

    rng = np.random.default_rng(5)
    late = np.concatenate([rng.normal(m, 25, 400) for m in (0, 60, 60, 10, -20, 90, 140, 30)])
    events = [(int(40000 * i), None if rng.random() < 0.02 else int(40000 * i + 1000 * v)) for i, v in enumerate(late)]
    python = Sync(clock=lambda: 0.0)
    ours = [python.video(a, b) for a, b in events]
    theirs = page.evaluate("async (events) => { const { Sync } = await import('/live.js'); const s = new Sync(); return events.map(([a, b]) => s.video(a, b)); }", events)
    assert ours == theirs and set(ours) == {"show", "hold", "drop", "skip"}


def test_messages_are_the_same_bytes(page):
    from avlab.protocol import Kind, pack

    theirs = page.evaluate("async () => { const m = await import('/live.js'); return [m.pack(1, 4294967296 + 7, 1.5e15, new Uint8Array([1, 2, 3]).buffer), m.pack(3, 0, 0, { type: 'é', n: 1 })].map((b) => [...b]); }")
    assert bytes(theirs[0]) == pack(Kind.VIDEO, b"\1\2\3", sequence=7, capture_us=1_500_000_000_000_000)
    assert bytes(theirs[1]) == pack(Kind.CONTROL, dict(type="é", n=1), sequence=0, capture_us=0)


def test_on_a_phone_and_in_the_dark(page):
    page.set_viewport_size(NARROW)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert page.locator("#stop").bounding_box()["y"] < 640
    shot(page, "serve_phone")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(WIDE)


def test_a_restart_of_the_server_is_survived(page, server):
    server.kill()
    page.locator("body[data-state=lost]").wait_for(timeout=8000)
    page.get_by_text("The server does not answer").first.wait_for(timeout=8000)
    shot(page, "serve_lost")
    n = page.evaluate("avlabLive.count.shown")
    server.start()
    live(page, 30000)
    for _ in range(40):
        if page.evaluate("avlabLive.count.shown") > n + 5:
            break
        page.wait_for_timeout(250)
    assert page.evaluate("avlabLive.count.shown") > n + 5
    assert page.locator("#credit").inner_text().startswith("Your picture"), "the uploaded picture was sent again"


def test_without_a_ticket_a_page_is_refused(page, server):
    code = "protocols => new Promise((done) => { const w = new WebSocket(location.origin.replace('http', 'ws') + '/live', protocols); w.onopen = () => done('open'); w.onclose = (e) => done(e.code); })"
    assert page.evaluate(code, ["avlab.live.1"]) == 1006 and page.evaluate(code, ["avlab.live.1", "ticket.made.up.one"]) == 1006
    fresh = "async () => { const { ticket } = await (await fetch('/ticket', { method: 'POST' })).json(); return ticket; }"
    ticket = page.evaluate(fresh)
    both = "t => new Promise((done) => { const w = new WebSocket(location.origin.replace('http', 'ws') + '/live', ['avlab.live.1', 'ticket.' + t]); w.onopen = () => { w.close(); done(w.protocol); }; w.onclose = (e) => done(e.code); })"
    assert page.evaluate(both, ticket) == "avlab.live.1" and page.evaluate(both, ticket) == 1006


def test_stop_gives_the_camera_back(page):
    page.locator("#stop").click()
    assert page.evaluate("!document.getElementById('camera').srcObject") and page.locator("#told").inner_text().startswith("Stopped")


def test_a_refused_camera_and_a_refused_ticket_are_said(chromium, server):
    context = chromium.new_context(viewport=WIDE)
    page = context.new_page()
    page.add_init_script("navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', 'NotAllowedError'))")
    page.goto(server.address)
    page.locator("#start").click()
    page.get_by_text("The camera was refused").wait_for(timeout=5000)
    shot(page, "serve_refused")
    page.close()
    page = chromium.new_context(permissions=["camera"], viewport=WIDE).new_page()
    page.route("**/ticket", lambda r: r.fulfill(status=429, body=json.dumps(dict(error="too many tickets from one address. Wait a minute."))))
    page.goto(server.address)
    page.locator("#start").click()
    page.get_by_text("too many tickets").first.wait_for(timeout=8000)
    page.close()


def test_nobody_else_was_asked(page, server):
    hosts = {urlparse(u).netloc for u in page.asked if urlparse(u).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {f"localhost:{server.port}"} and page.said == []
    assert not any("ticket." in u or "eyJ" in u for u in page.asked)
