"""The table of loaded, resized, newly initialised and ignored parameters."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from codebook_jax.weights.fill import Filled
from codebook_jax.weights.layouts import Shapes

_MOST = 12  # names per line


def report(student: Shapes, filled: Filled) -> str:
    """The table: arrays and numbers of each category, and names, with whole parts abbreviated."""
    fresh = [name for name in student if name not in filled.arrays]
    resized = [name for name in student if name in filled.resized]
    loaded = [name for name in student if name in filled.arrays and name not in filled.resized]
    kinds: dict[str, list[str]] = {}
    for key, (_, kind) in filled.ignored.items():
        kinds.setdefault(kind, []).append(key)
    several = {kind: f"{len(keys)}: {keys[0]}, ..." for kind, keys in kinds.items() if keys[1:]}
    ignored = [f"{kind} ({several.get(kind, keys[0])})" for kind, keys in kinds.items()]
    sizes = {name: math.prod(shape) for name, shape in student.items()}
    sizes |= {key: size for key, (size, _) in filled.ignored.items()}
    rows = {
        "loaded": (loaded, parts_of(loaded, student)),
        "resized": (resized, [f"{_short(name)} {filled.resized[name]}" for name in resized]),
        "newly initialised": (fresh, parts_of(fresh, student)),
        "ignored": (filled.ignored, ignored),
    }
    lines = [f"{'':18} {'arrays':>6} {'numbers':>13}"]
    for title, (counted, names) in rows.items():
        more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
        shown, numbers = f"{', '.join(names[:_MOST])}{more}", sum(sizes[name] for name in counted)
        lines.append(f"{title:18} {len(counted):6,} {numbers:13,}  {shown}")
    return "\n".join(lines)


def parts_of(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The names, abbreviated to a part if they include everything that `every` has below it."""
    others = [f"{other}/" for other in every if other not in names]
    found: dict[str, None] = {}
    for name in names:
        parts = itertools.accumulate(name.split("/"), "{}/{}".format)
        whole = (part for part in parts if not any(o.startswith(f"{part}/") for o in others))
        found[_short(next(whole))] = None
    return list(found)


def _short(name: str) -> str:
    return re.sub(r"^student/(towers/)?", "", name)
