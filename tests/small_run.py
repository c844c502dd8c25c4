"""A whole small run; `straight` in conftest.py trains one per test session."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from codebook_jax.run.metrics import read_rows
from configs import paper
from launch import local

ROOT = Path(__file__).parent.parent
STEPS = 20
SECTIONS = {
    "model": dict(dim=16),
    "model.image": dict(size_px=32, width=32, depth=1, heads=2),
    "model.text": dict(width=32, depth=1, fusion_depth=1, heads=2),
    "codebook": dict(size=16, iterations=5),
    "queue": dict(size=32),
    "data": dict(
        global_batch=8, scenes_examples=64, tokenizer_vocabulary=500, threads=1, prefetch=2
    ),
    "optimizer": dict(warmup_steps=5),
    "train": dict(steps=STEPS),
    "checkpoint": dict(every_steps=5),
    "evaluation": dict(every_steps=10, images=8, batch=8, rerank_top_k=2),
}
SMALL = {"log_every_steps": 1} | {
    f"{section}.{name}": value
    for section, fields in SECTIONS.items()
    for name, value in fields.items()
}


def together(commands, environment, outputs=None, count=None):
    """Processes of one run of `count` (default: one per command), each told of the others as by
    launch/local.py.

    Their output goes to the files `outputs`, or to pipes.
    """
    port, count = local.free_port(), count or len(commands)
    return [
        subprocess.Popen(
            command,
            env={**environment, **local.environment(own, count, port)},
            stdout=outputs[own] if outputs else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        for own, command in enumerate(commands)
    ]


def ran(command, environment=None, **options):
    """The process of a command that has run to its end; what it printed is text."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT, **options
    )


def kill_after(command, environment, workdir, step):
    """Starts a run and kills it once it has logged `step`."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or max([0, *(row["step"] for row in read_rows(metrics))]) < step:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def config_of(recipe=paper, **changes):
    config = recipe.get_config("tiny")
    config.update_from_flattened_dict(SMALL | changes)
    return config.lock()


def command(workdir, recipe="paper", **changes):
    fields = [f"--config.{name}={value}" for name, value in (SMALL | changes).items()]
    config = f"--config={ROOT / 'configs' / recipe}.py:tiny"
    program = [sys.executable, str(ROOT / "tests" / "faulty_run.py")]
    return [*program, config, f"--workdir={workdir}", *fields]
