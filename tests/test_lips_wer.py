"The numbers on the model card, counted again from the predictions that are kept beside the weights."
import csv
import re

import pytest
from conftest import ROOT

CARD = ROOT / "models" / "avlab_lips.md"


def distance(a, b):
    "Words to change, add or leave out."
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def counted(name, column):
    with open(ROOT / "models" / name) as f:
        rows = list(csv.DictReader(f))
    errors = sum(distance(r["truth"].split(), r[column].split()) for r in rows)
    right = sum(r["truth"] == r[column] for r in rows)
    return len(rows), 100 * errors / sum(len(r["truth"].split()) for r in rows), 100 * right / len(rows)


def on_the_card(row):
    "The numbers of a row of the card's table."
    line = next(x for x in CARD.read_text().splitlines() if x.startswith(f"| {row} |"))
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", line.split("|", 2)[2])]


@pytest.mark.parametrize("row, name, column, clips", [
    ("s1 test, grammar", "avlab_lips_test.csv", "grammar", 97), ("s1 test, greedy", "avlab_lips_test.csv", "greedy", 97),
    ("other speakers, grammar", "avlab_lips_others.csv", "grammar", 16), ("other speakers, greedy", "avlab_lips_others.csv", "greedy", 16)])
def test_the_card_says_what_the_predictions_say(row, name, column, clips):
    n, wer, sentences = counted(name, column)
    said = on_the_card(row)
    assert n == clips and said[0] == n
    assert wer == pytest.approx(said[1], abs=0.06) and sentences == pytest.approx(said[2], abs=0.06)


def test_the_test_split_is_the_published_one():
    from avlab.lips.corpus import split_of
    from avlab.lips.grammar import sentence_of

    with open(ROOT / "models" / "avlab_lips_test.csv") as f:
        rows = list(csv.DictReader(f))
    assert len({r["name"] for r in rows}) == 97
    assert all(r["speaker"] == "s1" and split_of(r["name"]) == "test" and sentence_of(r["name"]) == r["truth"] for r in rows)
