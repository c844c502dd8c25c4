"""The heads on top of the towers: words at masked positions, and whether a pair matches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from codebook_jax.method.numerics import wide_enough
from codebook_jax.models.layers import Compute, Dense, LayerNorm, gelu

MATCH = 1  # the class of a matching pair (ALBEF)


class MaskedWordHead(nnx.Module):
    """A transform, then the word embeddings as output layer, and a bias (Devlin et al., 2019)."""

    def __init__(
        self, spec: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        width, self.dtype = spec.width, compute.dtype
        self.transform = Dense(width, width, std=spec.init_std, dtype=compute.dtype, rngs=rngs)
        self.norm = LayerNorm(spec, compute, rngs)
        self.bias = nnx.Param(jnp.zeros((vocabulary_size,), jnp.float32))

    @jax.named_scope("words")
    def __call__(
        self, states: Float[Array, "*some width"], words: Float[Array, "vocab width"]
    ) -> Float[Array, "*some vocab"]:
        """Logits over the vocabulary, in at least float32."""
        x, words = self.norm(gelu(self.transform(states))), words.astype(self.dtype)
        wide = wide_enough(self.dtype)
        return jnp.einsum("...w,vw->...v", x, words, preferred_element_type=wide) + self.bias[...]


class MatchingHead(nnx.Module):
    """Two logits of a pair from its [CLS] state, in at least float32 (Li et al. 2021, 3.2)."""

    def __init__(self, width: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.classes = Dense(width, 2, std=std, dtype=None, rngs=rngs)

    @jax.named_scope("matching")
    def __call__(self, cls: Float[Array, "*some width"]) -> Float[Array, "*some 2"]:
        return self.classes(cls)
