"""Finds the layout of a weight file, and renames its keys as in the layout's table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from codebook_jax.errors import UserError
from codebook_jax.weights.fill import Arrays
from codebook_jax.weights.layouts import ALBEF, BERT, VIT_HF, VIT_HF5, VIT_TIMM, Layout

_LAYOUTS = {"image": (VIT_HF, VIT_HF5, VIT_TIMM), "text": (BERT,)}
_PREFIXES = {
    "image": ("", "vit.", "deit.", "model.", "visual_encoder."),
    "text": ("", "text_encoder."),
}
_KINDS = {"image": ("vit", "deit"), "text": ("bert",)}
# A BERT without a head, also within an ALBEF fine-tuned for retrieval, has no `bert.`.
_BARE = re.compile(r"^((?:text_encoder(?:_m)?\.)?)(?=(?:embeddings|encoder|pooler)\.)")
_OLD_NORM = re.compile(r"\.LayerNorm\.(gamma|beta)$")  # TensorFlow's names, in the first BERT files
_NORM = {"gamma": ".LayerNorm.weight", "beta": ".LayerNorm.bias"}


def recognise(part: str, arrays: Arrays, what: str) -> tuple[Layout, Arrays]:
    """The layout of the weights for `part` ("image", "text" or "model"), and the tensors with its
    names; raises UserError for other files.
    """
    if part != "image":
        arrays = {_plain(key): value for key, value in arrays.items()}
    if part == "model":
        if {"visual_encoder", "text_encoder"} <= {key.partition(".")[0] for key in arrays}:
            return ALBEF, arrays
        raise UserError(
            f"{what} is neither an ALBEF model (visual_encoder.*, text_encoder.*) nor a run or "
            "export of this code: for a single tower use image:SPEC or text:SPEC"
        )
    for prefix, layout in itertools.product(_PREFIXES[part], _LAYOUTS[part]):
        if prefix + _mark(layout) in arrays:
            return layout, {key.removeprefix(prefix): value for key, value in arrays.items()}
    known = ", ".join(f"{layout.title} ({_mark(layout)})" for layout in _LAYOUTS[part])
    raise UserError(f"{what} is not a {known}: give one of those")


def refuse_other_kind(part: str, config: Mapping[str, Any], what: str) -> None:
    """Raises UserError if the config.json beside the weights states what this model is not."""
    for field, known in (
        ("model_type", _KINDS[part]),
        ("hidden_act", ("gelu", "gelu_python")),
        ("position_embedding_type", ("absolute",)),
    ):
        value = config.get(field)
        if value is not None and value not in known:
            raise UserError(
                f"{what} has {field}={value!r} in its config.json, but this model needs "
                f"{' or '.join(known)}: give other weights"
            )


def _plain(key: str) -> str:
    return _OLD_NORM.sub(lambda found: _NORM[found[1]], _BARE.sub(r"\1bert.", key))


def _mark(layout: Layout) -> str:
    """The key by which a layout is known: the first layer's queries."""
    names = (theirs for ours, theirs in layout.names.items() if ours.endswith("/attention/qkv"))
    return next(names).split("|")[0].format(0) + ".weight"
