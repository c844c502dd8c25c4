"""A whole small run: one of its kind is trained once per test session (`straight`, in
conftest.py).
"""

import subprocess
import sys
from pathlib import Path

from configs import base
from launch import local

ROOT = Path(__file__).parent.parent
STEPS = 20
SMALL = {
    "model.image.size_px": 32,
    "model.image.width": 32,
    "model.image.depth": 1,
    "model.image.heads": 2,
    "model.text.width": 32,
    "model.text.depth": 1,
    "model.text.fusion_depth": 1,
    "model.text.heads": 2,
    "model.dim": 16,
    "codebook.size": 16,
    "codebook.iterations": 5,
    "queue.size": 32,
    "data.global_batch": 8,
    "data.scenes_examples": 64,
    "data.tokenizer_vocabulary": 500,
    "data.threads": 1,
    "data.prefetch": 2,
    "optimizer.warmup_steps": 5,
    "train.steps": STEPS,
    "log_every_steps": 1,
    "checkpoint.every_steps": 5,
    "evaluation.every_steps": 10,
    "evaluation.images": 8,
    "evaluation.batch": 8,
    "evaluation.rerank_top_k": 2,
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


def config_of(**changes):
    config = base.get_config("tiny")
    config.update_from_flattened_dict(SMALL | changes)
    return config.lock()


def command(workdir, **changes):
    fields = [f"--config.{name}={value}" for name, value in (SMALL | changes).items()]
    config = f"--config={ROOT / 'configs' / 'base.py'}:tiny"
    return [
        sys.executable,
        str(ROOT / "tests" / "faulty_run.py"),
        config,
        f"--workdir={workdir}",
        *fields,
    ]
