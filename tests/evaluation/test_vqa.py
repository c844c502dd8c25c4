"""VQA accuracy: every rule of the normalisation by hand, and the four variants that are in use."""

from __future__ import annotations

import numpy as np
import pytest

from codebook_jax.errors import UserError
from codebook_jax.evaluation.vqa import (
    CONTRACTIONS,
    VARIANTS,
    format_table,
    normalise,
    report,
    strip_punctuation,
    strip_server_punctuation,
    vqa_accuracy,
)


def accuracies(answer: str, references: list[str]) -> str:
    """The accuracy by each variant, in tenths and in their order: "10 3 0 10"."""
    return " ".join(
        f"{10 * vqa_accuracy({7: answer}, {7: references}, variant)[7]:.0f}" for variant in VARIANTS
    )


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy_climbs_with_the_annotators_who_agree(agreeing, accuracy, variant):
    references = ["red"] * agreeing + [f"other{at}" for at in range(10 - agreeing)]
    found = vqa_accuracy({"q": "red"}, {"q": references}, variant)
    assert found == {"q": pytest.approx(accuracy)}


def test_accuracy_of_any_number_of_annotators_leaves_each_out_in_turn():
    rng = np.random.default_rng(0)
    for _ in range(300):
        references = rng.choice(["red", "green", "blue"], size=rng.integers(2, 14)).tolist()
        scores = []
        for left_out in range(len(references)):
            others = references[:left_out] + references[left_out + 1 :]
            scores.append(min(1, sum(other == "red" for other in others) / 3))
        found = vqa_accuracy({1: "red"}, {1: references})[1]
        assert found == pytest.approx(sum(scores) / len(scores))


def test_a_single_annotator_decides_alone():
    assert vqa_accuracy({1: "red", 2: "blue"}, {1: ["red"], 2: ["red"]}) == {1: 1.0, 2: 0.0}


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("t-shirt", "t shirt"),  # not beside a blank: a blank
        ("t - shirt", "t  shirt"),  # beside one: nothing
        ("yes!", "yes "),
        ("yes! no", "yes no"),
        ("a-b -c", "ab c"),  # one hyphen beside a blank takes all of them away
        ("a-b /c", "a b c"),  # but not the other marks
        ("1,000", "1000"),  # a comma between digits takes every mark away
        ("1,000-2", "10002"),
        ("1,,2-3", "1  2 3"),
        ("red,blue", "red blue"),
        ('[x]{y}(z)="\\_"', " x  y  z      "),
        ("he's 10:30", "he's 10:30"),  # apostrophes and colons stay
        ("2.5", "2.5"),
        ("no.", "no"),
        ("u.s.a.", "usa"),
        (".5 inch.", ".5 inch"),
        ("." * 40, "." * 8),  # the official code takes away 32 of them
    ],
)
def test_marks_go_or_become_blanks(text, changed):
    assert strip_punctuation(text) == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("t-shirt", "t shirt"),
        ("a-b-c", "a b c"),
        ("1/2", "1/2"),  # beside digits only: it stays
        ("  ?!yes!? ", "yes"),  # both ends
        ("red , blue", "red blue"),
        ("a -- b", "a b"),
        ("1,000 and 1,,2", "1000 and 12"),
        ("7-11 store", "7-11 store"),
        ("(no.)", "no)"),  # the rule for ends wants a letter or digit beside the marks
        ("no.", "no"),
        ("2.5 ft.", "2.5 ft"),
    ],
)
def test_the_server_keeps_marks_between_digits(text, changed):
    assert strip_server_punctuation(text) == changed


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        (" Red\tand\nBlue ", "red and blue"),
        ("x\t-b-c", "x bc"),  # tabs and line breaks are blanks for the rule of marks
        ("x\n-b-c", "x bc"),
        ("None", "0"),
        ("zero one two three four five", "0 1 2 3 4 5"),
        ("six seven eight nine ten eleven", "6 7 8 9 10 eleven"),
        ("The cat, a dog and an owl", "cat dog and owl"),
        ("THE", ""),
        ("dont", "don't"),
        ("Isnt it", "isn't it"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("y'allll", "y'all'll"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),  # the wrong way round in the official table
        ("Im", "im"),  # it has "Im", which no lower-cased word meets
        ("lets shed well its", "lets shed well its"),  # not in it
        ("T-Shirt.", "t shirt"),
        ("1,000 people", "1000 people"),
        ("two-three", "2 3"),  # punctuation comes before numbers
        ("A.", ""),  # and before articles
    ],
)
def test_answers_are_normalised_in_the_official_order(answer, normalised):
    assert normalise(answer) == normalised


