"""The GELU against SciPy's normal distribution, over every bfloat16 number; LayerNorm in NumPy."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from scipy.stats import norm

from codebook_jax.models import layers, vit
from codebook_jax.models.layers import gelu


@pytest.fixture(scope="module")
def every_bfloat16():
    numbers = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    return numbers[np.isfinite(numbers.astype(np.float32))]


def assert_rounded(found, expected):
    """Within one unit in the last place of bfloat16, or of its smallest normal number, which
    backends flush.
    """
    limits = jnp.finfo(jnp.bfloat16)
    size = np.maximum(np.abs(expected), float(limits.tiny))
    unit = np.exp2(np.floor(np.log2(size))) * float(limits.eps)
    wrong = np.abs(np.asarray(found, np.float64) - expected)
    assert (wrong <= np.maximum(unit, float(limits.tiny))).all()


def test_gelu_and_its_slope_are_exact_to_the_rounding_of_every_bfloat16(every_bfloat16):
    x = every_bfloat16.astype(np.float64)
    found = jax.jit(gelu)(every_bfloat16)
    assert found.dtype == jnp.bfloat16
    assert_rounded(found, x * scipy.special.ndtr(x))
    slope = jax.jit(jax.vmap(jax.grad(gelu)))(every_bfloat16)
    assert_rounded(slope, scipy.special.ndtr(x) + x * norm.pdf(x))


def test_the_backward_pass_of_gelu_keeps_its_bfloat16_input_alone():
    x = jnp.linspace(-4, 4, 33, dtype=jnp.bfloat16)
    (kept,) = jax.tree.leaves(jax.vjp(gelu, x)[1])
    np.testing.assert_array_equal(kept, x)


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 2e-2), ("float32", 1e-6)])
def test_gelu_in_a_scan_that_is_computed_again_has_the_same_gradient(dtype, rtol):
    def scanned(x):
        body = jax.checkpoint(lambda x, _: (gelu(x), None), prevent_cse=False)
        return jax.lax.scan(body, x, length=3)[0].sum()

    x = jnp.linspace(-3, 3, 13).astype(dtype)
    plain = jax.jit(jax.grad(lambda x: gelu(gelu(gelu(x))).sum()))(x).astype(jnp.float32)
    np.testing.assert_allclose(
        jax.jit(jax.grad(scanned))(x).astype(jnp.float32), plain, rtol=rtol, atol=1e-6
    )


def test_gelu_of_wider_types_is_the_formula_with_erf():
    formula = lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))  # noqa: E731
    x = jnp.linspace(-6, 6, 101, dtype=jnp.float32)
    assert str(jax.make_jaxpr(gelu)(x)) == str(jax.make_jaxpr(formula)(x))
    with jax.enable_x64(True):
        wide = np.linspace(-6, 6, 101)
        found = gelu(jnp.asarray(wide))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wide * scipy.special.ndtr(wide), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "tokens, seen, lengths", [(257, 257, None), (30, 257, None), (7, 7, [5, 7])]
)
def test_attention_by_cudnn_gets_even_lengths_and_gives_the_same(
    monkeypatch, tokens, seen, lengths
):
    """cuDNN's kernel, as JAX calls it, refuses odd lengths in training: ViT-B/16 has 257 tokens."""
    real, asked = jax.nn.dot_product_attention, []

    def fused(query, key, value, *, implementation, **options):
        asked.append((implementation, query.shape[1], key.shape[1]))
        return real(query, key, value, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    query, key, value = (
        jax.random.normal(jax.random.key(each), (2, length, 2, 8))
        for each, length in enumerate((tokens, seen, seen))
    )
    lengths = None if lengths is None else jnp.array(lengths)

    def attended(implementation):
        compute = layers.Compute(jnp.float32, "none", 1, implementation, None)

        def total(*arrays):
            out = layers._attended(*arrays, lengths, compute)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(query, key, value)

    ((_, out), slopes), ((_, other), others) = attended("cudnn"), attended("xla")
    assert asked == [("cudnn", tokens + tokens % 2, seen + seen % 2), ("xla", tokens, seen)]
    np.testing.assert_allclose(out, other, atol=1e-6)
    for slope, same in zip(slopes, others, strict=True):
        np.testing.assert_allclose(slope, same, atol=1e-6)


def layer_norm(dtype, epsilon=1e-6, width=24):
    spec = SimpleNamespace(layer_norm_eps=epsilon, width=width)
    compute = layers.Compute(jnp.dtype(dtype), "none", 1, "xla", None)
    return layers.LayerNorm(spec, compute, nnx.Rngs(0))


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 1e-2), ("float32", 3e-6)])
def test_layer_norm_and_its_gradients_are_those_of_float64(dtype, rtol):
    """Outside check: the gradients by the textbook's Jacobian, row by row in NumPy."""
    draw, epsilon = np.random.default_rng(0), 0.1
    x, pull = (draw.normal(3, 2, (2, 5, 24)).astype(dtype) for _ in range(2))
    scale, bias = (draw.normal(1, 0.5, 24).astype(np.float32) for _ in range(2))
    graph = nnx.graphdef(layer_norm(dtype, epsilon))

    def applied(x, scale, bias):
        return nnx.merge(graph, nnx.State({"scale": scale, "bias": bias}))(x)

    y, pulled = jax.vjp(applied, *map(jnp.asarray, (x, scale, bias)))
    assert y.dtype == dtype
    wide, gradient = (np.asarray(a, np.float64).reshape(10, 24) for a in (x, pull))
    rate = 1 / np.sqrt(wide.var(axis=1, keepdims=True) + epsilon)
    unit = (wide - wide.mean(axis=1, keepdims=True)) * rate
    jacobians = [
        rate[i] * (np.eye(24) - 1 / 24 - np.outer(unit[i], unit[i]) / 24) for i in range(10)
    ]
    expected = (
        unit * scale + bias,
        np.stack([j @ (g * scale) for j, g in zip(jacobians, gradient, strict=True)]),
        (gradient * unit).sum(axis=0),
        gradient.sum(axis=0),
    )
    for found, right in zip((y, *pulled(jnp.asarray(pull))), expected, strict=True):
        found = np.asarray(found, np.float64).reshape(right.shape)
        assert np.abs(found - right).max() <= rtol * np.abs(right).max()


