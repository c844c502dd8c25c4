"""One array for each of the two modalities."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Shaped


class Pair(NamedTuple):
    """Arrays of one shape for images and for texts."""

    image: Shaped[Array, "..."]
    text: Shaped[Array, "..."]
