"""Instance alignment over the batch and the queue (Duan et al. 2022, 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebook_jax.method.numerics import NEVER
from codebook_jax.method.pair import Pair
from codebook_jax.method.queue import Queue


def alignment_loss(
    student: Pair,  # z_v, z_t: Float[Array, "batch dim"] each
    teacher: Pair,  # z'_v, z'_t: Float[Array, "batch dim"] each
    queue: Queue,
    image_id: Int[Array, " batch"],
    *,
    temperature: Float[Array, ""],
    alpha: Float[Array, ""],
    intra_weight: float,
    same_image: str,
) -> Float[Array, ""]:
    """Every student feature finds its pair among teacher features of the batch and the queue.

    Four directions, image and text each towards both modalities. A target is the pair itself (1 -
    alpha) mixed with what the teacher's own feature finds (alpha). `same_image` decides about other
    captions of a query's image in the batch: "ignore" leaves them out of the softmax, "negative"
    keeps them (ALBEF). Source: Duan et al. 2022, 3.2; Li et al. 2021, 3.2 and 3.3, which
    `intra_weight` 0 gives.
    """
    rows = jnp.concatenate([student.image, student.text])
    soft_rows = jnp.concatenate([teacher.image, teacher.text])
    batch = len(image_id)
    if same_image == "ignore":
        in_batch = (image_id[:, None] != image_id[None, :]) | jnp.eye(batch, dtype=bool)
    elif same_image == "negative":
        in_batch = jnp.ones((batch, batch), bool)
    else:
        raise ValueError(f'alignment.same_image="{same_image}" is not "ignore" or "negative".')
    in_queue = jnp.broadcast_to(queue.valid, (batch, len(queue.valid)))
    allowed = jnp.tile(jnp.concatenate([in_batch, in_queue], axis=1), (2, 1))[:, None]
    # [2 batch, 2, batch + queue]: queries of both modalities to candidates of both.
    logits, soft = (
        jnp.where(allowed, _similarities(part, teacher, queue.features) / temperature, NEVER)
        for part in (rows, soft_rows)
    )
    own = jnp.tile(jnp.eye(batch, allowed.shape[-1], dtype=logits.dtype), (2, 1))[:, None]
    targets = jax.lax.stop_gradient((1 - alpha) * own + alpha * jax.nn.softmax(soft))
    cross_entropy = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    by_direction = cross_entropy.reshape(2, -1, 2).mean(axis=1)  # [query modality, candidates']
    weights = jnp.array([[intra_weight, 1.0], [1.0, intra_weight]], by_direction.dtype)
    return jnp.sum(by_direction * weights) / weights.sum()


def _similarities(
    rows: Float[Array, "rows dim"], teacher: Pair, queue: Pair
) -> Float[Array, "rows 2 candidates"]:
    """Cosines of rows to both modalities' candidates, batch before queue; these get no gradient."""
    batch, kept = (
        jnp.einsum("rd,mcd->rmc", rows, jax.lax.stop_gradient(jnp.stack(part)), precision="highest")
        for part in (teacher, queue)
    )
    return jnp.concatenate([batch, kept], axis=-1)
