"""The towers' sizes against those published, and the towers against themselves piece by piece.

test_towers.py and weights/test_albef.py compare them with PyTorch's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebook_jax.method.numerics import unit
from codebook_jax.models import codis
from codebook_jax.models.bert import Negatives
from codebook_jax.models.layers import dropout
from configs import base

VOCABULARY = 30_522  # BERT's, uncased
TINY = {
    "model.image.size_px": 21,
    "model.image.patch_px": 7,
    "model.image.width": 12,
    "model.image.depth": 3,
    "model.image.heads": 3,
    "model.text.width": 10,
    "model.text.depth": 2,
    "model.text.fusion_depth": 3,
    "model.text.heads": 2,
    "model.text.max_tokens": 7,
    "model.text.max_positions": 11,
    "model.text.dropout": 0.1,
    "model.dim": 5,
    "model.image.init_std": 0.3,
    "model.text.init_std": 0.3,
    "model.text.value_std": 0.3,
    "codebook.size": 6,
}
WORDS = 23


def tiny(**changes):
    config = base.paper("tiny")
    config.update_from_flattened_dict(TINY | changes)
    return config


@functools.cache
def built(**changes):
    return codis.Model(tiny(**changes), WORDS)


@pytest.fixture(scope="module")
def fresh():
    """The initial parameters of the tiny size."""
    return jax.jit(lambda key: codis.init_student(tiny(), WORDS, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def student(fresh):
    """The same, each moved off its initial value so that no bias is zero and no scale one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(size=x.shape).astype(np.float32) * 0.1, fresh
    )


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    lengths = np.array([7, 3, 5, 4], np.int32)
    return dict(
        images=rng.normal(size=(4, 21, 21, 3)).astype(np.float32),
        tokens=rng.integers(0, WORDS, (4, 7)).astype(np.int32),
        lengths=lengths,
    )


def forward(model, towers, images, tokens, lengths, key=None):
    """(image feature, text feature, image tokens, text states, fused states, word logits)"""
    towers = model.towers(towers)
    image, image_tokens = towers.embed_images(images)
    text, states = towers.embed_texts(tokens, lengths, key)
    fused = towers.fusion(states[:, None], lengths[:, None], image_tokens, key=key)[:, 0]
    return image, text, image_tokens, states, fused, towers.word_logits(fused)


RUN = jax.jit(forward, static_argnums=0)


# -- how many parameters


@pytest.mark.parametrize(
    ("size", "image", "patches", "text"),
    [
        # Published: ViT-B/16 at 224 px and ViT-L/16 without their classifiers; BERT-base and
        # BERT-large without their poolers.
        ("base", 85_798_656, 257 - 197, 108_891_648),
        ("large", 303_301_632, 257 - 197, 334_092_288),
    ],
)
def test_a_size_has_the_parameters_of_the_published_vit_and_bert(size, image, patches, text):
    at, config = base.SIZES[size], base.get_config(size)
    shapes = jax.eval_shape(lambda: codis.init_student(config, VOCABULARY, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    width, image_width = at["text"]["width"], at["image"]["width"]
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part))  # noqa: E731
    towers = {name: count(part) for name, part in shapes["towers"].items()}
    # what the fusion layers have and BERT lacks
    cross = 2 * (width * width + width) + 2 * (image_width * width + width) + 2 * width
    cross *= at["text"]["fusion_depth"]
    assert towers["text"] + towers["fusion"] - cross == text
    assert towers["image"] == image + patches * image_width
    assert towers["image_projection"] == (image_width + 1) * at["dim"]
    assert towers["masked_words"] == width * width + width + 2 * width + VOCABULARY


def test_matching_logits_are_the_students_head_in_float32(student):
    cls = np.random.default_rng(2).normal(size=(3, 10)).astype(np.float32)
    head = jax.tree.map(np.float64, student["matching"]["classes"])
    logits = built().match_logits(student["matching"], jnp.asarray(cls, jnp.bfloat16))
    rounded = np.asarray(jnp.asarray(cls, jnp.bfloat16), np.float64)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, rounded @ head["kernel"] + head["bias"], atol=1e-5)


# -- against themselves


