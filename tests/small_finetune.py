"""Small fine-tuning runs in this process, from the export of a small pre-trained run."""

import contextlib
import io
import json
import runpy
from types import SimpleNamespace

import jax
import numpy as np
from small_run import ROOT, SMALL

from codebook_jax import train
from codebook_jax.config import flat
from codebook_jax.parallel import sharding
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.run.metrics import read_rows
from codebook_jax.tools import evaluate, export

# By config.task: its recipe, and what it trains on.
TASKS = {
    "entailment": ("entailment", "scenes:statements"),
    "nlvr2": ("nlvr2", "scenes:comparisons"),
    "text_assignment": ("nlvr2", "scenes"),
    "vqa": ("vqa", "scenes:questions"),
    "labels": ("labels", "scenes:labels"),
    "retrieval": ("retrieval", "scenes"),
    "grounding": ("grounding", "scenes:expressions"),
}
STEPS = 4
FIELDS = SMALL | {
    "train.epochs": 0.0,
    "train.steps": STEPS,
    "checkpoint.every_steps": 2,
    "evaluation.every_steps": STEPS,
    "evaluation.images": 8,
    "evaluation.between": (0.5,),
    "optimizer.warmup_steps": 2,
    "vqa.decoder_depth": 1,
}
NOT_SET = ("model.dim", "evaluation.rerank_top_k")  # of the export, or of the recipe


def recipe_of(task):
    """The unlocked config of the task's recipe, in the smallest size."""
    config = runpy.run_path(str(ROOT / "configs" / f"finetune_{TASKS[task][0]}.py"))
    config = config["get_config"]("tiny").unlock()
    config.task = task
    return config


def fields_of(task, **changes):
    """The fields that make the task's recipe small, by dotted name."""
    known, data = flat(recipe_of(task).to_dict()), TASKS[task][1]
    small = {name: value for name, value in FIELDS.items() if name in known}
    small = {name: value for name, value in small.items() if name not in NOT_SET}
    if TASKS[task][0] == "nlvr2":  # all of it learns, also from a teacher, as above tiny
        small |= {"optimizer.freeze": "", "teacher.use": True, "teacher.alpha": 0.4}
    return small | {"task": task, "data.train": data, "data.eval": data} | changes


def config_of(task, **changes):
    config = recipe_of(task)
    config.update_from_flattened_dict(fields_of(task, **changes))
    return config.lock()


def main_flags(task, **changes):
    """The flags of the command of the same run."""
    values = fields_of(task, **changes)
    config = ROOT / "configs" / f"finetune_{TASKS[task][0]}.py"
    return [f"--config={config}:tiny", *(f"--config.{n}={value}" for n, value in values.items())]


@contextlib.contextmanager
def saying():
    """What is printed meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        yield said


def trained(config, workdir):
    """A run to its end, and what it printed."""
    with saying() as said:
        assert train.fit(config, workdir)
    return SimpleNamespace(config=config, workdir=workdir, said=said.getvalue())


def evaluated(workdir, config=None):
    """(the figures of eval.json, what was printed)"""
    with saying() as said:
        evaluate.evaluate(config, workdir)
    return json.loads((workdir / "eval.json").read_text()), said.getvalue()


def exported(workdir, config=None):
    """The arrays of the student exported from the run, by name."""
    with saying():
        export.export(config, workdir)
    return read_arrays(workdir / "export" / "student")


def saved(workdir, step, item="student"):
    """The arrays of a checkpoint's item, by name."""
    return read_arrays(workdir / "checkpoints" / str(step) / item)


def rows_of(workdir):
    return read_rows(workdir / "metrics.jsonl")


def losses(workdir):
    return [row["loss"] for row in rows_of(workdir) if "loss" in row]


def on_one_device(monkeypatch, folder):
    """Lets the runs of this process use one device, and a folder of compiled programs."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: mesh)
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    for name, value in options.items():
        jax.config.update(name, value)


def picture(seed=0, side=32):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
