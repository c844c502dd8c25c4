"""Turns a file's tensors into our parameters: loads, resizes, ignores, and refuses misfits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from codebook_jax.errors import UserError, first_few
from codebook_jax.weights import layouts
from codebook_jax.weights.layouts import Arrays, Layout, Shape, Shapes

_CUBIC = -0.75  # the parameter of Keys' cubic kernel, as in PyTorch
_WORDS = ("text/words", "masked_words/bias")
_QUEUES = ("image_queue", "text_queue", "queue_ptr")
_LAYER = re.compile(r"(.*?\b(?:blocks|layers?)\.)(\d+)\.")
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
    """The parameters of `shapes` that `layout` has, from `arrays` in that layout, and its queues; a
    teacher is optional. Raises UserError, beginning with `what`, if a shape, depth or vocabulary
    differs, or, unless `allow_partial`, a tensor is missing or of another architecture.
    """
    wanted = layouts.keys_of(layout, shapes, text_depth)
    teacher = {name for name in wanted if name.startswith("teacher/")}
    if not any(key in arrays for name in teacher for key in wanted[name]):
        wanted = {name: keys for name, keys in wanted.items() if name not in teacher}
    every = dict.fromkeys(key for keys in wanted.values() for key in keys)
    _check_depth(arrays, every, what=what, allow_fewer=allow_partial)
    # A parameter that lacks a tensor is initialised as a whole.
    whole = {name: keys for name, keys in wanted.items() if arrays.keys() >= set(keys)}
    found: dict[str, np.ndarray] = {}
    resized: dict[str, str] = {}
    for name, keys in whole.items():
        found[name] = np.empty(shapes[name], np.float32)
        for key, ours in layouts.tensors(name, found[name], keys):
            theirs = as_float32(arrays[key], key, what)
            if name.endswith("image/positions"):
                if any(re.search(layouts.DISTILLATION, other) for other in arrays):
                    theirs = np.delete(theirs, 1, axis=-2)
                theirs, note = fitted_positions(theirs, shapes[name])
                resized |= {name: note} if note else {}
            if theirs.size == 1 and not ours.shape:
                theirs = theirs.reshape(())
            if theirs.shape != ours.shape:
                raise _misshapen(name, key, theirs.shape, ours.shape, what)
            ours[...] = theirs
    used = {key for keys in whole.values() for key in keys}
    ignored = {}
    for key in (key for key in arrays if key not in used):
        kinds = (kind for pattern, kind in layouts.IGNORED if re.search(pattern, key))
        kind = _PART if key in every else next(kinds, _STRANGE)
        ignored[key] = int(arrays[key].size), kind
    missing = [key for key in every if key not in arrays]
    strange = [key for key, (_, kind) in ignored.items() if kind == _STRANGE]
    strange = [key for key in strange if re.search(layout.own, key)]
    if (missing or strange) and not allow_partial:
        lacks = f"lacks {first_few(missing, 2)} ({len(missing)} of {len(every)} tensors)"
        has = f"has {first_few(strange, 2)}, which this model does not have"
        faults = [fault for fault, keys in ((lacks, missing), (has, strange)) if keys]
        raise UserError(
            f"{what} {' and '.join(faults)}: give weights of this architecture; in training, "
            "--config.init_allow_partial=true initialises what is missing and leaves out the rest"
        )
    if layout is layouts.ALBEF and "queue/image" in shapes:
        queues, unused = _queues(arrays, shapes["queue/image"], what)
        found |= queues
        ignored |= {key: (ignored[key][0], unused) for key in _QUEUES if key in arrays}
        ignored = {key: note for key, note in ignored.items() if note[1]}
    return Filled(found, resized, ignored)


def _queues(arrays: Arrays, shape: Shape, what: str) -> tuple[dict[str, np.ndarray], str]:
    """ALBEF's queues (image_queue, text_queue [dim, size], queue_ptr) as ours [size, dim], or why
    they are not used: training refills them.
    """
    size, dim = shape
    if any(key not in arrays for key in _QUEUES) or arrays["queue_ptr"].size != 1:
        return {}, "part of a queue"
    if {arrays[key].shape for key in _QUEUES[:2]} != {(dim, size)}:
        length = arrays["image_queue"].shape[-1]
        return {}, f"queue of {length:,}, but config.queue.size={size}"
    image, text = (np.array(as_float32(arrays[key], key, what).T, order="C") for key in _QUEUES[:2])
    cursor = int(arrays["queue_ptr"].reshape(-1)[0]) % size
    # what was never queued is zeros in `write_albef`'s files
    is_full = image[cursor:].any() or text[cursor:].any()
    numbers = {
        "queue/cursor": np.int32(cursor),
        "queue/filled": np.int32(size if is_full else cursor),
    }
    return {"queue/image": image, "queue/text": text} | numbers, ""


def as_float32(array: np.ndarray, key: str, what: str) -> Float[np.ndarray, "*some"]:
    """The tensor in float32; raises UserError for whole numbers and values that are not finite."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{what}: {key} holds {array.dtype}, not weights: give another file")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{what}: {key} holds values that are not finite: give an intact file")
    return array


def _check_depth(
    here: Iterable[str], wanted: Iterable[str], *, what: str, allow_fewer: bool
) -> None:
    """Raises UserError if a tower has another number of layers in the file than in the model."""
    depths, asked = (
        Counter(
            tower for tower, _ in {found.groups() for found in map(_LAYER.match, keys) if found}
        )
        for keys in (here, wanted)
    )
    for tower, depth in ((tower, depths[tower]) for tower in asked):
        if depth > asked[tower] or (0 < depth < asked[tower] and not allow_fewer):
            field = "text.depth + fusion_depth" if "bert." in tower else "image.depth"
            raise UserError(
                f"{what} has {depth} layers, but config.model.{field} asks for {asked[tower]}: use "
                "the file's depth"
            )


def _misshapen(name: str, key: str, theirs: Shape, ours: Shape, what: str) -> UserError:
    whose, advice = "config.model", "use the sizes of these weights"
    if name.endswith(_WORDS) and theirs[1:] == ours[1:]:
        whose = "the tokenizer"
        advice = (
            "set config.data.tokenizer to the tokenizer of these weights (empty: the one beside "
            "them), or remove the padding of their word table"
        )
    return UserError(
        f"{what}: {key} has shape {list(theirs)}, but {whose} asks for {list(ours)} ({name}): "
        f"{advice}"
    )


def fitted_positions(
    positions: Float[np.ndarray, "1 old width"], shape: Shape
) -> tuple[Float[np.ndarray, "1 new width"], str]:
    """The embeddings for the patches of `shape`, [1, new, width], and a note if they were resized,
    as by PyTorch's interpolate(mode="bicubic", align_corners=False), which ALBEF and DeiT use: no
    anti-aliasing, borders repeated. [CLS], and what cannot be resized, is returned as it is.
    """
    if positions.ndim != 3 or positions.shape[2] != shape[2] or positions.shape[1] == shape[1]:
        return positions, ""
    before, after = math.isqrt(positions.shape[1] - 1), math.isqrt(shape[1] - 1)
    if before**2 != positions.shape[1] - 1 or after**2 != shape[1] - 1:
        return positions, ""
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
