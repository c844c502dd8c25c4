"""Turns a file's tensors into our parameters: loads, resizes, ignores, and refuses misfits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from codebook_jax.errors import UserError, first_few
from codebook_jax.weights import layouts
from codebook_jax.weights.layouts import Arrays, Layout, Shape, Shapes

_CUBIC = -0.75  # the parameter of Keys' cubic kernel, as in PyTorch
_WORDS = ("text/words", "masked_words/bias")
_STRANGE, _PART = "not of this model", "part of an incomplete parameter"


class Filled(NamedTuple):
    """Our arrays from a file, and what to report about it."""

    arrays: dict[str, np.ndarray]  # by our names; parameters are float32
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
    """The parameters of `shapes` that `layout` has, from `arrays` in that layout, and its queues.

    A teacher is optional. Raises UserError, beginning with `what`, if a shape, the depth or the
    vocabulary differs, or, unless `allow_partial`, a tensor is missing or of another architecture.
    """
    wanted = layouts.places(layout, shapes, text_depth)
    teacher = {key for name in wanted if name.startswith("teacher/") for key in wanted[name].keys}
    if not any(key in arrays for key in teacher):
        wanted = {name: wanted[name] for name in wanted if not name.startswith("teacher/")}
    every = {key for place in wanted.values() for key in place.keys}
    _refuse_other_depth(layout, arrays, every, what=what, allow_fewer=allow_partial)
    found: dict[str, np.ndarray] = {}
    resized: dict[str, str] = {}
    used: set[str] = set()
    for name, place in wanted.items():
        if not all(key in arrays for key in place.keys):
            continue  # the whole parameter is initialised
        tensors = [as_float32(arrays[key], key, what) for key in place.keys]
        if name.endswith("image/positions"):
            if any(re.search(layouts.DISTILLATION, other) for other in arrays):
                tensors[0] = np.delete(tensors[0], 1, axis=-2)
            try:
                tensors[0], note = fitted_positions(tensors[0], shapes[name])
            except ValueError as error:
                raise UserError(f"{what}: {place.keys[0]} cannot be resized, {error}") from error
            resized |= {name: note} if note else {}
        for number, (key, tensor) in enumerate(zip(place.keys, tensors, strict=True)):
            if tensor.size == 1 and not place.shape:
                tensors[number] = tensor.reshape(())
            _refuse_other_shape(name, key, tensors[number].shape, place.shape, what)
        found[name] = layouts.to_ours(place, shapes[name], tensors)
        used.update(place.keys)
    ignored = {}
    for key in (key for key in arrays if key not in used):
        kinds = (kind for pattern, kind in layouts.IGNORED if re.search(pattern, key))
        kind = _PART if key in every else next(kinds, _STRANGE)
        ignored[key] = int(arrays[key].size), kind
    missing = [key for place in wanted.values() for key in place.keys if key not in arrays]
    strange = [key for key, (_, kind) in ignored.items() if kind == _STRANGE]
    strange = [key for key in strange if re.search(layout.own, key)]
    if not allow_partial:
        _refuse_misfits(missing, strange, len(every), what)
    filled = Filled(found, resized, ignored)
    has_queues = layout is layouts.ALBEF and "queue/image" in shapes
    return _with_queues(filled, arrays, shapes, what) if has_queues else filled


def _refuse_misfits(missing: list[str], strange: list[str], count: int, what: str) -> None:
    faults = []
    if missing:
        faults.append(f"lacks {first_few(missing, 2)} ({len(missing)} of {count} tensors)")
    if strange:
        faults.append(f"has {first_few(strange, 2)}, which this model does not have")
    if faults:
        raise UserError(
            f"{what} {' and '.join(faults)}: give weights of this architecture, or use "
            "--config.init_allow_partial=true to initialise what is missing and leave out the rest"
        )


def _with_queues(filled: Filled, arrays: Arrays, shapes: Shapes, what: str) -> Filled:
    """With ALBEF's queues (image_queue, text_queue [dim, size], queue_ptr); those of another length
    are ignored: training refills them.
    """
    names = ("image_queue", "text_queue", "queue_ptr")
    queues = {key: arrays[key] for key in names if key in arrays}
    size, dim = shapes["queue/image"]
    unused = ""
    if len(queues) < len(names) or queues["queue_ptr"].size != 1:
        unused = "part of a queue"
    elif {queues[key].shape for key in names[:2]} != {(dim, size)}:
        unused = f"queue of {queues['image_queue'].shape[-1]:,}, but config.queue.size={size}"
    if unused:
        notes = {key: (int(value.size), unused) for key, value in queues.items()}
        return filled._replace(ignored=filled.ignored | notes)
    image, text = (np.ascontiguousarray(as_float32(queues[k], k, what).T) for k in names[:2])
    cursor = int(queues["queue_ptr"].reshape(-1)[0]) % size
    # what was never queued is zeros in `write_albef`'s files
    is_full = image[cursor:].any() or text[cursor:].any()
    found = {
        "queue/image": image,
        "queue/text": text,
        "queue/cursor": np.int32(cursor),
        "queue/filled": np.int32(size if is_full else cursor),
    }
    ignored = {key: note for key, note in filled.ignored.items() if key not in queues}
    return filled._replace(arrays=filled.arrays | found, ignored=ignored)


def as_float32(array: np.ndarray, key: str, what: str) -> Float[np.ndarray, "*some"]:
    """The tensor in float32; raises UserError for whole numbers and values that are not finite."""
    if array.dtype.kind != "f":
        raise UserError(f"{what}: {key} holds {array.dtype}, not weights: give another file")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{what}: {key} holds values that are not finite: give an intact file")
    return array


def _refuse_other_depth(
    layout: Layout, here: Iterable[str], wanted: Iterable[str], *, what: str, allow_fewer: bool
) -> None:
    """Raises UserError if a tower has another number of layers in the file than in the model."""
    for ours, theirs in layout.names.items():
        if "/blocks/" not in ours or "fusion/" in ours:
            continue
        layer = re.compile(re.escape(theirs.partition("{}")[0]) + r"(\d+)\.")
        depth, asked = (
            len({found[1] for found in map(layer.match, keys) if found}) for keys in (here, wanted)
        )
        if depth > asked or (0 < depth < asked and not allow_fewer):
            field = "image.depth" if "image/" in ours else "text.depth + fusion_depth"
            raise UserError(
                f"{what} has {depth} layers, but config.model.{field} asks for {asked}: use the "
                "file's depth"
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


def fitted_positions(
    positions: Float[np.ndarray, "1 old width"], shape: Shape
) -> tuple[Float[np.ndarray, "1 new width"], str]:
    """The embeddings for the patches of `shape`, [1, new, width], and a note if they were resized.

    [CLS] is unchanged, the square of patches resized like PyTorch's interpolate(mode="bicubic",
    align_corners=False), which ALBEF and DeiT use: no anti-aliasing, borders repeated. Raises
    ValueError if a number of patches is not a square.
    """
    if positions.ndim != 3 or positions.shape[2] != shape[2] or positions.shape[1] == shape[1]:
        return positions, ""  # a different width is refused by the comparison of shapes
    before, after = math.isqrt(positions.shape[1] - 1), math.isqrt(shape[1] - 1)
    if before**2 != positions.shape[1] - 1 or after**2 != shape[1] - 1:
        raise ValueError(f"{positions.shape[1] - 1} or {shape[1] - 1} patches do not form a square")
    weights = _cubic_weights(before, after)
    square = positions[0, 1:].reshape(before, before, -1).astype(np.float64)
    resized = np.einsum("ir,jc,rcw->ijw", weights, weights, square).reshape(after * after, -1)
    whole = np.concatenate([positions[0, :1].astype(np.float64), resized])
    note = f"{before}x{before} to {after}x{after} patches, bicubic"
    return whole[None].astype(positions.dtype), note


def _cubic_weights(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """The weight of each old place in each new one; rows sum to one."""
    centres = (np.arange(after) + 0.5)[:, None] * before / after - 0.5
    places = np.floor(centres) + np.arange(-1, 3)
    distance = np.abs(centres - places)
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    weights = np.zeros((after, before))
    inside = np.clip(places, 0, before - 1).astype(int)
    np.add.at(weights, (np.arange(after)[:, None], inside), np.where(distance <= 1, near, far))
    return weights
