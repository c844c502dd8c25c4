"""Statements about two images: accuracy, and consistency over the pairs of a sentence."""

from __future__ import annotations

import pytest

from codebook_jax.errors import UserError
from codebook_jax.evaluation.comparisons import compare, format_table, sentence_of


def test_a_sentence_is_consistent_if_it_is_right_with_every_pair():
    references = {
        "dev-0-0-0": "True",
        "dev-0-1-0": "False",
        "dev-0-2-0": "True",  # sentence 0 of set 0 with three pairs
        "dev-0-0-1": "False",  # another sentence, with a pair of the first
        "dev-1-0-0": "True",  # another set
        "dev-1-1-0": "False",
    }
    wrong = {"dev-0-1-0": "True", "dev-1-1-0": "True"}
    found = compare(references | wrong, references).figures()
    assert found["accuracy"] == pytest.approx(100 * 4 / 6)
    assert found["consistency"] == pytest.approx(100 / 3)  # only sentence 1 of set 0
    assert found["sentences"] == 3
    assert compare(references, references).consistency == 100


def test_one_wrong_of_four_pairs_costs_a_quarter_of_accuracy_and_all_consistency():
    references = {f"test1-{at}-{pair}-0": "True" for at in range(7) for pair in range(4)}
    answers = {key: "False" if "-3-0" in key[-4:] else "True" for key in references}
    found = compare(answers, references)
    assert (found.figures()["accuracy"], found.consistency) == (75, 0)


def test_consistency_is_left_out_for_other_identifiers():
    references = {"dev-0-0-0": "True", "mine": "False"}
    found = compare(references, references)
    assert found.consistency is None
    assert "consistency" not in found.figures()
    assert found.figures()["accuracy"] == 100
    assert "not known" in format_table(found)
    assert compare({7: "True"}, {7: "True"}).consistency is None


@pytest.mark.parametrize(
    ("identifier", "sentence"),
    [
        ("dev-850-0-1", "dev-850-1"),
        ("train-10171-3-0", "train-10171-0"),
        ("dev-850-0", None),
        ("dev-850-0-1-img0", None),
        ("dev-a-0-1", None),
        (12, None),
    ],
)
def test_the_pair_is_the_third_part_of_an_identifier(identifier, sentence):
    assert sentence_of(identifier) == sentence


def test_labels_are_true_or_false_in_any_case():
    assert compare({"a": "true"}, {"a": "TRUE"}).figures()["accuracy"] == 100
    with pytest.raises(UserError, match="'Maybe' is not one of True, False"):
        compare({"a": "maybe"}, {"a": "True"})


def test_missing_answers_are_refused():
    with pytest.raises(UserError, match="1 missing .'b'."):
        compare({"a": "True"}, {"a": "True", "b": "True"})


def test_the_table_names_both_figures():
    references = {f"dev-{at}-{pair}-0": "True" for at in range(8) for pair in range(2)}
    table = format_table(compare(references | {"dev-0-0-0": "False"}, references))
    assert "93.75 %" in table and "87.50 % of 8 sentences" in table
