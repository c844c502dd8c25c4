"""Keeps JAX's settings (JAX_ENABLE_X64, JAX_DEFAULT_PRNG_IMPL, ...) from changing draws and other
libraries' types.

Our own code states its types, so float64 inputs are computed in float64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

# Stands for minus infinity where a softmax must leave something out: it keeps gradients finite.
NEVER = -1e30


def key_of(seed: int) -> Key[jax.Array, ""]:
    """The threefry key of a seed's last 32 bits, which are all that JAX uses."""
    return jax.random.key(np.uint32(seed % 2**32), impl="threefry2x32")


def wide_enough(*dtypes: DTypeLike) -> jnp.dtype:
    """The type that holds all of these, at least float32, whatever JAX may promote."""
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def unit(x: Float[Array, "*some dim"]) -> Float[Array, "*some dim"]:
    """x / max(|x|, 1e-12): rows of length one, in at least float32.

    Zeros stay, with a finite gradient. Source: ours, with the floor of PyTorch's `normalize`.

    >>> print(unit(jnp.array([[0.0, 4.0], [0.0, 0.0]])))
    [[0. 1.]
     [0. 0.]]
    """
    x = x.astype(wide_enough(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def unit_of_any(x: Float[Array, "*some dim"]) -> Float[Array, "*some dim"]:
    """`unit` of rows as large or as small as floats can be, whose squares they cannot hold."""
    x = x.astype(wide_enough(x.dtype))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return unit(x / jnp.where(largest > 0, largest, 1))


def require(usable: bool, sentence: str) -> None:
    """Raises ValueError with the sentence, which says what was given and what is needed."""
    if not usable:
        raise ValueError(sentence)


def at_least_once(iterations: int) -> None:
    require(iterations >= 1, f"iterations={iterations} must be 1 or more")


def own_settings(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program`, traced alike whatever JAX's threefry and rank-promotion settings are."""

    @functools.wraps(program)
    def traced(*arguments: Any) -> Any:
        with jax.threefry_partitionable(True), jax.numpy_rank_promotion("allow"):
            return program(*arguments)

    return traced


@contextlib.contextmanager
def default_types(dtype: DTypeLike = jnp.float32) -> Iterator[None]:
    """Inside, other libraries compute in their default types, float64 only if `dtype` is."""
    wide = jnp.dtype(dtype) == jnp.float64
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"):
        yield
