"""The weights of another of our own runs or exports, at another resolution too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from codebook_jax.data import text
from codebook_jax.errors import UserError
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import Checkpoints, read_arrays, reason
from codebook_jax.weights.fill import PARTIAL, POSITIONS, WORDS, Filled, few, fitted_positions
from codebook_jax.weights.layouts import Shapes
from codebook_jax.weights.load import MANIFEST

_WORDS = tuple(f"student/towers/{name}" for name in WORDS) + tuple(
    f"teacher/{name}" for name in WORDS
)


class Own(NamedTuple):
    """The contents of another run or export."""

    title: str
    config: ml_collections.ConfigDict
    arrays: dict[str, np.ndarray]  # by the state's names: student/towers/..., teacher/...
    tokenizer: str  # its folder; empty if it is missing


def is_own(path: Path) -> bool:
    """Whether this is the folder of a run, or of an export."""
    return (path / MANIFEST).is_file() or (
        (path / records.RECORD).is_file() and (path / "checkpoints").is_dir()
    )


def read_own(path: Path, what: str) -> Own:
    """The weights there: an export's own, or a run's best checkpoint, or its newest if none is
    marked best.
    """
    record = records.read_record(path)
    if record is None:
        raise UserError(
            f"{what}: {path / records.RECORD} is missing: give a complete run or export"
        )
    if (path / MANIFEST).is_file():
        folder, title = path, "an export"
    else:
        with Checkpoints(path, (), keep=1, create=False) as checkpoints:
            step = checkpoints.step_to_use()
        if step is None:
            raise UserError(f"{what} has no checkpoint yet: train it first")
        folder, title = path / "checkpoints" / str(step), f"the checkpoint of step {step:,}"
    arrays = {}
    for item in ("student", "teacher"):
        if not (folder / item).is_dir():
            continue
        try:
            arrays |= {
                f"{item}/{name}": array for name, array in read_arrays(folder / item).items()
            }
        except Exception as failure:  # any error of Orbax or tensorstore for a broken file
            raise UserError(
                f"{what}: {folder / item} cannot be read ({reason(failure)}): give another"
            ) from failure
    words = path / text.FOLDER
    return Own(title, records.recorded_config(record), arrays, str(words) if words.is_dir() else "")


def fill_own(own: Own, shapes: Shapes, *, what: str, allow_partial: bool) -> Filled:
    """Its arrays for a state of `shapes`; positions of another resolution are resized.

    Raises UserError, beginning with `what`, if a shape differs, or, unless `allow_partial`, arrays
    are missing or extra.
    """
    wanted = {
        name: shape for name, shape in shapes.items() if name.startswith(("student/", "teacher/"))
    }
    if not any(name.startswith("teacher/") for name in own.arrays):
        wanted = {name: shape for name, shape in wanted.items() if name.startswith("student/")}
    filled: dict[str, Any] = {}
    resized: dict[str, str] = {}
    for name in (name for name in wanted if name in own.arrays):
        array, note = own.arrays[name], ""
        if name.endswith(POSITIONS):
            array, note = fitted_positions(array, wanted[name], name, what)
        _refuse_other_shape(name, array.shape, wanted[name], what)
        filled[name] = array
        resized |= {name: note} if note else {}
    missing = sorted(wanted.keys() - own.arrays.keys())
    strange = sorted(own.arrays.keys() - wanted.keys())
    if strange and not allow_partial:
        raise UserError(
            f"{what} has {few(strange)}, which this config's model does not have: use the sizes it "
            "was trained with"
        )
    if missing and not allow_partial:
        raise UserError(
            f"{what} lacks {few(missing)} ({len(missing)} of {len(wanted)} arrays): {PARTIAL}"
        )
    ignored = {name: (int(own.arrays[name].size), "not in this model") for name in strange}
    return Filled(filled, resized, ignored)


def _refuse_other_shape(name: str, found: tuple, wanted: tuple, what: str) -> None:
    if found == wanted:
        return
    if name in _WORDS and found[1:] == wanted[1:]:
        raise UserError(
            f"{what} has a vocabulary of {found[0]:,}, but the tokenizer has {wanted[0]:,}: leave "
            "config.data.tokenizer empty to use the run's own"
        )
    raise UserError(
        f"{what}: {name} has shape {list(found)}, but the config asks for {list(wanted)}: use the "
        "sizes it was trained with"
    )
