"""The GELU against SciPy's normal distribution, over every bfloat16 number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from scipy.stats import norm

from codebook_jax.models import layers
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

    def fused(query, key, value, *, key_value_seq_lengths, implementation):
        asked.append((implementation, query.shape[1], key.shape[1]))
        return real(query, key, value, key_value_seq_lengths=key_value_seq_lengths)

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
