"""Drawing masked words, and negatives for matching; `tasks/draws.py` uses it for a step's draws."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from codebook_jax.data.text import Vocabulary
from codebook_jax.method.losses import NEVER


class MaskedText(NamedTuple):
    """Texts with words hidden; `slots` is the fixed maximum of hidden words per text."""

    tokens: Int[Array, "texts tokens"]  # what the model reads
    positions: Int[Array, "texts slots"]  # of the hidden words; 0 in an unused slot
    words: Int[Array, "texts slots"]  # the hidden words
    used: Bool[Array, "texts slots"]


def mask_words(
    key: Key[Array, ""],
    tokens: Int[Array, "texts tokens"],
    vocabulary: Vocabulary,
    *,
    probability: float,
    slots: int,
    mask_share: float,
    random_share: float,
) -> MaskedText:
    """Hides each word with `probability`, never a special token, at most `slots` per text (a random
    excess stays).

    A hidden word becomes [MASK] (`mask_share`), a random word that is not special (`random_share`),
    or stays as it is.
    Source: Devlin et al. 2019, 3.1. Departure: the fixed number of slots.
    """
    choose_key, lot_key, kind_key, word_key = jax.random.split(key, 4)
    special = jnp.isin(tokens, jnp.array(vocabulary.special_ids, tokens.dtype))
    chosen = jax.random.bernoulli(choose_key, jnp.float32(probability), tokens.shape) & ~special
    lot = jnp.where(chosen, jax.random.uniform(lot_key, tokens.shape, jnp.float32), -1.0)
    lots, positions = jax.lax.top_k(lot, slots)
    used = lots >= 0
    positions = jnp.where(used, positions, 0)
    words = jnp.take_along_axis(tokens, positions, axis=1)
    kind = jax.random.uniform(kind_key, used.shape, jnp.float32)
    plain = [i for i in range(vocabulary.size) if i not in vocabulary.special_ids]
    random_places = jax.random.randint(word_key, used.shape, 0, len(plain), jnp.int32)
    random_words = jnp.array(plain, tokens.dtype)[random_places]
    shown = jnp.where(
        kind < mask_share,
        vocabulary.mask_id,
        jnp.where(kind < mask_share + random_share, random_words, words),
    ).astype(tokens.dtype)
    row = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    # Unused slots write past the end, which a scatter drops.
    where = jnp.where(used, positions, tokens.shape[1])
    return MaskedText(tokens.at[row, where].set(shown, mode="drop"), positions, words, used)


def may_be_negatives(image_id: Int[Array, "rows"], groups: int) -> Bool[Array, "rows group"]:
    """Which members of its group each row may take as a negative: those of other images."""
    ids = image_id.reshape(groups, -1)
    return (ids[:, :, None] != ids[:, None, :]).reshape(len(image_id), -1)


def draw_negatives(
    queries: Float[Array, "rows dim"],
    candidates: Float[Array, "rows dim"],
    allowed: Bool[Array, "rows group"],
    noise: Float[Array, "rows group"],
    groups: int,
    *,
    temperature: Float[Array, ""],
) -> Int[Array, "rows"]:
    """For each row a member of its group, drawn in proportion to softmax(query . candidate /
    temperature).

    Returns the place in the group, which is meaningless if none is allowed. `noise` is Gumbel
    noise: the largest logit + noise is a draw from the softmax. No gradient passes. Source: Li et
    al. 2021, 3.2.
    """
    split = lambda x: x.reshape(groups, -1, x.shape[-1])  # noqa: E731
    cosines = jnp.einsum("gqd,gcd->gqc", split(queries), split(candidates), precision="highest")
    cosines = cosines.reshape(noise.shape)
    logits = jnp.where(allowed, jax.lax.stop_gradient(cosines / temperature) + noise, NEVER)
    return jax.lax.argmax(logits, 1, jnp.int32)
