"The tour, executed as `make tour` does, and its page opened from disk in a real browser."
import json
import re
import subprocess

import pytest
from conftest import ROOT, run_avlab
from test_site import CHROMIUM, FLAGS, MEASURE, NARROW, WIDE, browser  # noqa: F401


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour")
    done = run_avlab("run", ROOT / "nbs" / "runs" / "tour.ipynb", "-o", out, "--json", cwd=out, timeout=600)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_it_writes_a_page_and_numbers(tour):
    out, told = tour
    m = told["metrics"]
    assert (out / "index.html").stat().st_size > 50_000
    assert told["duration_s"] < 90
    assert m["faces_found"] == 1 and m["mouth_r"] >= 0.9 and m["word_error_ms_max"] < 100 and -40 < m["lufs"] < 0


def test_the_page_refers_to_nothing_outside_itself(tour):
    text = (tour[0] / "index.html").read_text()
    assert [u for u in re.findall(r"""(?:src|href|poster)=["']([^"'#]+)""", text) if not u.startswith(("data:", "https://"))] == []
    assert re.findall(r"""<(?:script|link|img|video|audio|source|iframe)[^>]+(?:src|href)=["']https?:""", text) == []
    assert not re.search(r"(?<![\w.])/(root|home/\w+|work)/\w", re.sub(r"data:[^\"']+", "", text))


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["desktop", "phone"])
def test_it_opens_from_disk(browser, tour, size):  # noqa: F811
    page = browser.new_page(viewport=size)
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto((tour[0] / "index.html").as_uri(), wait_until="load")
    seen = page.evaluate(MEASURE.replace("article ", ""))
    page.close()
    assert (said, asked) == ([], []) and seen["over"] <= 0 and seen["title"]
    assert len(seen["pictures"]) + seen["drawings"] >= 4 and all(w > 0 for w in seen["pictures"])
    assert len(seen["players"]) >= 1 and all(d > 0 for d in seen["players"])


def test_a_clip_that_can_not_be_read_stops_make_tour(tmp_path):
    if not (ROOT / ".venv" / ".base").exists():
        pytest.skip("this is not the environment that make makes")
    done = subprocess.run(["make", "-C", str(ROOT), "tour", f"CLIP={tmp_path / 'gone.mp4'}"], capture_output=True, text=True)
    assert done.returncode != 0 and "gone.mp4 does not exist" in done.stderr
