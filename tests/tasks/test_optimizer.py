"""The learning rate at its corners, what decays by name, and AdamW and Muon against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_task import assert_close, batch_of, read_back, run, task_on

from codebook_jax.models import codis
from codebook_jax.tasks.optimizer import decayed, from_config
from configs import base


def made(peak, ends, warmup_steps, steps, *, clip_norm=0.0):
    """The rate and the optimizer of these settings."""
    config = base.paper("tiny")
    config.train.steps = steps
    config.optimizer.update(
        learning_rate=peak, learning_rate_ends=ends, warmup_steps=warmup_steps, clip_norm=clip_norm
    )
    config.optimizer.update(weight_decay=0.02, b1=0.9, b2=0.999, eps=1e-8)
    return from_config(config)


def test_the_rate_warms_up_in_a_line_and_falls_in_half_a_cosine():
    rate, _ = made(1e-4, 1e-5, 2000, 58_590)
    for step, expected in {
        0: 1e-5,
        500: 1e-5 + 9e-5 / 4,
        1000: 5.5e-5,
        2000: 1e-4,
        2000 + 56_590 // 2: 5.5e-5,  # half way down
        2000 + 56_590 // 4: 1e-5 + 9e-5 * (1 + np.cos(np.pi * (56_590 // 4) / 56_590)) / 2,
        58_590: 1e-5,
        70_000: 1e-5,
    }.items():
        np.testing.assert_allclose(rate(step), expected, rtol=1e-4, err_msg=str(step))


def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak():
    rate, _ = made(1e-4, 1e-5, 2000, 10)
    np.testing.assert_allclose([rate(0), rate(9), rate(10)], [1e-5, 1e-4, 1e-5], rtol=1e-5)
    assert np.isfinite(made(1e-4, 1e-5, 5, 1)[0](0))


@pytest.fixture(scope="module")
def student():
    """The real parameter tree of `base`, as shapes."""
    config = base.get_config("base")
    return jax.eval_shape(lambda: codis.init_student(config, 30_522, jax.random.key(0)))


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_of_the_real_parameters_matrices_and_embeddings_decay_and_nothing_else(student):
    decays = {name for name, decay in names(decayed(student)).items() if decay}
    kernels = {
        # one product a line: image blocks, text blocks, fusion blocks with their cross-attention,
        # and the rest
        *(f"towers/image/blocks/{part}/kernel" for part in ("attention/qkv", "attention/out")),
        *(f"towers/image/blocks/mlp/{part}/kernel" for part in ("up", "down")),
        *(f"towers/text/blocks/{part}/kernel" for part in ("attention/qkv", "attention/out")),
        *(f"towers/text/blocks/mlp/{part}/kernel" for part in ("up", "down")),
        *(f"towers/fusion/blocks/{part}/kernel" for part in ("attention/qkv", "attention/out")),
        *(f"towers/fusion/blocks/mlp/{part}/kernel" for part in ("up", "down")),
        *(f"towers/fusion/blocks/cross/{part}/kernel" for part in ("query", "key_value", "out")),
        "towers/image/patches/kernel",
        "towers/image_projection/kernel",
        "towers/text_projection/kernel",
        "towers/masked_words/transform/kernel",
        "matching/classes/kernel",
    }
    embeddings = {"towers/image/cls", "towers/text/words", "towers/text/segment"}
    assert decays == kernels | embeddings and len(decays) == 23
    rest = names(student).keys() - decays
    assert {"temperature", "codebook/codes", "towers/masked_words/bias"} <= rest
    assert {name.rsplit("/")[-1] for name in rest} == {
        "bias", "scale", "positions", "temperature", "codes"
    }  # fmt: skip
    # One bias for each of the 20 products, one of the vocabulary; a scale and a bias for each of
    # the 10 norms.
    assert sum(name.endswith("/bias") for name in rest) == 20 + 1 + 10
    assert sum(name.endswith("/scale") for name in rest) == 10


def test_three_steps_of_adamw_are_those_of_numpy_and_biases_do_not_decay():
    rng = np.random.default_rng(0)
    shapes = {"layer": {"kernel": (5, 3), "bias": (2, 3)}, "codebook": {"codes": (4, 3)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    parameters = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=is_shape
    )
    rates = [0.01, 0.055, 0.1]
    _, transform = made(0.1, 0.01, 2, 10)
    found = jax.tree.map(jnp.asarray, parameters)
    moments = transform.init(found)
    expected = jax.tree.map(np.float64, parameters)
    first = jax.tree.map(np.zeros_like, expected)
    second = jax.tree.map(np.zeros_like, expected)
    decay = {"layer": {"kernel": 0.02, "bias": 0.0}, "codebook": {"codes": 0.0}}
    update = jax.jit(transform.update)
    for step in range(1, 4):
        gradients = jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=is_shape
        )
        updates, moments = update(gradients, moments, found)
        found = jax.tree.map(jnp.add, found, updates)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * np.square(g), second, gradients)
        expected = jax.tree.map(
            lambda p, m, v, d, step=step: (
                p
                - rates[step - 1]
                * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) + d * p)
            ),
            expected,
            first,
            second,
            decay,
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
        )


def test_a_zero_gradient_moves_only_what_decays():
    parameters = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2, 2), 3.0)}
    _, transform = made(0.1, 0.1, 0, 10)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = transform.update(zeros, transform.init(parameters), parameters)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.02 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_clipping_scales_the_whole_gradient_to_its_norm_and_leaves_a_small_one():
    parameters = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    gradients = {"a": jnp.full(3, 4.0), "b": jnp.full(4, -3.0)}
    norm = np.sqrt(3 * 16 + 4 * 9)
    for clip, scale in [(1.0, 1 / norm), (100.0, 1.0), (0.0, 1.0)]:
        _, transform = made(0.1, 0.1, 0, 10, clip_norm=clip)
        update = jax.jit(lambda g, p, t=transform: t.update(g, t.init(p), p))
        _, moments = update(gradients, parameters)
        first = [leaf for name, leaf in names(moments).items() if "mu/a" in name]
        np.testing.assert_allclose(first[0], 0.1 * 4.0 * scale, rtol=1e-5, err_msg=str(clip))


def newton_schulz(matrix):
    """Five rounds of Jordan's polynomial, which brings all singular values near 1."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_three_steps_of_muon_are_those_of_numpy_each_projection_of_all_heads_a_matrix():
    layers, width, heads, each = 2, 6, 2, 3
    config = base.paper("tiny")
    config.train.steps = 10
    config.optimizer.update(name="muon", learning_rate=0.01, learning_rate_ends=0.001)
    config.optimizer.update(warmup_steps=2, weight_decay=0.02, muon_learning_rate=0.3)
    rate, transform = from_config(config)
    shape = (layers, width, 3, heads, each)
    found = {"blocks": {"qkv": {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[2:])}}}
    expected, moment = np.ones(shape), np.zeros(shape)
    moments, update = transform.init(found), jax.jit(transform.update)
    rng = np.random.default_rng(0)
    for step in range(3):
        gradient = rng.normal(size=shape)
        grown = {"kernel": gradient.astype(np.float32), "bias": np.zeros(shape[2:], np.float32)}
        updates, moments = update({"blocks": {"qkv": grown}}, moments, found)
        found = jax.tree.map(jnp.add, found, updates)
        moment = 0.95 * moment + 0.05 * gradient
        ahead = 0.95 * moment / (1 - 0.95 ** (step + 2)) + 0.05 * gradient / (
            1 - 0.95 ** (step + 1)
        )
        for layer in range(layers):
            for part in range(3):
                of_all_heads = ahead[layer, :, part].reshape(width, -1)
                direction = newton_schulz(of_all_heads).reshape(width, heads, each)
                old = expected[layer, :, part]
                # decay is AdamW's: its rate times 0.02
                lost = float(rate(step)) * 0.02 * old
                expected[layer, :, part] = old - 30 * float(rate(step)) * direction - lost
    np.testing.assert_allclose(found["blocks"]["qkv"]["kernel"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["blocks"]["qkv"]["bias"], 1)


def test_muon_moves_every_matrix_inside_the_network_by_orthogonal_steps_and_adamw_the_rest():
    config = base.paper("tiny")
    config.optimizer.update(name="muon", warmup_steps=0, weight_decay=0.0, muon_learning_rate=0.5)
    student = codis.init_student(config, 50, jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: np.float32(rng.normal(size=x.shape))  # noqa: E731
    rate, transform = from_config(config)
    update = jax.jit(lambda g, p: transform.update(g, transform.init(p), p)[0])
    moved = names(jax.device_get(update(jax.tree.map(draw, student), student)))
    kernels = {name for name in moved if name.endswith("kernel")}
    by_adamw = {"towers/image/patches/kernel", "matching/classes/kernel"}
    assert len(kernels - by_adamw) == 18
    for name in moved.keys() - kernels | by_adamw:  # the first step of Adam has one size
        np.testing.assert_allclose(np.abs(moved[name]), rate(0), rtol=1e-3, err_msg=name)
    for name in kernels - by_adamw:
        step, count = moved[name], len(moved[name]) if "/blocks/" in name else 1
        if name.endswith(("qkv/kernel", "key_value/kernel")):  # [layers, inputs, 3, heads, each]
            step, count = np.moveaxis(step, 2, 1), count * step.shape[2]
        step = step.reshape(count, 512 if "down" in name else 128, -1)
        size = np.linalg.svd(step / (0.5 * rate(0) / 0.0015), compute_uv=False)
        wider = max(1, step.shape[2] / step.shape[1]) ** 0.5
        assert size.max() < 1.3 * wider and np.mean(size > 0.6 * wider) > 0.95, name


@pytest.mark.slow
def test_a_run_with_muon_a_stem_and_means_goes_on_bit_for_bit_and_alike_on_eight_devices(tmp_path):
    changes = {"optimizer.name": "muon", "model.image.stem": "conv", "model.pool": "mean"}
    changes["teacher.alpha"] = 0.0  # the teacher reads no hidden words
    one, eight = (task_on(*sizes, **changes) for sizes in ((1, 1, 1), (2, 2, 2)))
    one.check(one.config)
    first, batches = jax.device_get(one.init_state(0)), [batch_of(seed) for seed in range(3)]
    states, scalars = run(one, first, batches)
    assert all(np.isfinite(row["loss"]) for row in scalars)
    again, _ = run(one, read_back(one, states[1], tmp_path), batches[2:])
    assert_close(again[-1], states[-1], rtol=0)
    spread, _ = run(eight, first, batches[:1])
    assert_close(spread[0], states[0], rtol=1e-4)
