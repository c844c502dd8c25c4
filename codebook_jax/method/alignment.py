"""Instance alignment over the batch and the queue (Duan et al. 2022, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codebook_jax.method.numerics import NEVER, require
from codebook_jax.method.queue import Queue

SAME = ("ignore", "negative", "positive")  # what other samples with the query's id are
Features = Mapping[str, Float[Array, "batch dim"]]


def cross_entropies(
    student: Features,
    teacher: Features | None,
    queue: Queue | None,
    ids: Int[Array, " batch"],
    *,
    temperature: Float[Array, ""] | float,
    alpha: Float[Array, ""] | float,
    same: str = "ignore",
    valid: Mapping[str, Bool[Array, " batch"]] | None = None,
) -> Float[Array, "modalities batch modalities"]:
    """How well every student feature finds its own sample among teacher features of the batch and
    the queue: of each modality's queries among each modality's candidates, sorted by name.

    Features have length one. Teacher features get no gradient; without a teacher, the students are
    each other's candidates and all learn, as CLIP's (Radford et al. 2021, 2.3). A target is the
    sample itself (1 - alpha) mixed with what the teacher's own feature finds (alpha). `same`
    decides about other rows of the batch, and of a queue that remembers ids, with the query's id:
    "ignore" leaves them out of the softmax, "negative" keeps them (ALBEF's pre-training),
    "positive" shares the target among them and the sample (ALBEF's fine-tuning). Rows that are not
    `valid` are no candidates. Source: Duan et al. 2022, 3.2; Li et al. 2021, 3.2, 3.3 and 4.1.
    """
    names = sorted(student)
    candidates = student if teacher is None else jax.lax.stop_gradient(dict(teacher))
    rows = jnp.concatenate([student[name] for name in names])
    soft_rows = jax.lax.stop_gradient(jnp.concatenate([candidates[name] for name in names]))
    batch = len(ids)
    require(same in SAME, f'same="{same}" is not one of {", ".join(SAME)}.')
    in_batch = jnp.ones((batch, batch), bool)
    if same == "ignore":
        in_batch = (ids[:, None] != ids[None, :]) | jnp.eye(batch, dtype=bool)
    in_batch = jnp.tile(in_batch, (len(names), 1))[:, None]
    if valid is not None:
        in_batch = in_batch & jnp.stack([valid[name] for name in names])
    allowed = in_batch
    if queue is not None:
        in_queue = jnp.broadcast_to(queue.valid, (*in_batch.shape[:-1], len(queue.valid)))
        if queue.ids is not None and same == "ignore":
            other = ids[:, None] != queue.ids[None, :]
            in_queue = in_queue & jnp.tile(other, (len(names), 1))[:, None]
        allowed = jnp.concatenate([in_batch, in_queue], axis=-1)
    # [modalities batch, modalities, batch + queue]: queries of each modality, candidates of each.
    logits, soft = (
        jnp.where(allowed, _similarities(part, candidates, queue, names) / temperature, NEVER)
        for part in (rows, soft_rows)
    )
    own = jnp.tile(jnp.eye(batch, allowed.shape[-1], dtype=logits.dtype), (len(names), 1))[:, None]
    if same == "positive":
        all_ids = ids if queue is None or queue.ids is None else jnp.concatenate([ids, queue.ids])
        alike = jnp.tile(ids[:, None] == all_ids, (len(names), 1))[:, None]
        alike = jnp.pad(alike, ((0, 0), (0, 0), (0, allowed.shape[-1] - alike.shape[-1])))
        alike = jnp.where(allowed & alike, 1, own)  # a row that is not valid keeps its own
        own = alike / alike.sum(axis=-1, keepdims=True)
    targets = jax.lax.stop_gradient((1 - alpha) * own + alpha * jax.nn.softmax(soft))
    found = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    return found.reshape(len(names), batch, len(names))


def alignment_loss(
    found: Float[Array, "modalities batch modalities"], *, intra_weight: float
) -> Float[Array, ""]:
    """The mean over the batch and the directions of `cross_entropies`."""
    return mean_of_directions(found.mean(axis=1), intra_weight=intra_weight)


def mean_of_directions(
    by_direction: Float[Array, "modalities modalities"], *, intra_weight: float
) -> Float[Array, ""]:
    """The mean weighted with 1 between modalities and `intra_weight` (0: ALBEF's) within one."""
    own = jnp.eye(len(by_direction), dtype=by_direction.dtype)  # its dtype under 64 bits too
    weights = 1 - own + intra_weight * own
    return jnp.sum(by_direction * weights) / weights.sum()


def _similarities(
    rows: Float[Array, "rows dim"], candidates: Features, queue: Queue | None, names: list[str]
) -> Float[Array, "rows modalities candidates"]:
    """Cosines of rows to each modality's candidates, batch before queue."""
    parts = [candidates] if queue is None else [candidates, jax.lax.stop_gradient(queue.features)]
    cosines = [
        jnp.einsum(
            "rd,mcd->rmc", rows, jnp.stack([part[name] for name in names]), precision="highest"
        )
        for part in parts
    ]
    return jnp.concatenate(cosines, axis=-1)
