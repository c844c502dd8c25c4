"""All random draws of a pre-training step, made for the global batch before anything is
computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Key

from codebook_jax.data import augment
from codebook_jax.data.batch import Batch
from codebook_jax.data.text import Vocabulary
from codebook_jax.method.losses import Pair
from codebook_jax.method.sampling import MaskedText, mask_words, may_be_negatives


class Inputs(NamedTuple):
    """What a step learns from, with all its random draws; the first axis of every array is the
    batch.
    """

    image: Any  # uint8 [B, S, S, 3], augmented
    teacher_image: Any
    tokens: Any
    text_length: Any
    masked: MaskedText | None
    word_weight: Any  # of each hidden word in L_mlm; they sum to 1
    noise: Pair | None  # Gumbel noise, for the negatives of images and of texts
    allowed: Any  # bool [B, B / groups]: which rows of its group each row may take as a negative
    match_weight: (
        Any  # [B, 3] of the pair, its negative text, its negative image in L_itm; they sum to 1
    )


def draw_inputs(
    batch: Batch, key: Key[Array, ""], config: ml_collections.ConfigDict, vocabulary: Vocabulary
) -> Inputs:
    """Augmented views, hidden words and noise, drawn for the whole batch, independent of passes and
    shards.
    """
    student_key, teacher_key, word_key, image_noise, text_noise = jax.random.split(key, 5)
    views = _views(batch, student_key, teacher_key, config)
    masked, word_weight = None, None
    if config.losses.masked_lm:
        masked = mask_words(
            word_key,
            batch.tokens,
            vocabulary,
            probability=config.mlm.probability,
            slots=max(1, int(config.mlm.max_share * config.model.text.max_tokens)),
            mask_share=config.mlm.mask_share,
            random_share=config.mlm.random_share,
        )
        word_weight = masked.used.astype(jnp.float32)
        word_weight = word_weight / jnp.maximum(word_weight.sum(), 1)
    noise, allowed, match_weight = None, None, None
    if config.losses.matching:
        allowed = may_be_negatives(batch.image_id, config.itm.groups)
        shape = allowed.shape
        noise = Pair(
            jax.random.gumbel(image_noise, shape, jnp.float32),
            jax.random.gumbel(text_noise, shape, jnp.float32),
        )
        some = allowed.any(axis=1).astype(jnp.float32)
        match_weight = jnp.stack([jnp.ones_like(some), some, some], axis=1)
        match_weight = match_weight / match_weight.sum()
    return Inputs(
        *views, batch.tokens, batch.text_length, masked, word_weight, noise, allowed, match_weight
    )


def _views(
    batch: Batch, key: Array, teacher_key: Array, config: ml_collections.ConfigDict
) -> tuple[Array, Array]:
    data = config.data
    if not (data.flip or data.randaugment_layers):
        return batch.image, batch.teacher_image
    of = dict(layers=data.randaugment_layers, magnitude=data.randaugment_magnitude)
    image = _to_uint8(augment.augment(batch.image, batch.flip, key, **of))
    if data.teacher_view == "same":
        return image, image
    return image, _to_uint8(augment.augment(batch.teacher_image, batch.flip, teacher_key, **of))


def _to_uint8(images: Array) -> Array:
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)
