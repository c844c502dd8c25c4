"""Makes the goldens of the towers: what PyTorch's own BERT, ViT and DeiT compute with random
weights of odd small sizes.

    python -m pip install -e .[parity]
    python tests/goldens/make_towers.py

Each folder is what `save_pretrained` (or timm's state dict) writes, with outputs.npz beside it:
inputs, the states after the embeddings and after every layer, and what stands on top of them. On
another version of torch the last digits may differ.
"""

from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTModel,
)

FOLDER = Path(__file__).parent


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that make every part count, unlike a fresh model's: no bias is zero and no
    scale one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scale else 0.2 * noise)
    return model.eval()


def write(name: str, arrays: dict) -> None:
    outputs = {
        key: np.asarray(value.detach() if torch.is_tensor(value) else value)
        for key, value in arrays.items()
    }
    np.savez_compressed(FOLDER / name / "outputs.npz", **outputs)
    print(name, sum(path.stat().st_size for path in (FOLDER / name).iterdir()), "bytes")


def bert() -> None:
    config = BertConfig(
        vocab_size=53,
        hidden_size=36,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=70,
        max_position_embeddings=24,
        attn_implementation="eager",
    )
    model = randomised(BertForPreTraining(config), 0)
    model.save_pretrained(FOLDER / "bert")
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 53, (3, 11)), np.array([11, 4, 7])
    mask = (np.arange(11) < lengths[:, None]).astype(np.int64)
    out = model(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        output_hidden_states=True,
        return_dict=True,
    )
    states = {f"states_{layer}": state for layer, state in enumerate(out.hidden_states)}
    write("bert", {"tokens": tokens, "lengths": lengths, **states, "logits": out.prediction_logits})


def vit() -> None:
    config = ViTConfig(
        hidden_size=30,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=46,
        image_size=28,
        patch_size=7,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = randomised(ViTModel(config), 1)
    model.save_pretrained(FOLDER / "vit")
    images = np.random.default_rng(1).normal(size=(2, 3, 28, 28)).astype(np.float32)
    states = encoded(model, torch.tensor(images), distilled=False)
    square = model.embeddings.position_embeddings[:, 1:].reshape(1, 4, 4, 30).permute(0, 3, 1, 2)
    resized = {
        f"positions_{side}": torch.nn.functional.interpolate(
            square, size=(side, side), mode="bicubic", align_corners=False
        ).permute(0, 2, 3, 1)
        for side in (3, 7)
    }
    write("vit", {"images": images, **states, **resized})


def deit() -> None:
    config = DeiTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=50,
        image_size=32,
        patch_size=8,
        num_labels=4,
        attn_implementation="eager",
    )
    model = randomised(DeiTForImageClassificationWithTeacher(config), 2)
    model.save_pretrained(FOLDER / "deit")
    images = np.random.default_rng(2).normal(size=(2, 3, 32, 32)).astype(np.float32)
    write("deit", {"images": images, **encoded(model.deit, torch.tensor(images), distilled=True)})


def encoded(model: torch.nn.Module, images: torch.Tensor, *, distilled: bool) -> dict:
    """The states of a Hugging Face ViT after the embeddings, every layer and the norm; DeiT's
    without its distillation token.
    """
    states = model.embeddings(images)
    if distilled:
        states = torch.cat([states[:, :1], states[:, 2:]], dim=1)
    found = [states]
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    for layer in layers:
        states = layer(states)
        states = states[0] if isinstance(states, tuple) else states
        found.append(states)
    return {f"states_{place}": state for place, state in enumerate(found)} | {
        "normed": model.layernorm(states)
    }


def timm_vit() -> None:
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=30, patch_size=6, embed_dim=42, depth=3, num_heads=3, mlp_ratio=1.5, num_classes=5
    )
    randomised(model, 3)
    (FOLDER / "timm").mkdir(exist_ok=True)
    save_file(model.state_dict(), FOLDER / "timm" / "model.safetensors")
    images = torch.tensor(np.random.default_rng(3).normal(size=(2, 3, 30, 30)).astype(np.float32))
    states = model._pos_embed(model.patch_embed(images))
    found = {"images": images, "states_0": states}
    for place, block in enumerate(model.blocks, 1):
        states = block(states)
        found[f"states_{place}"] = states
    np.testing.assert_allclose(
        model.norm(states).detach(), model.forward_features(images).detach(), atol=1e-5
    )
    write("timm", found | {"normed": model.norm(states)})


if __name__ == "__main__":
    torch.manual_seed(0)
    for make in (bert, vit, deit, timm_vit):
        make()
