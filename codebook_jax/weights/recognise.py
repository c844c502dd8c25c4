"""Finds the layout of a weight file, and renames its keys as in the layout's table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from codebook_jax.errors import UserError
from codebook_jax.weights.fill import Arrays
from codebook_jax.weights.layouts import ALBEF, BERT, VIT_HF, VIT_HF5, VIT_TIMM, Layout

_HF_PATCHES = "embeddings.patch_embeddings.projection.weight"
_TIMM_PATCHES = "patch_embed.proj.weight"
_WORDS = "embeddings.word_embeddings.weight"
_IMAGE_PREFIXES = ("", "vit.", "deit.", "model.", "visual_encoder.")
_TEXT_PREFIXES = ("", "bert.", "text_encoder.bert.")
_OLD_NORM = re.compile(r"\.LayerNorm\.(gamma|beta)$")  # TensorFlow's names, in the first BERT files
# Fine-tuned for retrieval, ALBEF's text encoder has no head for masked words, and no `bert.`.
_BARE = re.compile(r"^(text_encoder(?:_m)?)\.(?=embeddings\.|encoder\.)")
_NORM = {"gamma": "weight", "beta": "bias"}


def image_tower(arrays: Arrays, what: str) -> tuple[Layout, Arrays]:
    """The layout of a ViT or DeiT, and the tensors without the model's prefix; raises UserError for
    other files.
    """
    for key, layout in ((_HF_PATCHES, VIT_HF), (_TIMM_PATCHES, VIT_TIMM)):
        prefix = _prefix(arrays, key, _IMAGE_PREFIXES, f"{what} holds no ViT or DeiT")
        if prefix is not None:
            bare = {name.removeprefix(prefix): value for name, value in arrays.items()}
            newer = layout is VIT_HF and any(name.startswith("layers.") for name in bare)
            return VIT_HF5 if newer else layout, bare
    raise UserError(
        f"{what} is not a ViT: it has neither {_HF_PATCHES} (Hugging Face) nor {_TIMM_PATCHES} "
        "(timm)"
    )


def text_tower(arrays: Arrays, what: str) -> tuple[Layout, Arrays]:
    """BERT's layout, and the tensors with its names; raises UserError for other files."""
    prefix = _prefix(arrays, _WORDS, _TEXT_PREFIXES, f"{what} holds no BERT")
    if prefix is None:
        raise UserError(f"{what} is not a BERT: it has no {_WORDS}")
    outer = prefix.removesuffix("bert.")
    named = {}
    for key, value in arrays.items():
        name = key.removeprefix(outer)
        if not prefix and name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        named[_OLD_NORM.sub(lambda old: f".LayerNorm.{_NORM[old[1]]}", name)] = value
    return BERT, named


def whole_model(arrays: Arrays, what: str) -> tuple[Layout, Arrays]:
    """ALBEF's layout, and the tensors with its names; raises UserError for other files."""
    if not {"visual_encoder", "text_encoder"} <= {key.partition(".")[0] for key in arrays}:
        raise UserError(
            f"{what} is neither an ALBEF model (visual_encoder.*, text_encoder.*) nor a run or "
            "export of this code: for a single tower use image:SPEC or text:SPEC"
        )
    return ALBEF, {_BARE.sub(r"\1.bert.", key): value for key, value in arrays.items()}


def refuse_other_kind(config: Mapping[str, Any], kinds: tuple[str, ...], what: str) -> None:
    """Raises UserError if the config.json beside the weights states another kind of model,
    activation or position embedding.
    """
    for field, known in (
        ("model_type", kinds),
        ("hidden_act", ("gelu", "gelu_python")),
        ("position_embedding_type", ("absolute",)),
    ):
        value = config.get(field)
        if value is not None and value not in known:
            raise UserError(
                f"{what} has {field}={value!r} in its config.json, but this model needs "
                f"{' or '.join(known)}: give other weights"
            )


def _prefix(arrays: Arrays, ending: str, known: tuple[str, ...], refusal: str) -> str | None:
    """The part of a key before `ending`, the shortest if several keys end so; None if none does."""
    found = [key.removesuffix(ending) for key in arrays if key.endswith(ending)]
    prefix = min(found, key=len, default=None)
    if prefix is not None and prefix not in known:
        raise UserError(f"{refusal}, but {prefix}{ending}: give another file")
    return prefix
