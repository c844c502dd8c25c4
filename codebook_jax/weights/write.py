"""Writes our weights for PyTorch: Hugging Face's ViTModel and BertModel, and a whole ALBEF."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from codebook_jax.data.augment import MEAN, STD
from codebook_jax.data.text import Vocabulary
from codebook_jax.files import write_json
from codebook_jax.weights import layouts
from codebook_jax.weights.layouts import Arrays

_PREPROCESSOR = {  # as in evaluation: the whole picture in a square, bicubic, normalised
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


def write_huggingface(
    folder: Path, arrays: Arrays, config: ConfigDict, vocabulary: Vocabulary, tokenizer: Path
) -> None:
    """`folder/image`, for ViTModel.from_pretrained, and `folder/text`, for BertModel's, of a train
    state's arrays; they have no pooler, and fusion encoder, projections and codebook are left out.
    """
    depth = config.model.text.depth
    towers = layouts.under(arrays, "student/towers/")
    vit = _vit(config) | {"architectures": ["ViTModel"]}
    image = layouts.to_theirs(layouts.VIT_HF, towers, depth)
    _save(folder / "image", image, vit, side=config.model.image.size_px)
    text = {name: value for name, value in towers.items() if name.startswith("text/")}
    text = layouts.under(layouts.to_theirs(layouts.BERT, text, depth), "bert.")
    bert = _bert(config, vocabulary, depth) | {"architectures": ["BertModel"]}
    _save(folder / "text", text, bert)
    shutil.copytree(tokenizer, folder / "text", dirs_exist_ok=True)


def write_albef(
    folder: Path, arrays: Arrays, config: ConfigDict, vocabulary: Vocabulary, tokenizer: Path
) -> None:
    """A train state's arrays as ALBEF's pre-training model, with its sizes and the tokenizer."""
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
    _save(folder, to_albef(arrays, text.depth), sizes, side=config.model.image.size_px)
    write_json(folder / "config_bert.json", bert)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def to_albef(arrays: Arrays, text_depth: int) -> dict[str, np.ndarray]:
    """ALBEF's state dict of a train state's arrays; unfilled queue entries are zeros, where ALBEF
    has random features, and the codebook is left out.
    """
    found = layouts.to_theirs(layouts.ALBEF, arrays, text_depth)
    for towers, copy in (("student/towers", ""), ("teacher", "_m")):  # duplicates and counters
        head = f"text_encoder{copy}.cls.predictions.decoder"
        found[f"{head}.weight"] = arrays[f"{towers}/text/words"].copy()
        found[f"{head}.bias"] = arrays[f"{towers}/masked_words/bias"].copy()
        numbers = np.arange(len(arrays[f"{towers}/text/positions"]), dtype=np.int64)[None]
        found[f"text_encoder{copy}.bert.embeddings.position_ids"] = numbers
    is_filled = np.arange(len(arrays["queue/image"])) < arrays["queue/filled"]
    for name in ("image", "text"):
        found[f"{name}_queue"] = np.where(is_filled, arrays[f"queue/{name}"].T, 0)
    found["queue_ptr"] = np.asarray(arrays["queue/cursor"], np.int64).reshape(1)
    return found


def _save(
    folder: Path, arrays: Arrays, config: Mapping[str, Any], *, side: int | None = None
) -> None:
    """Writes the weights and their config, and that of a ViT's pictures of `side` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.asarray(value, order="C") for key, value in arrays.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    if side:
        size = {"size": {"height": side, "width": side}}
        write_json(folder / "preprocessor_config.json", _PREPROCESSOR | size)


def _vit(config: ConfigDict) -> dict[str, Any]:
    image = config.model.image
    sizes = {"image_size": image.size_px, "patch_size": image.patch_px, "num_channels": 3}
    encoder = _encoder(image, image.depth, dropout=0.0)
    return {"model_type": "vit", "qkv_bias": True} | sizes | encoder


def _bert(config: ConfigDict, vocabulary: Vocabulary, depth: int) -> dict[str, Any]:
    text = config.model.text
    words = {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad_id}
    sizes = {"max_position_embeddings": text.max_positions, "type_vocab_size": 2}
    encoder = _encoder(text, depth, dropout=text.dropout)
    return {"model_type": "bert"} | words | sizes | encoder


def _encoder(model: ConfigDict, depth: int, *, dropout: float) -> dict[str, Any]:
    return {
        "hidden_size": model.width,
        "num_hidden_layers": depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_width or 4 * model.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.layer_norm_eps,
        "initializer_range": model.init_std,
        "torch_dtype": "float32",
    }
