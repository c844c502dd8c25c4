"""The keys that name examples in results and submissions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from codebook_jax.errors import UserError, first_few

Key = int | str


def check_keys(given: Iterable[Key], known: Collection[Key], what: str) -> None:
    """Raises UserError unless `what` gives every known key once, and no other, or
    if none is known.
    """
    counts = Counter(iter(given))  # of a mapping too, whose values a Counter would take as counts
    asked = dict.fromkeys(known)
    if not asked:
        raise UserError(f"{what}: there is nothing to answer: give a source with examples")
    faults = {
        "missing": [key for key in asked if key not in counts],
        "repeated": [key for key, times in counts.items() if times > 1],
        "unknown": [key for key in counts if key not in asked],
    }
    listed = [
        f"{len(keys):,} {fault} ({first_few([repr(key) for key in keys], 3)})"
        for fault, keys in faults.items()
        if keys
    ]
    if listed:
        raise UserError(
            f"{what}: of {len(asked):,} ids, {'; '.join(listed)}: give one answer for each id, "
            "written as in the questions (7 is not '7')"
        )
