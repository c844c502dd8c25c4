"""Writes our weights for PyTorch: Hugging Face's ViTModel and BertModel, and ALBEF's whole
model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from safetensors.numpy import save_file

from codebook_jax.data.augment import MEAN, STD
from codebook_jax.data.text import Vocabulary
from codebook_jax.files import write_json
from codebook_jax.weights import albef, layouts

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Named = Mapping[str, np.ndarray]


def write_huggingface(
    folder: Path,
    arrays: Named,
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    tokenizer: Path,
) -> None:
    """`folder/image`, for ViTModel.from_pretrained, and `folder/text`, for
    BertModel.from_pretrained.

    `arrays` are a train state's, by its names; the text encoder is written as a BERT of its own
    depth. Neither model has
    a pooler: pass add_pooling_layer=False. Fusion encoder, projections and codebook are left out.
    """
    depth = config.model.text.depth
    towers = layouts.under(arrays, "student/towers/")
    image = dict(layouts.to_theirs(layouts.VIT_HF, towers, depth))
    _save(folder / "image", image, _vit(config) | {"architectures": ["ViTModel"]})
    write_json(folder / "image" / "preprocessor_config.json", _preprocessor(config))
    halves = {name: value for name, value in towers.items() if name.startswith("text/")}
    text = {
        key.removeprefix("bert."): value
        for key, value in layouts.to_theirs(layouts.BERT, halves, depth)
    }
    bert = _bert(config, vocabulary, depth) | {"architectures": ["BertModel"]}
    _save(folder / "text", text, bert)
    shutil.copytree(tokenizer, folder / "text", dirs_exist_ok=True)


def write_albef(
    folder: Path,
    arrays: Named,
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    tokenizer: Path,
) -> None:
    """`folder/model.safetensors`, a state dict of ALBEF's pre-training model, with its sizes and
    the tokenizer.

    `arrays` are a train state's, by its names (student/..., teacher/..., queue/...). The codebook
    is left out.
    """
    text = config.model.text
    bert = _bert(config, vocabulary, text.depth + text.fusion_depth)
    bert |= {"fusion_layer": text.depth, "encoder_width": config.model.image.width}
    sizes = {
        "model_type": "albef",
        "image_res": config.model.image.size_px,
        "embed_dim": config.model.dim,
        "queue_size": config.queue.size,
        "momentum": config.teacher.momentum,
        "alpha": config.teacher.alpha,
        "vision": _vit(config),
        "text": bert,
    }
    _save(folder, albef.to_albef(arrays, text.depth), sizes)
    write_json(folder / "config_bert.json", bert)
    write_json(folder / "preprocessor_config.json", _preprocessor(config))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def _save(folder: Path, arrays: Named, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {
        key: np.asarray(value, order="C") for key, value in arrays.items()
    }  # unlike ascontiguousarray, keeps scalars
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def _vit(config: ml_collections.ConfigDict) -> dict[str, Any]:
    of = config.model.image
    return _tower(of, of.depth) | {
        "model_type": "vit",
        "image_size": of.size_px,
        "patch_size": of.patch_px,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _bert(config: ml_collections.ConfigDict, vocabulary: Vocabulary, depth: int) -> dict[str, Any]:
    of = config.model.text
    return _tower(of, depth) | {
        "model_type": "bert",
        "vocab_size": vocabulary.size,
        "max_position_embeddings": of.max_positions,
        "type_vocab_size": 2,
        "pad_token_id": vocabulary.pad_id,
        "hidden_dropout_prob": of.dropout,
        "attention_probs_dropout_prob": 0.0,
    }


def _tower(of: ml_collections.ConfigDict, depth: int) -> dict[str, Any]:
    return {
        "hidden_size": of.width,
        "num_hidden_layers": depth,
        "num_attention_heads": of.heads,
        "intermediate_size": of.mlp_width or 4 * of.width,
        "hidden_act": "gelu",
        "layer_norm_eps": of.layer_norm_eps,
        "initializer_range": of.init_std,
        "torch_dtype": "float32",
    }


def _preprocessor(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Evaluation's preprocessing: the whole picture resized to a square, bicubic, then
    normalised.
    """
    side = config.model.image.size_px
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
