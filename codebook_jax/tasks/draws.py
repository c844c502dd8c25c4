"""All random draws of a pre-training step, made before anything is computed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

from codebook_jax.data import augment
from codebook_jax.data.batch import Batch
from codebook_jax.data.text import Vocabulary
from codebook_jax.method.masking import MaskedText, Masking, mask_words
from codebook_jax.method.matching import may_be_negatives


class Pair(NamedTuple):
    """Arrays of one shape for images and for texts."""

    image: Shaped[Array, "..."]
    text: Shaped[Array, "..."]


class Inputs(NamedTuple):
    """What a step learns from, with all its random draws."""

    image: UInt8[Array, "batch side side 3"]  # augmented
    teacher_image: UInt8[Array, "batch side side 3"]
    tokens: Int[Array, "batch tokens"]
    text_length: Int[Array, " batch"]
    masked: MaskedText | None
    word_weight: Float[Array, "batch slots"] | None  # of the hidden words in L_mlm; sum to 1
    noise: Pair | None  # Gumbel noise, for the negatives of images and of texts
    allowed: Bool[Array, "batch group"] | None  # what each row may take as a negative
    # of the pair, its negative text and its negative image in L_itm; they sum to 1
    match_weight: Float[Array, "batch 3"] | None


def draw_inputs(
    batch: Batch, key: Key[Array, ""], config: ml_collections.ConfigDict, vocabulary: Vocabulary
) -> Inputs:
    """Views, hidden words and noise for the global batch, whatever its passes and shards."""
    student_key, teacher_key, word_key, image_noise, text_noise = jax.random.split(key, 5)
    data, views = config.data, (batch.image, batch.teacher_image)
    if data.flip or data.randaugment_layers:
        image = augmented(batch.image, batch.flip, student_key, data)
        views = image, image
        if data.teacher_view != "same":
            views = image, augmented(batch.teacher_image, batch.flip, teacher_key, data)
    masked, word_weight = None, None
    if config.losses.masked_lm:
        masked = mask_words(
            word_key,
            batch.tokens,
            Masking(
                config.mlm.probability,
                max(1, int(config.mlm.max_share * config.model.text.max_tokens)),
                config.mlm.mask_share,
                config.mlm.random_share,
            ),
            special_ids=vocabulary.special_ids,
            mask_id=vocabulary.mask_id,
            vocabulary_size=vocabulary.size,
        )
        word_weight = masked.used.astype(jnp.float32)
        word_weight = word_weight / jnp.maximum(word_weight.sum(), 1)
    noise, allowed, match_weight = None, None, None
    if config.losses.matching:
        allowed = may_be_negatives(batch.image_id, config.itm.groups)
        keys = image_noise, text_noise
        noise = Pair(*(jax.random.gumbel(key, allowed.shape, jnp.float32) for key in keys))
        some = allowed.any(axis=1).astype(jnp.float32)
        match_weight = jnp.stack([jnp.ones_like(some), some, some], axis=1)
        match_weight = match_weight / match_weight.sum()
    return Inputs(
        *views, batch.tokens, batch.text_length, masked, word_weight, noise, allowed, match_weight
    )


def augmented(
    view: UInt8[Array, "batch side side 3"],
    flip: Bool[Array, " batch"],
    key: Key[Array, ""],
    data: ml_collections.ConfigDict,
) -> UInt8[Array, "batch side side 3"]:
    """A view mirrored where `flip` says so, and under RandAugment."""
    layers, magnitude = data.randaugment_layers, data.randaugment_magnitude
    images = augment.augment(view, flip, key, layers=layers, magnitude=magnitude)
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)
