"""Shared by the data sets of other libraries: NAME:SPLIT, and usual names of the parts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from codebook_jax.data.sources.record import Request
from codebook_jax.data.sources.rows import first_line, names_in
from codebook_jax.errors import UserError

USUAL = {  # names of parts, first match wins; not ids, which often number examples, not images
    "image": ("image", "img", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "captions", "text", "texts", "sentences", "sentence", "txt"),
}
_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"  # for example train, train[:50%]
_SPLIT = re.compile(rf":({_PART}(?:\+{_PART})*)$")


def place_of(request: Request) -> tuple[str, str, str | None]:
    """(SCHEME:NAME, NAME, SPLIT) of a request for NAME:SPLIT; SPLIT is None if not given. Raises
    UserError for a NAME that can only be a folder, and does not exist.
    """
    place = request.place
    found = None if os.path.isdir(place) else _SPLIT.search(place)
    place, split = (place, None) if found is None else (place[: found.start()], found[1])
    what = f"{request.scheme}:{place}"
    if place.startswith(("/", ".", "~")) and not os.path.exists(place):
        raise UserError(f"{what}: the folder does not exist: give a folder, or a data set's name")
    return what, place, split


def only_split(what: str, splits: Sequence[str]) -> str:
    """The only split of a data set; raises UserError if it has several."""
    if len(splits) == 1:
        return splits[0]
    example = f"{what}:{splits[0] if splits else 'train'}"
    raise UserError(f"{what} has the splits {names_in(splits)}: name one, for example {example}")


def nothing_in(what: str, part: str, name: str, feature: object) -> UserError:
    """The refusal of a part that holds no images, or no captions."""
    return UserError(
        f"{what}: {name!r} is {first_line(feature)} and holds no {part}s: name another part with "
        f"?{part}_key=NAME; paths of images are read with json: or csv:, and URLs are downloaded "
        "with img2dataset and read with webdataset:"
    )
