"""`--mode=import`: a run that begins with public weights, as its checkpoint of step 0."""

from __future__ import annotations

from pathlib import Path

import ml_collections

from codebook_jax import build, summary, train
from codebook_jax.console import say
from codebook_jax.errors import UserError
from codebook_jax.weights.start import specs


def import_weights(config: ml_collections.ConfigDict, workdir: Path | str) -> None:
    """Makes a run whose checkpoint of step 0 holds the weights that config.init names."""
    workdir = Path(workdir).absolute()
    build.check(config)
    if not specs(config.init):
        raise UserError(
            "config.init=random names no weights to import: give some, e.g. "
            "--config.init=model:ALBEF.pth"
        )
    with train.own_checkpoints(config, workdir) as checkpoints:
        if saved := checkpoints.steps():
            raise UserError(
                f"--workdir={workdir} already holds a run (step {saved[-1]:,}): give another "
                "folder to import into"
            )
        parts = build.build_training(config, workdir, steps_saved=[], learns=False)
        summary.announce(parts)
        checkpoints.save(0, build.first_state(parts), train.meta_of(parts, 0, unreadable=0))
        checkpoints.wait()
    say(summary.next_steps(0, workdir))
