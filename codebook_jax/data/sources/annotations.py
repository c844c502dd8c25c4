"""COCO's caption files, and Karpathy's splits of COCO and Flickr30K.

A record is an image with all its captions, or with `?per=caption` an image with one of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from codebook_jax.data.sources.json_files import read_object
from codebook_jax.data.sources.listed import (
    Entry,
    Listed,
    captions_in,
    folders_of,
    keys_of,
    kind_of,
    shown,
)
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

PER = ("image", "caption")
SPLITS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}  # for each role


def open_coco(request: Request) -> Listed:
    """`coco:PATH`: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    return open_images(request, "coco", coco_entries(request.place))


def open_karpathy(request: Request) -> Listed:
    """`karpathy:PATH`: {"images": [{"filepath", "filename", "cocoid", "split", "sentences":
    [{"raw"}]}]}.
    """
    split = request.options.get("split")
    wanted = None if split is None else split.replace("+", ",").split(",")
    return open_images(request, "karpathy", karpathy_entries(request.place, wanted, request.role))


def open_images(request: Request, form: str, entries: Iterator[Entry]) -> Listed:
    """These entries, each an image with all its captions, as a source with the records that `?per=`
    selects.
    """
    per = request.options.get("per", "image")
    if per not in PER:
        raise UserError(
            f"{form}:{request.place}: per={per} is not valid: use per=image or per=caption"
        )
    folders = folders_of(request.place, request.image_root, request.settings.path_map)
    entries = _split(entries) if per == "caption" else entries
    return Listed(form, request.place, entries, folders, merge=request.merge)


def coco_entries(path: str) -> Iterator[Entry]:
    """The images of a caption file in its order; raises UserError, naming the entry, if the file is
    inconsistent.
    """
    content = read_object(path, "coco")
    for name in ("images", "annotations"):
        if not isinstance(content.get(name), list):
            karpathy = name == "annotations" and "images" in content
            cure = (
                f"karpathy:{path} reads Karpathy's splits; otherwise give " if karpathy else "give "
            )
            raise UserError(
                f'{path} has no list "{name}" (its keys: {keys_of(content)}): {cure}a COCO '
                "caption file, "
                "such as captions_train2014.json"
            )
    images: dict[int | str, tuple[str, str]] = {}
    for number, image in enumerate(content["images"]):
        where = f"{path} images[{number}]"
        key = identity(where, image, "id")
        if key in images:
            raise UserError(
                f"{where} has the same id {key} as {images[key][0]}: give each image its own id"
            )
        images[key] = where, text_of(where, image, "file_name")
    captions: dict[int | str, list[str]] = {key: [] for key in images}
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path} annotations[{number}]"
        if isinstance(annotation, dict) and "caption" not in annotation:
            raise UserError(
                f"{where} has no caption (its keys: {keys_of(annotation)}): give a COCO caption "
                "file, such as captions_train2014.json, not one of boxes or keypoints"
            )
        key = spelled_as_in(captions, identity(where, annotation, "image_id"))
        if key not in captions:
            raise UserError(f"{where} names image {key}, which the file does not list: remove it")
        captions[key] += captions_in(where, "caption", annotation["caption"])
    del content  # about 100 MB, no longer needed
    for key, (where, file_name) in images.items():
        yield Entry(where, file_name, tuple(captions[key]), key)


def karpathy_entries(path: str, wanted: Sequence[str] | None, role: str) -> Iterator[Entry]:
    """The images of the `wanted` splits (None: those of the role); raises UserError naming a
    malformed entry.
    """
    content = read_object(path, "karpathy")
    images = content.get("images")
    if not isinstance(images, list) or "annotations" in content:
        cure = f"coco:{path} reads COCO caption files" if "annotations" in content else ""
        raise UserError(
            f"{path} is not one of Karpathy's splits (its keys: {keys_of(content)}): "
            f"{cure or 'give dataset_coco.json or dataset_flickr30k.json'}"
        )
    places = [f"{path} images[{number}]" for number in range(len(images))]
    sizes = Counter(
        text_of(where, image, "split") for where, image in zip(places, images, strict=True)
    )
    chosen = tuple(wanted or [split for split in SPLITS[role] if split in sizes] or SPLITS[role])
    absent = [split for split in chosen if split not in sizes]
    if absent:
        held = ", ".join(f"{count:,} of {name}" for name, count in sizes.items())
        raise UserError(
            f"{path} has no split {absent[0]!r} (it has {held or 'no images'}): name its splits, "
            "for example ?split=train+restval"
        )
    for where, image in zip(places, images, strict=True):
        if image["split"] in chosen:
            yield _karpathy_entry(where, image)


def _karpathy_entry(where: str, image: Mapping[str, Any]) -> Entry:
    name = text_of(where, image, "filename")
    folder = image.get("filepath")
    if folder is not None and not isinstance(folder, str):
        raise UserError(f'{where}, key "filepath": {shown(folder)} is not a folder: use a string')
    sentences = image.get("sentences")
    if not isinstance(sentences, list):
        raise UserError(f'{where} has no list "sentences" (its keys: {keys_of(image)}): add it')
    captions: list[str] = []
    for number, sentence in enumerate(sentences):
        place = f"{where} sentences[{number}]"
        captions += captions_in(place, "raw", text_of(place, sentence, "raw", empty=True))
    key = next((identity(where, image, key) for key in ("cocoid", "imgid") if key in image), None)
    return Entry(where, f"{folder}/{name}" if folder else name, tuple(captions), key)


def _split(entries: Iterator[Entry]) -> Iterator[Entry]:
    """An entry for each caption; entries without captions unchanged, so that they are counted."""
    for entry in entries:
        if not entry.captions:
            yield entry
        for caption in entry.captions:
            yield entry._replace(captions=(caption,))


def text_of(where: str, entry: Any, key: str, *, empty: bool = False) -> str:
    """The string at a key of an entry; raises UserError if there is none, or, unless `empty`, if it
    is empty.
    """
    value = value_of(where, entry, key)
    if not isinstance(value, str) or not (value or empty):
        raise UserError(f'{where}, key "{key}": {shown(value)} is not a text: give one')
    return value


def identity(where: str, entry: Any, key: str) -> int | str:
    """The id at a key of an entry; raises UserError if there is none."""
    value = value_of(where, entry, key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f'{where}, key "{key}": {shown(value)} is not an id: use a whole number or a string'
        )
    return value


def spelled_as_in(ids: Container[int | str], key: int | str) -> int | str:
    """The id as it is in `ids`: an id may be a number in one list and a string in another."""
    if key in ids:
        return key
    if isinstance(key, int):
        return str(key)
    return int(key) if re.fullmatch("0|-?[1-9][0-9]{0,18}", key) else key


def value_of(where: str, entry: Any, key: str) -> Any:
    """The value at a key of an entry; raises UserError if the key is missing."""
    if not isinstance(entry, dict):
        raise UserError(f'{where} is a {kind_of(entry)}, not an object with the key "{key}"')
    if key not in entry:
        raise UserError(f'{where} has no key "{key}" (its keys: {keys_of(entry)}): add it')
    return entry[key]
