"""From a config to the parts of a run: mesh, data, tokenizer, task; refuses what does not fit."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from codebook_jax import programs
from codebook_jax.config import FREE, changed_fields, check_fields, restart_of, with_fields
from codebook_jax.console import say
from codebook_jax.data import text
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.record import sample_captions
from codebook_jax.errors import UserError, reason
from codebook_jax.parallel import memory, sharding
from codebook_jax.parallel.processes import peers
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import Checkpoints, Restored
from codebook_jax.tasks import (
    entailment,
    grounding,
    labels,
    nlvr2,
    pretrain,
    retrieval,
    sequences,
    vqa,
)
from codebook_jax.tasks.task import Task
from codebook_jax.weights import start as weights

Batches = AbstractContextManager[Iterator[NamedTuple]]
TASKS: dict[str, type[Task]] = {  # by config.task
    "pretrain": pretrain.Pretraining,
    "sequences": sequences.Sequences,
    "entailment": entailment.Entailment,
    "nlvr2": nlvr2.Comparing,
    "text_assignment": nlvr2.TextAssignment,
    "retrieval": retrieval.Retrieval,
    "grounding": grounding.Grounding,
    "labels": labels.Labelling,
    "vqa": vqa.Answering,
}


class Parts(NamedTuple):
    """What a run is made of; `config` has every automatic choice resolved."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    source: Source | None  # the training data; None if nothing is trained
    validation: Source | None
    tokenizer: text.Tokenizer
    task: Task
    device: memory.Memory | None = None  # of a device, and how else the task can be made
    compiled: memory.Compiled | None = None  # the step to run; None if nothing is trained
    start: weights.Initial | None = None  # to start from; None: fresh, or the run's own


def task_class(config: ml_collections.ConfigDict) -> type[Task]:
    """The task that `config.task` names; raises UserError for an unknown one."""
    if config.task not in TASKS:
        raise UserError(f"config.task={config.task!r} is not one of the tasks: {', '.join(TASKS)}")
    task = TASKS[config.task]
    if missing := sorted(task.__abstractmethods__):
        raise UserError(
            f"config.task={config.task!r} lacks {', '.join(missing)}: add them to "
            f"{task.__module__}.{task.__qualname__}"
        )
    return task


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field and its value, if no run can start with this config."""
    task_class(config).check(config)
    weights.specs(config.init)


def build_training(
    config: ml_collections.ConfigDict, workdir: Path, *, steps_saved: list[int], learns: bool = True
) -> Parts:
    """The parts of a training run in `workdir`, for a checked config; writes its record.

    `learns=False`, for a run that only keeps its weights, compiles no step. Raises UserError if the
    config cannot be trained.
    """
    saved = bool(steps_saved)
    record = records.read_record(workdir, has_checkpoint=saved)
    before = None if record is None else records.recorded_config(record)
    config, remats = _chosen_before(config, before)
    mesh = sharding.mesh_of(config.mesh)
    sharding.check_batch(mesh, config.data.global_batch, config.optimizer.accumulation)
    kind, also = task_class(config).reads, task_class(config).evaluates
    source = source_of(config, config.data.train, "train", kind=kind)
    validation = source_of(config, config.data.eval, "validation", kind=kind, also=also)
    adopts = task_class(config).adopts
    start = () if saved else weights.read_start(config, adopts)
    asked = weights.adopted(config, start, record, adopts)
    for name, (old, new) in changed_fields(config.to_dict(), asked.to_dict()).items():
        say(f"config.{name}={new} (from the {'weights' if start else 'run'}) instead of {old}")
    asked = config = task_class(config).from_data(asked, before, source)
    task_class(config).check_data(config, config.data.eval, validation)
    shards, size, fingerprint = sharding.data_shards(mesh), len(source), source.fingerprint()
    config = task_class(config).resolve(asked, before, shards=shards, examples=size)
    changes = {}
    if record is not None:
        changes = records.check_restart(workdir, record, config, fingerprint, has_checkpoint=saved)
    tokenizer, keep = text.open_tokenizer(
        weights.tokenizer_of(config, start),
        workdir,
        # None: its words came with the weights
        None if saved and weights.specs(config.init) else sample_captions(source),
        config.data.tokenizer_vocabulary,
        **text.spelling(config.data),
    )
    words = tokenizer.vocabulary
    facts = {"training data": fingerprint, "pairs": size, "vocabulary": words.size}
    peers.connected().compare("data", facts, "every host must read the same files")
    make = task_maker(asked, words, before=before, examples=size, has_checkpoint=saved)
    device, compiled = _fitted(make, config.mesh, remats) if learns else (None, None)
    # Without learning, the choice of fsdp is left to the start that trains, for its devices.
    task = compiled.task if learns else make({"mesh.fsdp": sharding.fsdp_choices(config.mesh)[-1]})
    config = task.config if learns else config
    if "mesh.fsdp" in changes:
        changes["mesh.fsdp"][1] = config.mesh.fsdp
    given = start, config, task.abstract_state(), task.pretrained
    first = weights.initial(*given) if start else None
    if jax.process_index() == 0:
        keep()  # the first write: all checks have passed
        kind, count = task.mesh.devices.flat[0].device_kind, task.mesh.devices.size
        facts = {
            "config": config.to_dict(),
            "data": {"train": repr(source), "examples": size, "fingerprint": fingerprint},
            "devices": {"kind": kind, "count": count, "processes": jax.process_count()},
        }
        step = max(steps_saved, default=0)
        records.write_record(workdir, record, facts, changes=changes, step=step)
    return Parts(config, task.mesh, source, validation, tokenizer, task, device, compiled, first)


def _chosen_before(
    config: ml_collections.ConfigDict, before: ml_collections.ConfigDict | None
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with the run's own choices, which the last bits of its weights depend on; and the
    remats to try, from the run's own on, if its devices are smaller now.
    """
    if before is None:
        return config, memory.remats_of(config.model.remat)
    if before.mesh.fsdp in sharding.fsdp_choices(config.mesh):
        config = with_fields(config, {"mesh.fsdp": before.mesh.fsdp})
    remats = memory.remats_of(config.model.remat, before.model.remat)
    if before.model.remat == remats[0]:
        config = with_fields(config, {"model.remat": remats[0]})
    return config, remats


