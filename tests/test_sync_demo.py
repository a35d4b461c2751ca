"The sync demo as a person meets it: a real browser, the example, both buttons, an unsuitable film, and no other host asked."
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from test_site import FLAGS, NARROW, WIDE, browser  # noqa: F401

PICTURES = os.environ.get("AVLAB_SCREENSHOTS")  # a folder that keeps what the browser showed


def shot(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def named():
    "Hosts that this process, the server's, asks the network for."
    found, real = [], socket.getaddrinfo

    def watched(host, *args, **kw):
        found.append(host.decode() if isinstance(host, bytes) else host)
        return real(host, *args, **kw)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(socket, "getaddrinfo", watched)
        m.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
        yield found


@pytest.fixture(scope="module")
def address(named):
    "The demo on a free port."
    from avlab.demo import look
    from avlab.sync.explorer import make_demo

    demo = make_demo("avlab_sync")
    _, url, _ = demo.launch(prevent_thread_lock=True, server_name="127.0.0.1", server_port=free_port(), quiet=True, **look())
    yield url
    demo.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def page(browser, address):  # noqa: F811
    page = browser.new_page(viewport=WIDE)
    page.asked, page.said = [], []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("pageerror", lambda e: page.said.append(str(e)))
    page.goto(address)
    page.locator("#measure").wait_for(timeout=15000)
    yield page
    page.close()


def test_without_a_film_one_line_says_so(page):
    page.locator("#measure").click()
    told = page.get_by_text("there is no film yet")
    told.first.wait_for(timeout=10000)
    assert "Traceback" not in page.content()


def test_the_example_is_measured(page):
    page.locator("#example").click()
    page.locator("video").first.wait_for(timeout=20000)
    page.locator("#measure").click()
    page.locator("#card").get_by_text("audio leads by 200 ms").first.wait_for(timeout=30000)
    page.locator("#figure svg").wait_for(timeout=5000)
    shot(page, "sync_demo_desktop")


def test_and_repaired(page):
    page.locator("#repair").click()
    page.get_by_text("Now: in sync").wait_for(timeout=30000)
    link = page.locator("a[download], a[href*='/file=']").first
    assert re.search(r"\.mp4", link.get_attribute("href"))
    shot(page, "sync_demo_repaired")


def test_on_a_phone(page):
    page.set_viewport_size(NARROW)
    page.wait_for_timeout(400)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    shot(page, "sync_demo_phone")


def test_a_film_without_a_voice_gets_one_line(page, tmp_path):
    from avlab.encode import write_video

    film = write_video(tmp_path / "wall.mp4", [np.full((128, 128, 3), 9, np.uint8)] * 60, 25, audio=np.zeros(38400, np.float32), sample_rate=16000)
    page.get_by_label("clear", exact=False).first.click()
    page.locator("input[type=file]").first.set_input_files(str(film))
    page.locator("video").first.wait_for(timeout=15000)
    page.locator("#measure").click()
    page.get_by_text("no face was followed").first.wait_for(timeout=20000)
    assert "Traceback" not in page.content()


def test_no_other_host_is_asked_and_nothing_breaks(page, address, named):
    home = urlparse(address).netloc
    assert sorted({u for u in page.asked if not u.startswith(("data:", "blob:")) and urlparse(u).netloc != home}) == []
    assert set(named) - {"127.0.0.1", "localhost", "0.0.0.0", None} == set()
    assert page.said == []
