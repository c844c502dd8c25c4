"""The queues of a whole ALBEF pre-training checkpoint, and its state dict (Li et al., NeurIPS
2021).

The keys of the parameters are in layouts.ALBEF; image_queue and text_queue [dim, queue] come with
queue_ptr.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from codebook_jax.weights import layouts
from codebook_jax.weights.fill import Arrays, Filled, as_float32
from codebook_jax.weights.layouts import ALBEF, Shapes

_QUEUES = ("image_queue", "text_queue", "queue_ptr")


def with_queues(filled: Filled, arrays: Arrays, shapes: Shapes, what: str) -> Filled:
    """The parameters with the checkpoint's queues, for a state of `shapes`; those of another length
    are ignored: training refills them.
    """
    queues = {key: arrays[key] for key in _QUEUES if key in arrays}
    size, dim = shapes["queue/image"]
    unused = ""
    if len(queues) < len(_QUEUES) or queues["queue_ptr"].size != 1:
        unused = "part of a queue"
    elif {queues[key].shape for key in _QUEUES[:2]} != {(dim, size)}:
        unused = f"queue of {queues['image_queue'].shape[-1]:,}, but config.queue.size={size}"
    if unused:
        notes = {key: (int(value.size), unused) for key, value in queues.items()}
        return filled._replace(ignored=filled.ignored | notes)
    image, text = (np.ascontiguousarray(as_float32(queues[k], k, what).T) for k in _QUEUES[:2])
    cursor = int(queues["queue_ptr"].reshape(-1)[0]) % size
    # `to_albef` writes zeros where nothing was queued yet
    is_full = image[cursor:].any() or text[cursor:].any()
    found = {
        "queue/image": image,
        "queue/text": text,
        "queue/cursor": np.int32(cursor),
        "queue/filled": np.int32(size if is_full else cursor),
    }
    ignored = {key: note for key, note in filled.ignored.items() if key not in queues}
    return filled._replace(arrays=filled.arrays | found, ignored=ignored)


def to_albef(arrays: Mapping[str, np.ndarray], text_depth: int) -> dict[str, np.ndarray]:
    """ALBEF's state dict of a train state's arrays, by its names (student/..., teacher/...,
    queue/...).

    Unfilled queue entries are zeros, where ALBEF has random features. The codebook is left out.
    """
    found = dict(layouts.to_theirs(ALBEF, arrays, text_depth))
    for towers, copy in (("student/towers", ""), ("teacher", "_m")):  # duplicates and counters
        places = len(arrays[f"{towers}/text/positions"])
        head = f"text_encoder{copy}.cls.predictions.decoder"
        found[f"{head}.weight"] = arrays[f"{towers}/text/words"].copy()
        found[f"{head}.bias"] = arrays[f"{towers}/masked_words/bias"].copy()
        numbers = np.arange(places, dtype=np.int64)[None]
        found[f"text_encoder{copy}.bert.embeddings.position_ids"] = numbers
    is_filled = np.arange(len(arrays["queue/image"])) < arrays["queue/filled"]
    for name in ("image", "text"):
        found[f"{name}_queue"] = np.where(is_filled, arrays[f"queue/{name}"].T, 0)
    found["queue_ptr"] = np.asarray(arrays["queue/cursor"], np.int64).reshape(1)
    return found
