"""Pictures in a folder for each class, whose name is their label, as in ImageNet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator

from codebook_jax.data.sources.examples import Entry, ListedExamples
from codebook_jax.data.sources.record import Example, Request
from codebook_jax.errors import UserError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif")
_SPLITS = {"train", "val", "valid", "validation", "dev", "test"}
_CURE = "give a folder with a folder of pictures for each class, such as data/train"


def open_folders(request: Request) -> ListedExamples:
    """`folders:FOLDER`."""
    if not os.path.isdir(request.place):
        raise UserError(f"folders:{request.place} is not a folder: {_CURE}")
    classes = {entry.name for entry in os.scandir(request.place) if _is_class(entry)}
    if len(classes) > 1 and classes <= _SPLITS:
        one = os.path.join(request.place, min(classes))
        names = " and ".join(sorted(classes))
        raise UserError(f"folders:{request.place} has {names}, not classes: give folders:{one}")
    settings = request.settings._replace(image_root=request.place, path_map="")
    request = request._replace(settings=settings)
    return ListedExamples(request, "labels", _in_turn(_entries(request.place)), _CURE)


def _is_class(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _in_turn(entries: Iterable[Entry]) -> list[Entry]:
    """The first of each class, the second of each, and so on: the first few have all classes."""
    numbered, seen = [], Counter()
    for entry in entries:
        (label,) = entry.example.answers
        numbered.append((seen[label], entry))
        seen[label] += 1
    return [entry for _, entry in sorted(numbered, key=lambda each: each[0])]


def _entries(place: str) -> Iterator[Entry]:
    """The pictures of a class at any depth, classes and files by name; hidden ones are skipped."""
    for folder, folders, files in os.walk(place, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = os.path.join(folder, name)
            image = os.path.relpath(path, place)
            label, why = image.partition(os.sep)[0], ""
            if name.rpartition(".")[2].lower() not in _PICTURES:
                why = f"is not a picture ({', '.join(_PICTURES)})"
            elif label == image:
                why = "is in no folder of a class"
            yield Entry(path, Example((image,), "", (label,), image, 0), why)
