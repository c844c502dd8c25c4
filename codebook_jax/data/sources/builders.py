"""Data sets of TensorFlow Datasets prepared as ArrayRecord files, read by index without TensorFlow.

Nothing is downloaded: `tfds build NAME --file_format=array_record` prepares a data set.
"""

from __future__ import annotations

import glob
import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.library_datasets import (
    chosen_part,
    first_line,
    only_split,
    place_and_split,
    texts_in,
)
from codebook_jax.data.sources.listed import NO_CAPTION
from codebook_jax.data.sources.record import Record, WithoutCaption, checked
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

_NAMES = (
    "image/filename",
    "image_name",
    "filename",
    "image/id",
    "image_id",
    "id",
)  # usual names of the part that identifies an image
_LOOKED_AT = 16  # examples hashed and checked on opening
_PREPARE = "prepare it with `tfds build NAME --file_format=array_record`"


class Examples:
    """The examples of a split, each an image with all its captions; the id is the number of the
    example.

    An example without a caption is found only when it is read: to know earlier means reading the
    whole data set.
    """

    def __init__(self, what: str, builder: Any, split: str, keys: dict[str, str | None]) -> None:
        """`keys` are {"image", "caption", "id"}: the requested names of the parts, or None.

        Raises UserError if a part or the split does not exist, or the data cannot be read by index.
        """
        self._what, self._split = what, split
        features = builder.info.features
        self._image = chosen_part(what, "image", keys["image"], list(features))
        self._caption = chosen_part(what, "caption", keys["caption"], list(features))
        self._id = keys["id"] and chosen_part(what, "id", keys["id"], list(features))
        self._id = self._id or next((name for name in _NAMES if name in features), None)
        self._data = _by_index(what, builder, split, _decoders(what, self._image, features))
        self.listed, self.left_out = len(self._data), ()
        self._fingerprint = self._hash(builder.info)

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Record:
        example = self._example(checked(index, len(self)))
        captions = texts_in(example[self._caption])
        if not captions:
            raise WithoutCaption(f"{self._numbered(index)} {NO_CAPTION}")
        return Record(example[self._image], captions, int(index))

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return texts_in(self._example(checked(index, len(self)))[self._caption])
        except UnreadableImage as failure:
            raise UserError(f"{failure}: see that the files are there, or {_PREPARE}") from failure

    def name(self, index: int) -> str:
        number = self._numbered(checked(index, len(self)))
        if self._id is None:
            return number
        try:
            value = self._example(index)[self._id]
        except UnreadableImage:
            return number
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def fingerprint(self) -> str:
        return self._fingerprint

    def __repr__(self) -> str:
        return f"tfds({self._what.partition(':')[2]!r}, images={len(self)})"

    def _numbered(self, index: int) -> str:
        return f"{self._what}[{index}]"

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self._data[int(index)]
        except Exception as failure:  # RuntimeError of ArrayRecord, any parsing error
            raise UnreadableImage(f"{self._numbered(index)}: {first_line(failure)}") from failure

    def _hash(self, info: Any) -> str:
        """A hash of the files' names and sizes, and of some examples; raises UserError if none of
        them has a caption.
        """
        parts = [
            (os.path.basename(part.filename), part.skip, part.take, part.examples_in_shard)
            for part in info.splits[self._split].file_instructions
        ]
        sizes = [(name, split.num_bytes) for name, split in sorted(info.splits.items())]
        keys = (self._image, self._caption)
        content = hashlib.sha256(repr(("tfds 1", info.full_name, sizes, parts, keys)).encode())
        captions = ()
        for index in np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(int):
            example = self._read_first(int(index))
            captions += texts_in(example[self._caption])
            content.update(repr((example[self._image], example[self._caption])).encode())
        if not captions:
            kind = info.features[self._caption]
            raise UserError(
                f"{self._what} has no text under {self._caption!r}, which is {first_line(kind)}: "
                "name the part that holds the captions with ?caption_key=NAME"
            )
        return content.hexdigest()

    def _read_first(self, index: int) -> dict[str, Any]:
        try:
            return self._example(index)
        except UnreadableImage as failure:
            raise UserError(f"{failure}: see that the files are there, or {_PREPARE}") from failure


