"""The effect of the codebook loss: weight 0 against 1, by seed and data set: `python
benchmarks/ablation.py`.

Every run is the ordinary command at size `tiny` with the same number of steps; recalls are on the
test data, by the student's dual encoder, after the last step. `--emoji=FOLDER` adds picture-text
pairs of your own (train.json, and val.json to evaluate on, in that folder).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = [f"{side}_r{k}" for side in ("txt", "img") for k in (1, 5, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--weights", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--emoji", help="a folder with train.json and val.json")
    parser.add_argument("--runs", default="runs/ablation", help="the folder for the runs")
    parser.add_argument("--out", default="benchmarks/results/ablation.json")
    parser.add_argument("fields", nargs="*", help="more config fields, e.g. losses.matching=0")
    options = parser.parse_args()
    data = {"scenes": []}
    if options.emoji:
        data["emoji"] = emoji_fields(Path(options.emoji))
    out = ROOT / options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    print(
        "| data | codebook weight | seed | TR R@1 / 5 / 10 | IR R@1 / 5 / 10 "
        "|\n|---|---|---|---|---|",
        flush=True,
    )
    for name, fields in data.items():
        for seed in options.seeds:
            for weight in options.weights:
                workdir = Path(options.runs) / f"{name}-{weight:g}-{seed}-{options.steps}"
                changed = [
                    *fields,
                    f"losses.codebook={weight}",
                    f"seed={seed}",
                    f"train.steps={options.steps}",
                    "evaluation.every_steps=0",
                    "evaluation.rerank_top_k=0",
                    *options.fields,
                ]
                recalls = run(workdir, changed)
                rows.append(
                    {"data": name, "weight": weight, "seed": seed, "steps": options.steps} | recalls
                )
                cells = [f"{recalls[name]:.1f}" for name in NAMES]
                print(
                    f"| {name} | {weight:g} | {seed} | {' / '.join(cells[:3])} | "
                    f"{' / '.join(cells[3:])} |",
                    flush=True,
                )
                out.write_text(json.dumps(rows, indent=1) + "\n")


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


def run(workdir: Path, fields: list[str]) -> dict[str, float]:
    """Trains and evaluates; returns the recalls in percent."""
    command = [sys.executable, "-m", "codebook_jax.main", f"--workdir={workdir}"]
    config = [
        f"--config={ROOT / 'configs' / 'base.py'}:tiny",
        *(f"--config.{field}" for field in fields),
    ]
    for extra in ([], ["--mode=eval"]):
        done = subprocess.run([*command, *config, *extra], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    results = json.loads((workdir / "eval.json").read_text())["student/dual"]
    return {name: results[name] for name in NAMES}


if __name__ == "__main__":
    main()
