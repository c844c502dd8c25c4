"""The answers that visual question answering chooses from."""

import json

import pytest
from small_finetune import config_of

from codebook_jax import build
from codebook_jax.data.sources import open_source
from codebook_jax.errors import UserError
from codebook_jax.run.record import trained_config
from codebook_jax.tasks.vqa import Answering


class Questions:
    """Questions with these answers."""

    def __init__(self, *answers):
        self.answers = answers

    def __len__(self):
        return len(self.answers)

    def captions(self, index):
        return ("what is it?", *self.answers[index])

    def __repr__(self):
        return "questions"


SOURCE = Questions(("red", "dark red"), ("red",), ("blue",), ("red", "2"))


def candidates(source=SOURCE, before=None, **changes):
    config = config_of("vqa", **{f"vqa.{name}": value for name, value in changes.items()})
    return tuple(Answering.from_data(config, before, source).vqa.candidates)


def test_they_are_the_commonest_in_training(capsys):
    assert candidates(candidates_most=1) == ("red",)
    assert "1 answers to choose from, 50.0% of those in training" in capsys.readouterr().out
    assert candidates() == ("red", "dark red", "blue", "2")
    scenes = dict(role="train", size_px=32, scenes_examples=64, seed=0)
    found = candidates(open_source("scenes:questions", **scenes))
    assert len(set(found)) == len(found) > 10 and all(found)


def test_they_are_those_of_a_file_each_once(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(["red", "blue", "red", "green"]))
    assert candidates(candidates_file=str(path)) == ("red", "blue", "green")
    assert "3 answers to choose from, 66.7% of those in training" in capsys.readouterr().out


@pytest.mark.parametrize("listed", [["green", "blue"], ["Red", "RED"], ["blue"]])
def test_a_file_that_misses_most_answers_is_refused_with_their_share(tmp_path, listed):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(listed))
    share = 100 * ("blue" in listed) / 6
    with pytest.raises(
        UserError, match=f"candidates_file='.*' has {len(listed)} answers .*, {share:.1f}% of"
    ):
        candidates(candidates_file=str(path))


@pytest.mark.parametrize("content", ['{"red": 1}', "[]", "[1, 2]"])
def test_a_file_that_is_no_list_of_texts_is_refused(tmp_path, content):
    path = tmp_path / "answers.json"
    path.write_text(content)
    with pytest.raises(UserError, match="answers.json is not a JSON list of answers"):
        candidates(candidates_file=str(path))


def test_a_run_keeps_its_own_also_when_its_data_change_and_when_it_is_used(tmp_path):
    before = config_of("vqa", **{"vqa.candidates": ("yes", "no")})
    assert candidates(before=before) == ("yes", "no")
    assert candidates(before=before, candidates=("maybe",)) == ("maybe",)
    assert candidates(before=before, candidates_most=2) == candidates(candidates_most=2)
    record = {"config": before.to_dict()}
    assert trained_config(tmp_path, record, None).vqa.candidates == ("yes", "no")
    assert trained_config(tmp_path, record, config_of("vqa")).vqa.candidates == ("yes", "no")
    other = config_of("vqa", **{"vqa.candidates": ("yes", "maybe")})
    assert trained_config(tmp_path, record, other).vqa.candidates == ("yes", "maybe")


def test_a_trained_run_ranks_the_answers_of_another_file_or_fewer_of_its_own(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(["green", "red", "red"]))
    own, other = {"vqa.candidates": ("yes", "no", "red")}, {"vqa.candidates": ("maybe",)}
    before = config_of("vqa", **own)
    for changes, expected in (
        (own, ("yes", "no", "red")),
        (own | {"vqa.candidates_file": str(path)}, ("green", "red")),
        (own | {"vqa.candidates_most": 2}, ("yes", "no")),
        (other | {"vqa.candidates_file": str(path)}, ("maybe",)),
    ):
        used = Answering.as_used(config_of("vqa", **changes), before)
        assert tuple(used.vqa.candidates) == expected
        assert ("answers to choose from" in capsys.readouterr().out) == (len(expected) == 2)
    of_file = config_of("vqa", **own | {"vqa.candidates_file": str(path)})
    assert Answering.as_used(before, of_file).vqa.candidates == ("yes", "no", "red")


def test_the_modes_of_a_trained_run_read_the_file_that_a_flag_names(
    pretrained, tmp_path, one_device
):
    config = config_of("vqa", init=f"model:{pretrained}", **{"vqa.method": "generate"})
    build.build_training(config, tmp_path / "run", steps_saved=[], learns=False)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(["green", "red"]))
    given = config_of("vqa", **{"vqa.candidates_file": str(path), "vqa.shortlist": 7})
    flags = {"vqa.candidates_file", "vqa.shortlist"}
    of = build.build_trained(given, tmp_path / "run", flags).task.config.vqa
    assert tuple(of.candidates) == ("green", "red") and of.shortlist == 7
    assert of.method == "generate"  # the run's own, which no flag has changed
    of = build.build_trained(given, tmp_path / "run", {"vqa.method"}).task.config.vqa
    assert len(of.candidates) > 2 and of.method == "rank" and of.shortlist == 32


@pytest.mark.parametrize("name", ["vqa.decoder_depth", "vqa.answer_tokens"])
def test_what_makes_another_decoder_is_refused_for_a_trained_run(tmp_path, name):
    record = {"config": config_of("vqa").to_dict()}
    with pytest.raises(UserError, match=f"another model: {name}=.*, now 5: give the old"):
        trained_config(tmp_path, record, config_of("vqa", **{name: 5}), {name})


def test_questions_without_any_answer_cannot_be_learned():
    with pytest.raises(UserError, match="has no answers to learn: give questions with answers"):
        candidates(Questions((), ()))
