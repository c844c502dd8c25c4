"""The text encoder and the fusion encoder: the first and the last layers of a BERT (Devlin et al.,
2019), post-norm.

The fusion layers have cross-attention to the image tokens between self-attention and feed-forward,
as ALBEF's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from codebook_jax.models.attention import CrossAttention, SelfAttention
from codebook_jax.models.layers import (
    Compute,
    FeedForward,
    LayerNorm,
    dropout,
    keys_of,
    scan,
    stack,
)


class Negatives(NamedTuple):
    """Which image the last text of each row attends to, by its place in the row's group."""

    row: Int[Array, "images"]  # 0 ... images / groups - 1
    groups: int


class TextBlock(nnx.Module):
    """Self-attention and feed-forward, each added to its input and normalised afterwards."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        eps: float,
        std: float,
        value_std: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        of = dict(dtype=compute.dtype, rngs=rngs)
        self.attention = SelfAttention(width, heads, std=std, value_std=value_std, **of)
        self.attention_norm = LayerNorm(width, eps=eps, **of)
        self.mlp = FeedForward(width, mlp_width, std=std, **of)
        self.mlp_norm = LayerNorm(width, eps=eps, **of)

    def __call__(
        self,
        x: Float[Array, "texts tokens width"],
        lengths: Int[Array, "texts"],
        *,
        rate: float,
        key: Key[Array, ""] | None,
        compute: Compute,
    ) -> Float[Array, "texts tokens width"]:
        key = keys_of(key, 2)
        attended = self.attention(x, lengths, implementation=compute.attention)
        x = self.attention_norm(x + dropout(attended, rate, _at(key, 0)))
        return self.mlp_norm(x + dropout(self.mlp(x), rate, _at(key, 1)))


class FusionBlock(TextBlock):
    """A text block that also attends to the image, before its feed-forward."""

    def __init__(
        self,
        width: int,
        image_width: int,
        heads: int,
        mlp_width: int,
        *,
        eps: float,
        std: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            width, heads, mlp_width, eps=eps, std=std, value_std=std, compute=compute, rngs=rngs
        )
        of = dict(dtype=compute.dtype, rngs=rngs)
        self.cross = CrossAttention(width, image_width, heads, std=std, **of)
        self.cross_norm = LayerNorm(width, eps=eps, **of)

    def __call__(
        self,
        x: Float[Array, "images texts tokens width"],
        lengths: Int[Array, "images texts"],
        image_tokens: Float[Array, "images patches image_width"],
        negatives: Negatives | None,
        *,
        rate: float,
        key: Key[Array, ""] | None,
        compute: Compute,
    ) -> Float[Array, "images texts tokens width"]:
        key = keys_of(key, 3)
        images, texts, tokens, width = x.shape
        # Everything but the cross-attention sees plain rows of text.
        rows = x.reshape(images * texts, tokens, width)
        attended = self.attention(rows, lengths.reshape(-1), implementation=compute.attention)
        rows = self.attention_norm(rows + dropout(attended, rate, _at(key, 0)))
        looked = self.look(rows.reshape(x.shape), image_tokens, negatives, compute=compute)
        rows = self.cross_norm(rows + dropout(looked.reshape(rows.shape), rate, _at(key, 1)))
        rows = self.mlp_norm(rows + dropout(self.mlp(rows), rate, _at(key, 2)))
        return rows.reshape(x.shape)

    def look(
        self,
        x: Float[Array, "images texts tokens width"],
        image_tokens: Float[Array, "images patches image_width"],
        negatives: Negatives | None,
        *,
        compute: Compute,
    ) -> Float[Array, "images texts tokens width"]:
        """Cross-attention of each row's texts to its image; with negatives, of the last text to its
        negative image.

        Keys and values of an image are computed once, and gathered for the negatives.
        """
        keys_values = self.cross.keys_values(image_tokens)
        own = x if negatives is None else x[:, :-1]
        images, texts, tokens, width = own.shape
        looked = self.cross(
            own.reshape(images, texts * tokens, width),
            keys_values,
            implementation=compute.attention,
        ).reshape(own.shape)
        if negatives is None:
            return looked
        other = self.cross(
            x[:, -1],
            gather_in_groups(keys_values, negatives.row, negatives.groups),
            implementation=compute.attention,
        )
        return jnp.concatenate([looked, other[:, None]], axis=1)


class TextEncoder(nnx.Module):
    """BERT's embeddings and first layers: one state per token."""

    def __init__(
        self,
        *,
        vocabulary_size: int,
        max_positions: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        layer_norm_eps: float,
        dropout: float,
        init_std: float,
        value_std: float,
        embedding_std: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        normal = nnx.initializers.truncated_normal(embedding_std)
        self.words = nnx.Param(normal(rngs.params(), (vocabulary_size, width), jnp.float32))
        self.positions = nnx.Param(normal(rngs.params(), (max_positions, width), jnp.float32))
        self.segment = nnx.Param(
            normal(rngs.params(), (2, width), jnp.float32)
        )  # row 0 is used, as in ALBEF
        self.norm = LayerNorm(width, eps=layer_norm_eps, dtype=compute.dtype, rngs=rngs)
        self.blocks = stack(
            lambda r: TextBlock(
                width,
                heads,
                mlp_width,
                eps=layer_norm_eps,
                std=init_std,
                value_std=value_std,
                compute=compute,
                rngs=r,
            ),
            depth,
            rngs,
        )
        self.depth, self.dropout, self.compute = depth, dropout, compute

    @jax.named_scope("text")
    def __call__(
        self,
        tokens: Int[Array, "texts tokens"],
        lengths: Int[Array, "texts"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "texts tokens width"]:
        """The states of each text's tokens; with a `key`, hidden states are dropped out."""
        keys = keys_of(key, self.depth + 1)
        x = self.words[...][tokens] + self.positions[...][: tokens.shape[1]] + self.segment[...][0]
        x = dropout(self.norm(x), self.dropout, _at(keys, self.depth))

        def apply(block: TextBlock, x: Array, key: Key[Array, ""] | None) -> Array:
            return block(x, lengths, rate=self.dropout, key=key, compute=self.compute)

        per_block = None if keys is None else keys[: self.depth]
        return scan(self.blocks, apply, x, per_block, self.compute)


class FusionEncoder(nnx.Module):
    """BERT's last layers, which attend to the image: text states to states of the pair (Duan et al.
    2022, 3).
    """

    def __init__(
        self,
        *,
        width: int,
        image_width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        layer_norm_eps: float,
        dropout: float,
        init_std: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        self.blocks = stack(
            lambda r: FusionBlock(
                width,
                image_width,
                heads,
                mlp_width,
                eps=layer_norm_eps,
                std=init_std,
                compute=compute,
                rngs=r,
            ),
            depth,
            rngs,
        )
        self.depth, self.dropout, self.compute = depth, dropout, compute

    @jax.named_scope("fusion")
    def __call__(
        self,
        text_states: Float[Array, "images texts tokens width"],
        lengths: Int[Array, "images texts"],
        image_tokens: Float[Array, "images patches image_width"],
        *,
        negatives: Negatives | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "images texts tokens width"]:
        """States of every pair of an image with one of its row's texts; token 0 stands for the
        pair.

        With `negatives`, the last text of each row attends to its negative image instead.
        """

        def apply(block: FusionBlock, x: Array, key: Key[Array, ""] | None) -> Array:
            return block(
                x,
                lengths,
                image_tokens,
                negatives,
                rate=self.dropout,
                key=key,
                compute=self.compute,
            )

        per_block = keys_of(key, self.depth)
        return scan(self.blocks, apply, text_states, per_block, self.compute)


def gather_in_groups(
    x: Shaped[Array, "rows *some"], row: Int[Array, "rows"], groups: int
) -> Shaped[Array, "rows *some"]:
    """Row `row[i]` of i's group for every i: the rows are `groups` equal contiguous parts, so none
    crosses a shard.
    """
    grouped = x.reshape(groups, -1, *x.shape[1:])
    return jax.vmap(lambda part, at: part[at])(grouped, row.reshape(groups, -1)).reshape(x.shape)


def _at(keys: Key[Array, "count"] | None, place: int) -> Key[Array, ""] | None:
    return None if keys is None else keys[place]
