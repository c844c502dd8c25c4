"""The four losses of CODIS: arrays to scalars (Duan et al., CVPR 2022, section 3; METHOD symbols in
the comments).

Every loss is computed in the type of its arguments, at least float32. `NEVER` stands for minus
infinity where a softmax
must leave something out: it keeps gradients finite where an infinity would not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEVER = -1e30


class Pair(NamedTuple):
    """One thing for both modalities."""

    image: Any
    text: Any


def alignment_loss(
    student: Pair,  # z_v, z_t: Float[Array, "batch dim"] each
    teacher: Pair,  # z'_v, z'_t: Float[Array, "batch dim"] each
    queue: Pair,  # Float[Array, "queue dim"] each
    queue_valid: Bool[Array, "queue"],
    image_id: Int[Array, "batch"],
    *,
    temperature: Float[Array, ""],
    alpha: Float[Array, ""],
    intra_weight: float,
    same_image: str,
) -> Float[Array, ""]:
    """Instance alignment: every student feature finds its pair among teacher features of the batch
    and the queue.

    Four directions, image and text each towards both modalities. A target is the pair itself (1 -
    alpha) mixed with what the teacher's own feature finds (alpha). `same_image` decides about other
    captions of a query's image in the
    batch: "ignore" leaves them out of the softmax, "negative" keeps them (ALBEF). Source: Duan et
    al. 2022, 3.2; Li et al. 2021, 3.2 and 3.3, which `intra_weight` 0 gives.
    """
    rows = jnp.concatenate([student.image, student.text])
    soft_rows = jnp.concatenate([teacher.image, teacher.text])
    allowed = candidates_allowed(image_id, queue_valid, same_image)
    allowed = jnp.concatenate([allowed, allowed])[:, None]
    # [2 batch, 2, batch + queue]: queries of both modalities, to candidates of both, in one
    # product.
    logits = jnp.where(allowed, _similarities(rows, teacher, queue) / temperature, NEVER)
    soft = jnp.where(allowed, _similarities(soft_rows, teacher, queue) / temperature, NEVER)
    own = jnp.tile(jnp.eye(len(image_id), allowed.shape[-1], dtype=logits.dtype), (2, 1))[:, None]
    targets = jax.lax.stop_gradient((1 - alpha) * own + alpha * jax.nn.softmax(soft))
    cross_entropy = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    by_direction = cross_entropy.reshape(2, -1, 2).mean(axis=1)  # [query modality, candidates']
    weights = jnp.array([[intra_weight, 1.0], [1.0, intra_weight]], by_direction.dtype)
    return jnp.sum(by_direction * weights) / weights.sum()


def candidates_allowed(
    image_id: Int[Array, "batch"], queue_valid: Bool[Array, "queue"], same_image: str
) -> Bool[Array, "batch candidates"]:
    """Which candidates take part in each query's softmax: batch first, then queue."""
    batch = len(image_id)
    if same_image == "ignore":
        in_batch = (image_id[:, None] != image_id[None, :]) | jnp.eye(batch, dtype=bool)
    elif same_image == "negative":
        in_batch = jnp.ones((batch, batch), bool)
    else:
        raise ValueError(f'alignment.same_image="{same_image}" is not "ignore" or "negative".')
    in_queue = jnp.broadcast_to(queue_valid, (batch, len(queue_valid)))
    return jnp.concatenate([in_batch, in_queue], axis=1)


class CodeLosses(NamedTuple):
    """The parts of L_code; their sum is the loss."""

    transport: Float[
        Array, ""
    ]  # L_ot: moves the codewords to the teacher features assigned to them
    text_to_code: Float[Array, ""]  # L_t2p: the text student predicts the image teacher's codes
    image_to_code: Float[Array, ""]  # L_i2p: the image student predicts the text teacher's codes


def codebook_losses(
    student: Pair,  # z_v, z_t: Float[Array, "batch dim"] each
    teacher: Pair,  # z'_v, z'_t: Float[Array, "batch dim"] each
    codes: Float[Array, "codes dim"],  # rows of length one
    assignment: Pair,  # q_v, q_t: Float[Array, "batch codes"] each, rows sum to 1
    *,
    temperature: float,
) -> CodeLosses:
    """Teacher features choose codewords by transport, student features of the other modality
    predict the choice.

    The codebook learns from all three, the student from the last two, the teacher and the
    assignment from none.
    Source: Duan et al. 2022, 3.1 and equations there; temperature as SwAV's (Caron et al. 2020).
    """
    chosen = jax.lax.stop_gradient(jnp.stack(assignment))  # [2, batch, codes]
    learned = jnp.stack(student)
    fixed = jax.lax.stop_gradient(jnp.stack(teacher))
    to_codes = jnp.einsum("msbd,kd->msbk", jnp.stack([learned, fixed]), codes, precision="highest")
    transport = jnp.sum(chosen * (1 - to_codes[1]), axis=-1).mean(axis=1).sum()
    log_p = jax.nn.log_softmax(to_codes[0] / temperature)
    predicted = -jnp.sum(chosen[::-1] * log_p, axis=-1).mean(axis=1)  # image predicts q_t, text q_v
    return CodeLosses(transport, predicted[1], predicted[0])


def matching_loss(
    logits: Float[Array, "pairs 2"], match: Bool[Array, "pairs"], weights: Float[Array, "pairs"]
) -> Float[Array, ""]:
    """Weighted sum of the cross-entropies of "match" (class 1) and "no match" (Li et al.

    2021, 3.2).
    """
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(weights * jnp.where(match, log_p[:, 1], log_p[:, 0]))


def masked_word_loss(
    logits: Float[Array, "*some vocab"],
    teacher_logits: Float[Array, "*some vocab"],
    words: Int[Array, "*some"],
    weights: Float[Array, "*some"],
    *,
    alpha: Float[Array, ""],
) -> Float[Array, ""]:
    """Weighted sum of cross-entropies to the true word (1 - alpha) and the teacher's distribution
    (alpha).

    Source: Li et al. 2021, 3.2 and 3.3.
    """
    log_p = jax.nn.log_softmax(logits)
    soft = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits))
    true = jnp.take_along_axis(log_p, words[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * ((1 - alpha) * true + alpha * jnp.sum(soft * log_p, axis=-1)))


def _similarities(
    rows: Float[Array, "rows dim"], teacher: Pair, queue: Pair
) -> Float[Array, "rows 2 candidates"]:
    """Cosines of every row to the candidates of both modalities, batch before queue; candidates get
    no gradient.
    """
    batch, kept = (
        jnp.einsum("rd,mcd->rmc", rows, jax.lax.stop_gradient(jnp.stack(part)), precision="highest")
        for part in (teacher, queue)
    )
    return jnp.concatenate([batch, kept], axis=-1)
