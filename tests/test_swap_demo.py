"The swap demo as a person meets it: a real browser, the example, no film, and no other host asked."
from urllib.parse import urlparse

import pytest
from test_site import NARROW, WIDE, browser  # noqa: F401
from test_sync_demo import free_port, named, shot  # noqa: F401


@pytest.fixture(scope="module")
def address(named):  # noqa: F811
    "The demo on a free port."
    from avlab.demo import look
    from avlab.swap.demo import make_demo

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
    page.locator("#swap").wait_for(timeout=15000)
    yield page
    page.close()


def test_without_a_film_one_line_says_so(page):
    page.locator("#swap").click()
    page.get_by_text("there is no film yet").first.wait_for(timeout=10000)
    assert "Traceback" not in page.content()


def test_the_example_is_swapped(page):
    page.locator("#example").click()
    page.locator("video").first.wait_for(timeout=60000)
    page.locator("#swap").click()
    page.locator("#made video").wait_for(timeout=90000)
    page.locator("#card .avlab-card").wait_for(timeout=10000)
    assert "collins" in page.locator("#card").inner_text()
    page.wait_for_timeout(600)
    shot(page, "swap_demo_desktop")


def test_on_a_phone(browser, address):  # noqa: F811
    page = browser.new_page(viewport=NARROW)
    page.goto(address)
    page.locator("#swap").wait_for(timeout=15000)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    shot(page, "swap_demo_phone")
    page.close()


def test_nobody_else_was_asked(page, named):  # noqa: F811
    hosts = {urlparse(u).hostname for u in page.asked if urlparse(u).scheme in ("http", "https", "ws", "wss")}
    assert hosts <= {"127.0.0.1", "localhost"} and page.said == []
    assert set(named) <= {"127.0.0.1", "localhost", "0.0.0.0", None}
