"""`--mode=export`: a trained model as one self-contained folder, by config.export.format:

codis         export/, what `codebook_jax.load` reads: export.json (format, step, sizes, versions),
              config.json (the run's record), tokenizer/, and Orbax's student/ (towers, matching,
              codebook, temperature) and, with config.export.teacher, teacher/ (towers)
huggingface   export_huggingface/, image/ for ViTModel and text/ for BertModel: weights/write.py
albef         export_albef/, a whole model for ALBEF's code: weights/write.py
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from codebook_jax import build
from codebook_jax.console import say
from codebook_jax.data import text
from codebook_jax.errors import UserError, reason
from codebook_jax.files import check_outputs, refused, write_json
from codebook_jax.parallel import sharding
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import Restored
from codebook_jax.run.ownership import owned
from codebook_jax.weights import start as weights
from codebook_jax.weights.load import FOLDER, FORMAT, LOADED, MANIFEST, MEANS
from codebook_jax.weights.write import write_albef, write_huggingface

FORMATS = {  # by config.export.format: the folder in the workdir, and how to load it
    "codis": (FOLDER, "import codebook_jax; model = codebook_jax.load('{folder}')"),
    "huggingface": (
        f"{FOLDER}_huggingface",
        "from transformers import BertModel, ViTModel\n"
        "ViTModel.from_pretrained('{folder}/image', add_pooling_layer=False)\n"
        "BertModel.from_pretrained('{folder}/text', add_pooling_layer=False)",
    ),
    "albef": (
        f"{FOLDER}_albef",
        "from safetensors.torch import load_file\n"
        "model.load_state_dict(load_file('{folder}/model.safetensors'))  # ALBEF's own model; it "
        "has no codebook",
    ),
}


def export(
    config: ml_collections.ConfigDict | None,
    workdir: Path | str,
    flags: Container[str] | None = None,
) -> None:
    """Writes the best checkpoint by validation into `workdir`; replaces an older export at the end;
    `config` and `flags` as in `build.build_trained`.
    """
    workdir = Path(workdir).absolute()
    parts = build.build_trained(config, workdir, flags)
    name, use = FORMATS[parts.config.export.format]
    items = parts.task.export_items(parts.config)
    folder, first = workdir / name, jax.process_index() == 0
    draft, replaced = (folder.with_name(f".{name}.{end}") for end in ("draft", "replaced"))
    with _alone(folder, draft, replaced) if first else contextlib.nullcontext():
        _together("the draft's folder is empty")
        share = parts.config.export.between  # below 1, of the last weights, as training tried it
        restored = build.restore_trained(parts, workdir, items, newest=share < 1)
        try:
            _write(draft, parts, restored, items)
        except (OSError, UserError):
            raise
        except Exception as failure:  # in which Orbax, tensorstore, safetensors wrap a full disk
            raise UserError(
                f"the export could not be written to {workdir} ({reason(failure)}), and an earlier "
                "export is unchanged: fix this and export again"
            ) from failure
        if first:
            again = ", replacing the previous export" if folder.exists() else ""
            with refused(folder):
                if folder.exists():
                    folder.rename(replaced)  # a folder cannot be renamed onto one that holds files
                draft.rename(folder)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            mixed = f", {share:.0%} of the way from the start" if share < 1 else ""
            say(f"exported the {', '.join(items)}{mixed}, {size / 1e6:,.1f} MB, to {folder}{again}")
            if parts.config.task not in LOADED:
                use = "start another task from it: --config.init=model:{folder}"
            say(use.format(folder=folder))
        _together("the export is in place")


def _write(draft: Path, parts: build.Parts, restored: Restored, items: tuple[str, ...]) -> None:
    """Every process writes its part of our own format, the first one everything else."""
    config, form, first = parts.config, parts.config.export.format, jax.process_index() == 0
    state = {item: getattr(restored.state, item) for item in items}
    if config.export.between < 1:
        start = weights.read_start(config, parts.task.adopts)
        if not start:
            raise UserError(
                f"config.export.between={config.export.between:g} needs the weights that training "
                f"began with, but config.init={config.init!r}: leave it out"
            )
        name = parts.task.checkpoint_items().trained
        state[name] = build.between(parts.task, start, state[name], config.export.between)
    tokenizer = draft.parent / text.FOLDER
    if form != "codis":
        if jax.process_count() > 1:
            state = multihost_utils.process_allgather(state, tiled=True)
        if first:
            write = write_albef if form == "albef" else write_huggingface
            arrays = {name: np.asarray(leaf) for name, leaf in sharding.named(state)}
            write(draft, arrays, config, parts.tokenizer.vocabulary, tokenizer)
        return
    with ocp.StandardCheckpointer() as checkpointer:
        for item in items:
            checkpointer.save(draft / item, state[item])
            checkpointer.wait_until_finished()
    if not first:
        return
    record = records.read_record(draft.parent) | {"config": config.to_dict()}
    write_json(draft / records.RECORD, record)
    shutil.copytree(tokenizer, draft / text.FOLDER)
    manifest = {
        "format": MEANS if config.model.pool == "mean" else FORMAT,
        "task": config.task,
        "size": config.size,
        "step": restored.step,
        "items": list(items),
        "parameters": {item: build.parameter_count(state[item]) for item in items},
        "image_size_px": config.model.image.size_px,
        "max_tokens": config.model.text.max_tokens,
        "dim": config.model.dim,
        "codes": config.codebook.size if "codebook" in config else 0,
        "vocabulary": parts.tokenizer.vocabulary.size,
        "versions": records.package_versions(),
        "git": records.git_commit(),
    }
    write_json(draft / MANIFEST, manifest)


@contextlib.contextmanager
def _alone(folder: Path, draft: Path, replaced: Path) -> Iterator[None]:
    """An empty draft that no other export writes to, removed at the end; raises UserError if one
    does, or the folder cannot be written.
    """

    def put_back() -> None:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)

    check_outputs(folder.parent, folders=(folder.name,))
    with owned(folder.parent, f".{folder.name}.running"), contextlib.ExitStack() as leaving:
        put_back()  # what a killed export moved away
        for path in (draft, replaced):
            shutil.rmtree(path, ignore_errors=True)  # left by a killed export
            leaving.callback(shutil.rmtree, path, ignore_errors=True)
        leaving.callback(put_back)  # the first to be called
        draft.mkdir()
        yield


def _together(point: str) -> None:
    """Waits until every process of the run gets here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)
