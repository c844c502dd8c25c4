"""The image encoder: a pre-norm Vision Transformer (Dosovitskiy et al., 2021) with [CLS]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from codebook_jax.models.layers import (
    Compute,
    Dense,
    FeedForward,
    LayerNorm,
    SelfAttention,
    normal_param,
    scan,
    stack,
)

Tokens = Float[Array, "images tokens width"]


class VisionBlock(nnx.Module):
    """Attention and feed-forward, each after a layer normalisation and added to its input."""

    def __init__(self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs) -> None:
        self.attention_norm = LayerNorm(spec, compute, rngs)
        self.attention = SelfAttention(spec, compute, rngs, value_std=spec.init_std)
        self.mlp_norm = LayerNorm(spec, compute, rngs)
        self.mlp = FeedForward(spec, compute, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.attention(self.attention_norm(x), None)
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nnx.Module):
    """Patches of an image to tokens; token 0 is [CLS]."""

    def __init__(self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs) -> None:
        width, std = spec.width, spec.init_std
        patches = (spec.size_px // spec.patch_px) ** 2
        self.patch_px, self.compute = spec.patch_px, compute
        self.patches = Dense(spec.patch_px**2 * 3, width, std=std, dtype=compute.dtype, rngs=rngs)
        self.cls = normal_param((1, 1, width), std=0.02, rngs=rngs)  # ViT's, whatever `init_std`
        self.positions = normal_param((1, patches + 1, width), std=spec.position_std, rngs=rngs)
        self.blocks = stack(lambda r: VisionBlock(spec, compute, r), spec.depth, rngs)
        self.norm = LayerNorm(spec, compute, rngs)

    @jax.named_scope("image")
    def __call__(self, images: Float[Array, "images side side 3"]) -> Tokens:
        x = self.patches(cut_patches(images.astype(self.compute.dtype), self.patch_px))
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(x.dtype)
        return self.norm(scan(self.blocks, lambda block, x, _: block(x), x, None, self.compute))


def cut_patches(
    images: Float[Array, "images side side 3"], patch_px: int
) -> Float[Array, "images patches values"]:
    """Squares of an image in reading order, each flattened in the order row, column, channel."""
    count, side = images.shape[0], images.shape[1] // patch_px
    squares = images.reshape(count, side, patch_px, side, patch_px, 3).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(count, side * side, -1)
