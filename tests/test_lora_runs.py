"The language model's run notebooks, small, as `avlab run` executes them; and from the corpus to a reading."
import json

import pytest
from conftest import ROOT, run_avlab

for package in ("transformers", "peft", "trl", "datasets", "jiwer"):
    pytest.importorskip(package)


def executed(name, out, ok=True, models=None, **parameters):
    "Run a notebook; returns its metrics and the text of its cells, or what it said when it failed."
    given = [x for k, v in parameters.items() for x in ("-p", f"{k}={v}")]
    env = {"AVLAB_MODELS": str(models)} if models else {}
    done = run_avlab("run", ROOT / "nbs" / "runs" / f"{name}.ipynb", "-o", out, "--json", *given, cwd=ROOT, timeout=900, env=env)
    if not ok:
        assert done.returncode != 0
        return done.stderr
    assert done.returncode == 0, done.stderr
    cells = json.loads((out / f"{name}.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("data", {}).get("text/plain", [])) for c in cells for o in c.get("outputs", []))
    return json.loads(done.stdout)["metrics"], text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Ten made mosaics to learn and four to be asked."
    from avlab.lips.tiny_vlm import made_dataset

    folder = tmp_path_factory.mktemp("mosaics")
    made_dataset(folder, 10, split="train", seed=5)
    made_dataset(folder, 4, split="test", seed=6)
    return folder


@pytest.fixture(scope="module")
def overfit(data, tmp_path_factory):
    "Ten samples, fifty epochs, batches of two."
    out = tmp_path_factory.mktemp("overfit")
    how = dict(dataset_dir=data, model="tiny", max_samples=10, num_epochs=50, batch_size=2, accumulation=1, install="true")
    return out, *executed("train_lora", out, models=out / "models", **how)


def test_smoke(data, tmp_path):
    m, text = executed("train_lora", tmp_path / "out", dataset_dir=data, model="tiny", max_steps=2, max_samples=4, batch_size=2, controls="true")
    assert m["steps"] == 2 and m["samples"] == 4 and m["matrices"] == 8 and m["loss_on"] == "assistant"
    assert set(m["controls"]) == {"true", "shuffled", "blank"} and m["installed"] is None
    assert m["engine"] == "tiny" and len(m["weights"]) == 64 and m["versions"]["transformers"]
    inside = {f.name for f in (tmp_path / "out" / "final-adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= inside
    assert "4 mosaics" in text


def test_overfit(overfit):
    out, m, _ = overfit
    assert m["samples"] == 10 and m["steps"] == 250 and m["exact"] == m["asked"] == 10
    assert m["losses"][-1][1] < 0.2 < m["losses"][0][1]
    installed = out / "models" / "gemma3n-lipreader-lora"
    assert m["installed"] == str(installed)
    config = json.loads((installed / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["base_model_name_or_path"]) == (16, 32, 0.05, "tiny")


def test_evaluation(data, overfit, tmp_path):
    from avlab.lips.lora_evaluation import eval_lora

    out, *_ = overfit
    m, text = executed("eval_lora", tmp_path / "new", models=out / "models", dataset_dir=data)
    assert m["clips"] == 4 and m["wer"] > 0.3 and m["engine"] == "tiny" and "freely" in text
    assert m["memory"]["weights_mb"] < 1 and m["plan"]["parameters"] < 2e5
    assert len((tmp_path / "new" / "predictions.csv").read_text().splitlines()) == 5
    known = eval_lora(out / "final-adapter", data, split="train", device="cpu")
    assert known.free.clips == 10 and known.free.wer == known.ruled.wer == 0
    assert known.weights_sha256 == m["weights"]


def test_refused_before_any_work(data, tmp_path):
    told = executed("train_lora", tmp_path / "gated", ok=False, models=tmp_path / "none", dataset_dir=data)
    assert "ModelMissing" in told and "google/gemma-3n-E4B-it" in told and "hf auth login" in told
    assert not (tmp_path / "gated" / "final-adapter").exists()


def test_an_interrupted_training_goes_on(data, tmp_path):
    from avlab.lips.lora import train_lora

    how = dict(model="tiny", max_samples=4, batch_size=2, accumulation=1, device="cpu", show=False, save_steps=2)
    train_lora(data, tmp_path, max_steps=4, **how)
    on = train_lora(data, tmp_path, max_steps=6, resume=True, **how)
    assert on.steps == 6 and (tmp_path / "checkpoint-6").is_dir() and not (tmp_path / "checkpoint-2").exists()


def test_from_the_corpus_to_a_reading(tmp_path, monkeypatch):
    from avlab.core import corpus

    raw = corpus("grid/raw")
    if raw is None:
        pytest.skip("the GRID corpus is not on this machine (AVLAB_DATA)")
    from avlab.lips.grammar import check_sentence
    from avlab.lips.lora import train_lora
    from avlab.lips.prepare import prepare_mosaics, write_dataset
    from avlab.lips.reader import read_lips

    how = dict(local_path=raw.parent, speakers=["s1"], limit=8)
    prepare_mosaics(tmp_path / "data", workers=1, **how)
    write_dataset(tmp_path / "data", **how)
    monkeypatch.setenv("AVLAB_MODELS", str(tmp_path / "models"))
    train_lora(tmp_path / "data", tmp_path / "run", model="tiny", max_steps=2, batch_size=2, device="cpu", install=True, show=False)
    said = read_lips(sorted((raw / "s1").glob("*.mp4"))[0], engine="vlm", force=True)
    assert said.engine == "vlm" and len(check_sentence(said.text)) == 6 and len(said.weights_sha256) == 64
