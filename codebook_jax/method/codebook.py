"""The codebook loss: soft codes, the parts of the loss, and how codewords are used.

Modalities are named and come in a mapping; order never matters, since names are taken sorted.
Source: Duan et al. 2022, 3.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebook_jax.method.assignment import column_error, row_error


def soft_codes(
    plan: Float[Array, "*some rows codes"], batch: int
) -> Float[Array, "*some batch codes"]:
    """q = N T of the plan's first `batch` rows: each sums to 1, or to 0 if it was left out.

    Source: Duan et al. 2022, 3.1.

    >>> plan = jnp.array([[0.125, 0.125], [0.0, 0.25], [0.5, 0.0]])
    >>> print(soft_codes(plan, batch=2))
    [[0.5 0.5]
     [0.  1. ]]
    """
    rows = plan[..., :batch, :]
    mass = rows.sum(axis=-1, keepdims=True)
    return rows / jnp.where(mass > 0, mass, 1)


class CodeLosses(NamedTuple):
    """The parts of L_code, each for every row of the batch; `total` is the loss."""

    transport: dict[str, Float[Array, " *rows"]]  # L_ot: codewords move to features they were given
    predicted: dict[tuple[str, str], Float[Array, " *rows"]]  # (a, b): student a predicts b's codes


def code_losses(
    student: Mapping[str, Float[Array, "*rows dim"]],
    teacher: Mapping[str, Float[Array, "*rows dim"]],
    codes: Float[Array, "codes dim"],
    assignment: Mapping[str, Float[Array, "*rows codes"]],
    *,
    temperature: float,
    targets: Mapping[tuple[str, str], Float[Array, "*rows codes"]] | None = None,
) -> CodeLosses:
    """Teacher features choose codewords, the students of the other modalities predict them.

    Features and codewords have length one; rows of `assignment`, the codes of the teacher's
    features, sum to 1. `targets[a, b]` is what a predicts of b, by default `assignment[b]`. The
    codebook learns from all parts, the student from the predictions, the teacher and the assignment
    from none. Source: Duan et al. 2022, 3.1; temperature as SwAV's (Caron et al. 2020).
    """
    names = sorted(student)
    given = [*(student[name] for name in names), *(teacher[name] for name in names)]
    given[len(names) :] = jax.lax.stop_gradient(given[len(names) :])
    cosines = _products(given, codes)
    log_p, transport, predicted = {}, {}, {}
    for name, learned, fixed in zip(names, cosines, cosines[len(names) :], strict=False):
        log_p[name] = jax.nn.log_softmax(learned / temperature)
        chosen = jax.lax.stop_gradient(assignment[name])
        transport[name] = jnp.sum(chosen * (1 - fixed), axis=-1)
    for a, b in itertools.permutations(names, 2):
        target = jax.lax.stop_gradient(assignment[b] if targets is None else targets[a, b])
        predicted[a, b] = -jnp.sum(target * log_p[a], axis=-1)
    return CodeLosses(transport, predicted)


def _products(
    features: Sequence[Float[Array, "*rows dim"]], codes: Float[Array, "codes dim"]
) -> Sequence[Float[Array, "*rows codes"]]:
    """Cosines with all codewords, in one product where the shapes are equal."""
    product = lambda x: jnp.einsum("...d,kd->...k", x, codes, precision="highest")  # noqa: E731
    if len({each.shape for each in features}) > 1:
        return [product(each) for each in features]
    return product(jnp.stack(features))


@flax.struct.dataclass
class Usage:
    """The codeword that won each of the newest samples, a ring; -1 where nothing is stored yet."""

    winners: Int[Array, "modalities window"]
    cursor: Int[Array, ""]


def empty_usage(window: int, modalities: int = 2) -> Usage:
    """A window of the newest samples in which nothing is stored."""
    return Usage(jnp.full((modalities, window), -1, jnp.int32), jnp.int32(0))


def add_winners(usage: Usage, winners: Int[Array, "modalities batch"]) -> Usage:
    """The window with one batch (its first samples, if it is larger) in place of its oldest."""
    window = usage.winners.shape[1]
    winners = winners[:, :window].astype(jnp.int32)
    places = (usage.cursor + jnp.arange(winners.shape[1], dtype=jnp.int32)) % window
    ring = usage.winners.at[:, places].set(winners, unique_indices=True)
    return Usage(ring, (usage.cursor + winners.shape[1]) % window)


def perplexity_and_unused(
    winners: Int[Array, "modalities samples"], codes: int
) -> tuple[Float[Array, " modalities"], Float[Array, " modalities"]]:
    """exp(entropy) of the winning codewords, and the share of codewords that won nothing.

    A winner of -1 stands for no sample.
    """
    here = winners >= 0
    row = jnp.arange(len(winners), dtype=jnp.int32)[:, None]
    counts = (
        jnp.zeros((len(winners), codes), jnp.float32)
        .at[row, jnp.where(here, winners, codes)]
        .add(1, mode="drop")
    )
    share = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), 1)
    return jnp.exp(entropy), (counts == 0).mean(axis=1, dtype=jnp.float32)


def codebook_scalars(
    usage: Usage, plan: Float[Array, "modalities rows codes"], batch: int, names: tuple[str, ...]
) -> dict[str, Float[Array, ""]]:
    """Metrics of the assignment; the plan's first `batch` rows are the batch's."""
    soft, codes = soft_codes(plan, batch), plan.shape[-1]
    perplexity, unused = perplexity_and_unused(usage.winners, codes)
    chosen = jax.lax.argmax(soft, 2, jnp.int32)
    samples = jnp.sum(usage.winners[0] >= 0, dtype=jnp.int32)  # as many of every modality
    unused_if_uniform = jnp.exp(samples.astype(jnp.float32) * math.log1p(-1 / codes))
    return {
        "codebook/perplexity": perplexity.mean(),
        **{f"codebook/perplexity_{name}": perplexity[i] for i, name in enumerate(names)},
        "codebook/unused_share": unused.mean(),
        "codebook/unused_share_uniform": unused_if_uniform,
        "codebook/assignment_entropy": -jnp.sum(jax.scipy.special.xlogy(soft, soft), -1).mean(),
        "codebook/agreement": jnp.mean(chosen[0] == chosen[1], dtype=jnp.float32),
        "transport/column_error": column_error(plan).max(),
        "transport/row_error": row_error(plan, jnp.sum(plan, axis=-1) > 0).max(),
    }
