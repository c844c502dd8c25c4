"""Turns a file's tensors into our parameters: loads, resizes and ignores tensors, and refuses
misfits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from codebook_jax.errors import UserError
from codebook_jax.weights import layouts
from codebook_jax.weights.layouts import Layout, Shapes
from codebook_jax.weights.positions import resize_positions

Arrays = Mapping[str, np.ndarray]
POSITIONS, WORDS = "image/positions", ("text/words", "masked_words/bias")
PARTIAL = (
    "give another file, or use --config.init_allow_partial=true to initialise what is incomplete"
)


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

    Raises UserError, beginning with `what`, if a shape, the vocabulary or the architecture differs,
    or, unless
    `allow_partial`, a tensor is missing.
    """
    wanted = layouts.places(layout, shapes, text_depth)
    found: dict[str, np.ndarray] = {}
    missing: list[str] = []
    used: set[str] = set()
    halves: set[str] = set()  # keys of incomplete parameters, which are initialised as a whole
    resized: dict[str, str] = {}
    _refuse_other_depth(layout, arrays, shapes, what=what, allow_partial=allow_partial)
    for name, layers in wanted.items():
        keys = [key for place in layers for key in place.keys]
        lacking = [key for key in keys if key not in arrays]
        if lacking:
            missing += lacking
            halves.update(key for key in keys if key in arrays)
            continue
        used.update(keys)
        value = {key: as_float32(arrays[key], key, what) for key in keys}
        if name == POSITIONS:
            (key,) = keys
            value[key] = _without_distillation(value[key], arrays)
            value[key], note = fitted_positions(value[key], shapes[name], key, what)
            resized |= {name: note} if note else {}
        for place in layers:
            for key in place.keys:
                _refuse_other_shape(name, key, value[key].shape, place.shape, what)
        found[name] = layouts.to_ours(
            name, shapes[name], [[value[key] for key in place.keys] for place in layers]
        )
    ignored = _ignored(layout, arrays, used | halves, what, allow_partial)
    ignored |= {
        key: (int(arrays[key].size), "part of an incomplete parameter") for key in sorted(halves)
    }
    _refuse_untied(arrays, what)
    if missing and not allow_partial:
        total = sum(len(place.keys) for layers in wanted.values() for place in layers)
        raise UserError(
            f"{what} lacks {few(missing)} ({len(missing)} of {total} tensors): {PARTIAL}"
        )
    return Filled(found, resized, ignored)


def _refuse_other_depth(
    layout: Layout, arrays: Arrays, shapes: Shapes, *, what: str, allow_partial: bool
) -> None:
    """Raises UserError if the file has more layers than the model, or, unless `allow_partial`,
    fewer.
    """
    for tower, parts in (("image", ("image",)), ("text", ("text", "fusion"))):
        if not any(name.startswith(f"{tower}/blocks/") for name in layout.modules):
            continue
        depths = [shapes[f"{part}/blocks/mlp/up/bias"][0] for part in parts]
        there = layouts.layer_count(layout, arrays, tower)
        if there > sum(depths) or (0 < there < sum(depths) and not allow_partial):
            fields = ("depth",) if tower == "image" else ("depth", "fusion_depth")
            asked = " + ".join(
                f"config.model.{tower}.{field}={depth}"
                for field, depth in zip(fields, depths, strict=True)
            )
            raise UserError(
                f"{what} has {there} layers, but {asked} asks for {sum(depths)}: use the file's "
                "depth"
            )


def as_float32(array: np.ndarray, key: str, what: str) -> Float[np.ndarray, "*some"]:
    """The tensor in float32; raises UserError for whole numbers and for values that are not
    finite.
    """
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise UserError(f"{what}: {key} holds {array.dtype}, not weights: give another file")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{what}: {key} holds values that are not finite: give an intact file")
    return array


def fitted_positions(
    positions: Float[np.ndarray, "1 old width"], shape: layouts.Shape, key: str, what: str
) -> tuple[Float[np.ndarray, "1 new width"], str]:
    """The image's position embeddings for the patches of `shape`, and a note if they were
    resized.
    """
    if positions.ndim != 3 or positions.shape[2] != shape[2] or positions.shape[1] == shape[1]:
        return positions, ""  # a different width is refused by the comparison of shapes
    try:
        new = resize_positions(positions, shape[1])
    except ValueError as error:
        raise UserError(f"{what}: {key} cannot be resized, {error}") from error
    sides = [round((count - 1) ** 0.5) for count in (positions.shape[1], shape[1])]
    return new, "{0}x{0} to {1}x{1} patches, bicubic".format(*sides)


def few(names: list[str], most: int = 2) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse_other_shape(
    name: str, key: str, found: layouts.Shape, wanted: layouts.Shape, what: str
) -> None:
    if found == wanted:
        return
    if name in WORDS and found[1:] == wanted[1:]:
        raise UserError(
            f"{what} has a vocabulary of {found[0]:,} ({key}), but the tokenizer has "
            f"{wanted[0]:,}: set config.data.tokenizer to these weights' own tokenizer, or remove "
            "the padding of their word table"
        )
    hint = ": is it transposed?" if found == wanted[::-1] else ""
    raise UserError(
        f"{what}: {key} has shape {list(found)}, but config.model asks for {list(wanted)} "
        f"({name}){hint}" + ("" if hint else ": set config.model to the sizes of these weights")
    )


def _without_distillation(
    positions: Float[np.ndarray, "1 old width"], arrays: Arrays
) -> Float[np.ndarray, "1 new width"]:
    """The embeddings without the second one, of DeiT's distillation token, if there is one."""
    distilled = any(re.search(layouts.DISTILLATION, key) for key in arrays)
    return np.delete(positions, 1, axis=1) if distilled and positions.ndim == 3 else positions


def _ignored(
    layout: Layout, arrays: Arrays, used: set[str], what: str, allow_partial: bool
) -> dict[str, tuple[int, str]]:
    ignored, strange = {}, []
    for key in arrays:
        if key in used:
            continue
        kind = next((kind for pattern, kind in layout.ignored if re.search(pattern, key)), None)
        if kind is None:
            kind = "not of this model"
            if re.search(layout.own, key):
                strange.append(key)
        ignored[key] = (int(arrays[key].size), kind)
    if strange and not allow_partial:
        raise UserError(
            f"{what} has {few(strange)}, which {layout.title} does not have: the architecture "
            "differs, and the model would compute something else without them "
            "(--config.init_allow_partial=true leaves them out)"
        )
    return ignored


def _refuse_untied(arrays: Arrays, what: str) -> None:
    """Raises UserError if output layer and word table differ: in our model they are the same
    array.
    """
    for key in arrays:
        prefix, found, leaf = key.rpartition("cls.predictions.decoder.")
        if not found:
            continue
        own = (
            "bert.embeddings.word_embeddings.weight" if leaf == "weight" else "cls.predictions.bias"
        )
        if prefix + own in arrays and not np.array_equal(arrays[key], arrays[prefix + own]):
            raise UserError(
                f"{what}: {key} differs from {prefix + own}, but here they are the same array: "
                "give weights whose output layer is tied to the word embeddings"
            )
