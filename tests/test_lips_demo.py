"The lip reading demo as a person meets it: a real browser, the example, no film, a film without a face, and no other host asked."
from urllib.parse import urlparse

import numpy as np
import pytest
from test_site import NARROW, WIDE, browser  # noqa: F401
from test_sync_demo import free_port, named, shot  # noqa: F401


@pytest.fixture(scope="module")
def address(named):  # noqa: F811
    "The demo on a free port."
    from avlab.demo import look
    from avlab.lips.live import make_demo

    demo = make_demo()
    _, url, _ = demo.launch(prevent_thread_lock=True, server_name="127.0.0.1", server_port=free_port(), quiet=True, **look())
    yield url
    demo.close()


@pytest.fixture(scope="module")
def page(browser, address):  # noqa: F811
    page = browser.new_page(viewport=WIDE)
    page.asked, page.said = [], []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("pageerror", lambda e: page.said.append(str(e)))
    page.goto(address)
    page.locator("#read").wait_for(timeout=15000)
    yield page
    page.close()


def test_without_a_film_one_line_says_so(page):
    page.locator("#read").click()
    page.get_by_text("there is no film yet").first.wait_for(timeout=10000)
    assert "Traceback" not in page.content()


def test_the_example_is_read(page):
    page.locator("#example").click()
    page.locator("video").first.wait_for(timeout=30000)
    page.locator("#read").click()
    page.locator("#card .avlab-big").first.wait_for(timeout=60000)
    assert len(page.locator("#card .avlab-big").first.inner_text().split()) == 6
    page.locator("#figure svg").wait_for(timeout=5000)
    shot(page, "lips_demo_desktop")


def test_a_film_without_a_face_is_refused_in_one_line(page, tmp_path):
    from avlab.media import write_video

    grey = write_video(tmp_path / "wall.mp4", [np.full((240, 320, 3), 90, np.uint8)] * 60, 25)
    page.get_by_label("clear", exact=False).first.click()
    page.locator("input[type=file]").first.set_input_files(str(grey))
    page.locator("video").first.wait_for(timeout=15000)
    page.locator("#read").click()
    page.get_by_text("no face").first.wait_for(timeout=20000)
    assert "Traceback" not in page.content()


def test_on_a_phone(browser, address):  # noqa: F811
    page = browser.new_page(viewport=NARROW)
    page.goto(address)
    page.locator("#read").wait_for(timeout=15000)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    shot(page, "lips_demo_phone")
    page.close()


def test_nobody_else_was_asked(page, named):  # noqa: F811
    hosts = {urlparse(u).hostname for u in page.asked if urlparse(u).scheme in ("http", "https", "ws", "wss")}
    assert hosts <= {"127.0.0.1", "localhost"} and page.said == []
    assert set(named) <= {"127.0.0.1", "localhost", "0.0.0.0", None}


def test_the_camera_is_read_while_it_films(address, tmp_path):
    "Chromium films the example over and over; six words appear under the picture."
    import av
    from avlab.lips.live import example_film
    from avlab.media import read_frames
    from playwright.sync_api import sync_playwright
    from test_site import CHROMIUM, FLAGS

    frames = list(read_frames(example_film()))
    with av.open(str(tmp_path / "camera.mjpeg"), "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuvj420p"
        for f in frames + [frames[-1]] * 15:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(f, "rgb24").reformat(format="yuvj420p")))
        out.mux(stream.encode())
    film = f"--use-file-for-fake-video-capture={tmp_path / 'camera.mjpeg'}"
    code = f"""
from playwright.sync_api import sync_playwright
with sync_playwright() as p:
    b = p.chromium.launch(executable_path={CHROMIUM!r}, args={FLAGS + ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", film]!r})
    page = b.new_context(permissions=["camera"]).new_page()
    page.goto({address!r})
    page.get_by_role("tab", name="The camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.get_by_label("capture photo").click(timeout=20000)
    page.wait_for_function("(document.querySelector('#live .avlab-big') || {{innerText: ''}}).innerText.trim().split(/\\\\s+/).length == 6", timeout=60000)
    print(page.locator("#live .avlab-big").inner_text())
    b.close()
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and len(done.stdout.split()) == 6, done.stderr[-400:]
