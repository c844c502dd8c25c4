"""Attention over a sequence's own tokens, and of texts over an image's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from codebook_jax.method.numerics import default_types
from codebook_jax.models.layers import Compute, Dense

Queries = Float[Array, "batch queries heads head_width"]
Keys = Float[Array, "batch keys heads head_width"]


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence over itself (Vaswani et al., 2017); padding is masked.

    `value_std` is of the initial value and output weights.
    """

    def __init__(
        self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs, *, value_std: float
    ) -> None:
        heads, common = (spec.heads, spec.width // spec.heads), dict(dtype=compute.dtype, rngs=rngs)
        stds = jnp.array([spec.init_std, spec.init_std, value_std], jnp.float32)[:, None, None]
        self.qkv = Dense(spec.width, (3, *heads), std=stds, **common)
        self.out = Dense(heads, spec.width, std=value_std, **common)
        self.compute = compute

    def __call__(
        self, x: Float[Array, "batch tokens width"], lengths: Int[Array, "batch"] | None
    ) -> Float[Array, "batch tokens width"]:
        qkv = self.qkv(x)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return self.out(_attended(query, key, value, lengths, self.compute))


class CrossAttention(nnx.Module):
    """Attention of texts over an image, whose `key_value` is computed once for all texts."""

    def __init__(
        self, spec: ConfigDict, image_width: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        heads = spec.heads, spec.width // spec.heads
        common = dict(std=spec.init_std, dtype=compute.dtype, rngs=rngs)
        self.query = Dense(spec.width, heads, **common)
        self.key_value = Dense(image_width, (2, *heads), **common)
        self.out = Dense(heads, spec.width, **common)
        self.compute = compute

    def __call__(
        self,
        x: Float[Array, "images tokens width"],
        keys_values: Float[Array, "images patches 2 heads head_width"],
    ) -> Float[Array, "images tokens width"]:
        """`tokens` may be of several texts in sequence: queries do not see each other."""
        key, value = keys_values[:, :, 0], keys_values[:, :, 1]
        return self.out(_attended(self.query(x), key, value, None, self.compute))


def _attended(
    query: Queries, key: Keys, value: Keys, lengths: Int[Array, "batch"] | None, compute: Compute
) -> Queries:
    options = dict(key_value_seq_lengths=lengths, implementation=compute.attention)
    with default_types(query.dtype):
        return jax.nn.dot_product_attention(query, key, value, **options)
