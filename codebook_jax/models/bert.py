"""The text and fusion encoders: the first and last layers of a post-norm BERT (Devlin et al. 2019).

The fusion layers have cross-attention to the image tokens before the feed-forward, as ALBEF's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped
from ml_collections import ConfigDict

from codebook_jax.method.numerics import wide_enough
from codebook_jax.models.layers import (
    Compute,
    CrossAttention,
    FeedForward,
    Keys,
    LayerNorm,
    SelfAttention,
    dropout,
    keys_of,
    normal_param,
    scan,
    stack,
)

States = Float[Array, "texts tokens width"]
PairStates = Float[Array, "images texts tokens width"]
DropoutKey = Key[Array, ""] | None  # None: nothing is dropped


class Negatives(NamedTuple):
    """Which image the last text of each row attends to, by its place in the row's group."""

    row: Int[Array, " images"]  # 0 ... images / groups - 1
    groups: int


class Seen(NamedTuple):
    """What the texts of each row attend to."""

    keys_values: tuple[Keys, Keys]
    lengths: Int[Array, " images"] | None = None  # of the keys before the padding; None: all
    negatives: Negatives | None = None  # of the last text of each row


class TextBlock(nnx.Module):
    """Self-attention and feed-forward, each added to its input and normalised afterwards."""

    def __init__(
        self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs, *, value_std: float
    ) -> None:
        self.attention = SelfAttention(spec, compute, rngs, value_std=value_std)
        self.attention_norm = LayerNorm(spec, compute, rngs)
        self.mlp = FeedForward(spec, compute, rngs)
        self.mlp_norm = LayerNorm(spec, compute, rngs)
        self.dropout = spec.dropout

    def __call__(self, x: States, lengths: Int[Array, " texts"], key: DropoutKey) -> States:
        attention_key, mlp_key = keys_of(key, 2)
        x = self.attention_norm(
            x + dropout(self.attention(x, lengths), self.dropout, attention_key)
        )
        return self.mlp_norm(x + dropout(self.mlp(x), self.dropout, mlp_key))


