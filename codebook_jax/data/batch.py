"""The fields of a batch, with their shapes and types."""

from __future__ import annotations

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """One step's pairs, as the host makes them (NumPy) and as the device receives them (jax.Array).

    B is the number of pairs (of this process on the host, of all processes on the device), S the
    image's side in pixels, L the text's length in tokens.
    """

    image: Any  # uint8 [B, S, S, 3]   the student's crop, RGB
    teacher_image: (
        Any  # uint8 [B, S, S, 3]   the teacher's crop; equal to `image` when teacher_view is "same"
    )
    flip: (
        Any  # bool  [B]            mirror both crops on the device; the caption is already changed
    )
    tokens: Any  # int32 [B, L]         [CLS] words [SEP], padded on the right
    text_length: Any  # int32 [B]            tokens before the padding, [CLS] and [SEP] included
    image_id: Any  # int32 [B]            equal for pairs of one image, within a source
    example: Any  # int32 [B]            index in the source, for reports
    skipped: Any  # int32 [B]            unreadable records skipped before this one
