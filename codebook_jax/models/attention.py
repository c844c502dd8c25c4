"""Attention over a sequence's own tokens, and of texts over an image's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from codebook_jax.method.numerics import default_types
from codebook_jax.models.layers import Dense


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence over itself (Vaswani et al., 2017), with padding masked by
    length.

    `value_std` is for the initial value and output weights: how much a token takes in from others
    at first.
    """

    def __init__(
        self, width: int, heads: int, *, std: float, value_std: float, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        stds = jnp.array([std, std, value_std], jnp.float32)[:, None, None]
        self.qkv = Dense(width, (3, heads, width // heads), std=stds, dtype=dtype, rngs=rngs)
        self.out = Dense((heads, width // heads), width, std=value_std, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        lengths: Int[Array, "batch"] | None,
        *,
        implementation: str | None,
    ) -> Float[Array, "batch tokens width"]:
        qkv = self.qkv(x)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return self.out(_attended(query, key, value, lengths, implementation))


class CrossAttention(nnx.Module):
    """Attention of texts over image tokens, whose keys and values are computed once for all texts
    of the image.
    """

    def __init__(
        self, width: int, image_width: int, heads: int, *, std: float, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.query = Dense(width, (heads, width // heads), std=std, dtype=dtype, rngs=rngs)
        self.key_value = Dense(
            image_width, (2, heads, width // heads), std=std, dtype=dtype, rngs=rngs
        )
        self.out = Dense((heads, width // heads), width, std=std, dtype=dtype, rngs=rngs)

    def keys_values(
        self, image_tokens: Float[Array, "images patches image_width"]
    ) -> Float[Array, "images patches 2 heads head_width"]:
        """Keys and values of each image."""
        return self.key_value(image_tokens)

    def __call__(
        self,
        x: Float[Array, "images tokens width"],
        keys_values: Float[Array, "images patches 2 heads head_width"],
        *,
        implementation: str | None,
    ) -> Float[Array, "images tokens width"]:
        """`tokens` may hold several texts of one image in sequence: queries do not see each
        other.
        """
        key, value = keys_values[:, :, 0], keys_values[:, :, 1]
        return self.out(_attended(self.query(x), key, value, None, implementation))


def _attended(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch keys heads head_width"],
    value: Float[Array, "batch keys heads head_width"],
    lengths: Int[Array, "batch"] | None,
    implementation: str | None,
) -> Float[Array, "batch queries heads head_width"]:
    with default_types(query.dtype):
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=implementation
        )
