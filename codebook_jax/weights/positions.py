"""Position embeddings of a ViT for a different number of patches."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

_A = -0.75  # of Keys' cubic kernel, as in PyTorch


def fitted_positions(
    positions: Float[np.ndarray, "1 old width"], shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "1 new width"], str]:
    """The embeddings for the patches of `shape`, [1, new, width], and a note if they were resized.

    [CLS] is unchanged, the square of patches resized like PyTorch's interpolate(mode="bicubic",
    align_corners=False), which ALBEF and DeiT use: no anti-aliasing, borders repeated. Raises
    ValueError if a number of patches is not a square.
    """
    if positions.ndim != 3 or positions.shape[2] != shape[2] or positions.shape[1] == shape[1]:
        return positions, ""  # a different width is refused by the comparison of shapes
    before, after = math.isqrt(positions.shape[1] - 1), math.isqrt(shape[1] - 1)
    if before**2 != positions.shape[1] - 1 or after**2 != shape[1] - 1:
        raise ValueError(f"{positions.shape[1] - 1} or {shape[1] - 1} patches do not form a square")
    weights = _cubic_weights(before, after)
    square = positions[0, 1:].reshape(before, before, -1).astype(np.float64)
    resized = np.einsum("ir,jc,rcw->ijw", weights, weights, square).reshape(after * after, -1)
    whole = np.concatenate([positions[0, :1].astype(np.float64), resized])
    note = f"{before}x{before} to {after}x{after} patches, bicubic"
    return whole[None].astype(positions.dtype), note


def _cubic_weights(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """The weight of each old place in each new one; rows sum to one."""
    centres = (np.arange(after) + 0.5)[:, None] * before / after - 0.5
    places = np.floor(centres) + np.arange(-1, 3)
    distance = np.abs(centres - places)
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    weights = np.zeros((after, before))
    inside = np.clip(places, 0, before - 1).astype(int)
    np.add.at(weights, (np.arange(after)[:, None], inside), np.where(distance <= 1, near, far))
    return weights
