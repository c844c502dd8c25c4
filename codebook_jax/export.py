"""A trained model as one folder that needs nothing else: `--mode=export` writes what `codebook_jax.load` reads.

export/export.json   what is inside: format, step, sizes, versions
       config.json   the run's record, with its config
       tokenizer/    the run's tokenizer
       student/      Orbax: towers, matching, codebook, temperature
       teacher/      Orbax: towers, where config.export.teacher asked for them
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from codebook_jax import build, evaluate
from codebook_jax import workdir as records
from codebook_jax.checkpoint import Restored, reason
from codebook_jax.data import text
from codebook_jax.errors import UserError
from codebook_jax.inference import FOLDER, FORMAT, MANIFEST
from codebook_jax.metrics import say

_DRAFT, _REPLACED = f".{FOLDER}.draft", f".{FOLDER}.replaced"


def export(config: ml_collections.ConfigDict | None, workdir: Path | str) -> None:
    """Writes `workdir/export`, from the checkpoint best in validation; an older one is replaced when this is complete."""
    workdir = Path(workdir).absolute()
    parts = build.build_trained(config, workdir)
    items = ("student", "teacher") if parts.config.export.teacher else ("student",)
    restored = evaluate.restore_trained(parts, workdir, items)
    folder, draft = workdir / FOLDER, workdir / _DRAFT
    first = jax.process_index() == 0
    if first:
        _begin(workdir)
    _together("the draft's folder is empty")
    try:
        _write(draft, parts, restored, items)
    except BaseException:
        if first:  # it takes the space that another try needs
            shutil.rmtree(draft, ignore_errors=True)
        raise
    if first:
        again = ", in place of the one before" if _put_in_place(workdir) else ""
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"exported the {' and the '.join(items)}, {size / 1e6:,.1f} MB, to {folder}{again}")
        say(f"import codebook_jax; model = codebook_jax.load({str(folder)!r})")
    _together("the export is in place")


def _write(
    draft: Path,
    parts: build.Parts,
    restored: Restored,
    items: tuple[str, ...],
) -> None:
    """Every process its part of the arrays, the first one all else."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            for item in items:
                checkpointer.save(draft / item, getattr(restored.state, item))
                checkpointer.wait_until_finished()
    except OSError:
        raise
    except Exception as failure:  # Orbax and tensorstore wrap a full disk in errors of their own
        raise UserError(
            f"the export could not be written to {draft.parent} ({reason(failure)}), and one from before is as "
            "it was: mend this and export again"
        ) from failure
    if jax.process_index() != 0:
        return
    record = records.read_record(draft.parent) | {"config": parts.config.to_dict()}
    records.write_json(draft / records.RECORD, record)
    shutil.copytree(draft.parent / text.FOLDER, draft / text.FOLDER)
    records.write_json(draft / MANIFEST, _manifest(parts, restored, items))


def _manifest(parts: build.Parts, restored: Restored, items: tuple[str, ...]) -> dict[str, Any]:
    config = parts.config
    return {
        "format": FORMAT,
        "task": config.task,
        "size": config.size,
        "step": restored.step,
        "items": list(items),
        "parameters": {
            item: build.parameter_count(getattr(restored.state, item)) for item in items
        },
        "image_size_px": config.model.image.size_px,
        "max_tokens": config.model.text.max_tokens,
        "dim": config.model.dim,
        "codes": config.codebook.size,
        "vocabulary": parts.tokenizer.vocabulary.size,
        "versions": records.package_versions(),
        "git": records.git_commit(),
    }


def _begin(workdir: Path) -> None:
    """An empty draft, whatever an export that was killed has left."""
    folder, draft, replaced = workdir / FOLDER, workdir / _DRAFT, workdir / _REPLACED
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for leftover in (draft, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()


def _put_in_place(workdir: Path) -> bool:
    """The complete draft becomes the export; whether there was one before."""
    folder, replaced = workdir / FOLDER, workdir / _REPLACED
    there = folder.exists()
    if there:
        folder.rename(replaced)  # no file system renames a folder onto one that holds files
    try:
        (workdir / _DRAFT).rename(folder)
    except OSError:
        if there:
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return there


def _together(point: str) -> None:
    """Waits until every process of the run is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)
