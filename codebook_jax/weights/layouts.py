"""Tables that map our parameters to the names in public weights, and back, and the table of a file.

A table maps modules: their `weight` and `bias` are our `kernel` or `scale` and `bias`. `{}` is the
number of the layer; several modules for one of ours ("a|b|c") are joined on their first axis.
Reading and writing use the same table, so a round trip is bit exact.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from codebook_jax.errors import UserError

PRETRAINED = ("pretrain", "retrieval", "grounding")  # tasks with the parameters of pre-training
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by our names, such as image/blocks/mlp/up/kernel
Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How a file names the parameters of one tower or of a whole model."""

    title: str
    names: Mapping[str, str]  # our modules, and our parameters that stand alone, to theirs
    own: str  # pattern of the tower's keys: an unknown one means another architecture

    @property
    def mark(self) -> str:
        """The key by which the layout is known: the queries of the first layer."""
        named = (theirs for ours, theirs in self.names.items() if ours.endswith("attention/qkv"))
        return next(named).split("|")[0].format(0) + ".weight"


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


def prefixed(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
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
        **prefixed("image/blocks/", f"{blocks}.{{}}.", block),
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
        **prefixed("image/blocks/", "blocks.{}.", _TIMM_BLOCK),
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
        **prefixed("text/blocks/", "bert.encoder.layer.{}.", _BERT_BLOCK),
        **prefixed("fusion/blocks/", "bert.encoder.layer.{}.", _BERT_BLOCK),
        "masked_words/transform": "cls.predictions.transform.dense",
        "masked_words/norm": "cls.predictions.transform.LayerNorm",
        "masked_words/bias": "cls.predictions.bias",
    },
    own=r"^bert\.(embeddings|encoder)\.",
)


def _albef(ours: str, copy: str) -> dict[str, str]:
    return {
        **prefixed(ours, f"visual_encoder{copy}.", VIT_TIMM.names),
        **prefixed(ours, f"text_encoder{copy}.", BERT.names),
        **prefixed(f"{ours}fusion/blocks/", f"text_encoder{copy}.bert.encoder.layer.{{}}.", _CROSS),
        f"{ours}image_projection": f"vision_proj{copy}",
        f"{ours}text_projection": f"text_proj{copy}",
    }


# ALBEF's pre-training model (Li et al., NeurIPS 2021), by the names of the train state: timm's ViT,
# a BERT whose last layers have cross-attention, projections; `_m` marks the momentum copies.
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
OWN = Layout("a run or export of this code", {}, own=".")  # with our names and shapes
_READ = {  # by part of config.init: prefixes and layouts of its keys, and its kinds in config.json
    "model": (("",), (ALBEF,), ()),
    "image": (
        ("", "vit.", "deit.", "model.", "visual_encoder."),
        (VIT_HF, VIT_HF5, VIT_TIMM),
        ("vit", "deit"),
    ),
    "text": (("", "text_encoder."), (BERT,), ("bert",)),
}
# A BERT without a head, also within an ALBEF fine-tuned for retrieval, has no `bert.`.
_BARE = re.compile(r"^((?:text_encoder(?:_m)?\.)?)(?=(?:embeddings|encoder|pooler)\.)")
_OLD_NORM = re.compile(r"\.LayerNorm\.(gamma|beta)$")  # TensorFlow's names, in the first BERT files
_NORM = {"gamma": ".LayerNorm.weight", "beta": ".LayerNorm.bias"}


def under(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a part of the tree, by their names there."""
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def keys_of(layout: Layout, shapes: Shapes, text_depth: int) -> dict[str, list[str]]:
    """The keys of each of our parameters that the layout has, layer by layer; those of the fusion
    are numbered on from the text encoder's `text_depth`.
    """
    found = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition("/")
        ending = ".bias" if leaf == "bias" else ".weight"
        if module in layout.names:
            keys = [part + ending for part in layout.names[module].split("|")]
        elif name in layout.names:
            keys = [layout.names[name]]
        elif layout is OWN and name.startswith(("student/", "teacher/")):
            keys = [name]
        else:
            continue
        first = text_depth if "fusion/blocks/" in name else 0
        layers = shape[0] if "{}" in keys[0] else 1
        found[name] = [key.format(layer) for layer in range(first, first + layers) for key in keys]
    return found


def tensors(
    name: str, array: Shaped[np.ndarray, "*some"], keys: list[str]
) -> Iterator[tuple[str, Shaped[np.ndarray, "*other"]]]:
    """Each key of one of our parameters, and its tensor as a view of the contiguous `array`."""
    is_stacked = "/blocks/" in name and keys != [name]
    layers, shape = (len(array), array.shape[1:]) if is_stacked else (1, array.shape)
    parts = len(keys) // layers
    if keys == [name]:
        views = array[None, None]
    elif name.endswith("patches/kernel"):  # theirs is of a convolution, ours has rows of pixels
        side = math.isqrt(shape[0] // 3)
        views = array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)[None, None]
    elif name.endswith("/kernel"):  # theirs is [outputs, inputs]; the inputs of `out` have two axes
        inputs = math.prod(shape[: 2 if name.endswith("/out/kernel") else 1])
        views = array.reshape(layers, inputs, parts, -1).transpose(0, 2, 3, 1)
    else:
        views = array.reshape(layers, parts, *((-1,) if is_stacked else shape))
    return zip(keys, (views[*at, ...] for at in np.ndindex(*views.shape[:2])), strict=True)


def to_theirs(
    layout: Layout, arrays: Mapping[str, Shaped[np.ndarray, "*some"]], text_depth: int
) -> dict[str, Shaped[np.ndarray, "*some"]]:
    """Each of our parameters that the layout has, in that layout, by its key."""
    shapes = {name: array.shape for name, array in arrays.items()}
    return {
        key: np.array(tensor, order="C")
        for name, keys in keys_of(layout, shapes, text_depth).items()
        for key, tensor in tensors(name, np.asarray(arrays[name]), keys)
    }


def recognise(part: str, arrays: Arrays, what: str) -> tuple[Layout, Arrays]:
    """The layout of the weights for `part` ("image", "text" or "model"), and the tensors with its
    names; raises UserError, beginning with `what`, for other files.
    """
    if part != "image":
        arrays = {
            _OLD_NORM.sub(lambda found: _NORM[found[1]], _BARE.sub(r"\1bert.", key)): value
            for key, value in arrays.items()
        }
    prefixes, layouts, _ = _READ[part]
    for prefix, layout in itertools.product(prefixes, layouts):
        if prefix + layout.mark in arrays:
            return layout, {key.removeprefix(prefix): value for key, value in arrays.items()}
    known = ", ".join(f"{layout.title} ({layout.mark})" for layout in layouts)
    other = f", {OWN.title}: for a single tower use image:SPEC or text:SPEC"
    raise UserError(f"{what} is not {known}{other if part == 'model' else ': give one of those'}")


def refuse_other_kind(part: str, config: Mapping[str, Any], what: str) -> None:
    """Raises UserError if the config.json beside the weights states what this model is not."""
    for field, known in (
        ("model_type", _READ[part][2]),
        ("hidden_act", ("gelu", "gelu_python")),
        ("position_embedding_type", ("absolute",)),
    ):
        value = config.get(field)
        if value is not None and value not in known:
            raise UserError(
                f"{what} has {field}={value!r} in its config.json, but this model needs "
                f"{' or '.join(known)}: give other weights"
            )
