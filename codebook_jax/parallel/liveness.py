"""How many bytes of a traced program are alive at once, as XLA would assign buffers; nothing is
compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.extend import core

# Computed where their result is read, without a buffer, if all readers can fuse them (XLA's loop
# fusion).
CHEAP = frozenset(
    "abs add and broadcast_in_dim ceil clamp convert_element_type copy_p copy div eq "
    "expand_dims floor ge gt integer_pow iota is_finite le lt max min mul ne neg not or "
    "pad real rem reshape rev round select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign slice square squeeze stop_gradient sub transpose xor "
    "concatenate random_wrap random_unwrap".split()
)
DEAR = frozenset(
    "cbrt cos erf erf_inv erfc exp exp2 expm1 log log1p logistic pow rsqrt sin sqrt tanh".split()
)
VIEWS = frozenset(
    "reshape squeeze expand_dims copy stop_gradient optimization_barrier "
    "sharding_constraint".split()
)
READERS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin dynamic_slice".split()
)
INLINED = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat2 remat".split()
)

Bytes = Callable[[Any], int]  # of an abstract value on one device


def peak(jaxpr: core.Jaxpr, bytes_of: Bytes, *, in_place: bool = False) -> int:
    """Most bytes alive at once between a program's arguments and its results; the results count
    unless `in_place`.
    """
    equations, results = _flat(jaxpr)
    outputs = {v for v in results if not isinstance(v, core.Literal)}
    readers: dict[Any, list[int]] = {}
    for place, (_, inputs, _) in enumerate(equations):
        for v in inputs:
            if not isinstance(v, core.Literal):
                readers.setdefault(v, []).append(place)
    names = [eqn.primitive.name for eqn, _, _ in equations]
    last = {v: places[-1] for v, places in readers.items()} | dict.fromkeys(outputs, len(equations))
    unbuffered = set()
    for place in range(len(equations) - 1, -1, -1):
        _, inputs, made = equations[place]
        if len(made) != 1:
            continue
        (v,) = made
        places, name = readers.get(v, []), names[place]
        taken_in = all(names[p] in CHEAP | DEAR | READERS for p in places) and v not in outputs
        if name in VIEWS or (taken_in and (name in CHEAP or (name in DEAR and len(places) == 1))):
            unbuffered.add(v)
            for source in inputs:  # inputs stay alive until v is read
                if not isinstance(source, core.Literal):
                    last[source] = max(last.get(source, place), last.get(v, place))
    dying: dict[int, list[Any]] = {}
    for v, place in last.items():
        dying.setdefault(place, []).append(v)
    size: dict[Any, int] = {}
    alive = most = 0
    for place, (eqn, _, made) in enumerate(equations):
        for v in made:
            free = v in unbuffered or (in_place and v in outputs) or v not in last
            size[v] = 0 if free else bytes_of(v.aval)
        mine = sum(size[v] for v in made)
        gone = sum(size.get(v, 0) for v in dying.get(place, ()))
        reused = (
            min(gone, mine)
            if names[place] in CHEAP | DEAR | {"dynamic_update_slice", "scatter-add", "scatter"}
            else 0
        )
        most = max(most, alive + mine - reused + _inside(eqn, bytes_of))
        alive += mine - gone
    return most


def _inside(eqn: Any, bytes_of: Bytes) -> int:
    """Most bytes alive inside a loop's or a branch's body, with the slices of what a loop runs
    over.
    """
    name, inside = eqn.primitive.name, 0
    for body in core.jaxprs_in_params(eqn.params):
        slices = 0
        if name == "scan":
            # What it runs over has one axis less inside; the names of scan's parameters differ
            # between JAX's versions.
            pairs = zip(body.invars, eqn.invars, strict=True)
            slices = sum(
                bytes_of(own.aval) for own, given in pairs if own.aval.shape != given.aval.shape
            )
        inside = max(inside, peak(body, bytes_of) + slices)
    return inside


class _Value:
    """A result, distinct from those of other calls of the same function."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def _flat(jaxpr: core.Jaxpr) -> tuple[list[tuple[Any, list[Any], list[Any]]], list[Any]]:
    """(equation, its arguments, its results) in order, with function calls inlined; and the
    program's results.
    """
    flat: list[tuple[Any, list[Any], list[Any]]] = []

    def write_out(jaxpr: core.Jaxpr, given: dict[Any, Any]) -> list[Any]:
        """Appends the equations of `jaxpr` with `given` as its arguments; returns its results."""
        named = dict(given)
        read = lambda v: v if isinstance(v, core.Literal) else named.get(v, v)  # noqa: E731
        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            bodies = list(core.jaxprs_in_params(eqn.params))
            if eqn.primitive.name in INLINED and bodies:
                results = write_out(bodies[0], dict(zip(bodies[0].invars, inputs, strict=True)))
                named |= dict(zip(eqn.outvars, results, strict=True))
                continue
            made = []
            for v in eqn.outvars:
                fresh = _Value(v.aval)
                named[v] = fresh
                made.append(fresh)
            flat.append((eqn, inputs, made))
        return [read(v) for v in jaxpr.outvars]

    return flat, write_out(jaxpr, {})