def test_the_table_of_contractions_has_the_official_entries():
    assert len(CONTRACTIONS) == 120
    whole = {key: word for key, word in CONTRACTIONS.items() if key.count("'") < word.count("'")}
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in whole.items())
    unusual = {key: word for key, word in CONTRACTIONS.items() if key not in whole}
    assert unusual == {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
    assert {key for key in CONTRACTIONS if key != key.lower()} == {"Im", "Ive", "Id've", "I'dve"}


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        # annotators agree: only d changes what they gave, and b leaves the answer as it is too
        ("The cat.", ["The cat."] * 10, "0 10 0 10"),
        ("cat", ["The cat."] * 10, "0 0 0 10"),
        ("t-shirt", ["t-shirt"] * 10, "0 10 0 10"),
        ("Yes!", ["yes"] * 10, "10 0 10 10"),
        (" yes\n", ["yes\t"] * 10, "0 10 0 10"),
        # annotators differ: a and c change the marks of what they gave, b and d all of it
        ("the cat", ["the cat"] * 9 + ["dog"], "0 10 0 10"),
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], "10 10 10 10"),
        ("2", ["two"] * 9 + ["3"], "0 10 0 10"),
        ("dont", ["don't"] * 9 + ["no"], "10 10 10 10"),
        # annotators who differ only by blanks at the ends agree for b
        ("The cat", ["the cat", "the cat "] * 5, "0 0 0 10"),
        # the server's marks
        ("1/2", ["1/2"] * 9 + ["half"], "10 10 10 10"),
        ("1 2", ["1/2"] * 9 + ["half"], "10 10 0 10"),
        ("yes", ["yes!"] * 9 + ["no"], "0 10 10 10"),  # a leaves "yes " where a mark was
    ],
)
def test_the_variants_part_where_they_should(answer, references, expected):
    assert accuracies(answer, references) == expected


def test_the_first_variant_is_the_default():
    answers, references = {1: "The cat."}, {1: ["the cat"] * 10}
    assert vqa_accuracy(answers, references) == {1: 0.0}
    assert vqa_accuracy(answers, references, "d") == {1: 1.0}
    with pytest.raises(ValueError, match="'e' is not one of a, b, c, d"):
        vqa_accuracy(answers, references, "e")


def test_a_report_has_every_variant_and_type_and_where_the_variants_part():
    answers = {1: "yes", 2: "The cat.", "x3": "blue"}
    references = {1: ["yes"] * 10, 2: ["cat"] * 10, "x3": ["blue"] * 2 + ["red"] * 8}
    types = {1: "yes/no", 2: "other", "x3": "other"}
    found = report(answers, references, types)
    assert list(found.accuracy) == ["overall", "yes/no", "other"]
    right = {"a": [1, 1, 0.6], "b": [1, 0, 0.6], "c": [1, 1, 0.6], "d": [1, 1, 0.6]}
    for variant, (first, second, third) in right.items():
        overall = 100 * (first + second + third) / 3
        assert found.accuracy["overall"][variant] == pytest.approx(overall)
        assert found.accuracy["yes/no"][variant] == 100
        assert found.accuracy["other"][variant] == pytest.approx(50 * (second + third))
    assert found.parted == {2: {"a": 1, "b": 0, "c": 1, "d": 1}}
    assert list(report(answers, references).accuracy) == ["overall"]
    table = format_table(found, answers, references)
    assert "3 questions" in table and f"{100 * 2.6 / 3:.2f}" in table
    assert "'The cat.'" in table and "'cat' x10" in table and "(b) 0.00" in table
    assert "most possible" not in table


def test_a_table_says_how_much_few_annotators_can_give():
    references = {1: ["red"] * 3, 2: ["blue"] * 2, 3: ["2"], 4: ["cup"] * 2 + ["mug"] * 8}
    answers = {key: given[-1] for key, given in references.items()}
    found = report(answers, references)
    assert found.accuracy["overall"]["a"] == pytest.approx(100 * (2 / 3 + 1 / 3 + 1 + 1) / 4)
    table = format_table(found, answers, references)
    assert "2 questions have only two or three annotators" in table
    assert "75.00 is the most possible" in table


def test_answers_for_other_questions_are_refused():
    with pytest.raises(UserError, match=r"2 ids, 1 missing \('b'\); 1 unknown \(3\)"):
        vqa_accuracy({"a": "x", 3: "y"}, {"a": ["x"], "b": ["y"]})


def test_no_questions_are_refused():
    with pytest.raises(UserError, match="nothing to answer"):
        report({}, {})


def test_questions_without_reference_answers_are_refused():
    with pytest.raises(UserError, match=r"1 of 2 questions have no reference answers \(8\)"):
        vqa_accuracy({7: "x", 8: "y"}, {7: ["x"], 8: []})
