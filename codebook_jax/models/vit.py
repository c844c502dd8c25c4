"""The image encoder: a Vision Transformer (Dosovitskiy et al., 2021), pre-norm, with a [CLS]
token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from codebook_jax.models.attention import SelfAttention
from codebook_jax.models.layers import Compute, Dense, FeedForward, LayerNorm, scan, stack


class VisionBlock(nnx.Module):
    """Attention and feed-forward, each after a layer normalisation and added to its input."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        eps: float,
        std: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        of = dict(dtype=compute.dtype, rngs=rngs)
        self.attention_norm = LayerNorm(width, eps=eps, **of)
        self.attention = SelfAttention(width, heads, std=std, value_std=std, **of)
        self.mlp_norm = LayerNorm(width, eps=eps, **of)
        self.mlp = FeedForward(width, mlp_width, std=std, **of)

    def __call__(
        self, x: Float[Array, "images tokens width"], compute: Compute
    ) -> Float[Array, "images tokens width"]:
        x = x + self.attention(self.attention_norm(x), None, implementation=compute.attention)
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nnx.Module):
    """Patches of an image to tokens; token 0 is [CLS]."""

    def __init__(
        self,
        *,
        size_px: int,
        patch_px: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        layer_norm_eps: float,
        init_std: float,
        position_std: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        normal = nnx.initializers.truncated_normal(0.02)  # ViT's, whatever `init_std` is
        patches = (size_px // patch_px) ** 2
        self.patch_px, self.compute = patch_px, compute
        self.patches = Dense(
            patch_px * patch_px * 3, width, std=init_std, dtype=compute.dtype, rngs=rngs
        )
        self.cls = nnx.Param(normal(rngs.params(), (1, 1, width), jnp.float32))
        places = nnx.initializers.truncated_normal(position_std)
        self.positions = nnx.Param(places(rngs.params(), (1, patches + 1, width), jnp.float32))
        self.blocks = stack(
            lambda r: VisionBlock(
                width, heads, mlp_width, eps=layer_norm_eps, std=init_std, compute=compute, rngs=r
            ),
            depth,
            rngs,
        )
        self.norm = LayerNorm(width, eps=layer_norm_eps, dtype=compute.dtype, rngs=rngs)

    @jax.named_scope("image")
    def __call__(
        self, images: Float[Array, "images side side 3"]
    ) -> Float[Array, "images tokens width"]:
        x = self.patches(cut_patches(images.astype(self.compute.dtype), self.patch_px))
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(x.dtype)
        x = scan(self.blocks, lambda block, x, _: block(x, self.compute), x, None, self.compute)
        return self.norm(x)


def cut_patches(
    images: Float[Array, "images side side 3"], patch_px: int
) -> Float[Array, "images patches values"]:
    """Squares of an image in reading order, each flattened in the order row, column, channel."""
    count, side = images.shape[0], images.shape[1] // patch_px
    squares = images.reshape(count, side, patch_px, side, patch_px, 3).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(count, side * side, patch_px * patch_px * 3)
