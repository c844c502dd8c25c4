"""Tables that map our parameters to the names in public weights, and back.

A table maps modules: their `weight` and `bias` are our `kernel` or `scale` and `bias`. `{}` is the
number of the layer; several modules for one of ours are joined on their first axis. Reading and
writing use the same table, so a round trip is bit exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

Shape = tuple[int, ...]
Shapes = Mapping[
    str, Shape
]  # shapes of our parameters, by names such as image/blocks/mlp/up/kernel


class Layout(NamedTuple):
    """How a file names the parameters of one tower or of a whole model."""

    title: str
    modules: Mapping[str, str]  # our module to theirs; "a|b|c" for several
    parameters: Mapping[str, str]  # our parameters that stand alone
    own: str  # pattern of the tower's keys: an unknown one means another architecture
    ignored: tuple[
        tuple[str, str], ...
    ]  # (pattern, what it is) of known keys that are not used here


_TIMM_BLOCK = {
    "attention_norm": "norm1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
_HF_VIT_BLOCK = {
    "attention_norm": "layernorm_before",
    "attention/qkv": "attention.attention.query|attention.attention.key|attention.attention.value",
    "attention/out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
_HF5_VIT_BLOCK = _HF_VIT_BLOCK | {
    "attention/qkv": "attention.q_proj|attention.k_proj|attention.v_proj",
    "attention/out": "attention.o_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
_BERT_BLOCK = {
    "attention/qkv": "attention.self.query|attention.self.key|attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_CROSS = {
    "cross/query": "crossattention.self.query",
    "cross/key_value": "crossattention.self.key|crossattention.self.value",
    "cross/out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
}
_HEADS = (
    r"^(head|head_dist|classifier|cls_classifier|distillation_classifier|pre_logits)\.",
    "head",
)
DISTILLATION = (
    r"(^|\.)(dist_token|distillation_token)$"  # DeiT's second token, with a position of its own
)
_DISTILLATION = (DISTILLATION, "distillation token")
_POOLER = (r"(^|\.)pooler\.", "pooler")
_POSITION_NUMBERS = (r"(^|\.)position_ids$", "position numbers")
_TIED = "output layer, tied to the words"


def _each(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    """The table with a prefix for the names on each side."""
    return {
        f"{ours}{name}": "|".join(f"{theirs}{part}" for part in value.split("|"))
        for name, value in modules.items()
    }


def _vit_hf(title: str, blocks: str, block: Mapping[str, str]) -> Layout:
    return Layout(
        title,
        modules={
            "image/patches": "embeddings.patch_embeddings.projection",
            **_each("image/blocks/", f"{blocks}.{{}}.", block),
            "image/norm": "layernorm",
        },
        parameters={
            "image/cls": "embeddings.cls_token",
            "image/positions": "embeddings.position_embeddings",
        },
        own=r"^(embeddings|encoder|layers|layernorm)\.",
        ignored=(_DISTILLATION, (r"\.mask_token$", "mask token"), _POOLER, _HEADS),
    )


VIT_HF = _vit_hf("ViT in the Hugging Face layout", "encoder.layer", _HF_VIT_BLOCK)
VIT_HF5 = _vit_hf("ViT in the layout of transformers 5", "layers", _HF5_VIT_BLOCK)
VIT_TIMM = Layout(
    "ViT in timm's layout",
    modules={
        "image/patches": "patch_embed.proj",
        **_each("image/blocks/", "blocks.{}.", _TIMM_BLOCK),
        "image/norm": "norm",
    },
    parameters={"image/cls": "cls_token", "image/positions": "pos_embed"},
    own=r"^(cls_token|pos_embed|reg_token|patch_embed|blocks|norm|norm_pre|fc_norm)(\.|$)",
    ignored=(_DISTILLATION, _HEADS),
)
BERT = Layout(
    "BERT in the Hugging Face layout",
    modules={
        "text/norm": "bert.embeddings.LayerNorm",
        **_each("text/blocks/", "bert.encoder.layer.{}.", _BERT_BLOCK),
        **_each("fusion/blocks/", "bert.encoder.layer.{}.", _BERT_BLOCK),
        "masked_words/transform": "cls.predictions.transform.dense",
        "masked_words/norm": "cls.predictions.transform.LayerNorm",
    },
    parameters={
        "text/words": "bert.embeddings.word_embeddings.weight",
        "text/positions": "bert.embeddings.position_embeddings.weight",
        "text/segment": "bert.embeddings.token_type_embeddings.weight",
        "masked_words/bias": "cls.predictions.bias",
    },
    own=r"^bert\.(embeddings|encoder)\.",
    ignored=(
        _POSITION_NUMBERS,
        (r"^cls\.predictions\.decoder\.(weight|bias)$", _TIED),
        _POOLER,
        (r"^cls\.seq_relationship\.", "next-sentence head"),
        (r"^(classifier|qa_outputs)\.", "head"),
    ),
)
# ALBEF's pre-training model: timm's ViT, a BERT whose last layers have cross-attention,
# projections. For the student's own parts (itm_head, temp), the momentum copies and the queues see
# albef.py.
ALBEF = Layout(
    "ALBEF",
    modules={
        **_each("", "visual_encoder.", VIT_TIMM.modules),
        **_each("", "text_encoder.", BERT.modules),
        **_each("fusion/blocks/", "text_encoder.bert.encoder.layer.{}.", _CROSS),
        "image_projection": "vision_proj",
        "text_projection": "text_proj",
    },
    parameters={
        **_each("", "visual_encoder.", VIT_TIMM.parameters),
        **_each("", "text_encoder.", BERT.parameters),
    },
    own=r"^(visual_encoder|text_encoder\.bert\.(embeddings|encoder))\.",
    ignored=(
        _POSITION_NUMBERS,
        (r"^text_encoder\.cls\.predictions\.decoder\.(weight|bias)$", _TIED),
        (r"^visual_encoder\.head\.", "head"),
        _POOLER,
    ),
)


def under(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below a part of the tree, by their names there."""
    return {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
    }


