"""What a fine-tuning says of its scores, and the files of answers that an evaluation gives."""

import json
import math
import re

import numpy as np
import pytest
from golden_weights import VOCABULARY, one_mesh
from one_weight import config_of as world_config
from small_finetune import config_of

from codebook_jax import build, train
from codebook_jax.data.sources import Example
from codebook_jax.errors import UserError
from codebook_jax.evaluation.predicting import Predicted
from codebook_jax.run.metrics import read_rows


def found(keys, outputs, answers=(), left_out=0):
    """Predictions for examples with these keys, which have the answers if there are some."""
    answers = answers or [()] * len(keys)
    examples = [
        Example((), "a text", right, key, 0) for key, right in zip(keys, answers, strict=True)
    ]
    return Predicted(examples, [(8, 8)] * len(keys), outputs, left_out, 0)


def task_of(name, **changes):
    config = config_of(name, **changes)
    return build.TASKS[name](config, VOCABULARY, one_mesh())


def written(evaluation, folder):
    """{name: what it holds} of the evaluation's files."""
    for name, write in evaluation.files:
        assert str(folder / name) in write(folder / name)
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def comparing():
    return task_of("nlvr2")


@pytest.fixture(scope="module")
def answering():
    return task_of("vqa", **{"vqa.candidates": ("red", "blue", "2")})


IDENTIFIERS = ["dev-1-0-0", "dev-1-1-0", "dev-2-0-1"]
TRUTH = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])  # false, true, true
CHOSEN = np.array([[2, 0], [1, 2], [0, 1]]), np.full((3, 2), 0.5)


def test_a_test_set_without_answers_gives_a_submission_and_no_score(comparing, answering, tmp_path):
    judged = comparing.judged(found(IDENTIFIERS, TRUTH), None)
    assert math.isnan(judged.score) and judged.results == {"student": {"examples": 3.0}}
    assert "3 comparisons without known answers" in judged.summary
    files = written(judged, tmp_path)
    lines = "dev-1-0-0,False\ndev-1-1-0,True\ndev-2-0-1,True\n"
    assert files == {"nlvr2_predictions.csv": lines}
    folder = tmp_path / "vqa"
    folder.mkdir()
    judged = answering.judged(found([7, 9, 8], CHOSEN), None)
    assert "3 questions without known answers" in judged.summary
    rows = json.loads(written(judged, folder)["vqa_result.json"])
    assert [(row["question_id"], row["answer"]) for row in rows] == [
        (7, "2"),
        (9, "blue"),
        (8, "red"),
    ]


def test_known_answers_score_those_examples_alone_and_all_are_written(
    comparing, answering, tmp_path
):
    labels = [("false",), (), ("false",)]
    judged = comparing.judged(found(IDENTIFIERS, TRUTH, labels), None)
    assert judged.score == 50 and judged.results["student"]["consistency"] == 50  # of 2 sentences
    assert len(written(judged, tmp_path)["nlvr2_predictions.csv"].splitlines()) == 3
    judged = answering.judged(found([7, 9, 8], CHOSEN, [("2",) * 10, (), ("mauve",) * 10]), None)
    assert judged.score == 50 and judged.results["student"]["questions"] == 2
    assert "always the best same answer: 50.00" in judged.table
    assert "1 of 2 questions (50.0%) have an answer among the 3 to choose from" in judged.table


def test_a_submission_that_would_miss_examples_is_not_written_and_an_older_one_is_set_aside(
    comparing, answering, tmp_path
):
    for task, outputs, name in (
        (comparing, TRUTH, "nlvr2_predictions.csv"),
        (answering, CHOSEN, "vqa_result.json"),
    ):
        path, aside = tmp_path / name, tmp_path / f"earlier_{name}"
        for answers in ((), [("false",)] * 3):
            for older in ("older", ""):
                if older:
                    path.write_text(older)
                judged = task.judged(found(IDENTIFIERS, outputs, answers, left_out=2), None)
                [(named, write)] = judged.files
                said = write(tmp_path / named)
                assert re.search(f"{name} is not written.* pictures of 2 cannot", said)
                assert (str(aside) in said) == bool(older) and "\n" not in said
                assert not path.exists() and aside.read_text() == "older"


def test_questions_of_one_id_are_refused_since_a_submission_answers_each_once(answering):
    with pytest.raises(UserError, match=r"1 ids are those of several questions \(7\)"):
        answering.judged(found([7, 7, 8], CHOSEN), None)


def test_statements_of_one_id_are_refused_since_they_would_be_judged_as_one(comparing):
    with pytest.raises(UserError, match=r"1 ids are those of several statements \(0\)"):
        comparing.judged(found([0, 1, 0], TRUTH, [("true",)] * 3), None)


def test_a_submission_that_lacks_what_the_list_lost_is_not_written(comparing, tmp_path):
    lost = found(IDENTIFIERS, TRUTH)._replace(unlisted=1)
    [(name, write)] = comparing.judged(lost, None).files
    assert "1 of the list were left out before" in write(tmp_path / name)
    assert not list(tmp_path.iterdir())


# -- scores of a run that starts from a trained model, with a model of one weight


FINETUNES = {"init": "model:export", "train.steps": 12}


def test_a_run_scores_its_start_and_warns_of_every_later_score_below_it(world, tmp_path, capsys):
    world.score = {0: 50.0, 6: 40.0, 12: 60.0}.get
    config = world_config(**FINETUNES, **{"optimizer.learning_rate": 0.25})
    train.fit(config, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert "validation at step 0: scored 50.0; before the first step" in said
    [warning] = [line for line in said if line.startswith("warning: ")]
    assert "is 40.00, below the 50.00 before the first step" in warning
    for cause in ("learning rate too high (now 0.25)", "batch too small (now 4)", "image ids"):
        assert cause in warning
    assert world.evaluated == [(0, False), (6, False), (12, True)]
    scored = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if "eval/score" in row]
    assert scored == [0, 6, 12]


def test_without_known_answers_no_step_is_called_the_best(world, tmp_path, capsys):
    world.score = lambda step: float("nan")
    train.fit(world_config(**FINETUNES, **{"evaluation.between": (0.5,)}), tmp_path)
    said = capsys.readouterr().out
    assert "step 6: scored nan; without known answers none is the best: name data.eval" in said
    assert "None" not in said and "between" not in said
    assert world.evaluated == [(0, False), (6, False), (12, True)]


def test_without_a_score_of_the_start_no_weights_between_are_tried(world, tmp_path, capsys):
    world.score = float
    train.fit(world_config(**FINETUNES | {"train.steps": 6}), tmp_path)
    (tmp_path / "best.json").unlink()
    train.fit(world_config(**FINETUNES, **{"evaluation.between": (0.5,)}), tmp_path)
    assert "between" not in capsys.readouterr().out
    assert world.evaluated == [(0, False), (6, True), (6, False), (12, True)]


def test_a_fresh_run_is_not_scored_before_it_has_learned_anything(world, tmp_path, capsys):
    world.score = {6: 40.0, 12: 30.0}.get
    train.fit(world_config(**FINETUNES | {"init": "random"}), tmp_path)
    assert world.evaluated == [(6, False), (12, True)]
    assert "warning" not in capsys.readouterr().out


def test_the_last_step_is_scored_once_also_when_the_run_is_started_again(world, tmp_path):
    world.score = float
    for _ in range(2):
        train.fit(world_config(**FINETUNES), tmp_path)
    assert world.evaluated == [(0, False), (6, False), (12, True)]
