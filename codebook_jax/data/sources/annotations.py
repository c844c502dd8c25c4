"""COCO's caption files, Karpathy's splits of COCO and Flickr30K, Visual Genome's phrases: images
with all their captions, or with `?per=caption` with one each.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from codebook_jax.data.sources.json_files import read_json, read_object
from codebook_jax.data.sources.listed import Entry, Listed, captions_in, field
from codebook_jax.data.sources.record import Request
from codebook_jax.errors import UserError

IMAGE_DATA = "image_data.json"
FOLDERS = ("VG_100K", "VG_100K_2")
SPLITS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}  # for each role


def open_annotations(request: Request) -> Listed:
    """`coco:PATH`, `karpathy:PATH` and `vg:PATH`."""
    readers = {"coco": _coco_images, "karpathy": _karpathy_images, "vg": _genome_images}
    entries = readers[request.scheme](request)
    if request.choice("per", ("image", "caption")) == "caption":
        entries = (
            entry._replace(captions=captions)
            for entry in entries  # those without captions too, so that they are counted
            for captions in ([(text,) for text in entry.captions] or [()])
        )
    return Listed(request, entries)


def _coco_images(request: Request) -> Iterator[Entry]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}"""
    path, content = request.place, read_object(request.place)
    annotations = field(path, content, "annotations", "a list")
    images: dict[str, Entry] = {}  # an id may be a number here, a text there
    for number, image in enumerate(field(path, content, "images", "a list")):
        where = f"{path} images[{number}]"
        key = field(where, image, "id", "an id")
        if str(key) in images:
            raise UserError(f"{where} has the id {key} of {images[str(key)].where}: correct one")
        images[str(key)] = Entry(where, field(where, image, "file_name", "a text"), (), key)
    captions: dict[str, list[str]] = {key: [] for key in images}
    for number, annotation in enumerate(annotations):
        where = f"{path} annotations[{number}]"
        texts = captions_in(where, annotation, "caption")
        key = str(field(where, annotation, "image_id", "an id"))
        if key not in captions:
            raise UserError(f"{where} names image {key}, which the file does not list: remove it")
        captions[key] += texts
    del content, annotations  # about 100 MB, no longer needed
    for key, entry in images.items():
        yield entry._replace(captions=tuple(captions[key]))


def _karpathy_images(request: Request) -> Iterator[Entry]:
    """{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}, of the splits that
    `?split=` names, by default those of the role.
    """
    path = request.place
    images = field(path, read_object(path), "images", "a list")
    numbered = [(f"{path} images[{number}]", image) for number, image in enumerate(images)]
    sizes = Counter(field(where, image, "split", "a text") for where, image in numbered)
    usual = SPLITS[request.role]
    wanted = [split for split in usual if split in sizes] or usual
    if "split" in request.options:
        wanted = request.options["split"].replace("+", ",").split(",")
    for split in wanted:
        if split not in sizes:
            held = ", ".join(f"{count:,} of {name}" for name, count in sizes.items())
            raise UserError(
                f"{path} has no split {split!r} (it has {held or 'no images'}): name its splits, "
                "for example ?split=train+restval"
            )
    for where, image in numbered:
        if image["split"] not in wanted:
            continue
        name = field(where, image, "filename", "a text")
        if image.get("filepath"):
            name = f"{field(where, image, 'filepath', 'a text')}/{name}"
        captions: list[str] = []
        for number, sentence in enumerate(field(where, image, "sentences", "a list")):
            captions += captions_in(f"{where} sentences[{number}]", sentence, "raw")
        ids = [key for key in ("cocoid", "imgid") if key in image]
        key = field(where, image, ids[0], "an id") if ids else None
        yield Entry(where, name, tuple(captions), key)


def _genome_images(request: Request) -> Iterator[Entry]:
    """[{"id", "regions": [{"phrase"}]}]"""
    path, paths = request.place, {}
    root = request.image_root or os.path.dirname(path)
    for where, image in read_json(path):
        regions = field(where, image, "regions", "a list")
        key = field(where, image, "id" if "id" in image else "image_id", "an id")
        phrases: dict[str, None] = {}
        for number, region in enumerate(regions):
            phrases |= dict.fromkeys(captions_in(f"{where} regions[{number}]", region, "phrase"))
        paths = paths or _paths(path, root)
        if str(key) not in paths:
            raise UserError(
                f"{where} names image {key}, which is neither in {IMAGE_DATA} nor in the folders "
                f"{' and '.join(FOLDERS)} of {root or '.'}: put the published {IMAGE_DATA} beside "
                f"{path}, or set config.data.image_root to the folder that holds both"
            )
        yield Entry(where, paths[str(key)], tuple(phrases), key)


def _paths(path: str, root: str) -> dict[str, str]:
    """{image id: path below the root}, from image_data.json beside the file, or the folders."""
    beside, found = os.path.join(os.path.dirname(path), IMAGE_DATA), {}
    if os.path.exists(beside):
        for where, image in read_json(beside):
            key = field(where, image, "image_id" if "image_id" in image else "id", "an id")
            url = field(where, image, "url", "a text")
            found[str(key)] = "/".join(url.split("/")[-2:])
            if not found[str(key)].startswith(FOLDERS):
                wrong = f"{where} has the url {url}, not of VG_100K/NAME.jpg"
                raise UserError(f"{wrong}: give the published {IMAGE_DATA}")
        return found
    for folder in FOLDERS:
        place = os.path.join(root, folder)
        for name in os.listdir(place) if os.path.isdir(place) else ():
            stem, suffix = os.path.splitext(name)
            if stem.isdecimal() and suffix.lower() == ".jpg":
                found[stem] = f"{folder}/{name}"
    return found
