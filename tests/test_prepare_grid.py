"The preparation of the corpus as a run notebook, with the GRID clips and without, and what a worker holds after many clips."
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_avlab


def grid_here():
    from avlab.core import corpus

    return corpus("grid/raw") is not None


@pytest.fixture(params=["with GRID", "without GRID"])
def data(request, tmp_path):
    "This machine's own data, or a folder with nothing in it."
    if request.param == "without GRID":
        return tmp_path / "nothing"
    if not grid_here():
        pytest.skip("the GRID clips are not on this machine (AVLAB_DATA)")
    return os.environ.get("AVLAB_DATA", "data")


def test_the_run_notebook(data, tmp_path):
    env = {"AVLAB_DATA": os.path.abspath(data)}
    done = run_avlab("run", ROOT / "nbs/runs/prepare_grid.ipynb", "-o", tmp_path / "out", "-p", "workers=1", "--json", cwd=ROOT, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    m = json.loads(done.stdout)["metrics"]
    assert m["real"] == (not str(data).endswith("nothing")) and (m["clips"], m["failed"], m["lines"]) == (4, 0, 4)
    assert m["clips_per_s"]["1"] > 0.2 and m["processor_s_per_clip"]["1"] < 1.5 and m["doctor"]["error"] == 0
    assert m["hours_34000_measured"] == pytest.approx(34000 / m["clips_per_s"]["1"] / 3600)
    said = m["bad_inputs"]
    assert "no speaker s33" in said["a speaker that is not here"] and "s21 has no video" in said["s21"] and "show no face" in said["a clip without a face"]
    assert "another sentence" in said["another speaker's alignments"] and "frames" in said["half a clip"]
    assert "bridged" in said["a damaged block"]
    mosaics = list((tmp_path / "out/crew_1/grid/mosaics").rglob("*.jpg"))
    assert len(mosaics) == 4 and not list((tmp_path / "out/crew_1").rglob(".*.part*"))
    assert m["versions"]["mediapipe"] and m["engine"] and m["seed"] == 0


MANY = """
import sys, psutil
from avlab.lips.alignment import read_alignment
from avlab.lips.made import made_corpus
from avlab.lips.mosaic import clip_mosaic
clips = made_corpus(sys.argv[1], 2)
held = []
for k in range(32):
    c = clips[k % 2]
    clip_mosaic(c.video, read_alignment(c.alignment))
    held.append(psutil.Process().memory_info().rss / 1e6)
print(held[11], held[-1], psutil.Process().num_threads())
"""


def test_a_worker_does_not_grow(tmp_path):
    "Each clip opens and closes its own follower: neither memory nor threads are left behind. Few arenas: what is counted is not the allocator's reserve."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AVLAB_DOWNLOADS": "never", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    early, late, threads = (float(x) for x in done.stdout.split())
    assert late - early < 25 and threads < 40, done.stdout
