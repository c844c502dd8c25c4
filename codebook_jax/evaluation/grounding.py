"""Grounding: which of some boxes, and which point, an attention map picks for an expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float

from codebook_jax.errors import UserError
from codebook_jax.evaluation.keys import Key

OVERLAP = 0.5  # the least IoU of a right box
AREA_POWER = 0.5  # ALBEF
SLACK_PX = 1  # detectors and annotations round: so far may a box stick out of its picture

Box = Float[np.ndarray, " 4"]  # x, y, width, height in pixels
Boxes = Float[np.ndarray, "boxes 4"]
Map = Float[np.ndarray, "height width"]


class Grounding(NamedTuple):
    """What an attention map picks for one expression."""

    chosen: int  # which of the boxes
    scored: bool  # False if no box scored above 0, so that the first was taken
    overlaps: Float[np.ndarray, " boxes"]  # of each box with the true one
    pointing: float  # share of the map's highest pixels that are in the true box: mostly 0 or 1
    pointing_chance: float  # the true box's share of the picture


def ground(
    key: Key,
    attention: Float[np.ndarray, "rows columns"],
    height: int,
    width: int,
    box: Sequence[float],
    proposals: Sequence[Sequence[float]],
) -> Grounding:
    """What the map of an expression picks among the proposals, given its true box and the size of
    its picture. Without proposals, the highest point alone. Raises UserError, naming the
    expression, if a box is not in the picture; ValueError if the map holds NaN.
    """
    truth, boxes = np.asarray(box, float), np.asarray(proposals, float).reshape(-1, 4)
    check_boxes(np.concatenate([truth[None], boxes]), height, width, key)
    resized = resize_map(attention, height, width)
    if np.isnan(resized).any():
        raise ValueError(f"the attention map of expression {key!r} holds NaN: it picks no box")
    scores = box_scores(resized, boxes)
    best = int(scores.argmax()) if len(scores) else 0
    scored = bool((scores > 0).any())
    inside = np.zeros(resized.shape, bool)
    inside[_pixels(truth)] = True
    highest = resized == resized.max()
    return Grounding(
        best if scored else 0,
        scored,
        box_overlaps(truth, boxes),
        float(inside[highest].mean()),
        float(inside.mean()),
    )


def check_boxes(boxes: Boxes, height: int, width: int, key: Key) -> None:
    """Raises UserError if a box of the expression, the true one first, is not in its picture."""
    x, y, across, down = boxes.T
    fits = (x >= -SLACK_PX) & (y >= -SLACK_PX) & (across > 0) & (down > 0)
    fits &= (x + across <= width + SLACK_PX) & (y + down <= height + SLACK_PX)
    if not fits.all():
        at = int(fits.argmin())
        which = f"box {at} of {len(boxes) - 1}" if at else "the true box"
        raise UserError(
            f"expression {key!r}: {which}, {boxes[at].tolist()}, is not within its picture of "
            f"{width} x {height} pixels: give boxes as [x, y, width, height] in its pixels, cut at "
            "its borders"
        )


def resize_map(attention: Float[np.ndarray, "rows columns"], height: int, width: int) -> Map:
    """The map at the size of the picture, bicubic as PyTorch's interpolate (ALBEF): cubic of -0.75,
    pixel centres aligned, borders repeated, no antialiasing.
    """
    return cv2.resize(np.asarray(attention, float), (width, height), interpolation=cv2.INTER_CUBIC)


def box_scores(attention: Map, boxes: Boxes) -> Float[np.ndarray, " boxes"]:
    """The sum of the map over the pixels of each box, divided by the root of its area (ALBEF): the
    sum alone prefers large boxes, the mean small ones.
    """
    sums = np.array([attention[_pixels(box)].sum() for box in boxes])
    return sums / (boxes[:, 2] * boxes[:, 3]) ** AREA_POWER


def box_overlaps(box: Box, others: Boxes) -> Float[np.ndarray, " boxes"]:
    """Intersection over union of a box with others, as in ALBEF: the last pixel belongs to a box,
    and an overlap of a single row or column of pixels counts as none.
    """
    left, top = np.maximum(others[:, :2], box[:2]).T
    right, bottom = np.minimum(others[:, :2] + others[:, 2:], box[:2] + box[2:]).T - 1
    shared = np.where((left < right) & (top < bottom), (right - left + 1) * (bottom - top + 1), 0.0)
    return shared / (others[:, 2] * others[:, 3] + box[2] * box[3] - shared)


def evaluate(groundings: Sequence[Grounding]) -> dict[str, float]:
    """In percent, of the expressions: `pointing`, with the map's highest pixel in the true box, and
    `pointing_chance`; and, if all have boxes to choose from, `accuracy`, with an IoU of the chosen
    box of at least 0.5, `chance`, of a random box, and `ceiling`, of the best. Counts:
    `expressions`, and `unscored`, those without a score above 0.
    """
    if not groundings:
        raise UserError("there is no expression with a true box: no accuracy is known")
    right = [each.overlaps >= OVERLAP for each in groundings]
    counts = {"expressions": len(groundings)}
    shares = {
        "pointing": [each.pointing for each in groundings],
        "pointing_chance": [each.pointing_chance for each in groundings],
    }
    if bare := sum(not len(each) for each in right):
        if bare < len(right):
            raise UserError(
                f"{bare:,} of {len(right):,} expressions have no boxes to choose from: give "
                "detections for all of them, or for none"
            )
    else:
        shares |= {
            "accuracy": [each[of.chosen] for each, of in zip(right, groundings, strict=True)],
            "chance": [each.mean() for each in right],
            "ceiling": [each.any() for each in right],
        }
        counts["unscored"] = sum(not each.scored for each in groundings)
    return {name: 100 * float(np.mean(values)) for name, values in shares.items()} | counts


def format_table(found: dict[str, float]) -> str:
    """A table for a terminal, of what `evaluate` returns."""
    lines = [
        f"grounding of {found['expressions']:,} expressions",
        f"point in the box    {found['pointing']:6.2f} % (a random point "
        f"{found['pointing_chance']:.2f} %)",
    ]
    if "accuracy" in found:
        lines.append(
            f"box with IoU >= {OVERLAP}   {found['accuracy']:6.2f} % (a random box "
            f"{found['chance']:.2f} %, the best box {found['ceiling']:.2f} %)"
        )
    if found.get("unscored"):
        lines.append(
            f"{found['unscored']:,} of them with no score above 0: their first box is counted"
        )
    return "\n".join(lines)


def _pixels(box: Box) -> tuple[slice, slice]:
    """The rows and columns of a box, cut to whole pixels as ALBEF does."""
    x, y, across, down = box
    return slice(max(0, int(y)), int(y + down)), slice(max(0, int(x)), int(x + across))
