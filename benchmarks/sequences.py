"""Stories aligned in order, as a bag, and by mean pooling: `python benchmarks/sequences.py`.

Trains `configs/sequences.py:tiny` on scenes:stories, with the order and as a bag, for every seed,
and evaluates each on the test stories. `--sweep=WORKDIR` evaluates a trained run on validation
stories with a grid of orders instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
from pathlib import Path

from recalls import ROOT, run

from codebook_jax import build
from codebook_jax.data.sources import source_of
from codebook_jax.evaluation import stories
from codebook_jax.method import Order

NAMES = ("txt_r1", "img_r1", "right_order")
LOCALITIES, SPREADS, WIDTHS = (0.5, 1.0, 2.0), (0.05, 0.1, 0.2), (0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--runs", default="runs/sequences", help="the folder for the runs")
    parser.add_argument("--out", default="benchmarks/results/sequences.json")
    parser.add_argument("--sweep", help="a trained run to evaluate with a grid of orders")
    parser.add_argument("fields", nargs="*", help="more config fields, e.g. train.steps=100")
    options = parser.parse_args()
    if options.sweep:
        sweep(Path(options.sweep).absolute())
        return
    rows = []
    print("| trained | seed | compared by | R@1 | | right order | CPU time |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for ordered, seed in itertools.product((True, False), options.seeds):
        trained = "in order" if ordered else "as a bag"
        workdir = Path(options.runs) / f"{'ordered' if ordered else 'bag'}-{seed}"
        fields = [f"sequences.ordered={ordered}", f"seed={seed}", *options.fields]
        before = children_seconds()
        results = run(workdir.resolve(), "sequences", fields)
        seconds = children_seconds() - before
        for how, found in results.items():
            figures = {name: found[name] for name in NAMES}
            rows.append({"ordered": ordered, "seed": seed, "protocol": how} | figures)
            rows[-1]["cpu_s"] = round(seconds)
            cells = " | ".join(f"{value:.1f}" for value in figures.values())
            print(f"| {trained} | {seed} | {how} | {cells} | {seconds / 60:.1f} min |", flush=True)
    out = ROOT / options.out
    out.write_text(json.dumps(rows, indent=1) + "\n")


def children_seconds() -> float:
    """CPU seconds of the commands that have been run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sweep(workdir: Path) -> None:
    """Right order and R@1 of the run's best checkpoint on validation stories, for a grid."""
    parts = build.build_trained(None, workdir)
    student = build.restore_trained(parts, workdir, ("student",)).state.student
    source = source_of(parts.config, parts.config.data.eval, "validation", stories=True)
    towers = {"student": student["towers"]}
    encoded = stories.encode_stories(
        parts.task.model, towers, source, parts.tokenizer, parts.config
    )["student"]
    print("| locality | spread | width | R@1 | | right order |\n|---|---|---|---|---|---|")
    for locality, spread, width in itertools.product(LOCALITIES, SPREADS, WIDTHS):
        found = stories.evaluate(encoded, Order(locality, spread, width))["ordered"]
        cells = " | ".join(f"{found[name]:.1f}" for name in NAMES)
        print(f"| {locality} | {spread} | {width} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
