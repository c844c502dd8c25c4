"""What a loaded model finds in a picture for a text: heat maps of words, and a place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from codebook_jax.errors import UserError
from codebook_jax.evaluation.grounding import box_scores, check_boxes, resize_map

MOST_HEAT = 0.75  # the share of the colour where a map is highest

Pixels = UInt8[np.ndarray, "height width 3"]


class Explanation(NamedTuple):
    """Which patches of a picture speak for its match with a text, word by word (Grad-CAM)."""

    words: tuple[str, ...]
    maps: Float32[np.ndarray, "words rows columns"]  # each the sum over its word's tokens
    whole: Float32[np.ndarray, "rows columns"]  # over all tokens, [CLS] and [SEP] included
    layer: int  # of the fusion encoder, from 0
    probability: float  # that the picture and the text belong together
    pixels: Pixels  # of the picture

    def map_of(self, word: int | str | None) -> Float32[np.ndarray, "rows columns"]:
        """The map of a word, by its index or as a text (the first such), or of None: the whole."""
        if word is None:
            return self.whole
        if isinstance(word, str) and word in self.words:
            return self.maps[self.words.index(word)]
        if isinstance(word, int | np.integer) and 0 <= word < len(self.words):
            return self.maps[word]
        known = ", ".join(f"{number} {text!r}" for number, text in enumerate(self.words))
        raise UserError(f"{word!r} is not one of the words: give one of {known}")

    def picture(self, word: int | str | None = None) -> Image.Image:
        """The picture at its own size, under the heat of a word's map (None: of the whole)."""
        return Image.fromarray(heated(self.pixels, self.map_of(word)))

    def place(self, word: int | str | None = None) -> tuple[float, float]:
        """x and y, in pixels of the picture, of the highest point of a word's map."""
        return highest(resize_map(self.map_of(word), *self.pixels.shape[:2]))


class Grounded(NamedTuple):
    """Where a picture shows what a text names."""

    point: tuple[float, float]  # x and y, the centre of the map's highest pixel
    map: Float32[np.ndarray, "height width"]  # at the size of the picture
    scores: Float32[np.ndarray, " proposals"] | None  # None without proposals
    best: int | None  # the place of the best proposal


def ground(found: Explanation, text: str, proposals: Sequence[Sequence[float]] | None) -> Grounded:
    """The place of a text by the map of its explanation; raises UserError for proposals that are no
    boxes [x, y, width, height] in the picture.
    """
    height, width = found.pixels.shape[:2]
    resized = resize_map(found.whole, height, width)
    given = highest(resized), resized.astype(np.float32)
    if proposals is None:
        return Grounded(*given, None, None)
    try:
        boxes = np.asarray(proposals, float)
    except (TypeError, ValueError):
        boxes = np.zeros(0)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise UserError(
            f"proposals={str(proposals)[:100]} are no boxes: give a list of one or more "
            "[x, y, width, height] in pixels, or leave it out"
        )
    everything = np.array([[0, 0, width, height]])
    check_boxes(np.concatenate([everything, boxes]), height, width, text)
    scores = box_scores(resized, boxes)
    best = int(scores.argmax()) if (scores > 0).any() else 0  # as in evaluation
    return Grounded(*given, scores.astype(np.float32), best)


def highest(heat: Float[np.ndarray, "height width"]) -> tuple[float, float]:
    """x and y of the centre of the highest pixel."""
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    return float(x) + 0.5, float(y) + 0.5


def heated(pixels: Pixels, heat: Float[np.ndarray, "rows columns"]) -> Pixels:
    """The picture under a map enlarged to its size: unchanged where the map is 0, then over green
    and yellow to red at the map's own highest value.
    """
    enlarged = resize_map(heat, *pixels.shape[:2])
    level = np.clip(enlarged / max(enlarged.max(), 1e-12), 0, 1)[:, :, None]
    colour = 255 * np.clip(1.5 - np.abs(4 * level - np.array([3, 2, 1])), 0, 1)
    return np.rint(pixels + MOST_HEAT * level * (colour - pixels)).astype(np.uint8)
