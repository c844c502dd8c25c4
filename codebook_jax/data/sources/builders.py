"""Data sets of TensorFlow Datasets prepared as ArrayRecord files, read by index without TensorFlow.

Nothing is downloaded: `tfds build NAME --file_format=array_record` prepares a data set.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook_jax.data.sources import rows
from codebook_jax.data.sources.record import Request
from codebook_jax.errors import UserError, reason

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo

# Usual names of the part that identifies an image, which names it in messages.
_NAMES = ("image/filename", "image_name", "filename", "image/id", "image_id", "id")
_LOOKED_AT = 16  # examples hashed and checked on opening


class Examples(rows.Rows):
    """The examples of a split, each an image with all its captions and its number as id.

    One without a caption is found only when it is read: else all must be read first.
    """

    def __init__(
        self, what: str, parts: rows.Parts, data: Sequence[dict], info: DatasetInfo, split: str
    ) -> None:
        key = parts.id or next((name for name in _NAMES if name in info.features), None)
        self.form, _, self.place = what.partition(":")
        self._parts, self._data = parts._replace(id=key), data
        self.listed = self._count = len(data)
        files = [
            (os.path.basename(part.filename), part.skip, part.take, part.examples_in_shard)
            for part in info.splits[split].file_instructions
        ]
        sizes = [(name, each.num_bytes) for name, each in sorted(info.splits.items())]
        summary = ("tfds 1", info.full_name, sizes, files, (parts.image, parts.caption))
        content, captions = hashlib.sha256(repr(summary).encode()), ()
        for index in np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(int).tolist():
            example = self._row(index, "image", is_needed=True)
            captions += self._texts([example])
            content.update(repr((example[parts.image], example[parts.caption])).encode())
        if not captions:
            raise rows.nothing_in(what, "caption", parts.caption, info.features[parts.caption])
        self._fingerprint = content.hexdigest()

    def _read(self, row: int, part: str) -> Mapping[str, Any]:
        return self._data[row]

    def _place(self, row: int) -> str:
        return f"{self.form}:{self.place}[{row}]"


def open_tfds(request: Request) -> Examples:
    """`tfds:NAME[/CONFIG]:SPLIT`; NAME may be a folder, SPLIT may be `train[:50%]`."""
    try:
        import tensorflow_datasets as tfds  # here: it takes half a second
    except ImportError as failure:
        cure = 'pip install "codebook_jax[tfds]"'
        raise UserError(f"tfds: sources need TensorFlow Datasets: {cure}") from failure
    what, place, split = rows.place_of(request)
    builder = _builder(tfds, what, place, request.options.get("data_dir"))
    info = builder.info
    split = split or rows.only_split(what, list(info.splits))
    what = f"{what}:{split}"
    parts = rows.parts_of(what, request, list(info.features), rows.USUAL)
    feature, decoders = info.features[parts.image], {}
    if isinstance(feature, tfds.features.Image):
        decoders = {parts.image: tfds.decode.SkipDecoding()}
    elif not isinstance(feature, tfds.features.Tensor) or (
        len(feature.shape) != 3 or feature.np_dtype != np.uint8
    ):
        raise rows.nothing_in(what, "image", parts.image, feature)
    try:
        if not info.splits[split].num_examples:
            raise UserError(f"{what} has no examples: name another split or slice")
        data = builder.as_data_source(split=split, decoders=decoders)
    except (ValueError, KeyError, OSError, RuntimeError) as failure:  # of splits, files, formats
        raise UserError(
            f"{what} cannot be read ({reason(failure)}): its splits are "
            f"{', '.join(info.splits) or 'none'}, and it is prepared as {info.file_format.value}; "
            f"`tfds build {builder.name} --file_format=array_record` prepares it to be read"
        ) from failure
    return Examples(what, parts, data, info, split)


def _builder(tfds: ModuleType, what: str, place: str, data_dir: str | None) -> DatasetBuilder:
    """The builder of a prepared data set: in a folder, in the only one below it, or of a name."""
    for depth in range(3) if os.path.isdir(place) else ():  # NAME/CONFIG/VERSION
        pattern = os.path.join(glob.escape(place), *["*"] * depth, "features.json")
        found = sorted(map(os.path.dirname, glob.glob(pattern)))
        if len(found) > 1:
            raise UserError(f"{what} holds several data sets: give the folder of one: {found[-1]}")
        if found:
            return tfds.builder_from_directory(found[0])
    data_dir = data_dir and os.path.expanduser(data_dir)
    try:  # from its files: a data set's own code asks Google's cloud for what is not here
        return tfds.core.read_only_builder.builder_from_files(place, data_dir=data_dir)
    except Exception as failure:  # DatasetNotFoundError, ValueError, errors of parsing names, ...
        where = data_dir or "~/tensorflow_datasets (name another folder as ?data_dir=FOLDER)"
        raise UserError(
            f"{what} is not prepared in {where} ({reason(failure)}): run `tfds build "
            f"{place} --file_format=array_record`, which downloads it; a run downloads nothing"
        ) from failure
