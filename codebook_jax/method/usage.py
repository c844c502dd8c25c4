"""How codewords are used: by a batch's plan, and by the winners over a window of samples, kept in
the train state.

One batch says little: with fewer samples than codewords most must be unused
(bshall/VectorQuantizedVAE#3).
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebook_jax.method.transport import column_error, row_error


@flax.struct.dataclass
class Usage:
    """The codeword that won each of the newest samples of both modalities, a ring; -1 where nothing
    is stored yet.
    """

    winners: Int[Array, "2 window"]
    cursor: Int[Array, ""]


def empty_usage(window: int) -> Usage:
    return Usage(jnp.full((2, window), -1, jnp.int32), jnp.int32(0))


def record(usage: Usage, winners: Int[Array, "2 batch"]) -> Usage:
    """The window with one batch in place of its oldest samples; of a batch larger than the window,
    its first samples.
    """
    window = usage.winners.shape[1]
    winners = winners[:, :window].astype(jnp.int32)
    places = (usage.cursor + jnp.arange(winners.shape[1], dtype=jnp.int32)) % window
    ring = usage.winners.at[:, places].set(winners, unique_indices=True)
    return Usage(ring, (usage.cursor + winners.shape[1]) % window)


def perplexity_and_unused(usage: Usage, codes: int) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """exp(entropy) of the winners, and the share of codewords that won nothing, by modality (image,
    text).
    """
    here = usage.winners >= 0
    row = jnp.arange(2, dtype=jnp.int32)[:, None]
    counts = (
        jnp.zeros((2, codes), jnp.float32)
        .at[row, jnp.where(here, usage.winners, codes)]
        .add(1, mode="drop")
    )
    share = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), 1)
    return jnp.exp(entropy), (counts == 0).mean(axis=1, dtype=jnp.float32)


def unused_if_uniform(samples: Int[Array, "*some"], codes: int) -> Float[Array, "*some"]:
    """The share of `codes` codewords that `samples` draws with equal chances leave out, (1 - 1 /
    codes)^samples.
    """
    return jnp.exp(jnp.asarray(samples, jnp.float32) * math.log1p(-1 / codes))


def soft_codes(plan: Float[Array, "2 rows codes"], batch: int) -> Float[Array, "2 batch codes"]:
    """q = N T of the batch's rows: each sums to 1, except for a row left out of the transport."""
    rows = plan[:, :batch]
    mass = rows.sum(axis=-1, keepdims=True)
    return rows / jnp.where(mass > 0, mass, 1)


def codebook_scalars(
    usage: Usage, plan: Float[Array, "2 rows codes"], batch: int
) -> dict[str, Float[Array, ""]]:
    """Metrics of the assignment; the plan's first `batch` rows are the batch's."""
    soft = soft_codes(plan, batch)
    perplexity, unused = perplexity_and_unused(usage, plan.shape[-1])
    valid = jnp.sum(plan, axis=-1) > 0
    codes = jax.lax.argmax(soft, 2, jnp.int32)
    samples = jnp.sum(usage.winners[0] >= 0, dtype=jnp.int32)  # as many of both modalities
    return {
        "codebook/perplexity": perplexity.mean(),
        "codebook/perplexity_image": perplexity[0],
        "codebook/perplexity_text": perplexity[1],
        "codebook/unused_share": unused.mean(),
        "codebook/unused_share_uniform": unused_if_uniform(samples, plan.shape[-1]),
        "codebook/assignment_entropy": -jnp.sum(jax.scipy.special.xlogy(soft, soft), -1).mean(),
        "codebook/agreement": jnp.mean(codes[0] == codes[1], dtype=jnp.float32),
        "transport/column_error": column_error(plan).max(),
        "transport/row_error": row_error(plan, valid).max(),
    }
