"""Accuracy of labels: counts by hand, chance, top k against sorting."""

from __future__ import annotations

import numpy as np
import pytest

from codebook_jax.errors import UserError
from codebook_jax.evaluation.classes import classify, format_table, surely_above, top_k_accuracy

NAMES = ("contradiction", "neutral", "entailment")


def test_each_label_is_counted_under_what_it_was_taken_for():
    labels = ["neutral", "neutral", "entailment", "neutral", "contradiction"]
    predictions = ["neutral", "entailment", "entailment", "contradiction", "contradiction"]
    found = classify(predictions, labels, NAMES)
    assert found.confusion.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 1]]
    assert found.figures() == {
        "accuracy": pytest.approx(60),
        "chance_frequent": pytest.approx(60),
        "chance_uniform": pytest.approx(100 / 3),
        "examples": 5,
    }


def test_always_saying_the_most_frequent_label_is_chance():
    labels = ["a"] * 700 + ["b"] * 300
    found = classify(["a"] * 1000, labels, ("a", "b"))
    assert found.figures()["accuracy"] == found.figures()["chance_frequent"] == 70
    assert "no better" in format_table(found)
    better = classify(["a"] * 780 + ["b"] * 220, labels, ("a", "b"))
    assert better.figures()["accuracy"] == pytest.approx(92)
    assert "no better" not in format_table(better)


def test_three_standard_errors_make_the_difference():
    # chance 50 % of 100 examples: one standard error is 5
    assert surely_above(50, 100) == 65
    assert surely_above(90, 10) == 100


def test_labels_that_are_not_names_are_refused():
    with pytest.raises(UserError, match="'nuetral' is not one of .* did you mean neutral"):
        classify(["neutral"], ["nuetral"], NAMES)
    with pytest.raises(UserError, match="'-' is not one of"):
        classify(["-"], ["neutral"], NAMES)
    with pytest.raises(UserError, match="no example"):
        classify([], [], NAMES)


def test_top_k_is_that_of_sorting():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(97, 13)), rng.integers(0, 13, 97)
    found = top_k_accuracy(scores, labels)
    for k in (1, 5, 10):
        highest = np.argsort(-scores, axis=1)[:, :k]
        assert found[f"top{k}"] == pytest.approx(
            100 * np.mean([label in row for label, row in zip(labels, highest, strict=True)])
        )


def test_top_k_of_equal_scores_is_k_of_all_names():
    assert top_k_accuracy(np.ones((11, 23)), np.arange(11)) == {
        "top1": pytest.approx(100 / 23),
        "top5": pytest.approx(500 / 23),
        "top10": pytest.approx(1000 / 23),
    }


def test_ranks_that_take_in_every_name_are_left_out():
    assert list(top_k_accuracy(np.eye(5), np.arange(5))) == ["top1"]


def test_the_table_shows_every_label_or_the_commonest_mistakes():
    table = format_table(classify(["neutral"] * 3 + ["entailment"], ["neutral"] * 4, NAMES))
    heading, *_, last = table.splitlines()
    assert "75.00 %" in heading
    assert last.split() == ["entailment", "0", "0", "0"]
    assert ["neutral", "0", "3", "1"] in [line.split() for line in table.splitlines()]
    many = [f"name{at}" for at in range(50)]
    labels = many + ["name3"] * 2
    predictions = [*many[:3], "name4", *many[4:], "name4", "name7"]
    lines = format_table(classify(predictions, labels, many)).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["2", "name3", "taken", "for", "name4"],
        ["1", "name3", "taken", "for", "name7"],
    ]
