"""Runs of the ordinary command at size `tiny`, over data sets and seeds, for tables of recalls.

Recalls are on the test data, by the student's dual encoder, after the last step. Every run keeps
its folder; one that is in the results already is not repeated, and one that was interrupted goes
on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
NAMES = [f"{side}_r{k}" for side in ("txt", "img") for k in (1, 5, 10)]
Row = dict[str, float | str | list[str]]


class Variant(NamedTuple):
    """What is compared: a recipe in configs/, and fields that differ from it."""

    recipe: str = "paper"
    fields: tuple[str, ...] = ()


def parser(page: str, *, name: str, steps: int) -> argparse.ArgumentParser:
    """The options of a benchmark with this docstring; its figures go to results/NAME.json."""
    made = argparse.ArgumentParser(description=page.splitlines()[0])
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    made.add_argument("--emoji", help="a folder with train.json and val.json")
    made.add_argument("--runs", default=f"runs/{name}", help="the folder for the runs")
    made.add_argument("--out", default=f"benchmarks/results/{name}.json")
    made.add_argument("fields", nargs="*", help="more config fields, e.g. losses.matching=0")
    return made


def compare(
    variants: dict[str, Variant], options: argparse.Namespace, columns: dict[str, str]
) -> list[Row]:
    """Trains and evaluates every variant on all data with all seeds; prints a table meanwhile.

    `columns` names metrics of the last logged step that rows have too, and how to format them.
    """
    out = ROOT / options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(out.read_text()) if out.exists() else []
    heads = ["data", "variant", "seed", "TR R@1 / 5 / 10", "IR R@1 / 5 / 10", *columns]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    data = {"scenes": []}
    if options.emoji:
        data["emoji"] = emoji_fields(Path(options.emoji).resolve())
    runs = ((d, seed, v) for d in data for seed in options.seeds for v in variants)
    for name, seed, variant in runs:
        recipe, own = variants[variant]
        changed = [*own, *options.fields]
        key = {"data": name, "variant": variant, "seed": seed, "steps": options.steps}
        key |= {"fields": changed}
        row = next((row for row in rows if key.items() <= row.items()), None)
        if row is None:
            workdir = Path(options.runs) / f"{name}-{variant}-{seed}-{options.steps}"
            shared = [f"seed={seed}", f"train.steps={options.steps}"]
            shared += ["evaluation.every_steps=0", "evaluation.rerank_top_k=0"]
            of_data = [f for f in data[name] if recipe != "clip" or not f.startswith("queue.")]
            results = run(workdir.resolve(), recipe, [*of_data, *shared, *changed])
            recalls = {name: results["student/dual"][name] for name in NAMES}
            row = key | recalls | last_logged(workdir, columns)
            rows.append(row)
            out.write_text(json.dumps(rows, indent=1) + "\n")
        cells = [name, variant, str(seed)]
        cells += [" / ".join(f"{row[k]:.1f}" for k in NAMES[i : i + 3]) for i in (0, 3)]
        cells += [format(row[k], how) if k in row else "" for k, how in columns.items()]
        print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def emoji_fields(folder: Path) -> list[str]:
    """Fields for a few thousand small pictures with short captions from many words, evaluated in
    another drawing style.
    """
    return [
        f"data.train=json:{folder / 'train.json'}",
        f"data.eval=json:{folder / 'val.json'}",
        "data.randaugment_layers=2",
        "model.text.max_tokens=18",
        "model.text.value_std=0.12",
        "model.text.embedding_std=0.04",
        "teacher.alpha_steps=300",
        "queue.size=512",
    ]


def run(workdir: Path, recipe: str, fields: list[str]) -> dict[str, dict[str, float]]:
    """Trains `configs/RECIPE.py:tiny` and evaluates it; returns eval.json, by protocol."""
    command = [sys.executable, "-m", "codebook_jax.main", f"--workdir={workdir}"]
    config = [
        f"--config={ROOT / 'configs' / recipe}.py:tiny",
        *(f"--config.{field}" for field in fields),
    ]
    for extra in (["--config.evaluation.images=64"], ["--mode=eval"]):
        done = subprocess.run([*command, *config, *extra], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    return json.loads((workdir / "eval.json").read_text())


def last_logged(workdir: Path, names: dict[str, str]) -> dict[str, float]:
    """Those of these metrics that the last logged step has."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "loss" in row][-1]
    return {name: last[name] for name in names if name in last}
