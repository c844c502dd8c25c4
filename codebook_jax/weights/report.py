"""The table of loaded, resized, newly initialised and ignored parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from codebook_jax.weights.fill import Filled
from codebook_jax.weights.layouts import Shapes

_MOST = 12  # names per line


def report(heading: str, student: Shapes, filled: Filled, *, teacher: str, queue: bool) -> str:
    """The table: arrays and numbers of each category, and names, with whole parts abbreviated."""
    fresh = [name for name in student if name not in filled.arrays]
    resized = [name for name in student if name in filled.resized]
    loaded = [name for name in student if name in filled.arrays and name not in filled.resized]
    numbers = lambda names: sum(math.prod(student[name]) for name in names)  # noqa: E731
    notes = [f"{_short(name)} {filled.resized[name]}" for name in resized]
    kinds: dict[str, list[str]] = {}
    for key, (_, kind) in filled.ignored.items():
        kinds.setdefault(kind, []).append(key)
    unused = [f"{kind} ({_counted(keys)})" for kind, keys in kinds.items()]
    rows = [
        ("loaded", len(loaded), numbers(loaded), parts_of(loaded, student)),
        ("resized", len(resized), numbers(resized), notes),
        ("newly initialised", len(fresh), numbers(fresh), parts_of(fresh, student)),
        (
            "ignored",
            len(filled.ignored),
            sum(count for count, _ in filled.ignored.values()),
            unused,
        ),
    ]
    lines = [heading, f"{'':18} {'arrays':>6} {'numbers':>13}"]
    lines += [
        f"{title:18} {count:6,} {size:13,}  {_listed(names)}" for title, count, size, names in rows
    ]
    return "\n".join([*lines, f"teacher: {teacher}; queues: {'loaded' if queue else 'empty'}"])


def parts_of(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The names, abbreviated to a part if they include everything that `every` has below it."""
    names, every = set(names), list(every)
    found: dict[str, None] = {}
    for name in every:
        if name not in names:
            continue
        steps = name.split("/")
        for length in range(1, len(steps) + 1):
            part = "/".join(steps[:length])
            below = [other for other in every if other == part or other.startswith(f"{part}/")]
            if names.issuperset(below):
                found[_short(part)] = None
                break
    return list(found)


def _short(name: str) -> str:
    return re.sub(r"^student/(towers/)?", "", name)


def _counted(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{len(keys)}: {keys[0]}, ..."


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
