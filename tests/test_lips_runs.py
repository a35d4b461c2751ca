"The lip reading run notebooks, small, as `avlab run` executes them: with the GRID corpus and without."
import pytest
from test_sync_runs import executed, grid_here


@pytest.fixture(params=["with GRID", "without GRID"])
def data(request, tmp_path):
    "None for this machine's own data, or a folder with nothing in it."
    if request.param == "without GRID":
        return tmp_path / "nothing"
    if not grid_here():
        pytest.skip("the GRID corpus is not on this machine (AVLAB_DATA)")
    return None


def test_training(data, tmp_path):
    out = tmp_path / "out"
    m, text = executed("train_lips", out, data, clips=3, made=2, kept_back=2, minutes="0.02 0.02")
    assert (m["real_clips"] > 0) == (data is None) and m["made_clips"] > 0 and m["val_clips"] == 2
    assert m["parameters"] <= 8e6 and m["file_bytes"] <= 16e6 and m["half_precision_drift"] < 0.01
    assert f"{m['real_clips']} real and {m['made_clips']} made clips" in text
    from avlab.lips.net import load_reader

    assert load_reader(out / "avlab_lips.safetensors", "cpu").kinds == ("pictures", "points")


def test_witnesses_are_joined(tmp_path):
    small = dict(clips=0, made=2, kept_back=1)
    for k in (1, 2):
        executed("train_lips", tmp_path / f"{k}", tmp_path / "nothing", witnesses="points", minutes="0.01", seed=k, **small)
    files = " ".join(str(tmp_path / f"{k}" / "avlab_lips.safetensors") for k in (1, 2))
    m, _ = executed("train_lips", tmp_path / "both", tmp_path / "nothing", witnesses="", minutes="", join=files, **small)
    assert list(m["val_wer_pct_alone"]) == ["points 0", "points 1"] and len(m["joined"]) == 2


def test_evaluation(data, tmp_path):
    out = tmp_path / "out"
    m, text = executed("eval_lips", out, data, clips=3, others=1, made=2)
    assert m["real"] == (data is None) and m["clips"] == (3 if data is None else 2) and m["chance_wer_pct"] == pytest.approx(81)
    assert ("the made clips stand in" in text) == (data is not None)
    assert m["follows_the_picture_pct"] == 100 and m["blank_sentences_pct"] == 0
    if data is None:
        assert m["wer_pct"]["grammar"] < 30 and m["other_clips"] == 1
    from avlab.lips.evaluation import load_predictions

    assert len(load_predictions(out / "predictions.csv")) == m["clips"]


def test_a_new_speaker(data, tmp_path):
    out = tmp_path / "out"
    m, _ = executed("adapt_lips", out, data, clips=6, steps=2, batch=2)
    assert m["clips"] == 6 and (m["speaker"] == "s26") == (data is None)
    assert 0 <= m["wer_after_pct"] <= 100 and list(out.glob("*.safetensors"))