class Place(NamedTuple):
    """The keys of one layer of one of our parameters."""

    keys: tuple[str, ...]
    shape: Shape  # of each of the keys, in their layout


def places(layout: Layout, shapes: Shapes, text_depth: int) -> dict[str, list[Place]]:
    """For each of our parameters in the layout, its places: one per layer, or just one.

    Fusion layers are numbered on from the text encoder's `text_depth`.
    """
    found = {}
    for name, shape in shapes.items():
        keys = _keys(layout, name)
        if not keys:
            continue
        stacked = "/blocks/" in name
        first = text_depth if name.startswith("fusion/") else 0
        theirs = _their_shape(name, shape[1:] if stacked else shape, len(keys))
        found[name] = [
            Place(tuple(key.format(first + layer) for key in keys), theirs)
            for layer in range(shape[0] if stacked else 1)
        ]
    return found


def to_ours(
    name: str, shape: Shape, layers: list[list[Shaped[np.ndarray, "*some"]]]
) -> Shaped[np.ndarray, "*some"]:
    """Our parameter of this name and shape, from each layer's parts in their layout."""
    own = [_turned(name, np.concatenate(parts) if len(parts) > 1 else parts[0]) for parts in layers]
    return np.stack(own).reshape(shape)


def to_theirs(
    layout: Layout, arrays: Mapping[str, Shaped[np.ndarray, "*some"]], text_depth: int
) -> Iterator[tuple[str, Shaped[np.ndarray, "*some"]]]:
    """(key, array) of each of our parameters that the layout has, in that layout."""
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, found in places(layout, shapes, text_depth).items():
        layers = arrays[name] if "/blocks/" in name else arrays[name][None]
        for place, layer in zip(found, layers, strict=True):
            whole = (len(place.keys) * place.shape[0], *place.shape[1:]) if place.shape else ()
            turned = _turned_back(name, layer, whole)
            parts = np.split(turned, len(place.keys)) if len(place.keys) > 1 else [turned]
            for key, part in zip(place.keys, parts, strict=True):
                yield key, np.ascontiguousarray(part)


def layer_count(layout: Layout, keys: Iterable[str], tower: str) -> int:
    """The number of layers of `tower` ("image" or "text") in the keys: the highest number
    plus one.
    """
    module = next(m for ours, m in layout.modules.items() if ours.startswith(f"{tower}/blocks/"))
    pattern = re.compile(re.escape(module.partition("{}")[0]) + r"(\d+)\.")
    return max((int(found[1]) + 1 for key in keys if (found := pattern.match(key))), default=0)


def _keys(layout: Layout, name: str) -> list[str]:
    """Their keys for one of our parameters; empty if the layout has none."""
    if name in layout.parameters:
        return [layout.parameters[name]]
    module, _, leaf = name.rpartition("/")
    if module not in layout.modules:
        return []
    ending = "bias" if leaf == "bias" else "weight"
    return [f"{part}.{ending}" for part in layout.modules[module].split("|")]


def _their_shape(name: str, own: Shape, parts: int) -> Shape:
    if name.endswith("patches/kernel"):
        side = math.isqrt(own[0] // 3)
        return (own[1], 3, side, side)
    if name.endswith("/kernel"):
        inputs = 2 if name.endswith("/out/kernel") else 1  # heads, and features per head
        return (math.prod(own[inputs:]) // parts, math.prod(own[:inputs]))
    if "/blocks/" in name:
        return (math.prod(own) // parts,)
    return own


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """[outputs, inputs] as [inputs, outputs]; a convolution as rows in the order row, column,
    channel.
    """
    if name.endswith("patches/kernel"):
        return array.transpose(2, 3, 1, 0)
    return array.T if name.endswith("/kernel") else array


def _turned_back(name: str, array: np.ndarray, theirs: Shape) -> np.ndarray:
    """The inverse of `_turned`, for their shape."""
    if name.endswith("patches/kernel"):
        width, channels, side, _ = theirs
        return array.reshape(side, side, channels, width).transpose(3, 2, 0, 1)
    if name.endswith("/kernel"):
        return array.reshape(theirs[1], theirs[0]).T
    return array.reshape(theirs)
