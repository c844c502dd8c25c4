"""The table of loaded, resized, newly initialised and ignored parameters."""

from __future__ import annotations

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
    names = {
        "loaded": parts_of(loaded, student),
        "resized": [f"{_short(name)} {filled.resized[name]}" for name in resized],
        "newly initialised": parts_of(fresh, student),
        "ignored": [f"{kind} ({_counted(keys)})" for kind, keys in kinds.items()],
    }
    sizes = [[math.prod(student[name]) for name in group] for group in (loaded, resized, fresh)]
    sizes.append([size for size, _ in filled.ignored.values()])
    lines = [f"{'':18} {'arrays':>6} {'numbers':>13}"]
    for (title, listed), counts in zip(names.items(), sizes, strict=True):
        more = f", and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
        lines.append(
            f"{title:18} {len(counts):6,} {sum(counts):13,}  {', '.join(listed[:_MOST])}{more}"
        )
    return "\n".join(lines)


def parts_of(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The names, abbreviated to a part if they include everything that `every` has below it."""
    names, every = set(names), list(every)
    found: dict[str, None] = {}
    for name in (name for name in every if name in names):
        parts = ["/".join(name.split("/")[: length + 1]) for length in range(name.count("/") + 1)]
        whole = next(
            part
            for part in parts
            if all(other in names for other in every if f"{other}/".startswith(f"{part}/"))
        )
        found[_short(whole)] = None
    return list(found)


def _short(name: str) -> str:
    return re.sub(r"^student/(towers/)?", "", name)


def _counted(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{len(keys)}: {keys[0]}, ..."
