"""Where in a picture the fusion encoder finds a text: Grad-CAM of its cross-attention.

Source: Selvaraju et al. 2017; Li et al. 2021, 4.5 and appendix, whose map of a token is
mean over heads of attention x max(0, d matching score / d attention).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, UInt8

from codebook_jax.method.numerics import wide_enough
from codebook_jax.models.bert import FusionBlock, FusionEncoder, States
from codebook_jax.models.codis import MATCH, Model
from codebook_jax.parallel import sharding

LAYER = 2  # the third, of six (ALBEF): later ones look at few patches

Weights = Float[Array, "pairs heads tokens patches_and_cls"]


class Relevance(NamedTuple):
    """What speaks for the match of image i and text i."""

    maps: Float[Array, "pairs tokens patches"]  # padding has 0; [CLS] of the image is left out
    logits: Float[Array, "pairs 2"]  # of matching


def layer_of(fusion_depth: int) -> int:
    """The fusion layer whose attention is shown: the third, or the one in the middle of fewer."""
    return min(LAYER, (fusion_depth - 1) // 2)


def explain_pairs(
    model: Model,
    student: PyTree,
    images: UInt8[Array, "pairs side side 3"],
    tokens: Int[Array, "pairs tokens"],
    lengths: Int[Array, " pairs"],
) -> Relevance:
    """`relevance` of pictures for texts, in the layer of `layer_of`."""
    towers = model.towers(student["towers"])
    _, image_tokens = towers.embed_images(model.pixels(images))
    _, states = towers.embed_texts(tokens, lengths)
    layer = layer_of(towers.fusion.depth)
    return relevance(model, student, image_tokens, states, lengths, layer=layer)


def relevance(
    model: Model,
    student: PyTree,
    image_tokens: Float[Array, "pairs patches_and_cls width"],
    text_states: States,
    lengths: Int[Array, " pairs"],
    *,
    layer: int,
) -> Relevance:
    """How much each patch speaks, in a fusion layer, for the match of image i and text i through
    each of the text's tokens.
    """
    fusion = model.towers(student["towers"]).fusion
    heads = fusion.blocks.cross.query.kernel.shape[-2]
    shape = image_tokens.shape[0], heads, text_states.shape[1], image_tokens.shape[1]

    def score(change: Weights) -> tuple[Float[Array, ""], tuple[Weights, Float[Array, "pairs 2"]]]:
        """The sum of the matching scores, with the layer's attention changed; that attention."""
        states, weights = text_states, None
        for number, block in enumerate(_blocks(fusion)):
            chosen = number == layer
            states, found = _through(
                block, states, lengths, image_tokens, change if chosen else None
            )
            weights = found if chosen else weights
        logits = model.match_logits(student["matching"], states[:, 0])
        return logits[:, MATCH].sum(), (weights, logits)

    nothing = jnp.zeros(shape, wide_enough(text_states.dtype))
    slope, (weights, logits) = jax.grad(score, has_aux=True)(nothing)
    found = (weights * jnp.maximum(slope, 0)).mean(axis=1)[:, :, 1:]
    here = jnp.arange(found.shape[1]) < lengths[:, None]
    return Relevance(jnp.where(here[:, :, None], found, 0), logits)


def _through(
    block: FusionBlock,
    x: States,
    lengths: Int[Array, " pairs"],
    image_tokens: Float[Array, "pairs patches_and_cls width"],
    change: Weights | None,
) -> tuple[States, Weights]:
    """A fusion block with explicit attention to the image, to which `change` is added."""
    rows = block.attention_norm(x + block.attention(x, lengths))
    query = block.cross.query(rows)
    key, value = block.cross.key_value.parts(image_tokens)
    wide = wide_enough(query.dtype)
    logits = jnp.einsum("pthd,pshd->phts", query, key, preferred_element_type=wide)
    weights = jax.nn.softmax(logits / math.sqrt(query.shape[-1]))
    used = weights if change is None else weights + change
    looked = jnp.einsum("phts,pshd->pthd", used.astype(value.dtype), value)
    rows = block.cross_norm(rows + block.cross.out(looked))
    return block.mlp_norm(rows + block.mlp(rows)), weights


def _blocks(fusion: FusionEncoder) -> list[FusionBlock]:
    """The fusion blocks, which are one module with stacked parameters."""
    graph, state = nnx.split(fusion.blocks)
    blocks = []
    for number in range(fusion.depth):
        own = jax.tree.map(lambda x: x[number], nnx.to_pure_dict(state))  # noqa: B023
        own = sharding.gathered(own, fusion.compute.mesh, in_blocks=True)
        blocks.append(nnx.merge(graph, nnx.State(own)))
    return blocks
