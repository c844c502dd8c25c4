"""The codebook as a module for NNX, and as a pair of functions for plain trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from codebook_jax.method.numerics import require, unit
from codebook_jax.method.objective import CodebookAux, Features, codebook_alignment


class CodebookAlignment(nnx.Module):
    """A learnable codebook, whose call is `codebook_alignment`; `options` are its own.

    `codes` starts as `init_codes` has it; options of a call replace those of the module. Raises
    ValueError as these two functions do. Source: Duan et al. 2022, 3.1.

    >>> align = CodebookAlignment(codes=16, dim=4, rngs=nnx.Rngs(0))
    >>> loss, aux = align({"audio": jnp.eye(4), "text": jnp.eye(4)})
    >>> aux.assignments["text"].shape
    (4, 16)
    """

    def __init__(self, *, codes: int, dim: int, rngs: nnx.Rngs, **options: Any) -> None:
        self.codes = nnx.Param(init_codes(rngs.params(), codes, dim))
        self.options = options

    def __call__(self, student: Features, **options: Any) -> tuple[Float[Array, ""], CodebookAux]:
        return codebook_alignment(student, self.codes[...], **{**self.options, **options})


class Functions(NamedTuple):
    """`init(key) -> parameters` and `apply(parameters, student, ...) -> (loss, aux)`."""

    init: Callable[[Key[Array, ""]], dict[str, Array]]
    apply: Callable[..., tuple[Float[Array, ""], CodebookAux]]


def codebook_functions(*, codes: int, dim: int, **options: Any) -> Functions:
    """`CodebookAlignment` for parameters kept in plain trees, as with optax alone.

    Raises ValueError as it does. Source: Duan et al. 2022, 3.1.

    >>> init, apply = codebook_functions(codes=16, dim=4)
    >>> parameters = init(jax.random.key(0))
    >>> loss, aux = apply(parameters, {"audio": jnp.eye(4), "text": jnp.eye(4)})
    >>> aux.assignments["text"].shape
    (4, 16)
    """

    def apply(
        parameters: dict[str, Array], student: Features, **own: Any
    ) -> tuple[Float[Array, ""], CodebookAux]:
        return codebook_alignment(student, parameters["codes"], **{**options, **own})

    return Functions(lambda key: {"codes": init_codes(key, codes, dim)}, apply)


def init_codes(key: Key[Array, ""], codes: int, dim: int) -> Float[Array, "codes dim"]:
    """Unit vectors in random directions, float32.

    Raises ValueError unless `codes` and `dim` are at least 1. Source: ours.

    >>> codes = init_codes(jax.random.key(0), codes=2, dim=3)
    >>> print(jnp.linalg.norm(codes, axis=1).round())
    [1. 1.]
    """
    require(codes >= 1 and dim >= 1, f"codes={codes} and dim={dim} must be 1 or more")
    return unit(jax.random.normal(key, (codes, dim), jnp.float32))
