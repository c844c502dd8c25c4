"""The verbs of fine-tuned models: how many inputs belong together, and what is refused."""

import jax
import numpy as np
import pytest
from small_data import scenes_source, tokenizer_of
from small_finetune import config_of, picture

from codebook_jax.errors import UserError
from codebook_jax.models.finetuned import Network
from codebook_jax.weights.finetuned import FINETUNED

A, B, C = (picture(seed) for seed in range(3))
LONG = "circle " * 40
CHOICES = {
    "vqa": {"vqa.candidates": ("red", "blue", "two cups"), "vqa.shortlist": 2},
    "labels": {"labels.names": ("cup", "plate")},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One of each task, by config.task, with random parameters."""
    tokenizer = tokenizer_of(scenes_source(), tmp_path_factory.mktemp("run"))
    found = {}
    for task, kind in FINETUNED.items():
        config = config_of(task, **CHOICES.get(task, {}))
        student = Network(config, tokenizer.vocabulary.size).init(jax.random.key(0))
        found[task] = kind(config, tokenizer, {"student": student}, 0)
    return found


def test_a_single_input_is_taken_for_every_other(models):
    compare = models["nlvr2"].compare
    expected = [compare(A, each, "a star")[0] for each in (A, B, C)]
    for texts in ("a star", ["a star"] * 3):
        np.testing.assert_allclose(compare(A, [A, B, C], texts), expected, atol=1e-6)
    mirrored = [compare(each, A, "a star")[0] for each in (A, B, C)]
    np.testing.assert_allclose(compare([A, B, C], A, "a star"), mirrored, atol=1e-6)
    entails = models["entailment"].entails
    both = entails([A, B], "a star").probabilities
    alone = [entails(each, "a star").probabilities[0] for each in (A, B)]
    np.testing.assert_allclose(both, alone, atol=1e-6)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: m["nlvr2"].compare([A] * 3, [B] * 2, "a"), "3 and 2 images and 1 texts cannot"),
        (lambda m: m["nlvr2"].compare(A, [B] * 2, ["a"] * 3), "1 and 2 images and 3 texts cannot"),
        (lambda m: m["nlvr2"].compare(A, [B, b"x"], "a"), "image 1: 1 bytes: not a picture"),
        (lambda m: m["nlvr2"].compare(A, [], "a"), "nothing to do: give at least one image"),
        (lambda m: m["entailment"].entails([A] * 2, ["a"] * 3), "2 images and 3 texts cannot"),
        (lambda m: m["entailment"].entails(A, []), "nothing to do: .* one text"),
        (lambda m: m["entailment"].entails(A, ["a", ""]), "text 1, '', has no words"),
        (lambda m: m["vqa"].answer(A, ""), "text 0, '', has no words"),
        (lambda m: m["vqa"].answer(A, []), "nothing to do"),
        (lambda m: m["vqa"].answer("no/such.png", "what"), "image 0: no/such.png: .*file"),
        (lambda m: m["vqa"].answer(A, "what", 0), "top_k=0 is not a whole number between 1 and 2,"),
        (lambda m: m["vqa"].answer(A, "what", 3), "top_k=3 is not .* the model compares"),
        (lambda m: m["labels"].classify([A, b"x"]), "image 1: 1 bytes: not a picture"),
        (lambda m: m["labels"].classify([]), "nothing to do: give at least one image"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(models, call, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        call(models)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m["vqa"].answer(A, LONG),
        lambda m: m["entailment"].entails(A, LONG),
        lambda m: m["nlvr2"].compare(A, B, LONG),
    ],
)
def test_a_warning_points_to_the_line_that_called_the_verb(models, call):
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than the 24 tokens") as caught:
        call(models)
    assert [one.filename for one in caught] == [__file__]


def test_the_verb_of_another_task_names_those_there_are(models):
    assert not hasattr(models["vqa"], "compare")
    with pytest.raises(AttributeError, match="Entailing has no 'answer' but entails: other tasks'"):
        models["entailment"].answer(A, "what")
