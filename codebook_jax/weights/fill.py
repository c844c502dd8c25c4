"""Turns a file's tensors into our parameters: loads, resizes, ignores, and refuses misfits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from codebook_jax.errors import UserError
from codebook_jax.weights import layouts
from codebook_jax.weights.layouts import Layout, Shape, Shapes
from codebook_jax.weights.positions import resize_positions

Arrays = Mapping[str, np.ndarray]
_WORDS = ("text/words", "masked_words/bias")
_STRANGE, _PART = "not of this model", "part of an incomplete parameter"


class Filled(NamedTuple):
    """Our parameters from a file, float32, and what to report about it."""

    arrays: dict[str, Float[np.ndarray, "*some"]]  # by our names
    resized: dict[str, str]  # our name: old and new size
    ignored: dict[str, tuple[int, str]]  # their key: (count of numbers, what it is)


def fill(
    layout: Layout,
    arrays: Arrays,
    shapes: Shapes,
    *,
    text_depth: int,
    what: str,
    allow_partial: bool,
) -> Filled:
    """The parameters of `shapes` that `layout` has, from `arrays` in that layout.

    A teacher is optional. Raises UserError, beginning with `what`, if a shape, the depth or the
    vocabulary differs, or, unless `allow_partial`, a tensor is missing or of another architecture.
    """
    wanted = layouts.places(layout, shapes, text_depth)
    keys_of = {name: list(itertools.chain(*place.keys)) for name, place in wanted.items()}
    teacher = [name for name in wanted if name.startswith("teacher/")]
    if not any(key in arrays for name in teacher for key in keys_of[name]):
        for name in teacher:
            del keys_of[name]
    every = {key for keys in keys_of.values() for key in keys}
    _refuse_other_depth(layout, arrays, every, what=what, allow_fewer=allow_partial)
    found: dict[str, np.ndarray] = {}
    resized: dict[str, str] = {}
    for name, keys in keys_of.items():
        if not all(key in arrays for key in keys):
            continue  # the whole parameter is initialised
        value = {key: as_float32(arrays[key], key, what) for key in keys}
        if name.endswith("image/positions"):
            (key,) = keys
            if any(re.search(layouts.DISTILLATION, other) for other in arrays):
                value[key] = np.delete(value[key], 1, axis=-2)
            value[key], note = fitted_positions(value[key], shapes[name], key, what)
            resized |= {name: note} if note else {}
        for key in keys:
            if value[key].size == 1 and not wanted[name].shape:
                value[key] = value[key].reshape(())
            _refuse_other_shape(name, key, value[key].shape, wanted[name].shape, what)
        layers = [[value[key] for key in parts] for parts in wanted[name].keys]
        found[name] = layouts.to_ours(layout, name, shapes[name], layers)
    used = {key for name in found for key in keys_of[name]}
    ignored = {
        key: (int(arrays[key].size), _PART if key in every else _kind(key))
        for key in arrays
        if key not in used
    }
    missing = [key for keys in keys_of.values() for key in keys if key not in arrays]
    strange = [key for key, (_, kind) in ignored.items() if kind == _STRANGE]
    strange = [key for key in strange if re.search(layout.own, key)]
    if (missing or strange) and not allow_partial:
        lacks = [f"lacks {_few(missing)} ({len(missing)} of {len(every)} tensors)"] * bool(missing)
        has = [f"has {_few(strange)}, which this model does not have"] * bool(strange)
        raise UserError(
            f"{what} {' and '.join(lacks + has)}: give weights of this architecture, or use "
            "--config.init_allow_partial=true to initialise what is missing and leave out the rest"
        )
    return Filled(found, resized, ignored)


def as_float32(array: np.ndarray, key: str, what: str) -> Float[np.ndarray, "*some"]:
    """The tensor in float32; raises UserError for whole numbers and values that are not finite."""
    if array.dtype.kind != "f":
        raise UserError(f"{what}: {key} holds {array.dtype}, not weights: give another file")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{what}: {key} holds values that are not finite: give an intact file")
    return array


def fitted_positions(
    positions: Float[np.ndarray, "1 old width"], shape: Shape, key: str, what: str
) -> tuple[Float[np.ndarray, "1 new width"], str]:
    """The image's position embeddings for the patches of `shape`, and a note if resized."""
    if positions.ndim != 3 or positions.shape[2] != shape[2] or positions.shape[1] == shape[1]:
        return positions, ""  # a different width is refused by the comparison of shapes
    try:
        new = resize_positions(positions, shape[1])
    except ValueError as error:
        raise UserError(f"{what}: {key} cannot be resized, {error}") from error
    old_side, side = (round((count - 1) ** 0.5) for count in (positions.shape[1], shape[1]))
    return new, f"{old_side}x{old_side} to {side}x{side} patches, bicubic"


def _kind(key: str) -> str:
    """What a tensor is that is not used."""
    return next((kind for pattern, kind in layouts.IGNORED if re.search(pattern, key)), _STRANGE)


def _few(names: list[str], most: int = 2) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse_other_depth(
    layout: Layout, here: Iterable[str], wanted: Iterable[str], *, what: str, allow_fewer: bool
) -> None:
    """Raises UserError if a tower has another number of layers in the file than in the model."""
    for tower, fields in (("image", "depth"), ("text", "depth + fusion_depth")):
        for block in (
            theirs for ours, theirs in layout.names.items() if f"{tower}/blocks/" in ours
        ):
            layer = re.compile(re.escape(block.partition("{}")[0]) + r"(\d+)\.")
            depth, asked = (
                len({key[1] for key in map(layer.match, keys) if key}) for keys in (here, wanted)
            )
            if depth > asked or (0 < depth < asked and not allow_fewer):
                raise UserError(
                    f"{what} has {depth} layers, but config.model.{tower}.{fields} asks for "
                    f"{asked}: use the file's depth"
                )


def _refuse_other_shape(name: str, key: str, found: Shape, wanted: Shape, what: str) -> None:
    if found == wanted:
        return
    if name.endswith(_WORDS) and found[1:] == wanted[1:]:
        raise UserError(
            f"{what} has a vocabulary of {found[0]:,} ({key}), but the tokenizer has "
            f"{wanted[0]:,}: set config.data.tokenizer to the tokenizer of these weights (empty: "
            "the one beside them), or remove the padding of their word table"
        )
    hint = "is it transposed?" if found == wanted[::-1] else "use the sizes of these weights"
    raise UserError(
        f"{what}: {key} has shape {list(found)}, but config.model asks for {list(wanted)} "
        f"({name}): {hint}"
    )