def open_tfds(request: Request) -> Examples:
    """`tfds:NAME[/CONFIG]:SPLIT`, where NAME may be the folder of a prepared data set, and SPLIT
    `train[:50%]`.
    """
    place, split = place_and_split(request.place)
    what = f"tfds:{place}"
    builder = _builder(what, place, request.options.get("data_dir"))
    split = split or only_split(what, list(builder.info.splits))
    keys = {part: request.options.get(f"{part}_key") for part in ("image", "caption", "id")}
    return Examples(f"{what}:{split}", builder, split, keys)


def _library() -> Any:
    """TensorFlow Datasets, imported late: it takes half a second."""
    try:
        import tensorflow_datasets
    except ImportError as failure:
        raise UserError(
            'tfds: sources need TensorFlow Datasets: pip install "codebook_jax[tfds]"'
        ) from failure
    return tensorflow_datasets


def _builder(what: str, place: str, data_dir: str | None) -> Any:
    """The builder of a prepared data set in a folder, or of that name below `data_dir`."""
    tfds = _library()
    folder = _folder(what, place)
    if folder is not None:
        return tfds.builder_from_directory(folder)
    given = None if data_dir is None else os.path.expanduser(data_dir)
    try:
        # From its files alone: a data set's own code asks Google's cloud for whatever is not on
        # this machine.
        return tfds.core.read_only_builder.builder_from_files(place, data_dir=given)
    except Exception as failure:  # DatasetNotFoundError, ValueError, errors of parsing names, ...
        where = given or "~/tensorflow_datasets (name another folder as ?data_dir=FOLDER)"
        found = isinstance(failure, tfds.core.DatasetNotFoundError)
        why = "" if found else f" ({first_line(failure)})"
        raise UserError(
            f"{what} is not prepared in {where}{why}: run `tfds build {place} "
            "--file_format=array_record`, which downloads it; a run downloads nothing"
        ) from failure


def _folder(what: str, place: str) -> str | None:
    """The folder of the prepared data set at a place, or of the only one below it; None if the
    place is a name.
    """
    if not os.path.isdir(place):
        if place.startswith(("/", ".", "~")):
            raise UserError(
                f"{what}: the folder does not exist: give the name or the folder of a data set"
            )
        return None
    for depth in range(3):  # NAME/CONFIG/VERSION
        pattern = os.path.join(glob.escape(place), *["*"] * depth, "features.json")
        found = sorted(os.path.dirname(path) for path in glob.glob(pattern))
        if len(found) > 1:
            raise UserError(
                f"{what} holds several data sets: give the folder of one, for example {found[-1]}"
            )
        if found:
            return found[0]
    if os.sep in place.rstrip(os.sep):
        raise UserError(f"{what} holds no prepared data set (features.json): {_PREPARE}")
    return None


def _decoders(what: str, image: str, features: Any) -> dict[str, Any]:
    """Turns off tfds' own decoding of pictures; raises UserError if the part is not a picture."""
    tfds = _library()
    feature = features[image]
    if isinstance(feature, tfds.features.Image):
        return {image: tfds.decode.SkipDecoding()}
    if isinstance(feature, tfds.features.Tensor) and not isinstance(feature, tfds.features.Text):
        if feature.np_dtype == np.uint8 and len(feature.shape) == 3:
            return {}
    raise UserError(
        f"{what}: {image!r} is {first_line(feature)}, not a picture: name the picture part with "
        "?image_key=NAME"
    )


def _by_index(what: str, builder: Any, split: str, decoders: dict[str, Any]) -> Any:
    """The examples of a split; raises UserError if there are none, or they cannot be read by
    index.
    """
    try:
        if not builder.info.splits[split].num_examples:
            raise UserError(f"{what} has no examples: name another split or slice")
        return builder.as_data_source(split=split, decoders=decoders)
    except UserError:
        raise
    except NotImplementedError as failure:
        raise UserError(
            f"{what} is prepared as {builder.info.file_format.value}, which cannot be read by "
            f"index: prepare it again in another data_dir with `tfds build {builder.name} "
            "--file_format=array_record`"
        ) from failure
    except Exception as failure:  # ValueError for splits, OSError, ...
        splits = ", ".join(builder.info.splits)
        raise UserError(
            f"{what} cannot be read ({first_line(failure)}): its splits are {splits or 'none'}"
        ) from failure
