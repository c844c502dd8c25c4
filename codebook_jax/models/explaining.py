"""Where in a picture the fusion encoder finds a text: Grad-CAM of its cross-attention.

Source: Selvaraju et al. 2017; Li et al. 2021, 4.5 and appendix, whose map of a token is
mean over heads of attention x max(0, d matching score / d attention).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from codebook_jax.models.bert import FusionBlock, FusionEncoder, States
from codebook_jax.models.codis import MATCH, Model

LAYER = 2  # the third, of six (ALBEF): later ones look at few patches

Weights = Float[Array, "pairs heads tokens patches"]


def layer_of(fusion_depth: int) -> int:
    """The fusion layer whose attention is shown: the third, or the one in the middle of fewer."""
    return min(LAYER, (fusion_depth - 1) // 2)


def relevance(
    model: Model,
    student: PyTree,
    image_tokens: Float[Array, "pairs patches_and_cls width"],
    text_states: States,
    lengths: Int[Array, " pairs"],
    *,
    layer: int,
) -> Float[Array, "pairs tokens patches"]:
    """How much each patch speaks for the match of image i and text i through each of the text's
    tokens; padding gets 0. [CLS] of the image is left out.
    """
    fusion = model.towers(student["towers"]).fusion
    shape = image_tokens.shape[0], _heads(fusion), text_states.shape[1], image_tokens.shape[1]

    def score(change: Weights) -> tuple[Float[Array, ""], Weights]:
        """The sum of the matching scores, with a layer's attention changed; and that attention."""
        states, weights = text_states, None
        for number, block in enumerate(_blocks(fusion)):
            chosen = number == layer
            states, found = _through(
                block, states, lengths, image_tokens, change if chosen else None
            )
            weights = found if chosen else weights
        logits = model.match_logits(student["matching"], states[:, 0])
        return logits[:, MATCH].sum(), weights

    slope, weights = jax.grad(score, has_aux=True)(jnp.zeros(shape, jnp.float32))
    found = (weights * jnp.maximum(slope, 0)).mean(axis=1)[:, :, 1:]
    here = jnp.arange(found.shape[1]) < lengths[:, None]
    return jnp.where(here[:, :, None], found, 0)


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
    logits = jnp.einsum("pthd,pshd->phts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(query.shape[-1]))
    used = weights if change is None else weights + change
    looked = jnp.einsum("phts,pshd->pthd", used.astype(value.dtype), value)
    rows = block.cross_norm(rows + block.cross.out(looked))
    return block.mlp_norm(rows + block.mlp(rows)), weights


def _blocks(fusion: FusionEncoder) -> list[FusionBlock]:
    graph, state = nnx.split(fusion.blocks)
    parameters = nnx.to_pure_dict(state)
    return [
        nnx.merge(graph, nnx.State(jax.tree.map(lambda x: x[number], parameters)))  # noqa: B023
        for number in range(fusion.depth)
    ]


def _heads(fusion: FusionEncoder) -> int:
    return fusion.blocks.cross.query.kernel.shape[-2]