def _fitted(
    make: memory.Make, mesh: ml_collections.ConfigDict, remats: Sequence[str]
) -> tuple[memory.Memory, memory.Compiled]:
    """The memory of a device, and the step compiled for it; UserError if it does not fit."""
    device = memory.Memory(make, memory.device_memory())
    compiled = device.first_fit(sharding.fsdp_choices(mesh), remats)
    programs.release()
    device = memory.Memory(make, memory.device_memory())  # compiling took some of a host's memory
    device.check(compiled)
    return device, compiled


def task_maker(
    config: ml_collections.ConfigDict,
    vocabulary: text.Vocabulary,
    *,
    before: ml_collections.ConfigDict | None = None,
    examples: int = 1,
    has_checkpoint: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> memory.Make:
    """A function from changes of the config, by dotted name, to the task with them; it raises
    UserError for what does not fit together, or what the run, whose config was `before`, must keep.
    """

    def make(changes: Mapping[str, Any]) -> Task:
        fixed = [name for name in changes if restart_of(name) != FREE]
        if has_checkpoint and fixed:
            raise UserError(f"a run with checkpoints keeps its {', '.join(fixed)}")
        changed = with_fields(config, dict(changes))
        mesh = sharding.mesh_of(changed.mesh, devices)
        sharding.check_batch(mesh, changed.data.global_batch, changed.optimizer.accumulation)
        task, shards = task_class(changed), sharding.data_shards(mesh)
        changed = task.resolve(changed, before, shards=shards, examples=examples)
        return task(changed, vocabulary, mesh)

    return make


def first_state(parts: Parts) -> Any:
    """The state of a new run: fresh, or with the parameters that config.init names, printed."""
    state = jax.block_until_ready(parts.task.init_state(parts.config.seed))
    programs.release()
    if parts.start is None:
        return state
    say(parts.start.report)
    return weights.placed(state, parts.start.arrays)


def between(task: Task, start: tuple[weights.Part, ...], trained: Any, share: float) -> Any:
    """Parameters that are `share` of the way from those of `start` to the trained ones."""
    first = starting_parameters(task, start)
    return jax.tree.map(lambda old, new: (1 - share) * old + share * new, first, trained)


def starting_parameters(task: Task, start: tuple[weights.Part, ...]) -> Any:
    """What training began with: the parameters of `start`, fresh ones where it has none."""
    name = task.checkpoint_items().trained
    first = weights.initial(start, task.config, task.abstract_state(), task.pretrained)
    fresh = {name: task.init_parameters(task.config.seed)}
    return weights.placed(fresh, first.arrays)[name]


def build_trained(
    config: ml_collections.ConfigDict | None, workdir: Path, flags: Container[str] | None = None
) -> Parts:
    """The parts to use a trained run in `workdir`; `config` (None: the run's own) may change only
    how it is used, and `flags` are the fields that flags set: see `record.trained_config`.
    """
    record = records.read_record(workdir)
    if record is None:
        raise UserError(
            f"--workdir={workdir} holds no trained run (no {records.RECORD}): train one there first"
        )
    asked = config is not None
    if asked:
        check_fields(config)
    adopts = task_class(records.recorded_config(record)).adopts
    config = records.trained_config(workdir, record, config, flags, adopts)
    config = task_class(config).as_used(config, records.recorded_config(record))
    trained = sharding.axes_of_trained(config.mesh, record["config"]["mesh"]["fsdp"], asked=asked)
    config = with_fields(config, {"mesh": trained})
    mesh = sharding.mesh_of(config.mesh)
    size = config.data.tokenizer_vocabulary
    tokenizer, keep = text.open_tokenizer(config.data.tokenizer, workdir, None, size)
    keep()
    task = task_class(config)(config, tokenizer.vocabulary, mesh)
    return Parts(config, mesh, None, None, tokenizer, task)


def restore_trained(
    parts: Parts, workdir: Path, items: Sequence[str], *, newest: bool = False
) -> Restored:
    """The `items` of the checkpoint best in validation, or of the newest if none was scored or it
    is asked for.
    """
    alone, keep = parts.task.checkpoint_items().alone, parts.config.checkpoint.keep
    with Checkpoints(workdir, alone, keep=keep, create=False) as checkpoints:
        step = max(checkpoints.steps(), default=None) if newest else checkpoints.step_to_use()
        if step is None:
            raise UserError(f"--workdir={workdir} has no checkpoint yet: train it first")
        which = "the best in validation" if step == checkpoints.best_step() else "the newest"
        say(f"the checkpoint of step {step:,} ({which})")
        try:
            return checkpoints.restore(step, parts.task.abstract_state(), items)
        except Exception as failure:
            raise UserError(
                f"the checkpoint of step {step:,} in {workdir} cannot be read ({reason(failure)}): "
                "start the same command again if a run that is training here has just replaced it; "
                "else train again, which continues from the newest good one"
            ) from failure


def batches(parts: Parts, *, start_step: int, workers: int | None = None) -> Batches:
    """This process's rows of every batch from `start_step` on; `workers` None: as configured."""
    workers = parts.config.data.workers if workers is None else workers
    return parts.task.batches(parts.source, parts.tokenizer, start_step=start_step, workers=workers)


def validation_images(config: ml_collections.ConfigDict) -> int:
    """How many images to validate on during training (0: all); evaluation.images=-1 means 1,000,
    but 32 for a model above `tiny` on a CPU, where more would take an hour.
    """
    if config.evaluation.images >= 0:
        return config.evaluation.images
    return 32 if jax.default_backend() == "cpu" and config.size != "tiny" else 1000


def trained_parameters(task: Task) -> int:
    """How many parameters a task trains."""
    return parameter_count(getattr(task.abstract_state(), task.checkpoint_items().trained))


def parameter_count(tree: Any) -> int:
    """How many numbers a tree of arrays holds; the arrays may be abstract."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
