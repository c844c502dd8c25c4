"""`--mode=eval`: what a run has learned, its best checkpoint on the test data, in eval.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections

from codebook_jax import build
from codebook_jax.console import say
from codebook_jax.data.progress import Stages
from codebook_jax.data.sources import source_of
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs, write_json
from codebook_jax.run.checkpoint import FOLDER, Checkpoints, Restored

FILE = "eval.json"


def evaluate(config: ml_collections.ConfigDict | None, workdir: Path | str) -> None:
    """Writes `workdir/eval.json` and prints its table; `config` None: the run's own settings.

    All test images are evaluated unless a given `config` limits evaluation.images; the run's own
    value is for validation during training.
    """
    workdir = Path(workdir).absolute()
    check_outputs(workdir, (FILE,))
    images = max(0, config.evaluation.images) if config is not None else 0
    parts = build.build_trained(config, workdir)
    config = parts.config
    restored = restore_trained(parts, workdir, parts.task.checkpoint_items().evaluated)
    spec = config.data.test or config.data.eval
    source = source_of(config, spec, "test")
    limited = 0 < images < len(source)
    first = f", limited to the first {images} by config.evaluation.images" if limited else ""
    say(f"test data {spec}: {len(source):,} images{first}")
    with Stages("evaluated", silent=jax.process_index() != 0) as progress:
        found = parts.task.evaluate(
            restored.state, source, parts.tokenizer, images=images, final=True, progress=progress
        )
    say(found.table)
    if jax.process_index() == 0:
        write_json(workdir / FILE, found.results)


def restore_trained(parts: build.Parts, workdir: Path, items: Sequence[str]) -> Restored:
    """The `items` of the checkpoint best in validation, or of the newest if none was scored."""
    alone, keep = parts.task.checkpoint_items().alone, parts.config.checkpoint.keep
    with Checkpoints(workdir, alone, keep=keep, create=False) as checkpoints:
        step = checkpoints.step_to_use()
        if step is None:
            raise UserError(f"--workdir={workdir} has no checkpoint yet: train it first")
        which = "the best in validation" if step == checkpoints.best_step() else "the newest"
        say(f"the checkpoint of step {step:,} ({which})")
        try:
            return checkpoints.restore(step, parts.task.abstract_state(), items)
        except UserError:
            raise
        except Exception as failure:
            advice = (
                "start training again, which sets it aside and continues from the newest good one"
            )
            if not (workdir / FOLDER / str(step)).exists():
                advice = "a run that is training here has deleted it, start the same command again"
            raise UserError(
                f"the checkpoint of step {step:,} in {workdir} cannot be read "
                f"({type(failure).__name__}): {advice}"
            ) from failure
