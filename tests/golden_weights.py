"""The weights in goldens/, the configs of their sizes, and the start of a run from them."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from codebook_jax.weights import start

ROOT = Path(__file__).parents[1]
GOLDENS = Path(__file__).parent / "goldens"
WORDS = 53
# Every golden's own sizes; the image towers' text is BERT's, and BERT's image the ViT's.
IMAGE_FIELDS = ("size_px", "patch_px", "width", "depth", "heads", "mlp_width", "layer_norm_eps")
IMAGES = {
    "vit": dict(zip(IMAGE_FIELDS, (28, 7, 30, 3, 5, 46, 1e-5), strict=True)),
    "deit": dict(zip(IMAGE_FIELDS, (32, 8, 24, 2, 3, 50, 1e-12), strict=True)),
    "timm": dict(zip(IMAGE_FIELDS, (30, 6, 42, 3, 3, 63, 1e-6), strict=True)),
}
TEXT = dict(
    width=36, depth=2, fusion_depth=3, heads=3, mlp_width=70, max_positions=24, max_tokens=11
)
ALBEF = GOLDENS / "albef_pretrain.npz"
ALPHA_STEPS = 1  # alpha is that of the golden from the second update on
VOCABULARY = Vocabulary(WORDS, 0, 2, 3, 4, (0, 1, 2, 3, 4))


def albef_config():
    """configs/albef.py at the golden's sizes."""
    with np.load(ALBEF) as stored:
        sizes = json.loads(stored["config_json"].tobytes())
    config = runpy.run_path(str(ROOT / "configs" / "albef.py"))["get_config"]("tiny")
    vit, bert = sizes["vit"], sizes["bert"]
    config.update_from_flattened_dict(
        {
            "model.image.size_px": sizes["res"],
            "model.image.patch_px": vit["patch_size"],
            "model.image.width": vit["embed_dim"],
            "model.image.depth": vit["depth"],
            "model.image.heads": vit["num_heads"],
            "model.text.width": bert["hidden_size"],
            "model.text.depth": bert["fusion_layer"],
            "model.text.fusion_depth": bert["num_hidden_layers"] - bert["fusion_layer"],
            "model.text.heads": bert["num_attention_heads"],
            "model.text.mlp_width": bert["intermediate_size"],
            "model.text.max_positions": bert["max_position_embeddings"],
            "model.text.max_tokens": 11,
            "model.dim": sizes["embed"],
            "queue.size": sizes["queue"],
            "data.global_batch": 5,
            "itm.groups": 1,
            "teacher.alpha_steps": ALPHA_STEPS,
            "codebook.size": 7,
            "codebook.window_samples": 10,
        }
    )
    return config.lock()


def towers_config(image="vit", **changes):
    """The sizes of the goldens' towers, with config.init naming them."""
    config = albef_config()
    with config.unlocked():
        config.model.image.update(IMAGES[image])
        config.model.text.update(TEXT)
        config.init = f"image:{GOLDENS / image},text:{GOLDENS / 'bert'}"
        config.update_from_flattened_dict(changes)
    return config


def one_mesh(devices=1):
    kinds = (AxisType.Auto,) * 3
    shape = (devices // 2 or 1, min(devices, 2), 1)
    return Mesh(np.array(jax.devices()[:devices]).reshape(shape), sharding.AXES, axis_types=kinds)


def started(config, vocabulary=VOCABULARY):
    """The config of a run, and its initial weights."""
    read = start.read_start(config)
    config = start.adopted(config, read, None)
    task = pretrain.Pretraining(config, vocabulary, one_mesh())
    return config, start.initial(read, config, task.abstract_state())


def refusal(config, vocabulary=VOCABULARY):
    with pytest.raises(UserError) as caught:
        started(config, vocabulary)
    assert "\n" not in str(caught.value)
    return str(caught.value)
