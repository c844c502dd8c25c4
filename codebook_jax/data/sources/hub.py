"""Data sets of Hugging Face's `datasets`: Parquet files, what its `save_to_disk` wrote, or a name
on the hub.

Rows are read from Arrow files on disk. The library copies Parquet files and hub data to its own
cache, which takes
space: `~/.cache/huggingface/datasets`, unless HF_HOME or HF_DATASETS_CACHE names another place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from codebook_jax.data.network import hub_reachable
from codebook_jax.data.sources.hub_rows import Columns, Rows
from codebook_jax.data.sources.library_datasets import (
    chosen_part,
    first_line,
    only_split,
    place_and_split,
)
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

_SAVED = ("state.json", "dataset_dict.json")  # files that save_to_disk writes


def open_hugging_face(request: Request) -> Rows:
    """`hf:PLACE:SPLIT`: PLACE is a folder, a Parquet file or a name on the hub; SPLIT may be
    `train[:50%]`.
    """
    place, split = place_and_split(request.place)
    what = f"hf:{place}"
    table = _loaded(what, place, split)
    if isinstance(table, dict):
        split = split or only_split(what, list(table))
        if split not in table:
            raise UserError(f"{what} has no split {split!r}: its splits are {', '.join(table)}")
        table = table[split]
    what = f"{what}:{split}" if split else what
    keys = {part: request.options.get(f"{part}_key") for part in ("image", "caption", "id")}
    columns = Columns(
        chosen_part(what, "image", keys["image"], table.column_names),
        chosen_part(what, "caption", keys["caption"], table.column_names),
        keys["id"] and chosen_part(what, "id", keys["id"], table.column_names),
    )
    return Rows(what, _undecoded(what, table, columns.image), columns, merge=request.merge)


def _library() -> Any:
    """`datasets`, imported late: it takes a second."""
    try:
        import datasets
    except ImportError as failure:
        raise UserError(
            'hf: sources need Hugging Face\'s datasets: pip install "codebook_jax[hf]"'
        ) from failure
    return datasets


def _loaded(what: str, place: str, split: str | None) -> Any:
    """The table of a split, or {split: table}; raises UserError if it cannot be loaded."""
    datasets = _library()
    here = os.path.exists(place)
    if not here and place.startswith(("/", ".", "~")):
        raise UserError(f"{what}: the folder does not exist: give a folder, or a name on the hub")
    reachable = here or hub_reachable()
    try:
        with _quiet(datasets, offline=not reachable):
            return _load(datasets, what, place, split)
    except UserError:
        raise
    except (
        Exception
    ) as failure:  # the library's errors, its HTTP library's, Arrow's, OSError, ValueError, ...
        reason = first_line(failure.__cause__ or failure)
        if here:
            raise UserError(
                f"{what} cannot be read ({reason}): give a folder of Parquet files, or one that "
                "save_to_disk wrote"
            ) from failure
        if not reachable:
            reason = "there is no network, and it is not in the cache"
        raise UserError(
            f"{what} is not a folder here and could not be loaded from the Hugging Face hub "
            f"({reason}): give a folder, or a name on the hub with network access"
        ) from failure


def _load(datasets: Any, what: str, place: str, split: str | None) -> Any:
    if os.path.isfile(place):
        return datasets.load_dataset("parquet", data_files=place, split=split or "train")
    if not any(os.path.isfile(os.path.join(place, name)) for name in _SAVED):
        return datasets.load_dataset(place, split=split)
    saved = datasets.load_from_disk(place)
    if not isinstance(saved, dict) and split not in (None, "train", str(saved.split)):
        raise UserError(f"{what} is a single table and has no split {split!r}: leave the split out")
    return saved


@contextlib.contextmanager
def _quiet(datasets: Any, *, offline: bool) -> Iterator[None]:
    """Turns off progress bars and warnings; `offline` also stops the library from trying the hub,
    which takes 20 s.
    """
    from huggingface_hub import constants

    logging = datasets.utils.logging
    bars, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    before = [(module, module.HF_HUB_OFFLINE) for module in (constants, datasets.config)]
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        for module, already in before:
            module.HF_HUB_OFFLINE = already or offline
        yield
    finally:
        for module, already in before:
            module.HF_HUB_OFFLINE = already
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _undecoded(what: str, table: Any, image: str) -> Any:
    """The table with its pictures as the bytes or paths of files; raises UserError if the column
    holds anything else.
    """
    datasets = _library()
    feature = table.features[image]
    if isinstance(feature, datasets.Image):
        return table.cast_column(image, datasets.Image(decode=False))
    kind = getattr(feature, "dtype", "")
    if kind in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
        return table
    if kind in ("string", "large_string"):
        raise UserError(
            f"{what}: {image!r} holds texts, not pictures: if they are paths, read a list of them "
            "with json: or csv:; if they are URLs, download them with img2dataset and read its "
            "shards with webdataset:; or name the column of pictures with ?image_key=NAME"
        )
    raise UserError(
        f"{what}: {image!r} is {first_line(feature)}, not a picture: name the column of pictures "
        "with ?image_key=NAME"
    )
