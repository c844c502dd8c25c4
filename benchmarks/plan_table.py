"""The plans and tables of docs/scale.md: `python benchmarks/plan_table.py`, a quarter of an hour on
two cores.

Each plan is one process of `--mode=plan`; its figures go to `results/plans.json`. A plan already in
there is not repeated unless you name it with `--plans`; plans whose names end with `libtpu` need
libtpu. The tables are written into the page, between its marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
PAGE = ROOT / "docs" / "scale.md"

# name: size, chip, devices, fields
PLANS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "base, 8 h200": ("base", "h200", 8, {}),
    "base, 64 v5p": ("base", "v5p", 64, {}),
    "base, 256 v5p": ("base", "v5p", 256, {}),
    "huge, 256 v5p": ("huge", "v5p", 256, {}),
    "huge, 256 v5p, fsdp 8": ("huge", "v5p", 256, {"mesh.fsdp": 8}),
    "base, 1 v5p, 64 a chip": ("base", "v5p", 1, {"data.global_batch": 64}),
    "base, 8 v5p, 64 a chip": ("base", "v5p", 8, {"data.global_batch": 512}),
    "base, 64 v5p, 64 a chip": ("base", "v5p", 64, {"data.global_batch": 4096}),
    "base, 256 v5p, 64 a chip": ("base", "v5p", 256, {"data.global_batch": 16_384}),
    "huge, 1 v5p, 64 a chip": ("huge", "v5p", 1, {"data.global_batch": 64}),
    "huge, 256 v5p, 64 a chip": ("huge", "v5p", 256, {"data.global_batch": 16_384}),
    "huge, 256 v5p, 64 a chip, fsdp 8": (
        "huge",
        "v5p",
        256,
        {"data.global_batch": 16_384, "mesh.fsdp": 8},
    ),
}
LIBTPU = (  # compiled by a TPU's own compiler too
    "base, 64 v5p",
    "base, 8 v5p, 64 a chip",
    "base, 256 v5p, 64 a chip",
    "huge, 256 v5p, 64 a chip",
    "huge, 256 v5p, 64 a chip, fsdp 8",
)
JOBS = {name: (*of, "cpu") for name, of in PLANS.items()} | {
    f"{name}, libtpu": (*PLANS[name], "tpu") for name in LIBTPU
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", nargs="*", default=None, help=f"of: {'; '.join(JOBS)}")
    parser.add_argument("--again", action="store_true", help="repeat all plans")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [name for name in JOBS if name not in found or options.again]
    for name in missing if options.plans is None else options.plans:
        found[name] = planned(*JOBS[name])
        print(f"{name}: compiled in {found[name]['compile_s']} s", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), found))


def with_tables(page: str, found: dict[str, Any]) -> str:
    """The page with the table between each pair of marks replaced."""
    for make in (needs, fsdp, weak_scaling, parts, libtpu):
        before, mark, rest = page.partition(f"<!-- {make.__name__} -->\n")
        _, end, after = rest.partition(f"<!-- end of {make.__name__} -->")
        page = f"{before}{mark}{make(found)}\n{end}{after}"
    return page


def planned(
    size: str, chip: str, devices: int, fields: dict[str, Any], compiler: str
) -> dict[str, Any]:
    """The figures of one plan."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [
            sys.executable,
            "-m",
            "codebook_jax.main",
            "--mode=plan",
            f"--config=configs/base.py:{size}",
        ]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        command += [
            f"--plan.chip={chip}",
            f"--plan.devices={devices}",
            f"--plan.compiler={compiler}",
            f"--plan.json={out}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(heads: list[str], rows: list[list[Any]]) -> str:
    return "\n".join([row(heads), row(["---"] * len(heads)), *map(row, rows)])


def between(of: dict[str, float], form: str) -> str:
    """From nothing hidden to everything hidden, or one number if both read the same."""
    ends = [form.format(of["serial"]), form.format(of["overlapped"])]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def needs(found: dict[str, Any]) -> str:
    """Memory and time of each plan."""
    heads = [
        "",
        "batch",
        "GB a chip, of",
        "step, ms",
        "at least",
        "bound by",
        "images/s",
        "days",
        "chip-hours",
    ]
    rows = []
    for name, plan in ((name, found[name]) for name in PLANS):
        memory, seconds = (
            plan["memory"],
            {k: 1e3 * v for k, v in plan["seconds"].items() if k != "bound_by"},
        )
        rows.append(
            [
                name,
                f"{plan['batch']['global']:,}",
                f"{memory['need']['total'] / 1e9:.1f} of {memory['has'] / 1e9:.0f}",
                between(seconds, "{:.1f}"),
                f"{seconds['at_the_least']:.1f}",
                plan["bound_by"],
                between(plan["images_per_s"], "{:,.0f}"),
                between(plan["days"], "{:.3f}"),
                between(plan["chip_hours"], "{:,.0f}"),
            ]
        )
    return table(heads, rows)


def fsdp(found: dict[str, Any]) -> str:
    """Gigabytes per chip by fsdp."""
    sizes = [str(2**k) for k in range(9)]
    rows = []
    for name, plan in ((name, found[name]) for name in PLANS):
        by = plan["memory"]["by_fsdp"]
        if len(by) > 6 and "fsdp" not in name:
            rows.append([name, *(f"{by[size] / 1e9:.1f}" if size in by else "" for size in sizes)])
    return table(["GB a chip with fsdp", *sizes], rows)


def weak_scaling(found: dict[str, Any]) -> str:
    """The step time of one chip divided by that of many with the same share of the batch, with
    nothing and all hidden.
    """
    heads = [
        "64 pairs a chip",
        "chips",
        "GB sent a chip",
        "collectives",
        "communication, ms",
        "of it latency",
        "efficiency",
    ]
    rows = []
    for name, plan in ((name, found[name]) for name in PLANS):
        if "64 a chip" not in name:
            continue
        size = name.split(",")[0]
        alone = found[f"{size}, 1 v5p, 64 a chip"]["seconds"]
        seconds = plan["seconds"]
        efficiency = {end: alone[end] / seconds[end] for end in ("serial", "overlapped")}
        rows.append(
            [
                name,
                plan["devices"],
                f"{sum(part['bytes'] for part in plan['sent']) / 1e9:.2f}",
                sum(part["count"] for part in plan["sent"]),
                f"{1e3 * seconds['communication']:.1f}",
                f"{1e3 * seconds['waiting']:.1f}",
                between(efficiency, "{:.1%}"),
            ]
        )
    return table(heads, rows)


def parts(found: dict[str, Any]) -> str:
    """Shares of the matrix products by part."""
    names = [
        name
        for name in ("base, 256 v5p", "base, 256 v5p, 64 a chip", "huge, 256 v5p")
        if name in found
    ]
    rows = []
    for part in found[names[0]]["operations"]:
        shares = [
            sum(found[name]["operations"].get(part, {}).values()) / found[name]["operations_total"]
            for name in names
        ]
        rows.append([part, *(f"{share:.1%}" for share in shares)])
    whole = [f"{found[name]['operations_total'] / 1e12:,.0f}" for name in names]
    return table(["share of the products", *names], [*rows, ["TFLOP a step", *whole]])


def libtpu(found: dict[str, Any]) -> str:
    """What libtpu needs and sends, compared with the estimate and with what XLA's partitioner for
    CPUs sends.
    """
    heads = [
        "",
        "GB a chip: estimated",
        "libtpu: held",
        "in between",
        "program",
        "GB sent: for CPUs",
        "libtpu",
        "collectives",
    ]
    heads += ["communication, ms", "efficiency, none of it hidden"]
    rows = []
    for name in LIBTPU:
        plan, own = found[name], found[f"{name}, libtpu"]
        assigned, seconds = own["memory"]["assigned_by_xla"], own["seconds"]
        work = seconds["serial"] - seconds["communication"]
        rows.append(
            [
                name,
                f"{own['memory']['need']['total'] / 1e9:.1f}",
                *(f"{assigned[part] / 1e9:.1f}" for part in ("held", "in_between", "program")),
                *(f"{sum(part['bytes'] for part in of['sent']) / 1e9:.2f}" for of in (plan, own)),
                sum(part["count"] for part in own["sent"]),
                f"{1e3 * seconds['communication']:.1f}",
                f"{work / seconds['serial']:.1%}" if "64 a chip" in name else "",
            ]
        )
    return table(heads, rows)


if __name__ == "__main__":
    main()
