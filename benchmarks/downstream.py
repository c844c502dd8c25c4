"""Every downstream task from one pre-trained export and from random weights:
`python benchmarks/downstream.py --run=runs/downstream`.

Every run is the ordinary command at size `tiny` on the built-in scenes, followed by --mode=eval on
their test data. The run is pre-trained first, if it is not there, with `ARCHITECTURE` and a
vocabulary that has the words of all tasks, as BERT's has. Figures go to `results/downstream.json`,
the table into docs/finetuning.md, between its marks; a run that is in there already is not repeated
unless you name its task.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from codebook_jax.data import scenes, text
from codebook_jax.data.scenes.tasks import TASKS as WORLD_TASKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "downstream.json"
PAGE = ROOT / "docs" / "finetuning.md"
START, END = "<!-- downstream -->", "<!-- end of downstream -->"
ARCHITECTURE = (  # patches that keep their places, which two pictures and grounding need
    "model.image.stem=patch",
    "model.image.patch_px=8",
    "model.pool=cls",
    "model.text.position_std=0.0",
)
STEPS = 800  # of pre-training
READ = 4000  # scenes, and examples of each task, whose words are in the vocabulary


class Measured(NamedTuple):
    """What the table says of a task."""

    config: str
    figures: dict[str, str]  # of eval.json, "protocol figure", and their names in the table
    chance: str  # the figure that guessing reaches; empty: it is in the name
    before: tuple[str, ...] = ()  # fields of a stage that comes first


TASKS = {
    "vqa": Measured("vqa", {"student accuracy": "VQA accuracy"}, "student chance"),
    "entailment": Measured(
        "entailment", {"student accuracy": "accuracy"}, "student chance_uniform"
    ),
    "labels": Measured("labels", {"student accuracy": "linear probe"}, "student chance_uniform"),
    "retrieval": Measured(
        "retrieval",
        {"student/dual txt_r1": "R@1 image to text", "student/reranked txt_r1": "re-ranked"},
        "student/dual chance_r1",
    ),
    "nlvr2": Measured(
        "nlvr2",
        {"student accuracy": "accuracy", "student consistency": "consistency"},
        "student chance_uniform",
        (
            "task=text_assignment",
            "data.train=scenes",
            "data.eval=scenes",
            "train.epochs=1",
            "data.scenes_examples=8000",
            "optimizer.freeze=",
            "evaluation.between=()",
        ),
    ),
    "grounding": Measured(
        "grounding",
        {"grounding accuracy": "boxes", "grounding pointing": "pointing"},
        "grounding chance",
    ),
}
ZERO_SHOT = {
    "labels by prompts": ("scenes:labels", "zero_shot accuracy", "zero_shot chance_uniform"),
    "grounding, not fine-tuned": ("scenes:expressions", "grounding accuracy", "grounding chance"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="of pre-training; made if it is not there")
    parser.add_argument("--tasks", nargs="*", default=[], help=f"again: {', '.join(TASKS)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        run = (options.run or Path(folder) / "pretrained").absolute()
        export = run / "export"
        if not export.exists():
            pretrain(run, options.seed)
        for name, start in itertools.product(TASKS, ("pre-trained", "random")):
            task = TASKS[name]
            if name in options.tasks or start not in found.get(name, {}):
                workdir = Path(folder) / f"{name}-{start}"
                own = finetuned(task, export, start, workdir, options.seed)
                found.setdefault(name, {})[start] = own
                keep(found)
        for name, (data, figure, chance) in ZERO_SHOT.items():
            if name not in found:
                command(f"--workdir={run}", "--mode=eval", *base_with(data))
                results = json.loads((run / "eval.json").read_text())
                found[name] = {"figure": at(results, figure), "chance": at(results, chance)}
                keep(found)


def pretrain(run: Path, seed: int) -> None:
    """Pre-trains and exports, with a tokenizer trained on the words of all tasks."""
    _, save = text.open_tokenizer("", run.parent / f"{run.name}-words", words(), 8192)
    save()
    tokenizer = run.parent / f"{run.name}-words" / "tokenizer"
    fields = (*ARCHITECTURE, f"train.steps={STEPS}", f"data.tokenizer={tokenizer}", f"{seed=}")
    command(
        "--config=configs/base.py:tiny",
        f"--workdir={run}",
        *(f"--config.{field}" for field in fields),
    )
    command(f"--workdir={run}", "--mode=export")


def words() -> Iterator[str]:
    """Captions of training, and texts and answers of every task's."""
    for index in range(READ):
        yield from scenes.training_captions(scenes.training_scene(0, index))
        for draw in WORLD_TASKS.values():
            example = draw("train", 0, index)
            yield from (example.text, *dict.fromkeys(example.answers))


def base_with(data: str) -> tuple[str, ...]:
    fields = (*ARCHITECTURE, f"data.test={data}")
    return "--config=configs/base.py:tiny", *(f"--config.{field}" for field in fields)


def finetuned(task: Measured, export: Path, start: str, workdir: Path, seed: int) -> dict[str, Any]:
    """The figures on test data of a fine-tuning, and how long it took."""
    init = f"model:{export}" if start == "pre-trained" else "random"
    fields = [f"--config.init={init}", f"--config.seed={seed}"]
    if start == "random":  # of the same architecture and vocabulary
        same = (*ARCHITECTURE, f"data.tokenizer={export}/tokenizer")
        fields += [f"--config.{field}" for field in same]
    began, config = time.monotonic(), f"--config=configs/finetune_{task.config}.py:tiny"
    if task.before:
        stage = f"--workdir={workdir}-before"
        command(config, stage, *fields, *(f"--config.{field}" for field in task.before))
        command(stage, "--mode=export")
        fields[0] = f"--config.init=model:{workdir}-before/export"
        fields = fields[:2]  # the rest is the export's
    command(config, f"--workdir={workdir}", *fields)
    seconds = time.monotonic() - began
    command(f"--workdir={workdir}", "--mode=eval")
    results = json.loads((workdir / "eval.json").read_text())
    figures = {title: at(results, figure) for figure, title in task.figures.items()}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "figures": figures,
        "chance": at(results, task.chance),
        "seconds": round(seconds),
        "steps": max(row["step"] for row in rows),
    }


def at(results: dict[str, dict[str, float]], figure: str) -> float:
    protocol, name = figure.split()
    return round(results[protocol][name], 1)


def command(*flags: str) -> None:
    """Runs the program; ends this one with what it said if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "codebook_jax.main", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(flags)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def keep(found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    lines = ["| task | figure, % | pre-trained | random weights | chance | steps | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in TASKS:
        own, other = (found.get(name, {}).get(start) for start in ("pre-trained", "random"))
        for title, value in (own or {"figures": {}})["figures"].items():
            beside = f"{other['figures'][title]:.1f}" if other else ""
            first = title == next(iter(own["figures"]))
            tail = (
                f"{own['chance']:.1f} | {own['steps']:,} | {own['seconds']}" if first else " | | "
            )
            lines.append(f"| {name if first else ''} | {title} | {value:.1f} | {beside} | {tail} |")
    for name in ZERO_SHOT:
        if name in found:
            own = found[name]
            lines.append(
                f"| {name} | accuracy | {own['figure']:.1f} | | {own['chance']:.1f} | 0 | |"
            )
    print("\n".join(lines), flush=True)
    if PAGE.exists():
        before, _, rest = PAGE.read_text().partition(START)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{START}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
