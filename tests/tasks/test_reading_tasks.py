"""Tasks that read other data than they are named after: expressions as pairs, pairs as choices."""

from types import SimpleNamespace

import numpy as np
import pytest
from golden_weights import one_mesh
from list_files import open_it
from small_data import tokenizer_of
from small_finetune import config_of

from codebook_jax import build
from codebook_jax.data.sources import source_of
from codebook_jax.tasks import judging, nlvr2
from codebook_jax.tasks.draws import Pair


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(open_it("scenes:expressions"), tmp_path_factory.mktemp("run"))


def test_expressions_are_learned_as_pairs_by_the_weights_of_their_sources(tokenizer):
    mixed = "scenes:expressions?weight=3,scenes:expressions?weight=1"
    config = config_of("grounding", **{"data.train": mixed, "itm.groups": 1})
    task = build.TASKS["grounding"](config, tokenizer.vocabulary, one_mesh())
    source = source_of(config, mixed, "train", kind="expressions")
    examples = []
    with task.batches(source, tokenizer, start_step=0, workers=0) as batches:
        for _ in range(8):
            batch = next(batches)
            examples += batch.example.tolist()
            texts = [source[at].text for at in batch.example.tolist()]
            tokens = tokenizer.encode(texts, config.model.text.max_tokens).tokens
            np.testing.assert_array_equal(batch.tokens, tokens)
    assert len(examples) == 64 and sum(at < len(source) // 2 for at in examples) == 48


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_negatives_are_drawn_at_random_or_as_they_are_alike(negatives, tokenizer):
    config = config_of("grounding", **{"itm.negatives": negatives, "itm.groups": 1})
    task = build.TASKS["grounding"](config, tokenizer.vocabulary, one_mesh())
    random = np.random.default_rng(0)
    features = Pair(*random.normal(size=(2, 8, 4)).astype(np.float32))
    noise = Pair(*random.normal(size=(2, 8, 8)).astype(np.float32))
    inputs = SimpleNamespace(allowed=~np.eye(8, dtype=bool), noise=noise)
    student = {"temperature": np.float32(1e-3)}  # the noise decides nothing
    found = task._negatives(student, features, inputs, features)
    cosines = features.text @ features.image.T
    scores = (cosines, cosines.T) if negatives == "hard" else (noise.text, noise.image)
    for places, score in zip(found, scores, strict=True):
        expected = np.where(inputs.allowed, score, -np.inf).argmax(axis=1)
        np.testing.assert_array_equal(places, expected)


def test_a_grounding_score_is_told_also_if_some_expressions_have_no_score_above_zero():
    figures = {"pointing": 20.0, "pointing_chance": 9.0, "accuracy": 37.5, "chance": 25.0}
    judged = judging.expressions((figures, "a table\n2 of them with no score above 0"))
    assert judged.score == 37.5 and "37.50 %" in judged.summary and "25.00 %" in judged.summary
    judged = judging.expressions(({"pointing": 20.0, "pointing_chance": 9.0}, "a table"))
    assert judged.score == 20 and "20.00 %" in judged.summary and "9.00 %" in judged.summary


def test_a_text_is_assigned_to_its_own_picture_first_second_or_not_at_all():
    pairs = open_it("scenes", role="validation")
    labels = ("first", "second", "neither")
    assigned = nlvr2._Assigned(pairs, labels)
    assert len(assigned) == len(pairs)
    for at in range(6):
        example, own = assigned[at], pairs[at]
        here = [np.array_equal(image, own.image) for image in example.images]
        assert example.text == own.captions[0] and example.answers == (labels[at % 3],)
        assert here == [label == labels[at % 3] for label in labels[:2]]
