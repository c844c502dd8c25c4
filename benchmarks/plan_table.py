"""The plans in docs/scale.md: `python benchmarks/plan_table.py`, minutes on two cores.

Each plan is one process of `--mode=plan`; its figures go to `results/plans.json`. A plan already in
there is not repeated unless you name it with `--plans`; plans whose names end with `libtpu` need
libtpu. The table is written into the page, between its marks.
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
# name: flags
PLANS = {
    "base, 8 h200": ("--config=configs/base.py:base", "--plan.chip=h200", "--plan.devices=8"),
    "base, 64 v5p": ("--config=configs/base.py:base", "--plan.chip=v5p", "--plan.devices=64"),
    "base, 256 v5p": ("--config=configs/base.py:base", "--plan.chip=v5p", "--plan.devices=256"),
    "huge, 256 v5p": ("--config=configs/base.py:huge", "--plan.chip=v5p", "--plan.devices=256"),
}
PLANS |= {
    f"{name}, libtpu": (*PLANS[name], "--plan.compiler=tpu") for name in PLANS if "v5p" in name
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", nargs="*", default=None, help=f"of: {'; '.join(PLANS)}")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.plans or [name for name in PLANS if name not in found]:
        found[name] = planned(*PLANS[name])
        print(f"{name}: compiled in {found[name]['compile_s']} s", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(with_tables(PAGE.read_text(), found))


def planned(*flags: str) -> dict[str, Any]:
    """The figures of one plan."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "codebook_jax.main", "--mode=plan", f"--plan.json={out}"]
        command += [*flags, "--config.model.remat=blocks"]  # the same operations on every chip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{' '.join(flags)}\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def with_tables(page: str, found: dict[str, Any]) -> str:
    """The page with the table between its marks replaced."""
    heads = [
        "",
        "pairs",
        "GB a chip, of",
        "TFLOP a step",
        "GB sent a chip",
        "ms a step",
        "images/s",
    ]
    rows = [[*heads, "chip-hours"], ["---"] * (len(heads) + 1)]
    for name, plan in ((name, found[name]) for name in PLANS if name in found):
        memory = plan["memory"]
        sent: dict[str, float] = {}
        for row in plan["sent"]:
            sent[row["axes"]] = sent.get(row["axes"], 0) + row["bytes"] / 1e9
        rows.append(
            [
                name,
                f"{plan['batch']:,}",
                f"{memory['total'] / 1e9:.1f} of {memory['has'] / 1e9:.0f}",
                f"{plan['operations'] / 1e12:,.0f}",
                ", ".join(
                    f"{size:.2f} over {axes}" for axes, size in sent.items() if size >= 0.005
                ),
                f"{1e3 * plan['step_s']:.1f}",
                f"{plan['images_per_s']:,.0f}",
                f"{plan['chip_hours']:,.0f}",
            ]
        )
    before, mark, rest = page.partition("<!-- plans -->\n")
    _, end, after = rest.partition("<!-- end of plans -->")
    return before + mark + "".join(f"| {' | '.join(row)} |\n" for row in rows) + end + after


if __name__ == "__main__":
    main()
