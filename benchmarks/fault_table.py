"""Prints the table of docs/faults.md from the results of benchmarks/faults.py: `python
benchmarks/fault_table.py [FILE]`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results" / "faults.json"


class Row(NamedTuple):
    """What one fault led to."""

    fault: str
    happened: str  # exit codes and the sentence of the process without the fault
    ended_s: float | None  # from the fault to the end of the last process
    resumed_s: float | None  # from the next start to its first step
    lost_steps: int | None  # that had been done and were repeated
    final: str  # compared with the undisturbed run


def read(path: Path | str) -> dict[str, Row]:
    """The rows of a file written by faults.py, by name."""
    return {name: Row(**row) for name, row in json.loads(Path(path).read_text()).items()}


def table(rows: list[Row]) -> str:
    """A Markdown table; runs of one kind share a row, which shows the worst of their figures."""
    lines = ["| fault | exit codes and message | ends, s | resumes, s | steps lost | result |"]
    lines.append("|---|---|---|---|---|---|")
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(re.split(r" of process \d| in \w+/", row.fault)[0], []).append(row)
    for kind, same in kinds.items():
        name = kind if len(same) == 1 else f"{kind}, {_varied(same)}"
        happened = " or ".join(dict.fromkeys(_brief(row.happened) for row in same))
        worst = [
            max((value for row in same if (value := getattr(row, figure)) is not None), default="")
            for figure in ("ended_s", "resumed_s", "lost_steps")
        ]
        final = " or ".join(dict.fromkeys(row.final for row in same))
        lines.append(f"| {name} | {happened} | {worst[0]} | {worst[1]} | {worst[2]} | {final} |")
    return "\n".join(lines)


def _varied(rows: list[Row]) -> str:
    """How the runs of one kind differ."""
    if rows[0].fault.startswith("SIGKILL"):
        saves = sum("during a save" in row.fault for row in rows)
        first = sum("process 0" in row.fault for row in rows)
        return f"{len(rows)} runs: {saves} during a save, {first} of process 0"
    return f"{len(rows)} places: {', '.join(row.fault.rsplit(' ', 1)[1] for row in rows)}"


def _brief(happened: str) -> str:
    """The message without the hosts, folders and figures that differ between runs."""
    for pattern, replacement in (
        (r"(process \d+) on \S+?(?=[\s:,])", r"\1"),
        (r"/\S*/(run|checkpoints|\w+)\b", r"\1"),
        (r"step \d+", "step N"),
        (r"damaged \(.*\); it is", "damaged (what reading it raised); it is"),
        (r"damaged-\d+", "damaged-N"),
        (r"\|", "/"),
    ):
        happened = re.sub(pattern, replacement, happened)
    return happened if len(happened) <= 170 else f"{happened[:167]}..."


if __name__ == "__main__":
    print(table(list(read(sys.argv[1] if sys.argv[1:] else RESULTS).values())))
