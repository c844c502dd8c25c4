"""Finds the layout of a weight file, and renames its keys as in the layout's table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from codebook_jax.errors import UserError
from codebook_jax.weights.fill import Arrays
from codebook_jax.weights.layouts import BERT, VIT_HF, VIT_HF5, VIT_TIMM, Layout

_HF_PATCHES = "embeddings.patch_embeddings.projection.weight"
_TIMM_PATCHES = "patch_embed.proj.weight"
_WORDS = "embeddings.word_embeddings.weight"
_IMAGE_MODELS = ("", "vit.", "deit.", "model.", "visual_encoder.")
_TEXT_MODELS = ("", "bert.", "text_encoder.bert.")
_OLD_NORM = re.compile(r"\.LayerNorm\.(gamma|beta)$")  # TensorFlow's names, in the first BERT files
_NORM = {"gamma": "weight", "beta": "bias"}


def image_tower(arrays: Arrays, what: str) -> tuple[Layout, dict[str, Any]]:
    """The layout of a ViT or DeiT, and the tensors without the model's prefix; raises UserError for
    other files.
    """
    for ending, layouts in ((_HF_PATCHES, (VIT_HF, VIT_HF5)), (_TIMM_PATCHES, (VIT_TIMM,))):
        prefix = _prefix(arrays, ending)
        if prefix is None:
            continue
        if prefix not in _IMAGE_MODELS:
            raise UserError(
                f"{what} holds {prefix}{ending}, which is not from a ViT or DeiT: give one of those"
            )
        bare = {key.removeprefix(prefix): value for key, value in arrays.items()}
        newer = any(key.startswith("layers.") for key in bare)
        return layouts[-1] if newer else layouts[0], bare
    raise UserError(
        f"{what} is not a ViT: it has neither {_HF_PATCHES} (Hugging Face) nor {_TIMM_PATCHES} "
        "(timm)"
    )


def text_tower(arrays: Arrays, what: str) -> tuple[Layout, dict[str, Any]]:
    """BERT's layout, and the tensors with its names; raises UserError for other files."""
    prefix = _prefix(arrays, _WORDS)
    if prefix is None:
        raise UserError(f"{what} is not a BERT: it has no {_WORDS}")
    if prefix not in _TEXT_MODELS:
        raise UserError(f"{what} holds {prefix}{_WORDS}, which is not from a BERT: give a BERT")
    outer = prefix.removesuffix("bert.")
    named = {}
    for key, value in arrays.items():
        name = key.removeprefix(outer)
        if not prefix and name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        named[_OLD_NORM.sub(lambda old: f".LayerNorm.{_NORM[old[1]]}", name)] = value
    return BERT, named


def refuse_other_kind(config: Mapping[str, Any], kinds: tuple[str, ...], what: str) -> None:
    """Raises UserError if the config.json beside the weights states another kind of model or
    activation.
    """
    kind = config.get("model_type")
    if kind is not None and kind not in kinds:
        raise UserError(
            f"{what} is a {kind} according to its config.json: give a {' or '.join(kinds)}"
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_python"):
        raise UserError(
            f"{what} has hidden_act={activation!r} in its config.json, but this model uses the "
            "exact gelu"
        )
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(
            f"{what} has position_embedding_type={positions!r} in its config.json, but this model "
            "uses absolute"
        )


def _prefix(arrays: Arrays, ending: str) -> str | None:
    """The part of a key before `ending`, the shortest if several keys end so; None if none does."""
    found = sorted((key.removesuffix(ending) for key in arrays if key.endswith(ending)), key=len)
    return found[0] if found else None
