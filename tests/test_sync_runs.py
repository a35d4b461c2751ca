"The sync run notebooks, small, as `avlab run` executes them: with the GRID corpus and without."
import json
import os

import pytest
from conftest import ROOT, run_avlab


def grid_here():
    from avlab.core import corpus

    return corpus("grid/raw") is not None


def executed(name, out, data=None, **parameters):
    "Run a notebook; `data` is another data folder. Returns what it told and its executed cells."
    given = [x for k, v in parameters.items() for x in ("-p", f"{k}={v}")]
    env = {"AVLAB_DATA": str(data)} if data else {"AVLAB_DATA": os.environ.get("AVLAB_DATA", "data")}
    done = run_avlab("run", ROOT / "nbs" / "runs" / f"{name}.ipynb", "-o", out, "--json", *given, cwd=ROOT, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["metrics"]["seed"] >= 0 and told["metrics"]["versions"]["avlab"] and len(told["metrics"]["weights"]) == 64
    cells = json.loads((out / f"{name}.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("data", {}).get(k, [])) for c in cells for o in c.get("outputs", []) for k in ("text/markdown", "text/plain"))
    return told["metrics"], text


@pytest.fixture(params=["with GRID", "without GRID"])
def data(request, tmp_path):
    "None for this machine's own data, or a folder with nothing in it."
    if request.param == "without GRID":
        return tmp_path / "nothing"
    if not grid_here():
        pytest.skip("the GRID corpus is not on this machine (AVLAB_DATA)")
    return None


def test_training(data, tmp_path):
    m, text = executed("train_sync", tmp_path / "out", data, clips=2, made=3, kept_back=2, first_minutes=0.02, second_minutes=0.02)
    assert (m["real_clips"] > 0) == (data is None) and m["made_clips"] > 0
    assert m["parameters"] < 5e6 and m["file_bytes"] < 10e6 and m["half_precision_drift"] < 0.01
    assert f"{m['real_clips']} real and {m['made_clips']} made clips" in text
    from avlab.sync.networks import own_network

    own = own_network(tmp_path / "out" / "avlab_sync.safetensors", "cpu")
    assert len(own.facts["confidence"]) == 5 and own.facts["scale"] > 0


def test_evaluation(data, tmp_path):
    m, text = executed("eval_sync", tmp_path / "out", data)
    assert m["real"] == (data is None) and m["clips"] == 2
    assert ("made clips stand in for people" in text) == (data is not None)
    assert m["whole_pct"]["clean"] >= 90 and m["talk_near_pct"] >= 90
    assert m["windows_count"]["5"] > 20 and m["windows_pct"]["clean"]["15"] > 3 * m["chance_pct"]
    assert all(0 <= v <= 1 for v in m["auc"].values()) and 0 <= m["calibration_error"] <= 1
    assert {"goal", "asked", "reached", "met"} == set(m["goals"][0])


def test_an_evaluation_says_what_it_leaves_out(tmp_path):
    m, text = executed("eval_sync", tmp_path / "out", tmp_path / "nothing", conditions="babble, music", made_frames=60)
    assert m["left_out"] == ["babble 0 dB", "music 0 dB"] and "Left out" in text
    assert list(m["whole_pct"]) == ["clean"]


def test_bench(tmp_path):
    m, _ = executed("bench_sync", tmp_path / "out", tmp_path / "nothing")
    assert set(m["stages_s_per_s"]) == {"own", "published"} and m["machine"]["cores"] >= 1
    assert 0 < m["own_s_per_s"] < m["published_s_per_s"] * 1.5
    assert 0.1 < m["imports_gb"] < m["peak_gb_short"] < 1.2 and m["peak_gb_growth"] < 0.1
    assert m["long_s"] > m["short_s"] + 2
