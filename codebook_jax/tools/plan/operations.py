"""What a traced step computes, by part and pass: operations of its matrix products, and the least
bytes it moves.

The step names its parts (`jax.named_scope`). A loop counts once per iteration. Between products XLA
computes while it reads and writes, so only products, sums over an axis and gathers count as bytes;
attention scores are among them, which fused attention never writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.extend import core

# First match wins: a pattern in the path of names, and the name of the part.
PARTS: tuple[tuple[str, str], ...] = (
    (r"teach.*/image", "teacher, image tower"),
    (r"teach.*/text", "teacher, text encoder"),
    (r"teach.*/fusion", "teacher, fusion encoder"),
    (r"teach", "teacher, projections"),
    (r"embed.*/image", "image tower"),
    (r"embed.*/text", "text encoder"),
    (r"embed", "projections"),
    (r"pair.*/fusion", "fusion encoder"),
    (r"pair.*/words", "masked words"),
    (r"pair", "matching and its negatives"),
    (r"assign", "transport"),
    (r"compare", "alignment and codes"),
    (r"draw", "augmentation and draws"),
    (r"learn", "optimizer and teacher's average"),
    (r"", "all else"),
)
PASSES = ("forward", "backward", "recomputed")

Key = tuple[str, str]  # part, pass


class Operations(NamedTuple):
    """A multiplication and an addition are two operations."""

    products: float = 0.0  # of matrix products
    exact: float = 0.0  # those of them in full float32
    moved: float = 0.0  # bytes read and written

    def __add__(self, other: Operations) -> Operations:  # type: ignore[override]
        return Operations(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Operations:
        return Operations(*(count * a for a in self))


def count(jaxpr: core.Jaxpr, bytes_of: Callable[[Any], float]) -> dict[Key, Operations]:
    """Operations of a program by (part, pass); `bytes_of` gives the bytes of an abstract value."""
    found: dict[Key, Operations] = {}
    _count(jaxpr, "", 1, bytes_of, found)
    return found


def total(found: dict[Key, Operations]) -> Operations:
    return sum(found.values(), Operations())


def by_part(found: dict[Key, Operations]) -> dict[str, dict[str, Operations]]:
    """The same as {part: {pass: operations}}, in the order of PARTS."""
    names = [name for _, name in PARTS]
    parts: dict[str, dict[str, Operations]] = {name: {} for name in names}
    for (part, own_pass), operations in found.items():
        parts[part][own_pass] = operations
    return {part: passes for part, passes in parts.items() if passes}


def product_operations(eqn: Any) -> int:
    """The operations of a matrix product or a convolution; 0 for anything else."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return (
            2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        )
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs
    return 0


def _count(
    jaxpr: core.Jaxpr,
    path: str,
    times: int,
    bytes_of: Callable[[Any], float],
    found: dict[Key, Operations],
) -> None:
    for eqn in jaxpr.eqns:
        own_path = f"{path}/{eqn.source_info.name_stack}"
        bodies = list(core.jaxprs_in_params(eqn.params))
        name = eqn.primitive.name
        if name == "cond":
            _add(found, _dearest(bodies, own_path, times, bytes_of))
        elif bodies and not name.startswith("reduce"):
            turns = eqn.params["length"] if name == "scan" else 1
            for body in bodies:
                _count(body, own_path, times * turns, bytes_of, found)
        elif (own := _own(eqn, bytes_of)) != Operations():
            _add(found, {_key(own_path): own.times(times)})


def _own(eqn: Any, bytes_of: Callable[[Any], float]) -> Operations:
    """The operations of one equation that contains no program."""
    values = [v.aval for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "shape")]
    if products := product_operations(eqn):
        exact = (
            products if "HIGHEST" in str(eqn.params["precision"]) else 0
        )  # one for both operands, or a pair
        return Operations(products, exact, sum(map(bytes_of, values)))
    if eqn.primitive.name.startswith(("reduce", "arg", "cum", "sort", "top_k")):
        return Operations(moved=sum(map(bytes_of, values)))
    if eqn.primitive.name in ("gather", "dynamic_slice"):
        return Operations(moved=2 * bytes_of(eqn.outvars[0].aval))
    if eqn.primitive.name.startswith("scatter"):
        return Operations(moved=2 * bytes_of(eqn.invars[2].aval))  # of the updates
    if eqn.primitive.name == "dynamic_update_slice":
        return Operations(moved=2 * bytes_of(eqn.invars[1].aval))
    return Operations()


def _dearest(
    bodies: list[Any], path: str, times: int, bytes_of: Callable[[Any], float]
) -> dict[Key, Operations]:
    """The operations of the branch that computes most."""
    branches: list[dict[Key, Operations]] = [{} for _ in bodies]
    for body, found in zip(bodies, branches, strict=True):
        _count(body, path, times, bytes_of, found)
    return max(branches, key=lambda found: (total(found).products, total(found).moved), default={})


def _add(found: dict[Key, Operations], more: dict[Key, Operations]) -> None:
    for key, operations in more.items():
        found[key] = found.get(key, Operations()) + operations


def _key(path: str) -> Key:
    part = next(name for pattern, name in PARTS if re.search(pattern, path))
    if "rematted_computation" in path:
        return part, "recomputed"
    return part, "backward" if "transpose(" in path else "forward"
