"""Hidden words and their loss (Li et al. 2021, 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class MaskedText(NamedTuple):
    """Texts with words hidden, as `mask_words` returns them; `slots` is that of `Masking`."""

    tokens: Int[Array, "texts tokens"]  # what the model reads
    positions: Int[Array, "texts slots"]  # of the hidden words; 0 in an unused slot
    words: Int[Array, "texts slots"]  # the hidden words
    used: Bool[Array, "texts slots"]


class Masking(NamedTuple):
    """How `mask_words` hides words; the shares are from 0 to 1.

    Source: Devlin et al. 2019, 3.1, whose shares are these:

    >>> Masking(0.15, slots=8, mask_share=0.8, random_share=0.1).mask_share
    0.8
    """

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

    `slots` is at most the number of tokens (else JAX raises ValueError). Source: Devlin et al.
    2019, 3.1. Departure: the fixed number of slots.

    >>> text = jnp.array([[1, 7, 8, 2]])
    >>> masking = Masking(1.0, slots=3, mask_share=1.0, random_share=0.0)
    >>> options = dict(special_ids=(0, 1, 2, 3), mask_id=3, vocabulary_size=10)
    >>> hidden = mask_words(jax.random.key(0), text, masking, **options)
    >>> print(hidden.tokens, hidden.used)
    [[1 3 3 2]] [[ True  True False]]
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
    teacher_logits: Float[Array, "*some vocab"] | None,
    words: Int[Array, "*some"],
    weights: Float[Array, "*some"],
    *,
    alpha: Float[Array, ""] | float = 0.0,
) -> Float[Array, ""]:
    """Weighted cross-entropies, summed, to the true word and to the teacher's distribution p'.

        loss = - sum_i w_i ((1 - alpha) log p_i[word_i] + alpha p'_i . log p_i)

    `alpha` is from 0 to 1; the teacher gets no gradient, and without one (None) there is only the
    true word. Source: Li et al. 2021, 3.2 and 3.3.

    >>> even, word = jnp.zeros((1, 8)), jnp.array([3])  # 8 words, all as likely
    >>> alpha = jnp.float32(0.4)
    >>> loss = masked_word_loss(even, even, word, jnp.ones(1), alpha=alpha)
    >>> print(f"{loss:.3f}")  # log 8
    2.079
    """
    log_p = jax.nn.log_softmax(logits)
    # By comparison: the gradient of reading an entry is a scatter.
    right = jnp.arange(log_p.shape[-1], dtype=jnp.int32) == words[..., None]
    true = jnp.sum(jnp.where(right, log_p, 0), axis=-1)
    if teacher_logits is None:
        return -jnp.sum(weights * true)
    soft = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits))
    return -jnp.sum(weights * ((1 - alpha) * true + alpha * jnp.sum(soft * log_p, axis=-1)))
