"""The pieces of every tower: dense layers, feed-forward, attention, dropout, blocks stacked for one
scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from codebook_jax.method.numerics import default_types, wide_enough
from codebook_jax.parallel import sharding

Block = TypeVar("Block", bound=nnx.Module)
Queries = Float[Array, "batch queries heads head_width"]
Keys = Float[Array, "batch keys heads head_width"]
Some = Float[Array, "*some"]


class Compute(NamedTuple):
    """How a tower computes: nothing here changes what it computes."""

    dtype: jnp.dtype  # of matrix products; parameters, softmax and normalisations stay float32
    remat: str  # what is computed again: "none", "blocks", or all but matrix products ("dots")
    unroll: int  # blocks per scan iteration, if nothing is recomputed
    attention: str | None  # jax.nn.dot_product_attention's implementation
    mesh: jax.sharding.Mesh | None  # that parameters and rows are split over


class Dense(nnx.Module):
    """A dense layer from the last axes to new ones; biases are zero at first (BERT, ViT)."""

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        std: float | Some,  # an array broadcasts to the kernel
        dtype: DTypeLike | None,  # None: that of its input, at least float32
        rngs: nnx.Rngs,
    ) -> None:
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        self.dtype = dtype
        self.kernel = normal_param((*self.inputs, *outputs), std=std, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(
        self, x: Float[Array, "*some_and_inputs"], activation: Callable[[Some], Some] | None = None
    ) -> Float[Array, "*some_and_outputs"]:
        """The layer of `x`, or of `activation(x)`."""
        return self._parts(x, self.bias[...][None], activation)[0]

    def parts(self, x: Float[Array, "*some width"]) -> tuple[Array, ...]:
        """The layer of `x` along its first output axis, by a product each: an array of all of them
        would be cut and copied, and no `tensor` axis could split the heads of it.
        """
        return self._parts(x, self.bias[...])

    def _parts(
        self, x: Array, biases: Array, activation: Callable[[Some], Some] | None = None
    ) -> tuple[Array, ...]:
        """One for each of the biases, along their first axis."""
        dtype = self.dtype or wide_enough(x.dtype)
        rows = x.reshape(-1, math.prod(self.inputs)).astype(dtype)
        products = functools.partial(_products, len(biases))
        if activation:  # computing it again is cheap, memory not
            products = jax.checkpoint(
                lambda x, kernel: _products(len(biases), activation(x), kernel), prevent_cse=False
            )
        shape = *x.shape[: x.ndim - len(self.inputs)], *biases.shape[1:]
        found = zip(products(rows, self.kernel[...]), biases.astype(dtype), strict=True)
        return tuple((y + bias.ravel()).reshape(shape) for y, bias in found)


def normal_param(shape: tuple[int, ...], *, std: float | Some, rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter drawn from a truncated normal."""
    normal = nnx.initializers.truncated_normal(1.0)
    return nnx.Param(std * normal(rngs.params(), shape, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(
    parts: int, rows: Float[Array, "rows width"], kernel: Float[Array, "*width_and_outputs"]
) -> tuple[Array, ...]:
    """rows @ each part of the kernel. On a CPU, XLA's own backward pass transposes an operand, at
    half the speed; and it would keep a copy of the kernel in the type and shape of the products.
    """
    return tuple(rows @ part for part in _parts_of(kernel, parts, rows))


def _parts_of(kernel: Array, parts: int, rows: Array) -> list[Float[Array, "width outputs"]]:
    of_each = kernel.reshape(rows.shape[1], parts, -1).astype(rows.dtype)
    return [of_each[:, part] for part in range(parts)]


def _products_forward(
    parts: int, rows: Array, kernel: Array
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    return _products(parts, rows, kernel), (rows, kernel)


def _products_backward(
    parts: int, kept: tuple[Array, Array], gradients: tuple[Array, ...]
) -> tuple[Array, Array]:
    (rows, kernel), product = kept, jax.lax.dot_general
    each = zip(gradients, _parts_of(kernel, parts, rows), strict=True)
    to_rows = [product(gradient, part, (((1,), (1,)), ((), ()))) for gradient, part in each]
    to_kernel = [product(rows, gradient, (((0,), (0,)), ((), ()))) for gradient in gradients]
    to_kernel = jnp.stack(to_kernel, axis=1).reshape(kernel.shape)
    return sum(to_rows), to_kernel.astype(kernel.dtype)


_products.defvjp(_products_forward, _products_backward)


def gelu(x: Some) -> Some:
    """The exact GELU, by erf as in PyTorch (jax.nn's erfc is slow on a CPU)."""
    if x.dtype == jnp.bfloat16:  # 1 + erf would lose all digits for negative x
        return _gelu_of_bfloat16(x)
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def _gelu_of_bfloat16(x: Some) -> Some:
    wide, size = x.astype(jnp.float32), jnp.abs(x).astype(jnp.float32)
    root, ratio = _upper_tail(size)
    return (jnp.maximum(wide, 0) - root * (size * ratio * root)).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return _gelu_of_bfloat16(x), x  # all that the backward pass needs


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    size = jnp.abs(x).astype(jnp.float32)
    root, ratio = _upper_tail(size)
    slope = root * ((ratio - size * math.sqrt(0.5 / math.pi)) * root)  # at -size
    slope = jnp.where(x < 0, slope, 1 - slope)  # both slopes add up to 1
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu_of_bfloat16.defvjp(_gelu_forward, _gelu_backward)

# Abramowitz & Stegun 26.2.17 with one more power, and coefficients of our own that minimise the
# largest relative error over 0..16: 5e-6, a hundredth of bfloat16's rounding.
_TAIL_SCALE = 0.31
_TAIL = (0.12386133, 0.12043419, 0.13345889, 0.015689409, 0.18049944, -0.073945604)


def _upper_tail(x: Some) -> tuple[Some, Some]:
    """(root, ratio) with P(normal > x) = ratio root^2 for x >= 0; root^2 may be no float32."""
    t = 1 / (1 + _TAIL_SCALE * x)
    ratio = jnp.zeros_like(x)
    for coefficient in reversed(_TAIL):
        ratio = (ratio + coefficient) * t
    return jnp.exp(-0.25 * x * x), ratio


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation as in BERT and ViT: the variance in two passes, in float32."""

    def __init__(
        self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs, *, width: int | None = None
    ) -> None:
        options = dict(epsilon=spec.layer_norm_eps, dtype=compute.dtype)
        super().__init__(width or spec.width, **options, rngs=rngs)

    def __call__(self, x: Float[Array, "*some width"]) -> Float[Array, "*some width"]:
        return _normalised(x.astype(self.dtype), self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalised(x: Some, scale: Array, bias: Array, epsilon: float) -> Some:
    return _normalised_forward(x, scale, bias, epsilon)[0]


def _normalised_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(wide_enough(x.dtype))
    mean = wide.mean(axis=-1)
    centred = wide - mean[..., None]
    rate = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1) + epsilon)
    y = centred * (rate[..., None] * scale) + bias
    # Of autodiff's own choice, the backward pass would keep three arrays like x in float32.
    return y.astype(x.dtype), (x, mean, rate, scale)


def _normalised_backward(
    epsilon: float, kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
    x, mean, rate, scale = kept
    gradient, rate = gradient.astype(rate.dtype), rate[..., None]
    unit = (x.astype(rate.dtype) - mean[..., None]) * rate
    scaled = gradient * scale
    along = (scaled * unit).mean(axis=-1, keepdims=True)
    to_x = rate * (scaled - scaled.mean(axis=-1, keepdims=True) - unit * along)
    rows = tuple(range(x.ndim - 1))
    to_scale, to_bias = (gradient * unit).sum(axis=rows), gradient.sum(axis=rows)
    return to_x.astype(x.dtype), to_scale.astype(scale.dtype), to_bias.astype(scale.dtype)


_normalised.defvjp(_normalised_forward, _normalised_backward)


class FeedForward(nnx.Module):
    """Two dense layers around an exact GELU; `mlp_width` 0 is four times the width."""

    def __init__(self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs) -> None:
        inner = spec.mlp_width or 4 * spec.width
        common = dict(std=spec.init_std, dtype=compute.dtype, rngs=rngs)
        self.up = Dense(spec.width, inner, **common)
        self.down = Dense(inner, spec.width, **common)

    def __call__(self, x: Float[Array, "*some width"]) -> Float[Array, "*some width"]:
        return self.down(self.up(x), activation=gelu)


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence over itself (Vaswani et al., 2017); padding is masked.

    `value_std` is of the initial value and output weights.
    """

    def __init__(
        self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs, *, value_std: float
    ) -> None:
        heads, common = (spec.heads, spec.width // spec.heads), dict(dtype=compute.dtype, rngs=rngs)
        stds = jnp.array([spec.init_std, spec.init_std, value_std], jnp.float32)[:, None, None]
        self.qkv = Dense(spec.width, (3, *heads), std=stds, **common)
        self.out = Dense(heads, spec.width, std=value_std, **common)
        self.compute = compute

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        lengths: Int[Array, " batch"] | None,
        *,
        causal: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """With `causal`, no token sees those after it."""
        return self.out(_attended(*self.qkv.parts(x), lengths, self.compute, causal=causal))


class CrossAttention(nnx.Module):
    """Attention of texts over an image, whose `key_value.parts` are computed once for all texts; an
    `image_width` of None is for one that is given the keys and values of another.
    """

    def __init__(
        self, spec: ConfigDict, image_width: int | None, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        heads = spec.heads, spec.width // spec.heads
        common = dict(std=spec.init_std, dtype=compute.dtype, rngs=rngs)
        self.query = Dense(spec.width, heads, **common)
        if image_width is not None:
            self.key_value = Dense(image_width, (2, *heads), **common)
        self.out = Dense(heads, spec.width, **common)
        self.compute = compute

    def __call__(
        self,
        x: Float[Array, "images tokens width"],
        keys_values: tuple[Keys, Keys],
        lengths: Int[Array, " images"] | None = None,
    ) -> Float[Array, "images tokens width"]:
        """`tokens` may be of several texts in sequence: queries do not see each other. `lengths`
        counts the keys before the padding; None: there is none.
        """
        return self.out(_attended(self.query(x), *keys_values, lengths, self.compute))


def _attended(
    query: Queries,
    key: Keys,
    value: Keys,
    lengths: Int[Array, " batch"] | None,
    compute: Compute,
    *,
    causal: bool = False,
) -> Queries:
    tokens, seen = query.shape[1], key.shape[1]
    if compute.attention == "cudnn":  # which trains on even lengths alone
        if seen % 2 and lengths is None:
            lengths = jnp.full(len(key), seen, jnp.int32)
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
        )
    options = dict(key_value_seq_lengths=lengths, is_causal=causal)
    options["implementation"] = compute.attention
    # The softmax's own derivative keeps one array of weights, not two.
    with default_types(query.dtype), jax.softmax_custom_jvp(True):
        return jax.nn.dot_product_attention(query, key, value, **options)[:, :tokens]


def dropout(x: Some, rate: float, key: Key[Array, ""] | None) -> Some:
    """Drops a share `rate` of the entries and scales the rest; without a key it changes nothing."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def stack(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one module, whose parameters have a leading axis over the blocks."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))


def scan(
    blocks: Block,
    apply: Callable[[Block, Array, Key[Array, ""] | None], Array],
    x: Some,
    keys: Key[Array, " blocks"] | None,
    compute: Compute,
) -> Some:
    """Sends `x` through stacked blocks one after another, each with its key."""
    graph, state = nnx.split(blocks)

    def body(x: Array, block: tuple[PyTree, Key[Array, ""] | None]) -> tuple[Array, None]:
        parameters, key = block
        own = sharding.gathered(parameters, compute.mesh, in_blocks=True)
        rows = sharding.by_rows(x, compute.mesh)
        return apply(nnx.merge(graph, nnx.State(own)), rows, key), None

    unroll = compute.unroll
    if compute.remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if compute.remat == "dots" else None
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        unroll = 1  # in one iteration, XLA would merge the recomputation with the computation
    return jax.lax.scan(body, x, (nnx.to_pure_dict(state), keys), unroll=unroll)[0]


def keys_of(key: Key[Array, ""] | None, count: int) -> tuple[Key[Array, ""] | None, ...]:
    """`count` keys from one; as many None from None."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
