"""Grad-CAM against the fusion encoder's own forward pass and a derivative by differences."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, Mesh
from small_data import tokenizer_of
from small_run import config_of

from codebook_jax.data.sources import open_source
from codebook_jax.evaluation.zero_shot import find_expressions
from codebook_jax.models import codis, layers
from codebook_jax.models.explaining import explain_pairs, layer_of, relevance
from configs import base

WORDS, TOKENS = 23, 7
SIZES = {
    "model.image.size_px": 21,
    "model.image.patch_px": 7,
    "model.image.width": 15,
    "model.image.depth": 1,
    "model.image.heads": 5,
    "model.text.width": 22,
    "model.text.depth": 1,
    "model.text.heads": 2,
    "model.text.max_tokens": TOKENS,
    "model.text.max_positions": 11,
    "model.dim": 5,
    "model.image.init_std": 0.3,
    "model.text.init_std": 0.3,
    "model.text.value_std": 0.3,
    "codebook.size": 0,
    "losses.codebook": 0.0,
}


@functools.cache
def built(depth=3, dtype="float32"):
    config = base.paper("tiny")
    config.update_from_flattened_dict(
        SIZES | {"model.text.fusion_depth": depth, "model.dtype": dtype}
    )
    return config, codis.Model(config, WORDS)


@pytest.fixture(scope="module")
def student():
    """Parameters far from the initial ones, so that no bias is zero."""
    config, _ = built()
    fresh = jax.jit(lambda key: codis.init_student(config, WORDS, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), fresh)


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(1)
    lengths = np.array([7, 3, 5], np.int32)
    return rng.normal(size=(3, 10, 15)), rng.normal(size=(3, TOKENS, 22)), lengths


@functools.partial(jax.jit, static_argnums=0)
def explained(model, *given):
    return relevance(model, *given, layer=layer_of(3))


def single(tree, dtype=np.float32):
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def test_the_explicit_forward_pass_is_the_fusion_encoders(student, states):
    _, model = built()
    seen, texts, lengths = states
    seen, texts = single((seen, texts))
    found = explained(model, student, seen, texts, lengths)
    own = model.pair_logits(student, seen, texts[:, None], lengths[:, None])[:, 0]
    np.testing.assert_allclose(found.logits, own, atol=1e-5)
    assert np.abs(own).min() > 1e-2


def test_a_map_is_attention_times_its_positive_slope_and_zero_on_padding(
    student, states, monkeypatch
):
    chosen, token, step = layer_of(3), 1, 1e-6
    assert chosen == 1
    *given, lengths = states
    with jax.enable_x64(True):
        _, whole = built(dtype="float64")
        _, alone = built(1, "float64")
        wide = single(student, np.float64)
        found = explained(whole, wide, *given, lengths).maps
        blocks = wide["towers"]["fusion"]["blocks"]

        def score(head=0, patch=0, change=0.0):
            """The matching score of the middle text, by three encoders of a layer each; in the
            second one, a weight is changed. And the weights of that layer.
            """
            x, weights = given[1][:, None], None
            for number in range(3):

                def attended(query, key, value, lengths, *_, number=number, **options):
                    """In float64, which JAX's own attention is not."""
                    nonlocal weights
                    query, key, value = map(np.asarray, (query, key, value))
                    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(11)
                    if lengths is not None:
                        hidden = np.arange(key.shape[1]) >= np.asarray(lengths)[:, None]
                        logits = np.where(hidden[:, None, None], -np.inf, logits)
                    used = scipy.special.softmax(logits, axis=-1)
                    if number == chosen and lengths is None:
                        weights = used[1].copy()
                        used[1, head, token, patch] += change
                    return np.einsum("bhqk,bkhd->bqhd", used, value)

                monkeypatch.setattr(layers, "_attended", attended)
                own = jax.tree.map(lambda p: p[number : number + 1], blocks)  # noqa: B023
                towers = wide["towers"] | {"fusion": {"blocks": own}}
                with jax.disable_jit():
                    x = alone.towers(towers).fusion(x, lengths[:, None], given[0])
            return float(alone.match_logits(wide["matching"], x[1, 0, 0])[1]), weights

        _, weights = score()
        expected = np.zeros(2)
        for place, patch in enumerate((1, 4)):  # 0 is [CLS]
            for head in range(2):
                above, below = (score(head, patch, change)[0] for change in (step, -step))
                slope = max(0.0, (above - below) / (2 * step))
                expected[place] += weights[head, token, patch] * slope / 2
        np.testing.assert_allclose(found[1, token, [0, 3]], expected, rtol=1e-4)
    assert (expected > 1e-6).any() and found.dtype == np.float64
    for row, length in zip(found, lengths, strict=True):
        assert (row[length:] == 0).all() and row[:length].max() > 0


def test_bfloat16_explains_as_float32(student):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (3, 21, 21, 3), np.uint8)
    tokens, lengths = rng.integers(0, WORDS, (3, TOKENS)), np.array([7, 3, 5])
    explain = jax.jit(explain_pairs, static_argnums=0)
    exact, rounded = (
        explain(built(dtype=dtype)[1], student, images, tokens, lengths)
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.maps.dtype == np.float32
    rounded, exact = (np.asarray(each.maps.sum(1)) for each in (rounded, exact))
    alike = np.corrcoef(rounded.ravel(), exact.ravel())[0, 1]
    assert alike > 0.9


def test_expressions_are_found_alike_on_one_device_and_on_a_mesh(tmp_path):
    config = config_of()
    source = open_source(
        "scenes:expressions", role="test", size_px=32, scenes_examples=13, image_root="", seed=0
    )
    tokenizer = tokenizer_of(source, tmp_path)
    words = tokenizer.vocabulary.size
    student = codis.init_student(config, words, jax.random.key(0))
    rng = np.random.default_rng(0)
    student = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), student)
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        model = codis.Model(config, words, mesh)
        figures, _ = find_expressions(model, student, source, tokenizer, config, images=13)
        found.append(figures)
    assert found[0] == found[1] and found[0]["expressions"] == 13