def test_the_backward_pass_of_layer_norm_keeps_its_bfloat16_input_and_two_numbers_a_row():
    norm, x = layer_norm("bfloat16"), jnp.linspace(-4, 4, 72, dtype=jnp.bfloat16).reshape(3, 24)
    kept = jax.tree.leaves(jax.vjp(norm, x)[1])
    assert sorted((leaf.shape, str(leaf.dtype)) for leaf in kept) == [
        ((3,), "float32"),
        ((3,), "float32"),
        ((3, 24), "bfloat16"),
        ((24,), "float32"),
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_backward_pass_of_a_feed_forward_keeps_no_output_of_the_gelu(dtype):
    """Of the hidden layer, one array: the input of the GELU, not what the next product reads."""
    spec = SimpleNamespace(width=24, mlp_width=0, init_std=0.02)
    compute = layers.Compute(jnp.dtype(dtype), "none", 1, "xla", None)
    block = layers.FeedForward(spec, compute, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 24), dtype)
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(block, x)[1])]
    assert kept.count((5, 96)) == 1
    plain = lambda x: block.down(gelu(block.up(x)))  # noqa: E731
    slope, same = (jax.vjp(f, x)[1](jnp.ones_like(x))[0] for f in (block, plain))
    np.testing.assert_array_equal(slope, same)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_backward_pass_of_stacked_blocks_keeps_no_copy_of_their_kernels(dtype):
    spec = SimpleNamespace(width=24, heads=2, mlp_width=0, init_std=0.02, layer_norm_eps=1e-6)
    compute = layers.Compute(jnp.dtype(dtype), "none", 1, "xla", None)
    make = lambda rngs: vit.VisionBlock(spec, compute, rngs)  # noqa: E731
    graph, state = nnx.split(layers.stack(make, 3, nnx.Rngs(0)))

    def run(parameters, x):
        blocks = nnx.merge(graph, nnx.State(parameters))
        return layers.scan(blocks, lambda block, x, _: block(x), x, None, compute)

    parameters = nnx.to_pure_dict(state)
    kept = jax.tree.leaves(jax.vjp(run, parameters, jnp.zeros((2, 5, 24), dtype))[1])
    kernels = [leaf for leaf in jax.tree.leaves(parameters) if leaf.size >= 3 * 24 * 24]
    sizes = {leaf.size for leaf in kernels}
    stacked = [leaf for leaf in kept if leaf.size in sizes]
    assert len(stacked) == len(kernels) == 4
    assert all(any(leaf is kernel for kernel in kernels) for leaf in stacked)