class FusionBlock(TextBlock):
    """A text block that also attends to the image, before its feed-forward; an `image_width` of
    None is for one that is given the keys and values of another.
    """

    def __init__(
        self, spec: ConfigDict, image_width: int | None, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        super().__init__(spec, compute, rngs, value_std=spec.init_std)
        self.cross = CrossAttention(spec, image_width, compute, rngs)
        self.cross_norm = LayerNorm(spec, compute, rngs)

    def __call__(
        self, x: PairStates, lengths: Int[Array, "images texts"] | None, seen: Seen, key: DropoutKey
    ) -> PairStates:
        """Without `lengths`, tokens see those before them alone."""
        attention_key, cross_key, mlp_key = keys_of(key, 3)
        # Everything but the cross-attention sees plain rows of text.
        rows = x.reshape(-1, *x.shape[2:])
        of_rows = None if lengths is None else lengths.reshape(-1)
        attended = self.attention(rows, of_rows, causal=lengths is None)
        rows = self.attention_norm(rows + dropout(attended, self.dropout, attention_key))
        looked = self._look(rows.reshape(x.shape), seen).reshape(rows.shape)
        rows = self.cross_norm(rows + dropout(looked, self.dropout, cross_key))
        rows = self.mlp_norm(rows + dropout(self.mlp(rows), self.dropout, mlp_key))
        return rows.reshape(x.shape)

    def _look(self, x: PairStates, seen: Seen) -> PairStates:
        """Cross-attention of each row's texts to its image, the last to its negative image."""
        keys_values, lengths, negatives = seen
        own = x if negatives is None else x[:, :-1]
        looked = self.cross(own.reshape(len(own), -1, own.shape[-1]), keys_values, lengths)
        looked = looked.reshape(own.shape)
        if negatives is None:
            return looked
        others = tuple(gather_in_groups(each, *negatives) for each in keys_values)
        other = self.cross(x[:, -1], others)
        return jnp.concatenate([looked, other[:, None]], axis=1)


class TwoImageBlock(nnx.Module):
    """A fusion block for each of two images, one after the other; both project the tokens of their
    image by the same layer (Li et al. 2021, 4.4).
    """

    def __init__(
        self, spec: ConfigDict, image_width: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        self.first = FusionBlock(spec, image_width, compute, rngs)
        self.second = FusionBlock(spec, None, compute, rngs)

    def __call__(
        self,
        x: PairStates,
        lengths: Int[Array, "images texts"],
        image_tokens: Float[Array, "images 2 patches image_width"],
        key: DropoutKey,
    ) -> PairStates:
        first_key, second_key = keys_of(key, 2)
        first, second = (
            Seen(self.first.cross.key_value.parts(image_tokens[:, number])) for number in (0, 1)
        )
        return self.second(self.first(x, lengths, first, first_key), lengths, second, second_key)


class Embeddings(nnx.Module):
    """BERT's embeddings of words, positions and the first segment."""

    def __init__(
        self, spec: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        width, std = spec.width, spec.position_std or spec.embedding_std
        self.words = normal_param((vocabulary_size, width), std=spec.embedding_std, rngs=rngs)
        self.positions = normal_param((spec.max_positions, width), std=std, rngs=rngs)
        self.segment = normal_param((2, width), std=std, rngs=rngs)  # row 0 is used, as in ALBEF
        self.norm = LayerNorm(spec, compute, rngs)
        self.dropout, self.compute = spec.dropout, compute

    def embed(self, tokens: Int[Array, "*some tokens"], key: DropoutKey) -> Array:
        """A vector a token; with a `key`, dropped out."""
        x = self.words[...][tokens] + self.positions[...][: tokens.shape[-1]]
        return dropout(self.norm(x + self.segment[...][0]), self.dropout, key)


class TextEncoder(Embeddings):
    """BERT's embeddings and first layers: one state per token."""

    def __init__(
        self, spec: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        super().__init__(spec, vocabulary_size, compute, rngs)
        self.blocks = stack(
            lambda r: TextBlock(spec, compute, r, value_std=spec.value_std), spec.depth, rngs
        )
        self.depth = spec.depth

    @jax.named_scope("text")
    def __call__(
        self,
        tokens: Int[Array, "texts tokens"],
        lengths: Int[Array, " texts"],
        key: DropoutKey = None,
    ) -> States:
        """The states of each text's tokens; with a `key`, hidden states are dropped out."""
        block_keys = embedding_key = None
        if key is not None:
            keys = jax.random.split(key, self.depth + 1)
            block_keys, embedding_key = keys[: self.depth], keys[self.depth]
        x = self.embed(tokens, embedding_key)

        def apply(block: TextBlock, x: States, key: DropoutKey) -> States:
            return block(x, lengths, key)

        return scan(self.blocks, apply, x, block_keys, self.compute)


class FusionEncoder(nnx.Module):
    """BERT's last layers, which attend to the image (Duan et al. 2022, 3)."""

    def __init__(
        self, spec: ConfigDict, image_width: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        self.depth, self.compute = spec.fusion_depth, compute
        self.blocks = stack(lambda r: FusionBlock(spec, image_width, compute, r), self.depth, rngs)

    @jax.named_scope("fusion")
    def __call__(
        self,
        text_states: PairStates,
        lengths: Int[Array, "images texts"],
        image_tokens: Float[Array, "images patches image_width"],
        *,
        negatives: Negatives | None = None,
        key: DropoutKey = None,
    ) -> PairStates:
        """States of every pair of an image with a text of its row; token 0 stands for the pair.

        With `negatives`, the last text of each row attends to its negative image instead.
        """

        def apply(block: FusionBlock, x: PairStates, key: DropoutKey) -> PairStates:
            seen = Seen(block.cross.key_value.parts(image_tokens), negatives=negatives)
            return block(x, lengths, seen, key)

        block_keys = None if key is None else jax.random.split(key, self.depth)
        return scan(self.blocks, apply, text_states, block_keys, self.compute)


class TwoImageFusion(nnx.Module):
    """The fusion encoder for texts about two images, with a block for each image in every layer."""

    def __init__(
        self, spec: ConfigDict, image_width: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        self.depth, self.compute = spec.fusion_depth, compute
        make = lambda r: TwoImageBlock(spec, image_width, compute, r)  # noqa: E731
        self.blocks = stack(make, self.depth, rngs)

    @jax.named_scope("fusion")
    def __call__(
        self,
        text_states: PairStates,
        lengths: Int[Array, "images texts"],
        image_tokens: Float[Array, "images 2 patches image_width"],
        *,
        key: DropoutKey = None,
    ) -> PairStates:
        """States of every text with the two images of its row; token 0 stands for all three."""

        def apply(block: TwoImageBlock, x: PairStates, key: DropoutKey) -> PairStates:
            return block(x, lengths, image_tokens, key)

        block_keys = None if key is None else jax.random.split(key, self.depth)
        return scan(self.blocks, apply, text_states, block_keys, self.compute)


def gather_in_groups(
    x: Shaped[Array, " rows *some"], row: Int[Array, " rows"], groups: int
) -> Shaped[Array, " rows *some"]:
    """Row `row[i]` of i's group for every i, of `groups` equal contiguous groups (shards)."""
    grouped = x.reshape(groups, -1, *x.shape[1:])
    return taken(grouped, row.reshape(groups, -1)).reshape(x.shape)


def taken(
    x: Shaped[Array, "batch rows *some"], places: Int[Array, "batch picks"]
) -> Shaped[Array, "batch picks *some"]:
    """x[b, places[b, i]] for every b and i. Its gradient is a product with zeros and ones: adding
    rows one by one, a GPU would round differently each time.
    """
    differentiable = jnp.issubdtype(x.dtype, jnp.floating)
    return (_taken if differentiable else _read)(x, places, x.shape[1])


def _read(x: Array, places: Array, rows: int) -> Array:
    return jax.vmap(lambda part, at: part[at])(x, places)


_taken = jax.custom_vjp(_read, nondiff_argnums=(2,))


def _taken_forward(x: Array, places: Array, rows: int) -> tuple[Array, Array]:
    return _read(x, places, rows), places


def _taken_backward(rows: int, places: Array, gradient: Array) -> tuple[Array, None]:
    chosen = jax.nn.one_hot(places, rows, dtype=gradient.dtype)
    wide = wide_enough(gradient.dtype)
    options = dict(precision="highest", preferred_element_type=wide)
    found = jnp.einsum("bpr,bp...->br...", chosen, gradient, **options)
    return found.astype(gradient.dtype), None


_taken.defvjp(_taken_forward, _taken_backward)
