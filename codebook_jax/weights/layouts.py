"""Tables that map our parameters to the names in public weights, and back.

A table maps modules: their `weight` and `bias` are our `kernel` or `scale` and `bias`. `{}` is the
number of the layer; several modules for one of ours ("a|b|c") are joined on their first axis.
Reading and writing use the same table, so a round trip is bit exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Shaped

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by our names, such as image/blocks/mlp/up/kernel
T = TypeVar("T")


class Layout(NamedTuple):
    """How a file names the parameters of one tower or of a whole model."""

    title: str
    names: Mapping[str, str]  # our modules, and our parameters that stand alone, to theirs
    own: str  # pattern of the tower's keys: an unknown one means another architecture
    is_ours: bool = False  # our own names and shapes: nothing is renamed or transposed


_TIMM_BLOCK = {
    "attention_norm": "norm1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
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
_HF_VIT_BLOCK = _BERT_BLOCK | {
    "attention/qkv": "attention.attention.query|attention.attention.key|attention.attention.value",
    "attention_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
}
_HF5_VIT_BLOCK = _HF_VIT_BLOCK | {
    "attention/qkv": "attention.q_proj|attention.k_proj|attention.v_proj",
    "attention/out": "attention.o_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
_CROSS = {
    "cross/query": "crossattention.self.query",
    "cross/key_value": "crossattention.self.key|crossattention.self.value",
    "cross/out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
}
# DeiT's second token, with a position of its own
DISTILLATION = r"(^|\.)(dist_token|distillation_token)$"
IGNORED = (  # known keys without a use here, and what they are
    (DISTILLATION, "distillation token"),
    (r"\.mask_token$", "mask token"),
    (r"(^|\.)pooler\.", "pooler"),
    (r"(^|\.)position_ids$", "position numbers"),
    (r"(^|\.)cls\.predictions\.decoder\.(weight|bias)$", "output layer, tied to the words"),
    (r"^cls\.seq_relationship\.", "next-sentence head"),
    (r"^(visual_encoder(_m)?\.)?(head|head_dist|pre_logits|qa_outputs)\.", "head"),
    (r"^(classifier|cls_classifier|distillation_classifier)\.", "head"),
)


def _each(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """The table with a prefix for the names on each side."""
    return {
        f"{ours}{name}": "|".join(f"{theirs}{part}" for part in value.split("|"))
        for name, value in names.items()
    }


def _vit_hf(title: str, blocks: str, block: Mapping[str, str]) -> Layout:
    names = {
        "image/patches": "embeddings.patch_embeddings.projection",
        "image/cls": "embeddings.cls_token",
        "image/positions": "embeddings.position_embeddings",
        **_each("image/blocks/", f"{blocks}.{{}}.", block),
        "image/norm": "layernorm",
    }
    return Layout(title, names, own=r"^(embeddings|encoder|layers|layernorm)\.")


VIT_HF = _vit_hf("ViT in the Hugging Face layout", "encoder.layer", _HF_VIT_BLOCK)
VIT_HF5 = _vit_hf("ViT in the layout of transformers 5", "layers", _HF5_VIT_BLOCK)
VIT_TIMM = Layout(
    "ViT in timm's layout",
    {
        "image/patches": "patch_embed.proj",
        "image/cls": "cls_token",
        "image/positions": "pos_embed",
        **_each("image/blocks/", "blocks.{}.", _TIMM_BLOCK),
        "image/norm": "norm",
    },
    own=r"^(cls_token|pos_embed|reg_token|patch_embed|blocks|norm|norm_pre|fc_norm)(\.|$)",
)
BERT = Layout(
    "BERT in the Hugging Face layout",
    {
        "text/words": "bert.embeddings.word_embeddings.weight",
        "text/positions": "bert.embeddings.position_embeddings.weight",
        "text/segment": "bert.embeddings.token_type_embeddings.weight",
        "text/norm": "bert.embeddings.LayerNorm",
        **_each("text/blocks/", "bert.encoder.layer.{}.", _BERT_BLOCK),
        **_each("fusion/blocks/", "bert.encoder.layer.{}.", _BERT_BLOCK),
        "masked_words/transform": "cls.predictions.transform.dense",
        "masked_words/norm": "cls.predictions.transform.LayerNorm",
        "masked_words/bias": "cls.predictions.bias",
    },
    own=r"^bert\.(embeddings|encoder)\.",
)


def _albef(ours: str, copy: str) -> dict[str, str]:
    return {
        **_each(ours, f"visual_encoder{copy}.", VIT_TIMM.names),
        **_each(ours, f"text_encoder{copy}.", BERT.names),
        **_each(f"{ours}fusion/blocks/", f"text_encoder{copy}.bert.encoder.layer.{{}}.", _CROSS),
        f"{ours}image_projection": f"vision_proj{copy}",
        f"{ours}text_projection": f"text_proj{copy}",
    }


# ALBEF's pre-training model (Li et al., NeurIPS 2021), by the names of the train state: timm's ViT,
# a BERT whose last layers have cross-attention, projections; `_m` marks the momentum copies. For
# the queues see albef.py.
ALBEF = Layout(
    "ALBEF",
    {
        **_albef("student/towers/", ""),
        **_albef("teacher/", "_m"),
        "student/matching/classes": "itm_head",
        "student/temperature": "temp",
    },
    own=r"^(visual_encoder|text_encoder\.bert\.(embeddings|encoder))\.",
)
OWN = Layout("a run or export of this code", {}, own=".", is_ours=True)


def in_student(layout: Layout) -> Layout:
    """The layout of a tower with the names that its parameters have in the train state."""
    return layout._replace(names=_each("student/towers/", "", layout.names))


def under(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries below a part of the tree, by their names there."""
    found = (name for name in named if name.startswith(prefix))
    return {name.removeprefix(prefix): named[name] for name in found}


