"The site in a real browser: every page, wide and narrow, light and dark, with nothing loaded from elsewhere."
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from conftest import ROOT

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
WIDE, NARROW = dict(width=1280, height=800), dict(width=390, height=844)
CHROMIUM = os.environ.get("AVLAB_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Links(HTMLParser):
    "What a page refers to, what it loads, and the places in it."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "link" and a.get("href") and a.get("rel") != "canonical":
            self.loads.append(a["href"])
        if a.get("src"):
            self.loads.append(a["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site: `_docs` when it is current, else built now."
    front = ROOT / "_docs" / "index.html"
    sources = [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "nbs" / "site").iterdir(), ROOT / "avlab" / "app" / "docs.py"]
    if front.exists() and front.stat().st_mtime > max(f.stat().st_mtime for f in sources):
        return front.parent
    from avlab.app.docs import build

    return build(ROOT, tmp_path_factory.mktemp("site")).parent


@pytest.fixture(scope="module")
def pages(site):
    from avlab.app.docs import pages

    return [p.name for p in pages(ROOT / "nbs")]


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.fail("no Chromium here: make test installs it, or AVLAB_CHROMIUM names one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


def test_every_notebook_is_a_page(site, pages):
    assert len(pages) >= 15 and pages[0] == "index.html"
    assert [p for p in pages if not (site / p).exists()] == []


def test_sidebar_is_in_reading_order(site, pages):
    front = (site / "index.html").read_text()
    nav = front[front.index('data-md-type="navigation"') : front.index('data-md-type="toc"')] if 'data-md-type="toc"' in front else front
    seen = list(dict.fromkeys(re.findall(r'href="((?:[\w.]+/)*[\w.]+\.html)" class="md-nav__link', nav)))
    assert [p for p in seen if p in pages] == [p for p in pages if p in seen] and len(seen) >= len(pages) - 1


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    read = {p.relative_to(site).as_posix(): Links(p.read_text()) for p in site.rglob("*.html")}
    broken, foreign = [], []
    for page, found in read.items():
        for url in found.links + found.loads:
            if url.startswith(("data:", "mailto:", "javascript:")):
                continue
            parts = urlparse(url)
            if parts.scheme or parts.netloc:
                if url in found.loads:
                    foreign.append((page, url))
                continue
            if page == "404.html":
                continue
            target, anchor = urldefrag(urljoin(page, url))
            target = unquote(target).lstrip("/") or "index.html"
            if target.endswith("/"):
                target += "index.html"
            if not (site / target).exists() or (anchor and target in read and unquote(anchor) not in read[target].ids and not anchor.startswith("__")):
                broken.append((page, url))
    assert (foreign, broken) == ([], [])


def test_no_style_or_script_names_another_host(site):
    loading = re.compile(r"""(?:@import|url\(|importScripts\(|fetch\()\s*["']?(?:https?:)?//(?!www\.w3\.org)""")
    assert [p.name for p in [*site.rglob("*.css"), *site.rglob("*.html")] if loading.search(p.read_text())] == []


def test_directives_and_machine_paths_are_not_shown(site):
    for p in site.rglob("*.html"):
        text = re.sub(r"<[^>]+>", "", p.read_text())
        assert not re.search(r"^#\|\s*(export|hide|default_exp|slow|gpu|net|demo)\b", text, re.M), p.name
        assert not re.search(r"(?<![\w.])/(root|home/\w+|work|tmp)/\w", text), p.name


MEASURE = """async () => {
    const media = [...document.querySelectorAll('article video, article audio')].slice(0, 2).map(m => new Promise(done => {
        if (m.readyState >= 1) return done(m.duration);
        m.onloadedmetadata = () => done(m.duration); m.onerror = () => done(-1); m.preload = 'metadata'; m.load(); setTimeout(() => done(-2), 8000) }));
    const root = document.documentElement;
    return {over: Math.max(root.scrollWidth, document.body.scrollWidth) - root.clientWidth, title: document.querySelector('h1')?.offsetHeight || 0,
        pictures: [...document.querySelectorAll('article img')].map(i => i.complete ? i.naturalWidth : -1), drawings: document.querySelectorAll('article svg').length,
        players: await Promise.all(media)}}"""


@pytest.fixture(scope="module")
def seen(browser, address, pages):
    "Every page once wide and light, once narrow and dark: what was measured, what the console said, who was asked."
    found = dict(pages={}, said=[], asked=[])
    for size, scheme in ((WIDE, "light"), (NARROW, "dark")):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        page = context.new_page()
        page.on("console", lambda m: found["said"].append((m.location.get("url"), m.text)) if m.type == "error" else None)
        page.on("pageerror", lambda e: found["said"].append(str(e)))
        page.on("request", lambda r: found["asked"].append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
        for name in pages:
            assert page.goto(address + name, wait_until="load").ok, name
            found["pages"][name, size["width"]] = page.evaluate(MEASURE)
        context.close()
    return found


def test_the_console_is_quiet(seen):
    assert seen["said"] == []


def test_no_other_host_is_asked(seen):
    assert seen["asked"] == []


def test_no_page_is_wider_than_its_window(seen):
    assert {k: v["over"] for k, v in seen["pages"].items() if v["over"] > 0} == {}


def test_every_page_has_its_title(seen):
    assert [k for k, v in seen["pages"].items() if not v["title"]] == []


def test_pictures_are_drawn(seen):
    assert [k for k, v in seen["pages"].items() if any(w <= 0 for w in v["pictures"])] == []
    assert sum(len(v["pictures"]) + v["drawings"] for (_, w), v in seen["pages"].items() if w == WIDE["width"]) >= 20


def test_players_play(seen):
    durations = [d for v in seen["pages"].values() for d in v["players"]]
    assert len(durations) >= 2 and all(d > 0 for d in durations)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["desktop", "phone"])
def test_search_finds_a_word(browser, address, size):
    page = browser.new_page(viewport=size)
    page.goto(address)
    if size is NARROW:
        page.locator("label.md-header__button[for=__search]").click()
    page.locator("input.md-search__input").click()
    page.keyboard.type("landmarks", delay=15)
    first = page.locator("li.md-search-result__item a").first
    first.wait_for(timeout=15000)
    first.click()
    page.wait_for_url(re.compile(r"\.html"), timeout=10000)
    assert "landmark" in page.locator("article").inner_text().lower()
    page.close()


def test_light_and_dark(browser, address):
    page = browser.new_page(viewport=WIDE, color_scheme="light")
    page.goto(address)
    colour = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    before = colour()
    page.locator("form[data-md-component=palette] label:visible").first.click()
    page.wait_for_function("c => getComputedStyle(document.body).backgroundColor !== c", arg=before)
    assert sum(map(int, re.findall(r"\d+", colour())[:3])) < 200 < sum(map(int, re.findall(r"\d+", before)[:3]))
    page.close()


def test_sources_unfold(browser, address):
    page = browser.new_page(viewport=WIDE)
    page.goto(address + "core.html")
    fold = page.locator("details.source").first
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").is_visible() and "class AvlabError" in fold.inner_text()
    page.close()


def test_quarto_would_be_given_every_notebook(tmp_path):
    "Quarto itself may be absent; the processing that nbdev does for it must succeed on every notebook all the same."
    code = f"""
from pathlib import Path
from avlab.app.docs import signatures_only
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb
signatures_only()
for f in sorted(Path("nbs").rglob("*.ipynb")):
    if not any(p[0] in "._" for p in f.parts): exec_nb(f.resolve(), Path({str(tmp_path)!r}) / f.name, FilterDefaults)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "IN_TEST": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "def probe(" in "".join(f.read_text() for f in tmp_path.glob("*.ipynb"))


def test_readme_is_whole():
    text = (ROOT / "README.md").read_text()
    missing = [u for u in re.findall(r"""(?:\]\(|(?:src|href)=")([^)"#]+)""", text) if not u.startswith(("http", "mailto:", "#", "data:")) and not (ROOT / u.split("#")[0]).exists()]
    assert missing == [] and "make tour" in text and "make test" in text
    assert len(text) < 60_000
