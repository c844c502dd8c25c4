"""Writes our weights for PyTorch: Hugging Face's ViTModel and BertModel, and a whole ALBEF."""

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

Named = Mapping[str, np.ndarray]
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
    folder: Path,
    arrays: Named,
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    tokenizer: Path,
) -> None:
    """`folder/image`, for ViTModel.from_pretrained, and `folder/text`, for BertModel's.

    `arrays` are a train state's, by its names. Neither model has a pooler: pass
    add_pooling_layer=False. Fusion encoder, projections and codebook are left out.
    """
    depth = config.model.text.depth
    towers = layouts.under(arrays, "student/towers/")
    image = dict(layouts.to_theirs(layouts.VIT_HF, towers, depth))
    _save(folder / "image", image, _vit(config) | {"architectures": ["ViTModel"]})
    _save_preprocessor(folder / "image", config)
    text = {name: value for name, value in towers.items() if name.startswith("text/")}
    text = layouts.under(dict(layouts.to_theirs(layouts.BERT, text, depth)), "bert.")
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
    """A state dict of ALBEF's pre-training model, with its sizes and the tokenizer.

    `arrays` are a train state's: student/..., teacher/..., queue/.... The codebook is left out.
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
    _save_preprocessor(folder, config)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def _save(folder: Path, arrays: Named, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.asarray(value, order="C") for key, value in arrays.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def _save_preprocessor(folder: Path, config: ml_collections.ConfigDict) -> None:
    side = config.model.image.size_px
    size = {"size": {"height": side, "width": side}}
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR | size)


def _vit(config: ml_collections.ConfigDict) -> dict[str, Any]:
    image = config.model.image
    return {
        "model_type": "vit",
        "image_size": image.size_px,
        "patch_size": image.patch_px,
        "num_channels": 3,
        "qkv_bias": True,
        **_encoder(image, image.depth, dropout=0.0),
    }


def _bert(config: ml_collections.ConfigDict, vocabulary: Vocabulary, depth: int) -> dict[str, Any]:
    text = config.model.text
    return {
        "model_type": "bert",
        "vocab_size": vocabulary.size,
        "max_position_embeddings": text.max_positions,
        "type_vocab_size": 2,
        "pad_token_id": vocabulary.pad_id,
        **_encoder(text, depth, dropout=text.dropout),
    }


def _encoder(model: ml_collections.ConfigDict, depth: int, *, dropout: float) -> dict[str, Any]:
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
