"""The fields of a batch, with their shapes and types."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

if TYPE_CHECKING:  # jaxtyping's Array imports JAX, which worker processes do not need
    from jaxtyping import Array


class Batch(NamedTuple):
    """One step's pairs: of this process as NumPy arrays, or on the devices as global arrays."""

    image: UInt8[Array | np.ndarray, "batch side side 3"]  # the student's crop, RGB
    teacher_image: UInt8[Array | np.ndarray, "batch side side 3"]  # the teacher's crop
    flip: Bool[Array | np.ndarray, " batch"]  # mirror both crops; the caption is changed already
    tokens: Int32[Array | np.ndarray, "batch tokens"]  # [CLS] words [SEP], padded on the right
    text_length: Int32[Array | np.ndarray, " batch"]  # tokens before the padding
    image_id: Int32[Array | np.ndarray, " batch"]  # equal for pairs of one image, within a source
    example: Int32[Array | np.ndarray, " batch"]  # index in the source, for reports
    skipped: Int32[Array | np.ndarray, " batch"]  # unreadable records skipped before this one


class Answers(NamedTuple):
    """The right answers to each question, each with its share."""

    tokens: Int32[Array | np.ndarray, "batch answers tokens"]  # padded as in `Batch`
    weight: Float32[Array | np.ndarray, "batch answers"]  # 0 where there is no answer


class ExampleBatch(NamedTuple):
    """One step's examples of a downstream task, as in `Batch`."""

    images: UInt8[Array | np.ndarray, "batch pictures side side 3"]
    flip: Bool[Array | np.ndarray, " batch"]
    tokens: Int32[Array | np.ndarray, "batch tokens"]
    text_length: Int32[Array | np.ndarray, " batch"]
    target: Int32[Array | np.ndarray, " batch"] | Answers  # the number of the right label
    example: Int32[Array | np.ndarray, " batch"]
    skipped: Int32[Array | np.ndarray, " batch"]


class StoryBatch(NamedTuple):
    """One step's stories, as in `Batch`; padded frames and sentences follow the real ones."""

    # The student's crop: one for all frames of a story, so that what moves keeps its path; black
    # where padded.
    frames: UInt8[Array | np.ndarray, "batch frames side side 3"]
    teacher_frames: UInt8[Array | np.ndarray, "batch frames side side 3"]  # the teacher's crop
    frame_count: Int32[Array | np.ndarray, " batch"]  # frames before the padding
    tokens: Int32[Array | np.ndarray, "batch sentences tokens"]  # all padding where padded
    text_length: Int32[
        Array | np.ndarray, "batch sentences"
    ]  # 1 where padded, so that no row is empty
    sentence_count: Int32[Array | np.ndarray, " batch"]  # sentences before the padding
    example: Int32[Array | np.ndarray, " batch"]  # index in the source, for reports
    skipped: Int32[Array | np.ndarray, " batch"]  # unreadable stories skipped before this one
