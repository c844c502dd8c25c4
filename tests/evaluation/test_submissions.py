"""Submissions: what is written the public evaluations can read, and nothing else is written."""

from __future__ import annotations

import csv
import json

import pytest

from codebook_jax.errors import UserError
from codebook_jax.evaluation import submissions
from codebook_jax.evaluation.submissions import write_comparisons, write_vqa


def test_a_vqa_submission_is_one_list_in_the_order_of_the_questions(tmp_path):
    path = tmp_path / "new" / "vqa.json"
    answers = [(2, "two cups"), ("x", 'a "quote"'), (10, "日本")]
    said = write_vqa(path, answers, [10, 2, "x"])
    assert json.loads(path.read_text()) == [
        {"question_id": 10, "answer": "日本"},
        {"question_id": 2, "answer": "two cups"},
        {"question_id": "x", "answer": 'a "quote"'},
    ]
    assert "3 questions" in said and "447,793" in said and str(path) in said
    assert list(path.parent.iterdir()) == [path]


def test_a_submission_for_all_of_test2015_is_said_to_be_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "TEST2015_QUESTIONS", 2)
    whole = write_vqa(tmp_path / "vqa.json", {1: "a", 2: "b"}.items(), [1, 2])
    part = write_vqa(tmp_path / "vqa.json", {1: "a"}.items(), [1])
    assert "all 2 questions of test2015" in whole and "only" not in whole
    assert "only from a file that answers all 2" in part


@pytest.mark.parametrize("write", [write_vqa, write_comparisons])
@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ([1, 2], r"of 3 ids, 1 missing \(3\):"),
        ([1, 2, 3, 2], r"1 repeated \(2\):"),
        ([1, 2, 3, 4], r"1 unknown \(4\):"),
        ([1, 2, "3"], r"1 missing \(3\); 1 unknown \('3'\):"),
        ([], r"3 missing \(1, 2, 3\):"),
        ([*range(1, 9)], r"5 unknown \(4, 5, 6 and 2 more\):"),
    ],
)
def test_incomplete_answers_are_refused_and_the_old_file_stays(tmp_path, write, keys, fault):
    path = tmp_path / "answers"
    path.write_text("old")
    with pytest.raises(UserError, match=fault):
        write(path, [(key, "True") for key in keys], [1, 2, 3])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_answers_that_are_not_texts_are_refused(tmp_path):
    with pytest.raises(UserError, match="the answer to 8 is None"):
        write_vqa(tmp_path / "vqa.json", [(7, "a"), (8, None)], [7, 8])
    assert not list(tmp_path.iterdir())


def test_a_submission_of_comparisons_has_a_line_for_each_identifier(tmp_path):
    path = tmp_path / "nlvr2.csv"
    answers = [("test1-0-1-0", "False"), ("test1-0-0-0", True)]
    said = write_comparisons(path, answers, ["test1-0-0-0", "test1-0-1-0"])
    assert path.read_text() == "test1-0-0-0,True\ntest1-0-1-0,False\n"
    with open(path, newline="") as file:
        assert dict(csv.reader(file)) == {"test1-0-0-0": "True", "test1-0-1-0": "False"}
    assert "2 statements, all that were evaluated" in said


@pytest.mark.parametrize("identifier", ["a,b", 'a"b', "a\nb", " a", "a\t"])
def test_identifiers_that_would_break_a_line_are_refused(tmp_path, identifier):
    with pytest.raises(UserError, match="which NLVR2's evaluation cannot read"):
        write_comparisons(tmp_path / "nlvr2.csv", [(identifier, "True")], [identifier])
    assert not list(tmp_path.iterdir())


def test_comparisons_are_true_or_false(tmp_path):
    with pytest.raises(UserError, match="the answer to 'a' is 'left'"):
        write_comparisons(tmp_path / "nlvr2.csv", [("a", "left")], ["a"])


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken cannot be written"):
        write_vqa(tmp_path / "taken", [(1, "a")], [1])
    assert not list((tmp_path / "taken").iterdir())
