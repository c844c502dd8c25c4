"""Compile time of the training step against depth: `python benchmarks/compile_time.py [--compiler
tpu]`.

One process per row; nothing is allocated, the step is traced on shapes and compiled as for
training. The rows have a small global batch, one pass, and no remat, because a scan with remat has
one block per iteration whatever `model.scan_unroll`
is: so the unrolled row differs from the scanned one only in that field. `huge` and `base` as
configured, with remat, are rows too. `--compiler tpu` compiles for one v5p with libtpu, which needs
no TPU. Goals: scanned at most a third of unrolled; huge at most 1.3 times base. Seconds are
wall-clock time; CPU seconds, over all cores, stand beside them and are more reliable on a machine
that does other work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from train_step import run_alone

from codebook_jax.tools.chips import COMPILERS, PlanOptions, environment

BATCH = 16
WORDS = 30_522  # BERT's
SCANNED, UNROLLED, HUGE = "base, scanned", "base, unrolled", "huge, scanned"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    SCANNED: ("base", {"model.remat": "none"}),
    UNROLLED: (
        "base",
        {"model.remat": "none", "model.scan_unroll": 12},
    ),  # the deepest tower's depth
    HUGE: ("huge", {"model.remat": "none"}),
    "base, scanned, remat": ("base", {}),
    "huge, scanned, remat": ("huge", {}),
}
GOALS = (  # (what, row, against, most times)
    ("scanned / unrolled", SCANNED, UNROLLED, 1 / 3),
    ("huge / base", HUGE, SCANNED, 1.3),
    ("huge / base, with remat", "huge, scanned, remat", "base, scanned, remat", 1.3),
)
RATIOS = ("all_s", "cpu_s", "instructions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help=f"of: {'; '.join(ROWS)}")
    parser.add_argument(
        "--repeat", type=int, default=1, help="processes per row; the fastest counts"
    )
    parser.add_argument("--compiler", choices=COMPILERS, default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*ROWS[options.one], options.compiler)))
        return
    figures: dict[str, Any] = {
        "batch": BATCH,
        "cores": os.cpu_count(),
        "compiler": options.compiler,
        "rows": {},
        "goals": {},
    }
    print(
        f"{'':24} {'trace, s':>9} {'lower, s':>9} {'compile, s':>11} {'all, s':>8} "
        f"{'of CPUs, s':>11} {'instructions':>13}",
        flush=True,
    )
    for name in options.rows:
        own = ["--one", name, "--compiler", options.compiler]
        row = min(
            (run_alone(__file__, own) for _ in range(options.repeat)),
            key=lambda found: found["all_s"],
        )
        figures["rows"][name] = row
        print(
            f"{name:24} {row['trace_s']:9.1f} {row['lower_s']:9.1f} {row['compile_s']:11.1f} "
            f"{row['all_s']:8.1f} {row['cpu_s']:11.1f} {row['instructions']:13,}",
            flush=True,
        )
    for what, row, against, most in GOALS:
        if {row, against} <= figures["rows"].keys():
            ratio = {by: figures["rows"][row][by] / figures["rows"][against][by] for by in RATIOS}
            figures["goals"][what] = ratio | {"at_most": most}
            print(
                f"{what}: {', '.join(f'{value:.2f} ({by})' for by, value in ratio.items())}; goal "
                f"{most:.2f}"
            )
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(figures, indent=1) + "\n")


def measure(size: str, fields: dict[str, Any], compiler: str) -> dict[str, Any]:
    """Seconds to trace, lower and compile the step of a size, and how long the compiled
    program is.
    """
    options = PlanOptions("v5p", devices=1, compiler=compiler)
    if compiler == "tpu":
        os.environ |= environment(options)
    import jax

    from codebook_jax import build
    from codebook_jax.data.text import Vocabulary
    from codebook_jax.tools.plan import described_tpus
    from configs import base

    jax.config.update("jax_enable_compilation_cache", False)
    config = base.paper(size)
    config.update_from_flattened_dict({"data.global_batch": BATCH} | fields)
    devices = described_tpus(options) if compiler == "tpu" else None
    vocabulary = Vocabulary(WORDS, 0, 101, 102, 103, (0, 100, 101, 102, 103))
    task = build.task_maker(config, vocabulary, devices=devices)({})
    state, batch, mesh = task.abstract_state(), task.abstract_batch(), task.mesh
    times, began = [time.perf_counter()], time.process_time()
    traced = task.step.trace(state, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    trace, lower, compile_ = (after - before for before, after in itertools.pairwise(times))
    return {
        "trace_s": trace,
        "lower_s": lower,
        "compile_s": compile_,
        "all_s": trace + lower + compile_,
        "cpu_s": time.process_time() - began,
        "instructions": sum(" = " in line for line in compiled.as_text().splitlines()),
        "jax": jax.__version__,
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }


if __name__ == "__main__":
    main()