def test_what_the_backward_pass_recomputes_does_not_change_the_gradient(student, inputs):
    def gradient(**changes):
        model = built(**changes)

        def objective(towers):  # every tower's blocks go through one scan: the text's stand for all
            encode = model.towers(towers).embed_texts
            feature, states = encode(inputs["tokens"], inputs["lengths"], jax.random.key(0))
            return jnp.sum(jnp.sin(states)) + jnp.sum(jnp.sin(feature))

        return jax.jit(jax.grad(objective))(student["towers"])

    plain = gradient(**{"model.remat": "none"})
    assert np.abs(plain["text"]["blocks"]["mlp"]["up"]["kernel"]).max() > 1e-3
    for changes in ({"model.remat": "blocks"}, {"model.remat": "dots", "model.scan_unroll": 2}):
        other = gradient(**changes)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()),
            plain,
            other,
        )


def test_tokens_after_the_length_change_no_output_before_it(student, inputs):
    model = built()
    padding = np.arange(7)[None, :] >= inputs["lengths"][:, None]
    assert padding.any()
    other = np.where(padding, (inputs["tokens"] + 5) % WORDS, inputs["tokens"])
    first = RUN(model, student["towers"], **inputs)
    second = RUN(model, student["towers"], **(inputs | {"tokens": other}))
    np.testing.assert_array_equal(first[1], second[1])
    for before, after in zip(first[3:], second[3:], strict=True):
        np.testing.assert_array_equal(np.asarray(before)[~padding], np.asarray(after)[~padding])
        assert (np.asarray(before)[padding] != np.asarray(after)[padding]).any()


@pytest.fixture(scope="module")
def fused(student):
    """The fusion encoder as one program for each shape."""
    model = built()

    @jax.jit
    def run(states, lengths, image_tokens, negative=None):
        negatives = None if negative is None else Negatives(negative, 2)
        return model.towers(student["towers"]).fusion(
            states, lengths, image_tokens, negatives=negatives
        )

    return run


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(3)
    return (
        rng.normal(size=(4, 3, 7, 10)).astype(np.float32),
        rng.integers(3, 8, (4, 3)).astype(np.int32),
        rng.normal(size=(4, 10, 12)).astype(np.float32),
    )


def test_the_last_text_looks_at_its_negative_image_as_if_that_had_been_given(fused, states):
    text, lengths, image_tokens = states
    negative = np.array([1, 1, 0, 1], np.int32)  # places in groups of two
    rows = np.array([1, 1, 2, 3])
    found = fused(text, lengths, image_tokens, negative)
    own = fused(text[:, :2], lengths[:, :2], image_tokens)
    np.testing.assert_allclose(found[:, :2], own, rtol=1e-5, atol=1e-5)
    other = fused(text[:, 2:], lengths[:, 2:], image_tokens[rows])
    np.testing.assert_allclose(found[:, 2:], other, rtol=1e-5, atol=1e-5)
    plain = fused(text[:, 2:], lengths[:, 2:], image_tokens)
    assert np.abs(np.asarray(plain - found[:, 2:]))[[0, 2]].max() > 1e-2  # rows with another image


def test_several_texts_of_one_image_are_what_they_are_one_by_one(fused, states):
    text, lengths, image_tokens = states
    together = fused(text, lengths, image_tokens)
    for place in range(3):
        alone = fused(text[:, place, None], lengths[:, place, None], image_tokens)
        np.testing.assert_allclose(together[:, place, None], alone, rtol=1e-5, atol=1e-5)


def test_bfloat16_towers_point_where_float32_ones_do(student, inputs):
    wide = RUN(built(), student["towers"], **inputs)
    narrow = RUN(built(**{"model.dtype": "bfloat16"}), student["towers"], **inputs)
    for index in (0, 1):
        assert narrow[index].dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(narrow[index], axis=1), 1, rtol=1e-5)
        cosine = np.sum(np.asarray(wide[index]) * np.asarray(narrow[index]), axis=1)
        assert (cosine > 0.999).all(), cosine
    assert narrow[2].dtype == narrow[4].dtype == jnp.bfloat16 and narrow[5].dtype == jnp.float32
    assert not np.array_equal(wide[0], narrow[0])


