"""The verbs of a loaded model that need no training: labels by prompts, heat maps and places."""

import copy

import jax
import numpy as np
import pytest
import scipy.special
from PIL import Image
from small_data import scenes_source, tokenizer_of
from small_run import config_of

from codebook_jax.data.images import resize_square
from codebook_jax.errors import UserError
from codebook_jax.evaluation.grounding import box_scores, resize_map
from codebook_jax.models import codis
from codebook_jax.models.explaining import explain_pairs
from codebook_jax.weights.explained import Explanation, heated
from codebook_jax.weights.load import Codis

TEXT = "A red circle, left-hand of the blue square!"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with random parameters far from the initial ones."""
    config = config_of(**{"model.text.fusion_depth": 2})
    tokenizer = tokenizer_of(scenes_source(), tmp_path_factory.mktemp("run"))
    words, rng = tokenizer.vocabulary.size, np.random.default_rng(0)
    student = codis.init_student(config, words, jax.random.key(0))
    noisy = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    student = jax.tree.map(noisy, student) | {"temperature": np.float32(0.3)}
    return Codis(config, tokenizer, {"student": student}, step=0)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def explanation(model, picture):
    return model.explain(picture, TEXT)


@pytest.fixture
def made():
    """An explanation of our own: the map of "red" is highest in the third patch of four."""
    maps = np.array([[[0, 0], [3, 1]], [[0, 2], [0, 0]]], np.float32)
    pixels = np.full((20, 40, 3), 200, np.uint8)
    return Explanation(("red", "ring"), maps, maps.sum(0), 2, 0.5, pixels)


def test_the_maps_of_words_are_those_of_their_tokens(model, picture, explanation):
    assert " ".join(explanation.words) == "A red circle left hand of the blue square"
    pixels = resize_square(picture, 32)[None]
    tokens, lengths, _ = model._tokenizer.encode([TEXT], 24)
    found = explain_pairs(model._model, model._student, pixels, tokens, lengths)
    maps = np.asarray(found.maps)[0]
    ids, at = tokens[0, : lengths[0]], 1
    for word, own in zip(explanation.words, explanation.maps, strict=True):
        alone = model._tokenizer.encode([word], 24)
        count = alone.lengths[0] - 2
        np.testing.assert_array_equal(ids[at : at + count], alone.tokens[0, 1 : count + 1])
        np.testing.assert_allclose(own.ravel(), maps[at : at + count].sum(0), atol=1e-6)
        at += count
    assert at == lengths[0] - 1 and (explanation.maps.max(axis=(1, 2)) > 0).all()
    np.testing.assert_allclose(explanation.whole.ravel(), maps.sum(0), atol=1e-6)
    assert abs(explanation.probability - model.match(picture, TEXT)[0]) < 1e-5
    assert explanation.layer == 0


def test_a_heat_map_has_the_size_of_the_picture_and_is_red_where_its_word_is(made):
    red = np.asarray(made.picture("red"), int)
    assert red.shape == made.pixels.shape
    warm = red[:, :, 0] - red[:, :, 2]
    y, x = np.unravel_index(warm.argmax(), warm.shape)
    assert y >= 10 and x < 20 and abs(warm[5, 30]) < 9
    np.testing.assert_array_equal(red, np.asarray(made.picture(0)))
    assert (np.asarray(made.picture("ring")) != red).any()
    np.testing.assert_array_equal(np.asarray(made.picture()), heated(made.pixels, made.whole))
    x, y = made.place("ring")
    assert x > 20 and y < 10


def test_a_map_without_anything_leaves_the_picture(made):
    np.testing.assert_array_equal(heated(made.pixels, np.zeros((2, 2))), made.pixels)


@pytest.mark.parametrize("word", ["square", 2, -1, 1.5])
def test_a_word_that_is_not_in_the_text_is_refused_with_those_that_are(made, word):
    with pytest.raises(UserError, match=f"^{word!r} is not one of .* 0 'red', 1 'ring'"):
        made.picture(word)


def test_a_place_is_the_highest_point_of_the_map_and_the_fullest_box(model, picture, explanation):
    boxes = [[0, 0, 30, 20], [30, 0, 30, 20], [0, 20, 30, 20], [30, 20, 30, 20]]
    found = model.ground(picture, TEXT, boxes)
    expected = resize_map(explanation.whole, 40, 60)
    np.testing.assert_allclose(found.map, expected, atol=1e-5)
    x, y = found.point
    assert found.map[int(y), int(x)] == found.map.max() and (x % 1, y % 1) == (0.5, 0.5)
    np.testing.assert_allclose(found.scores, box_scores(expected, np.array(boxes)), rtol=1e-3)
    assert found.best == found.scores.argmax() and found.scores.max() > 0
    without = model.ground(Image.fromarray(picture), TEXT)
    assert without.scores is without.best is None and without.point == found.point


def test_labels_are_told_by_their_prompts_at_the_models_temperature(model, picture):
    pictures, labels = [picture, picture[::-1]], ["a star", "a red ring"]
    prompts = ["{}", "there is {} here"]
    found = model.classify(pictures, labels, prompts)
    told = [model.encode_text([p.replace("{}", label) for p in prompts]) for label in labels]
    told = np.stack([each.mean(0) / np.linalg.norm(each.mean(0)) for each in told])
    cosine = model.encode_image(pictures) @ told.T
    temperature = float(model._items["student"]["temperature"])
    expected = scipy.special.softmax(cosine / temperature, axis=1)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    assert found.best == [labels[at] for at in expected.argmax(1)]
    usual = model.classify(picture, labels)
    own = model.classify(picture, labels, model.config.evaluation.prompts)
    np.testing.assert_array_equal(usual.probabilities, own.probabilities)
    assert usual.probabilities.shape == (1, 2) and len(model.config.evaluation.prompts) > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda m, p: m.classify(p, ["circle " * 40]),
        lambda m, p: m.ground(p, "circle " * 40),
        lambda m, p: m.explain(p, "circle " * 40),
    ],
)
def test_a_warning_points_to_the_line_that_called_the_verb(model, picture, call):
    with pytest.warns(UserWarning, match="are longer than the 24 tokens") as caught:
        call(model, picture)
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m, p: m.explain([p, p], "a star"), "2 images and 1 texts .* one image"),
        (lambda m, p: m.explain(p, "?!"), "text 0, '\\?!', has no words"),
        (lambda m, p: m.explain(b"x", "a star"), "image 0: 1 bytes: not a picture"),
        (lambda m, p: m.ground(p, "a star", [[0, 0, 61.5, 9]]), "'a star': box 1 of 1, .*60 x 40"),
        (lambda m, p: m.ground(p, "a star", []), r"proposals=\[\] are no boxes"),
        (lambda m, p: m.ground(p, "a star", [1, 2, 3, 4]), r"proposals=\[1, 2, .* no boxes"),
        (lambda m, p: m.ground(p, "a star", ["box"]), "proposals=.*'box'.* no boxes"),
        (lambda m, p: m.classify(p, []), "labels is empty"),
        (lambda m, p: m.classify(p, ["a", ""]), "the label '' has no words"),
        (lambda m, p: m.classify(p, "?!"), r"the label '\?!' has no words"),
        (lambda m, p: m.classify(p, ["a"], "a photo"), r"prompts=\('a photo',\) cannot"),
        (lambda m, p: m.classify(p, ["a"], []), r"prompts=\(\) cannot"),
    ],
)
def test_what_cannot_be_explained_is_refused(model, picture, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(model, picture)


def test_a_model_with_one_fusion_layer_or_none_is_refused(model, picture):
    few = copy.copy(model)
    few.config = config_of(**{"model.text.fusion_depth": 1})
    with pytest.raises(UserError, match="single fusion layer"):
        few.explain(picture, "a star")
    few.config = config_of(**{"model.text.fusion_depth": 0})
    for call in (few.explain, few.ground, few.match):
        with pytest.raises(UserError, match="no fusion encoder"):
            call(picture, "a star")


def test_another_text_and_picture_need_no_other_program(model, picture, explanation):
    before = model._explain._cache_size()
    model.explain(picture[:30], "two stars")
    assert model._explain._cache_size() == before == 1
