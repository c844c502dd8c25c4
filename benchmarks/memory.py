"""What the memory check foretells beside what a run takes: `python benchmarks/memory.py`.

One process per row trains a few steps on the built-in scenes, with a save and an evaluation, by
`train.fit`. Foretold is what the check prints; measured is the device's own peak, or on a CPU how
much the process grew after the step was compiled. The table is written into docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from train_step import run_alone

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "scale.md"
ON_A_CPU: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny, 32 pairs": ("tiny", {"data.global_batch": 32}),
    "tiny, 64 pairs": ("tiny", {}),
    "tiny, 256 pairs": ("tiny", {"data.global_batch": 256, "queue.size": 256}),
    "tiny, 256 pairs, remat": (
        "tiny",
        {"data.global_batch": 256, "queue.size": 256, "model.remat": "blocks"},
    ),
    "tiny, 256 pairs, 4 passes": (
        "tiny",
        {"data.global_batch": 256, "queue.size": 256, "optimizer.accumulation": 4},
    ),
    "small, 8 pairs": ("small", {"data.global_batch": 8}),
    "small, 16 pairs": ("small", {"data.global_batch": 16}),
    "small, 32 pairs": ("small", {"data.global_batch": 32}),
    "small, 32 pairs, remat": ("small", {"data.global_batch": 32, "model.remat": "blocks"}),
    "small, 32 pairs, 4 passes": ("small", {"data.global_batch": 32, "optimizer.accumulation": 4}),
    "base, 2 pairs": ("base", {"data.global_batch": 2}),
    "base, 4 pairs": ("base", {"data.global_batch": 4}),
    "base, 8 pairs": ("base", {"data.global_batch": 8}),
    "base, 8 pairs, no remat": ("base", {"data.global_batch": 8, "model.remat": "none"}),
    "base, 8 pairs, 2 passes": ("base", {"data.global_batch": 8, "optimizer.accumulation": 2}),
}
ON_A_GPU = {
    f"{size}, {pairs} pairs{note}": (size, {"data.global_batch": pairs} | fields)
    for size, pairs, fields, note in (
        ("tiny", 256, {"queue.size": 256}, ""),
        ("small", 256, {}, ""),
        ("base", 64, {"model.remat": "blocks"}, ""),
        ("base", 64, {"model.remat": "none"}, ", no remat"),
        ("base", 128, {"model.remat": "dots"}, ", products kept"),
        ("base", 256, {"model.remat": "blocks"}, ""),
        ("base", 256, {"optimizer.accumulation": 4, "model.remat": "none"}, ", no remat, 4 passes"),
    )
}
ROWS = ON_A_CPU | ON_A_GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ON_A_CPU), help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*ROWS[options.one])))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.rows:
        found[name] = run_alone(__file__, ["--one", name])
        print(f"{name}: {found[name]}", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), found))


def measure(size: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Bytes that the check foretells and that a run takes."""
    import jax

    from codebook_jax import train
    from codebook_jax.parallel import memory
    from configs import base

    config = base.paper(size)
    few = {"train.steps": 4, "checkpoint.every_steps": 2, "log_every_steps": 1}
    few |= {"data.scenes_examples": 2000, "evaluation.images": 8, "evaluation.batch": 8}
    config.update_from_flattened_dict(few | {"evaluation.rerank_top_k": 2} | fields)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    real = memory.Memory.check

    def check(self: memory.Memory, compiled: memory.Compiled) -> None:
        real(self, compiled)
        found.update(foretold=compiled.need.total, parts=compiled.need._asdict())
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        found["before"] = of_process("VmRSS")

    memory.Memory.check = check
    with tempfile.TemporaryDirectory() as folder:
        train.fit(config.lock(), Path(folder) / "run")
    stats = jax.devices()[0].memory_stats() or {}
    growth = of_process("VmHWM") - found["before"]
    return found | {"measured": stats.get("peak_bytes_in_use", growth)}


def of_process(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def with_table(page: str, found: dict[str, Any]) -> str:
    """The page with the table between its marks replaced."""
    rows = ["| | device | foretold, MB | measured, MB | apart |", "| --- | --- | --- | --- | --- |"]
    for name, row in ((name, found[name]) for name in ROWS if name in found):
        apart = row["foretold"] / row["measured"] - 1
        sizes = f"{row['foretold'] / 1e6:,.0f} | {row['measured'] / 1e6:,.0f}"
        rows.append(f"| {name} | {row['device']} | {sizes} | {apart:+.1%} |")
    before, mark, rest = page.partition("<!-- memory -->\n")
    _, end, after = rest.partition("<!-- end of memory -->")
    return before + mark + "\n".join(rows) + "\n" + end + after


if __name__ == "__main__":
    main()
