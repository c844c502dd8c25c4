"""What every tower is made of: dense layers, the feed-forward part, dropout, and blocks stacked for one scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

REMAT = ("none", "blocks", "dots")


class Compute(NamedTuple):
    """How a tower computes: nothing here changes what it computes."""

    dtype: Any  # of matrix products; parameters, softmax and layer normalisation's sums stay float32
    remat: str  # what the backward pass recomputes: "none", whole "blocks", or all but matrix products ("dots")
    unroll: int  # blocks a scan iteration holds
    attention: str | None  # jax.nn.dot_product_attention's implementation


def dense(
    inputs: int | tuple[int, ...], outputs: int | tuple[int, ...], *, std: float, dtype: Any, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """A dense layer over the last axes, weights from a truncated normal, biases zero (BERT, ViT)."""
    axes = tuple(range(-len(inputs), 0)) if isinstance(inputs, tuple) else -1
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=axes,
        dtype=dtype,
        kernel_init=nnx.initializers.truncated_normal(std),
        rngs=rngs,
    )


def layer_norm(width: int, *, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation as BERT's and ViT's: the variance in two passes, in float32."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


class FeedForward(nnx.Module):
    """Two dense layers around an exact GELU, four times as wide inside."""

    def __init__(self, width: int, *, std: float, dtype: Any, rngs: nnx.Rngs) -> None:
        self.up = dense(width, 4 * width, std=std, dtype=dtype, rngs=rngs)
        self.down = dense(4 * width, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*some width"]) -> Float[Array, "*some width"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


def dropout(x: Float[Array, "*some"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*some"]:
    """Drops a share `rate` of the entries and scales the rest; without a key it changes nothing."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` blocks as one, every parameter with a leading axis over the blocks."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))


def scan(
    blocks: nnx.Module, apply: Callable[[Any, Array, Any], Array], x: Array, per_block: Any, compute: Compute
) -> Array:
    """Sends `x` through stacked blocks one after another; `per_block` has a leading axis over them too.

    Compile time does not grow with depth, and the memory of the backward pass follows `compute.remat`.
    """
    graph, parameters = nnx.split(blocks)

    def body(x: Array, block: Any) -> tuple[Array, None]:
        own, extra = block
        return apply(nnx.merge(graph, own), x, extra), None

    if compute.remat == "blocks":
        body = jax.checkpoint(body, prevent_cse=False)
    elif compute.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    elif compute.remat != "none":
        raise ValueError(f'model.remat="{compute.remat}" is not one of {", ".join(REMAT)}.')
    return jax.lax.scan(body, x, (parameters, per_block), unroll=compute.unroll)[0]


def keys_of(key: Key[Array, ""] | None, count: int) -> Key[Array, "count"] | None:
    """`count` keys from one; None from None."""
    return None if key is None else jax.random.split(key, count)
