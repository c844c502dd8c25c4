"""`--mode=eval`: what a run has learned, its best checkpoint on the test data, in eval.json."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import jax
import ml_collections

from codebook_jax import build
from codebook_jax.console import Stages, say
from codebook_jax.data.sources import source_of
from codebook_jax.files import check_outputs, write_json
from codebook_jax.run.metrics import RESULTS


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
    check_outputs(workdir, (RESULTS,))
    images = max(0, config.evaluation.images) if config is not None else 0
    parts = build.build_trained(config, workdir, flags)
    config = parts.config
    restored = build.restore_trained(parts, workdir, parts.task.checkpoint_items().evaluated)
    spec = config.data.test or config.data.eval
    source = source_of(config, spec, "test", kind=parts.task.reads, also=parts.task.evaluates)
    limited = 0 < images < len(source)
    first = f", limited to the first {images} by config.evaluation.images" if limited else ""
    say(f"test data {spec}: {len(source):,} {source.evaluated}{first}")
    with Stages("evaluated") as stages:
        progress = stages if jax.process_index() == 0 else None
        found = parts.task.evaluate(
            restored.state, source, parts.tokenizer, images=images, final=True, progress=progress
        )
    say(found.table)
    if jax.process_index() == 0:
        write_json(workdir / RESULTS, found.results)
        for name, write in found.files:
            say(write(workdir / name))
    if found.unwritten:
        say(found.unwritten)
