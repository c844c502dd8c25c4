"""What JAX's settings (JAX_ENABLE_X64, JAX_DEFAULT_PRNG_IMPL, ...) must not change: draws, and other libraries' types.

Our own code states its types, and so computes in float64 what it is given in float64.
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
from jaxtyping import Key


def key_of(seed: int) -> Key[jax.Array, ""]:
    """The key of a seed, of which JAX takes the last 32 bits; always threefry's."""
    return jax.random.key(np.uint32(seed % 2**32), impl="threefry2x32")


def wide_enough(*dtypes: DTypeLike) -> jnp.dtype:
    """The type that holds all of these, at least float32 (JAX's own promotion may be set to refuse)."""
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def same_draws(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program`, drawing the same numbers whether or not JAX_THREEFRY_PARTITIONABLE is set."""

    @functools.wraps(program)
    def traced(*arguments: Any) -> Any:
        with jax.threefry_partitionable(True):
            return program(*arguments)

    return traced


@contextlib.contextmanager
def default_types(dtype: DTypeLike = jnp.float32) -> Iterator[None]:
    """Inside it other libraries compute as they do by default; in float64 only what has that `dtype`."""
    wide = jnp.dtype(dtype) == jnp.float64
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"):
        yield
