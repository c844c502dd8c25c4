"""A whole ALBEF pre-training checkpoint (Li et al., NeurIPS 2021): student, momentum copies,
queues; in and out.

Its keys: visual_encoder.*, text_encoder.*, vision_proj, text_proj, with momentum copies whose first
part ends in _m; itm_head and temp, of the student only; image_queue and text_queue [dim, queue]
with queue_ptr.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from codebook_jax.errors import UserError
from codebook_jax.weights import layouts
from codebook_jax.weights.fill import Arrays, Filled, as_float32, fill
from codebook_jax.weights.layouts import ALBEF, Shapes

_MATCHING = {"matching/classes/kernel": "itm_head.weight", "matching/classes/bias": "itm_head.bias"}
_QUEUES = ("image_queue", "text_queue", "queue_ptr")
_TEMPERATURE = "temp"
_BARE = re.compile(
    r"^(text_encoder(?:_m)?)\.(?=embeddings\.|encoder\.)"
)  # fine-tuned for retrieval: no head, no bert.


def is_albef(arrays: Mapping[str, Any]) -> bool:
    """Whether these are the tensors of a whole ALBEF model."""
    parts = {key.partition(".")[0] for key in arrays}
    return {"visual_encoder", "text_encoder"} <= parts


def fill_state(
    arrays: Arrays, shapes: Shapes, *, text_depth: int, what: str, allow_partial: bool
) -> Filled:
    """The arrays of an ALBEF checkpoint that a train state uses, by its names
    (student/towers/image/cls, ...).

    `shapes` are those of the state. Without momentum copies there are no teacher arrays. Queues of
    another length are
    ignored: training refills them. Raises UserError like `fill`.
    """
    arrays = {_BARE.sub(r"\1.bert.", key): value for key, value in arrays.items()}
    student = {key: value for key, value in arrays.items() if not _is_momentum(key)}
    teacher = {_plain(key): value for key, value in arrays.items() if _is_momentum(key)}
    rest = {
        key: student.pop(key)
        for key in (*_MATCHING.values(), _TEMPERATURE, *_QUEUES)
        if key in student
    }
    towers = layouts.under(shapes, "student/towers/")
    of = dict(text_depth=text_depth, allow_partial=allow_partial)
    found = fill(ALBEF, student, towers, what=what, **of)
    filled = {f"student/towers/{name}": value for name, value in found.arrays.items()}
    resized = {f"student/towers/{name}": note for name, note in found.resized.items()}
    ignored = dict(found.ignored)
    if teacher:
        found = fill(ALBEF, teacher, towers, what=f"{what}, its momentum copy,", **of)
        filled |= {f"teacher/{name}": value for name, value in found.arrays.items()}
        resized |= {f"teacher/{name}": note for name, note in found.resized.items()}
        ignored |= {_momentum(key): reason for key, reason in found.ignored.items()}
    filled |= _student_only(rest, shapes, what, allow_partial)
    queue, unused = _queue(rest, shapes, what)
    return Filled(filled | queue, resized, ignored | unused)


def to_albef(arrays: Mapping[str, np.ndarray], text_depth: int) -> dict[str, np.ndarray]:
    """ALBEF's state dict of a train state's arrays, by its names (student/..., teacher/...,
    queue/...).

    Unfilled queue entries are zeros, where ALBEF has random features. The codebook is left out.
    """
    student, teacher, queue = (
        layouts.under(arrays, f"{item}/") for item in ("student", "teacher", "queue")
    )
    towers = layouts.under(student, "towers/")
    found = dict(layouts.to_theirs(ALBEF, towers, text_depth)) | _tied(towers)
    momentum = dict(layouts.to_theirs(ALBEF, teacher, text_depth)) | _tied(teacher)
    found |= {_momentum(key): value for key, value in momentum.items()}
    found["itm_head.weight"] = np.ascontiguousarray(student["matching/classes/kernel"].T)
    found["itm_head.bias"] = student["matching/classes/bias"]
    found[_TEMPERATURE] = np.asarray(student["temperature"])
    here = np.arange(len(queue["image"])) < queue["filled"]
    for name in ("image", "text"):
        found[f"{name}_queue"] = np.ascontiguousarray(np.where(here[:, None], queue[name], 0).T)
    found["queue_ptr"] = np.asarray(queue["cursor"], np.int64).reshape(1)
    return found


def _tied(towers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The duplicates and counters in ALBEF's state dict."""
    positions = len(towers["text/positions"])
    return {
        "text_encoder.cls.predictions.decoder.weight": towers["text/words"].copy(),
        "text_encoder.cls.predictions.decoder.bias": towers["masked_words/bias"].copy(),
        "text_encoder.bert.embeddings.position_ids": np.arange(positions, dtype=np.int64)[None],
    }


def _student_only(
    rest: Arrays, shapes: Shapes, what: str, allow_partial: bool
) -> dict[str, np.ndarray]:
    filled = {}
    missing = [key for key in (*_MATCHING.values(), _TEMPERATURE) if key not in rest]
    if missing and not allow_partial:
        raise UserError(
            f"{what} lacks {', '.join(missing)}: give a pre-training checkpoint, or use "
            "--config.init_allow_partial=true to initialise the missing parts"
        )
    for name, key in _MATCHING.items():
        if key in rest:
            value = as_float32(rest[key], key, what).T
            wanted = shapes[f"student/{name}"]
            if value.shape != wanted:
                raise UserError(
                    f"{what}: {key} has shape {list(value.T.shape)}, but should have "
                    f"{list(wanted[::-1])}"
                )
            filled[f"student/{name}"] = np.ascontiguousarray(value)
    if _TEMPERATURE in rest:
        value = as_float32(rest[_TEMPERATURE], _TEMPERATURE, what)
        if value.size != 1:
            raise UserError(
                f"{what}: {_TEMPERATURE} has shape {list(value.shape)}, but should be one number"
            )
        filled["student/temperature"] = value.reshape(())
    return filled


def _queue(
    rest: Arrays, shapes: Shapes, what: str
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, str]]]:
    """The queues of the state, or the keys that cannot be used for them."""
    size, dim = shapes["queue/image"]
    here = [key for key in _QUEUES if key in rest]
    unused = ""
    if len(here) < len(_QUEUES) or rest["queue_ptr"].size != 1:
        unused = "part of a queue"
    elif {rest[key].shape for key in _QUEUES[:2]} != {(dim, size)}:
        unused = f"queue of {rest['image_queue'].shape[-1]:,}, but config.queue.size={size}"
    if unused:
        return {}, {key: (int(rest[key].size), unused) for key in here}
    image, text = (np.ascontiguousarray(as_float32(rest[key], key, what).T) for key in _QUEUES[:2])
    cursor = int(rest["queue_ptr"].reshape(-1)[0]) % size
    young = not (
        image[cursor:].any() or text[cursor:].any()
    )  # zeros, as `to_albef` writes unfilled entries
    return {
        "queue/image": image,
        "queue/text": text,
        "queue/cursor": np.int32(cursor),
        "queue/filled": np.int32(cursor if young else size),
    }, {}


def _is_momentum(key: str) -> bool:
    return key.partition(".")[0].endswith("_m")


def _plain(key: str) -> str:
    first, dot, rest = key.partition(".")
    return first.removesuffix("_m") + dot + rest


def _momentum(key: str) -> str:
    first, dot, rest = key.partition(".")
    return f"{first}_m{dot}{rest}"
