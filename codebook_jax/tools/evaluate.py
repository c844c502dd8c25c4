"""Evaluation of what a workdir has learned: its best checkpoint on the test data, written to
eval.json.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import jax
import ml_collections

from codebook_jax import build
from codebook_jax.console import say
from codebook_jax.data.progress import Stages
from codebook_jax.data.sources import source_of
from codebook_jax.errors import UserError
from codebook_jax.evaluation import retrieval
from codebook_jax.files import check_outputs
from codebook_jax.run.checkpoint import FOLDER, Checkpoints, Restored

FILE = "eval.json"


def evaluate(
    config: ml_collections.ConfigDict | None,
    workdir: Path | str,
    flags: Container[str] | None = None,
) -> None:
    """Writes `workdir/eval.json` and prints its table; `config` and `flags`: see
    `build.build_trained`.

    All test images are evaluated unless a given `config` limits evaluation.images; the run's own
    value is for validation during training.
    """
    workdir = Path(workdir).absolute()
    check_outputs(workdir, (FILE,))
    images = max(0, config.evaluation.images) if config is not None else 0
    parts = build.build_trained(config, workdir, flags)
    config = parts.config
    restored = restore_trained(parts, workdir, items=("student", "teacher"))
    spec = config.data.test or config.data.eval
    source = source_of(config, spec, "test")
    first = (
        f", limited to the first {images} by config.evaluation.images"
        if 0 < images < len(source)
        else ""
    )
    say(f"test data {spec}: {len(source):,} images{first}")
    with Stages("evaluated", silent=jax.process_index() != 0) as progress:
        results = retrieval.evaluate(
            parts.task,
            restored.state,
            source,
            parts.tokenizer,
            config,
            images=images,
            rerank=config.evaluation.rerank_top_k > 0,
            progress=progress,
        )
    say(retrieval.format_table(results))
    if jax.process_index() == 0:
        retrieval.write_eval_json(workdir / FILE, results)


def restore_trained(parts: build.Parts, workdir: Path, items: tuple[str, ...]) -> Restored:
    """The `items` of the checkpoint best in validation, or of the newest if none was scored; prints
    which.
    """
    with Checkpoints(workdir, keep=parts.config.checkpoint.keep, create=False) as checkpoints:
        step = checkpoints.step_to_use()
        if step is None:
            raise UserError(f"--workdir={workdir} has no checkpoint yet: train it first")
        best = step == checkpoints.best_step()
        say(
            f"the checkpoint of step {step:,} "
            f"({'the best in validation' if best else 'the newest'})"
        )
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
