"""`--mode=eval`: what a run has learned, its best checkpoint on the test data, in eval.json."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

import jax
import ml_collections

from codebook_jax import build
from codebook_jax.console import Stages, say
from codebook_jax.data.sources import Source, source_of
from codebook_jax.evaluation.stage import Cache, digest
from codebook_jax.files import check_outputs, write_json
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import Restored
from codebook_jax.run.metrics import RESULTS
from codebook_jax.run.ownership import owned

CACHE = "cache"  # in the workdir while an evaluation is not finished: a folder for each process


def evaluate(
    config: ml_collections.ConfigDict | None,
    workdir: Path | str,
    flags: Container[str] | None = None,
) -> None:
    """Writes `workdir/eval.json` and prints its table; `config` and `flags`: see
    `build.build_trained`. If it is killed, the next call goes on where it was.

    All test images are evaluated unless a given `config` limits evaluation.images; the run's own
    value is for validation during training.
    """
    workdir = Path(workdir).absolute()
    check_outputs(workdir, (RESULTS,), (CACHE,))
    images = max(0, config.evaluation.images) if config is not None else 0
    parts = build.build_trained(config, workdir, flags)
    config, resumes = parts.config, parts.task.resumes
    spec = config.data.test or config.data.eval
    with _own_cache(workdir) as folder:
        source = source_of(config, spec, "test", kind=parts.task.reads, also=parts.task.evaluates)
        parts.task.check_data(config, spec, source)
        restored = build.restore_trained(parts, workdir, parts.task.checkpoint_items().evaluated)
        limited = 0 < images < len(source)
        first = f", limited to the first {images} by config.evaluation.images" if limited else ""
        say(f"test data {spec}: {len(source):,} {source.evaluated}{first}")
        kept = {"cache": Cache(folder, _key(parts, restored, source, images))} if resumes else {}
        with Stages("evaluated") as stages:
            kept["progress"] = stages if jax.process_index() == 0 else None
            found = parts.task.evaluate(
                restored.state, source, parts.tokenizer, images=images, final=True, **kept
            )
        say(found.table)
        if jax.process_index() == 0:
            write_json(workdir / RESULTS, found.results)
            for name, write in found.files:
                say(write(workdir / name))
        if limited and found.files:
            say(
                f"only the first {images:,} of {len(source):,} {source.evaluated} were evaluated: "
                "for a submission of all, leave out config.evaluation.images"
            )


@contextlib.contextmanager
def _own_cache(workdir: Path) -> Iterator[Path]:
    """The folder in which this process may keep what one evaluation of the workdir at a time makes;
    it is removed if that succeeds.
    """
    cache, own = workdir / CACHE, jax.process_index()
    with owned(workdir, f".{CACHE}.running") if own == 0 else contextlib.nullcontext():
        peers.connected().exchange("cache owned", None)
        yield cache / str(own)
        peers.connected().exchange("evaluated", None)
        shutil.rmtree(cache if own == 0 else cache / str(own), ignore_errors=True)


def _key(parts: build.Parts, restored: Restored, source: Source, images: int) -> str:
    """All that the features and scores of an evaluation depend on, besides the tokens of texts and
    the choice of pairs, which its stages compare themselves. Raises UserError if hosts differ.
    """
    config, state = parts.config, sharding.named(restored.state)
    facts = {
        "step": restored.step,
        "weights": digest(sharding.to_host(leaf) for _, leaf in state),
        "model": config.model.to_dict(),
        "score": config.evaluation.rerank_score,
        "data": [repr(source), source.fingerprint(), images],
        "places": [config.data.image_root, config.data.path_map],
        "device": parts.mesh.devices.flat[0].device_kind,
        "code": records.code_digest(),
        "versions": records.package_versions(),
    }
    peers.connected().compare("evaluation", facts, "every host must read the same files")
    return json.dumps(facts)
