"""Hidden words and their loss (Li et al. 2021, 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class MaskedText(NamedTuple):
    """Texts with words hidden; `slots` is the fixed maximum of hidden words per text."""

    tokens: Int[Array, "texts tokens"]  # what the model reads
    positions: Int[Array, "texts slots"]  # of the hidden words; 0 in an unused slot
    words: Int[Array, "texts slots"]  # the hidden words
    used: Bool[Array, "texts slots"]


class Masking(NamedTuple):
    """How words are hidden; the source's values are 0.15, 0.8 and 0.1."""

    probability: float  # of each word
    slots: int  # at most so many words per text
    mask_share: float  # of the hidden words, which become [MASK]
    random_share: float  # which become a random word; the rest stays as it is


def mask_words(
    key: Key[Array, ""],
    tokens: Int[Array, "texts tokens"],
    masking: Masking,
    *,
    special_ids: Sequence[int],
    mask_id: int,
    vocabulary_size: int,
) -> MaskedText:
    """Hides words, never a special token, nor puts one in; a random excess over `slots` stays.

    Source: Devlin et al. 2019, 3.1. Departure: the fixed number of slots.
    """
    choose_key, lot_key, kind_key, word_key = jax.random.split(key, 4)
    chosen = jax.random.bernoulli(choose_key, jnp.float32(masking.probability), tokens.shape)
    chosen &= ~jnp.isin(tokens, jnp.array(special_ids, tokens.dtype))
    lot = jnp.where(chosen, jax.random.uniform(lot_key, tokens.shape, jnp.float32), -1.0)
    lots, positions = jax.lax.top_k(lot, masking.slots)
    used = lots >= 0
    positions = jnp.where(used, positions, 0)
    words = jnp.take_along_axis(tokens, positions, axis=1)
    kind = jax.random.uniform(kind_key, used.shape, jnp.float32)
    plain = [i for i in range(vocabulary_size) if i not in special_ids]
    random_places = jax.random.randint(word_key, used.shape, 0, len(plain), jnp.int32)
    random_words = jnp.array(plain, tokens.dtype)[random_places]
    shown = jnp.where(
        kind < masking.mask_share,
        mask_id,
        jnp.where(kind < masking.mask_share + masking.random_share, random_words, words),
    ).astype(tokens.dtype)
    row = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    # Unused slots write past the end, which a scatter drops.
    where = jnp.where(used, positions, tokens.shape[1])
    return MaskedText(tokens.at[row, where].set(shown, mode="drop"), positions, words, used)


def masked_word_loss(
    logits: Float[Array, "*some vocab"],
    teacher_logits: Float[Array, "*some vocab"],
    words: Int[Array, "*some"],
    weights: Float[Array, "*some"],
    *,
    alpha: Float[Array, ""],
) -> Float[Array, ""]:
    """Weighted cross-entropies, summed, to the true word (1 - alpha) and the teacher's (alpha).

    Source: Li et al. 2021, 3.2 and 3.3.
    """
    log_p = jax.nn.log_softmax(logits)
    soft = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits))
    true = jnp.take_along_axis(log_p, words[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * ((1 - alpha) * true + alpha * jnp.sum(soft * log_p, axis=-1)))
