"""The image encoder: a pre-norm Vision Transformer (Dosovitskiy et al., 2021) with [CLS]."""

from __future__ import annotations

import math

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
    gelu,
    normal_param,
    scan,
    stack,
)

Tokens = Float[Array, "images tokens width"]
GELU_MEAN, GELU_STD = 0.5 / math.sqrt(math.pi), 0.588  # of the GELU of a standard normal


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
        if spec.stem == "conv":
            self.patches = ConvStem(spec, compute, rngs)
        else:
            values = spec.patch_px**2 * 3
            self.patches = Dense(values, width, std=std, dtype=compute.dtype, rngs=rngs)
        self.cls = normal_param((1, 1, width), std=0.02, rngs=rngs)  # ViT's, whatever `init_std`
        self.positions = normal_param((1, patches + 1, width), std=spec.position_std, rngs=rngs)
        self.blocks = stack(lambda r: VisionBlock(spec, compute, r), spec.depth, rngs)
        self.norm = LayerNorm(spec, compute, rngs)

    @jax.named_scope("image")
    def __call__(self, images: Float[Array, "images side side 3"]) -> Tokens:
        x = images.astype(self.compute.dtype)
        if isinstance(self.patches, Dense):
            x = cut_patches(x, self.patch_px)
        x = self.patches(x)
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(x.dtype)
        return self.norm(scan(self.blocks, lambda block, x, _: block(x), x, None, self.compute))


class ConvStem(nnx.Module):
    """Convolutions to one vector a patch (Xiao et al. 2021, 3): 8x8 pixels at a stride of 4, then
    3x3 at a stride of 2, each with a layer norm and a GELU, up to the encoder's width; and a dense
    layer.
    """

    def __init__(self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs) -> None:
        self.halvings = int(math.log2(spec.patch_px)) - 2
        inputs = 3 * 8**2
        for layer in range(self.halvings + 1):
            width = spec.width >> (self.halvings - layer)
            options = dict(std=inputs**-0.5, dtype=compute.dtype, rngs=rngs)
            setattr(self, f"conv{layer}", Dense(inputs, width, **options))
            setattr(self, f"norm{layer}", LayerNorm(spec, compute, rngs, width=width))
            inputs = 3**2 * width
        options = dict(std=spec.init_std, dtype=compute.dtype, rngs=rngs)
        self.linear = Dense(width, width, **options)

    def __call__(
        self, x: Float[Array, "images side side 3"]
    ) -> Float[Array, "images patches width"]:
        # 8x8 at a stride of 4 is 2x2 at a stride of 1 over squares of 4x4
        side = x.shape[1] // 4
        x = _windows(cut_patches(x, 4).reshape(len(x), side, side, -1), size=2, stride=1)
        for layer in range(self.halvings + 1):
            if layer:
                x = _windows(x, size=3, stride=2)
            x = getattr(self, f"norm{layer}")(getattr(self, f"conv{layer}")(x))
            x = (gelu(x) - GELU_MEAN) / GELU_STD
        return self.linear(x.reshape(len(x), -1, x.shape[-1]))


def _windows(
    x: Float[Array, "images rows columns values"], *, size: int, stride: int
) -> Float[Array, "images new_rows new_columns window"]:
    """What a convolution reads at each of its places, as values; zeros above and left of `x`."""
    side = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    taps = [
        x[:, row : row + side : stride, column : column + side : stride]
        for row in range(size)
        for column in range(size)
    ]
    return jnp.concatenate(taps, axis=-1)


def cut_patches(
    images: Float[Array, "images side side 3"], patch_px: int
) -> Float[Array, "images patches values"]:
    """Squares of an image in reading order, each flattened in the order row, column, channel."""
    count, side = images.shape[0], images.shape[1] // patch_px
    squares = images.reshape(count, side, patch_px, side, patch_px, 3).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(count, side * side, -1)
