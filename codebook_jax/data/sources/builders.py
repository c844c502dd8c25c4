"""Data sets of TensorFlow Datasets prepared as ArrayRecord files, read by index without TensorFlow.

Nothing is downloaded: `tfds build NAME --file_format=array_record` prepares a data set.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources import library_datasets as library
from codebook_jax.data.sources.record import (
    NO_CAPTION,
    NamedSource,
    Record,
    Request,
    WithoutCaption,
    checked,
    required,
)
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo

# Usual names of the part that identifies an image.
_NAMES = ("image/filename", "image_name", "filename", "image/id", "image_id", "id")
_LOOKED_AT = 16  # examples hashed and checked on opening


class Examples(NamedSource):
    """The examples of a split, each an image with all its captions and its number as id.

    One without a caption is found only when it is read: else all must be read first.
    """

    def __init__(
        self, what: str, data: Sequence, info: DatasetInfo, split: str, parts: library.Parts
    ) -> None:
        self.form, _, self.place = what.partition(":")
        self._what, self._parts = what, parts
        self._id = parts.id or next((name for name in _NAMES if name in info.features), None)
        self._data, self.listed, self.left_out = data, len(data), ()
        self._fingerprint = self._hash(info, split)

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Record:
        example = self._example(index)
        captions = library.texts_in(example[self._parts.caption])
        if not captions:
            raise WithoutCaption(f"{self._what}[{index}] {NO_CAPTION}")
        return Record(example[self._parts.image], captions, int(index))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return library.texts_in(self._example(index)[self._parts.caption])

    def name(self, index: int) -> str:
        value = number = f"{self._what}[{checked(index, len(self))}]"
        with contextlib.suppress(UnreadableImage):
            value = self._example(index)[self._id] if self._id else number
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def _example(self, index: int) -> dict[str, Any]:
        number = int(checked(index, len(self)))
        try:
            return self._data[number]
        except Exception as failure:  # RuntimeError of ArrayRecord, any parsing error
            raise UnreadableImage(
                f"{self._what}[{index}]: {library.first_line(failure)}"
            ) from failure

    def _hash(self, info: DatasetInfo, split: str) -> str:
        """Of the files' names and sizes, and of some examples, of which one must have a caption."""
        files = [
            (os.path.basename(part.filename), part.skip, part.take, part.examples_in_shard)
            for part in info.splits[split].file_instructions
        ]
        sizes = [(name, each.num_bytes) for name, each in sorted(info.splits.items())]
        image, caption, _ = self._parts
        summary = ("tfds 1", info.full_name, sizes, files, (image, caption))
        content, captions = hashlib.sha256(repr(summary).encode()), ()
        for index in np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(int):
            with required():
                example = self._example(int(index))
            captions += library.texts_in(example[caption])
            content.update(repr((example[image], example[caption])).encode())
        if not captions:
            raise library.nothing_in(self._what, "caption", caption, info.features[caption])
        return content.hexdigest()


def open_tfds(request: Request) -> Examples:
    """`tfds:NAME[/CONFIG]:SPLIT`; NAME may be a folder, SPLIT may be `train[:50%]`."""
    try:
        import tensorflow_datasets as tfds  # here: it takes half a second
    except ImportError as failure:
        cure = 'pip install "codebook_jax[tfds]"'
        raise UserError(f"tfds: sources need TensorFlow Datasets: {cure}") from failure
    what, place, split = library.place_of(request)
    builder = _builder(tfds, what, place, request.options.get("data_dir"))
    info = builder.info
    split = split or library.only_split(what, list(info.splits))
    what = f"{what}:{split}"
    parts = library.parts_of(what, request, list(info.features))
    feature = info.features[parts.image]
    decoders = {parts.image: tfds.decode.SkipDecoding()}
    if not isinstance(feature, tfds.features.Image):
        decoders = {}
        is_array = isinstance(feature, tfds.features.Tensor) and len(feature.shape) == 3
        if not is_array or feature.np_dtype != np.uint8:
            raise library.nothing_in(what, "image", parts.image, feature)
    try:
        if not info.splits[split].num_examples:
            raise UserError(f"{what} has no examples: name another split or slice")
        data = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as failure:
        raise UserError(
            f"{what} is prepared as {info.file_format.value}, which cannot be read by index: "
            f"prepare it again in another data_dir with `tfds build {builder.name} "
            "--file_format=array_record`"
        ) from failure
    except (ValueError, KeyError, OSError, RuntimeError) as failure:  # of splits, of files
        splits = f"its splits are {', '.join(info.splits) or 'none'}"
        raise UserError(
            f"{what} cannot be read ({library.first_line(failure)}): {splits}"
        ) from failure
    return Examples(what, data, info, split, parts)


def _builder(tfds: ModuleType, what: str, place: str, data_dir: str | None) -> DatasetBuilder:
    """The builder of a prepared data set: in a folder, in the only one below it, or of a name."""
    for depth in range(3) if os.path.isdir(place) else ():  # NAME/CONFIG/VERSION
        pattern = os.path.join(glob.escape(place), *["*"] * depth, "features.json")
        found = sorted(map(os.path.dirname, glob.glob(pattern)))
        if len(found) > 1:
            raise UserError(f"{what} holds several data sets: give the folder of one: {found[-1]}")
        if found:
            return tfds.builder_from_directory(found[0])
    if os.path.isdir(place) and os.sep in place.rstrip(os.sep):
        cure = "prepare it with `tfds build NAME --file_format=array_record`"
        raise UserError(f"{what} holds no prepared data set (features.json): {cure}")
    data_dir = data_dir and os.path.expanduser(data_dir)
    try:  # from its files: a data set's own code asks Google's cloud for what is not here
        return tfds.core.read_only_builder.builder_from_files(place, data_dir=data_dir)
    except Exception as failure:  # DatasetNotFoundError, ValueError, errors of parsing names, ...
        where = data_dir or "~/tensorflow_datasets (name another folder as ?data_dir=FOLDER)"
        raise UserError(
            f"{what} is not prepared in {where} ({library.first_line(failure)}): run `tfds build "
            f"{place} --file_format=array_record`, which downloads it; a run downloads nothing"
        ) from failure
