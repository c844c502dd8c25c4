"""The phrases of Visual Genome: `region_descriptions.json`, with images in VG_100K and VG_100K_2.

A record is an image with all its distinct phrases, or with `?per=caption` an image with one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from codebook_jax.data.sources.annotations import open_images, spelled_as_in
from codebook_jax.data.sources.json_files import id_of, list_of, read_json, text_of, value_of
from codebook_jax.data.sources.listed import Entry, Listed, captions_in
from codebook_jax.data.sources.request import Request
from codebook_jax.errors import UserError

IMAGE_DATA = "image_data.json"
FOLDERS = ("VG_100K", "VG_100K_2")


def open_visual_genome(request: Request) -> Listed:
    """`vg:PATH`: [{"id", "regions": [{"phrase"}]}]."""
    root = request.image_root or os.path.dirname(request.place)
    return open_images(request, _entries(request.place, root))


def _entries(path: str, root: str) -> Iterator[Entry]:
    """The images of the file; raises UserError, naming the entry, if the file is not one of region
    descriptions.
    """
    paths: dict[int | str, str] = {}
    for where, image in read_json(path, "vg"):
        regions = list_of(where, image, "regions", "give region_descriptions.json")
        key = id_of(where, image, "id" if "id" in image else "image_id")
        phrases: dict[str, None] = {}
        for number, region in enumerate(regions):
            place = f"{where} regions[{number}]"
            phrase = value_of(place, region, "phrase")
            phrases |= dict.fromkeys(captions_in(place, "phrase", phrase))
        paths = paths or _paths(path, root)
        if (listed := spelled_as_in(paths, key)) not in paths:
            raise UserError(
                f"{where} names image {key}, which is neither in {IMAGE_DATA} nor in "
                f"{' or '.join(FOLDERS)}: put the published {IMAGE_DATA} beside {path}"
            )
        yield Entry(where, paths[listed], tuple(phrases), key)


def _paths(path: str, root: str) -> dict[int | str, str]:
    """{image id: path below the root}, from image_data.json beside the file, else from the
    folders.
    """
    beside = os.path.join(os.path.dirname(path), IMAGE_DATA)
    if os.path.exists(beside):
        return dict(_described(where, image) for where, image in read_json(beside, "vg"))
    found: dict[int | str, str] = {}
    for folder in FOLDERS:
        place = os.path.join(root, folder)
        for name in os.listdir(place) if os.path.isdir(place) else ():
            stem, _, suffix = name.partition(".")
            if stem.isdecimal() and suffix.lower() == "jpg":
                found[int(stem)] = f"{folder}/{name}"
    if not found:
        raise UserError(
            f"cannot tell which of {' and '.join(FOLDERS)} holds the images of {path}: put the "
            f"published {IMAGE_DATA} beside it, or set config.data.image_root to the folder that "
            f"holds both (now {root or '.'})"
        )
    return found


def _described(where: str, image: Any) -> tuple[int | str, str]:
    """(image id, path below the root) of an entry of image_data.json."""
    key = id_of(where, image, "id" if "image_id" not in image else "image_id")
    parts = text_of(where, image, "url").split("/")
    if len(parts) < 2 or parts[-2] not in FOLDERS:
        raise UserError(
            f'{where}, key "url": it does not end in VG_100K/NAME.jpg: give the published '
            f"{IMAGE_DATA}"
        )
    return key, "/".join(parts[-2:])