class Place(NamedTuple):
    """Where a file has one of our parameters."""

    keys: list[list[str]]  # of each layer, or once: those that are joined on their first axis
    shape: Shape  # of the tensor of every key


def places(layout: Layout, shapes: Shapes, text_depth: int) -> dict[str, Place]:
    """The place of each of our parameters that the layout has.

    Fusion layers are numbered on from the text encoder's `text_depth`.
    """
    if layout.is_ours:
        kept = (name for name in shapes if name.startswith(("student/", "teacher/")))
        return {name: Place([[name]], shapes[name]) for name in kept}
    found = {}
    for name, shape in shapes.items():
        if keys := _keys(layout, name):
            is_stacked = "/blocks/" in name
            first = text_depth if "fusion/blocks/" in name else 0
            layers = range(first, first + shape[0]) if is_stacked else (0,)
            found[name] = Place(
                [[key.format(layer) for key in keys] for layer in layers],
                _their_shape(name, shape[1:] if is_stacked else shape, len(keys)),
            )
    return found


def to_ours(
    layout: Layout, name: str, shape: Shape, layers: list[list[Shaped[np.ndarray, "*some"]]]
) -> Shaped[np.ndarray, "*some"]:
    """Our parameter of this name and shape, from each layer's tensors in their layout."""
    if layout.is_ours:
        return layers[0][0]
    if name.endswith(
        "patches/kernel"
    ):  # of a convolution: to rows in the order row, column, channel
        return layers[0][0].transpose(2, 3, 1, 0).reshape(shape)
    if name.endswith("/kernel"):  # [outputs, inputs] to [inputs, outputs]
        return np.stack([np.concatenate(parts).T for parts in layers]).reshape(shape)
    return np.stack(layers).reshape(shape)


def to_theirs(
    layout: Layout, arrays: Mapping[str, Shaped[np.ndarray, "*some"]], text_depth: int
) -> Iterator[tuple[str, Shaped[np.ndarray, "*some"]]]:
    """(key, array) of each of our parameters that the layout has, in that layout."""
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, (keys_of, shape) in places(layout, shapes, text_depth).items():
        layers = arrays[name] if "/blocks/" in name else arrays[name][None]
        for keys, layer in zip(keys_of, layers, strict=True):
            if name.endswith("patches/kernel"):
                width, channels, side, _ = shape
                layer = layer.reshape(side, side, channels, width).transpose(3, 2, 0, 1)
            elif name.endswith("/kernel"):
                layer = layer.reshape(shape[1], -1).T
            for key, part in zip(keys, layer.reshape(len(keys), *shape), strict=True):
                yield key, np.array(part, order="C")


def _keys(layout: Layout, name: str) -> list[str]:
    """Their keys for one of our parameters; empty if the layout has none."""
    if name in layout.names:
        return [layout.names[name]]
    module, _, leaf = name.rpartition("/")
    ending = "bias" if leaf == "bias" else "weight"
    return [f"{part}.{ending}" for part in layout.names.get(module, "").split("|") if part]


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