def test_dropout_happens_with_a_key_alone_and_follows_it(student, inputs):
    model = built()
    still = RUN(model, student["towers"], **inputs)
    one, again, other = (
        RUN(model, student["towers"], **inputs, key=jax.random.key(k)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one[4], again[4])
    assert not np.allclose(one[4], other[4]) and not np.allclose(one[4], still[4])
    np.testing.assert_array_equal(one[2], still[2])  # none in the ViT
    off = RUN(
        built(**{"model.text.dropout": 0.0}), student["towers"], **inputs, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(off[4], still[4])


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = jnp.ones((200, 500))
    dropped = np.asarray(jax.jit(lambda x, key: dropout(x, 0.1, key))(x, jax.random.key(0)))
    share = (dropped == 0).mean()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / x.size)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.9, rtol=1e-6)


def test_a_row_of_zeros_has_no_direction_and_a_finite_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    cubes, gradient = jax.jit(jax.value_and_grad(lambda x: (unit(x) ** 3).sum()))(x)
    np.testing.assert_allclose(cubes, 0.6**3 + 0.8**3, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_a_fresh_codebook_is_of_unit_rows_and_the_temperature_is_the_configs(fresh):
    np.testing.assert_allclose(jnp.linalg.norm(fresh["codebook"]["codes"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(fresh["temperature"], 0.07, rtol=1e-6)


CONV = {"model.image.size_px": 48, "model.image.patch_px": 16, "model.image.width": 16}
CONV |= {"model.image.heads": 2, "model.image.stem": "conv", "model.pool": "mean"}


def test_the_stem_is_convolutions_with_norms_and_scaled_gelus_between():
    model = built(**CONV)
    fresh = codis.init_student(tiny(**CONV), WORDS, jax.random.key(0))["towers"]
    rng = np.random.default_rng(0)
    towers = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), fresh)
    images = rng.normal(size=(2, 48, 48, 3)).astype(np.float32)
    x, stem = images, towers["image"]["patches"]
    kernel = stem["conv0"]["kernel"].reshape(2, 2, 4, 4, 3, -1).transpose(0, 2, 1, 3, 4, 5)
    kernels = [kernel.reshape(8, 8, 3, -1)]
    kernels += [
        stem[name]["kernel"].reshape(3, 3, -1, stem[name]["bias"].size)
        for name in ("conv1", "conv2")
    ]
    for layer, (kernel, stride, pad) in enumerate(zip(kernels, (4, 2, 2), (4, 1, 1), strict=True)):
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(pad, 0)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + stem[f"conv{layer}"]["bias"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * stem[f"norm{layer}"]["scale"] + stem[f"norm{layer}"]["bias"]
        x = (jax.nn.gelu(x, approximate=False) - 0.28209479) / 0.588
    expected = x.reshape(2, 9, 16) @ stem["linear"]["kernel"] + stem["linear"]["bias"]
    found = jax.jit(lambda towers: model.towers(towers).image.patches(images))(towers)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # GELU of a standard normal has this mean and standard deviation
    normal = jax.nn.gelu(rng.normal(size=2_000_000).astype(np.float32), approximate=False)
    np.testing.assert_allclose([normal.mean(), normal.std()], [0.2821, 0.588], atol=2e-3)


def test_the_mean_is_over_the_patches_and_over_the_tokens_of_each_text(inputs):
    model, towers = (
        built(**CONV),
        codis.init_student(tiny(**CONV), WORDS, jax.random.key(0))["towers"],
    )
    images = np.random.default_rng(0).normal(size=(4, 48, 48, 3)).astype(np.float32)
    say = jax.jit(
        lambda towers: (
            model.towers(towers).embed_images(images),
            model.towers(towers).embed_texts(inputs["tokens"], inputs["lengths"]),
        )
    )
    (image, patches), (text, states) = jax.device_get(say(towers))
    means = {"image": patches[:, 1:].mean(axis=1)}
    means["text"] = np.stack(
        [own[:n].mean(axis=0) for own, n in zip(states, inputs["lengths"], strict=True)]
    )
    for name, found in {"image": image, "text": text}.items():
        layer = towers[f"{name}_projection"]
        expected = means[name] @ layer["kernel"] + layer["bias"]
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
