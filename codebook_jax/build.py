"""From a config to the parts of a run: mesh, data, tokenizer, task. Raises UserError for settings
that do not fit.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from codebook_jax import modes
from codebook_jax.config import check, check_values
from codebook_jax.console import say
from codebook_jax.data.batch import Batch
from codebook_jax.data.pipeline import training_batches
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.text import (
    Tokenizer,
    Vocabulary,
    open_tokenizer,
    said_unknown,
    spelling,
    tokenizer_for_run,
    unknown_in,
)
from codebook_jax.errors import UserError
from codebook_jax.evaluation import retrieval
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.parallel import axes, memory, sharding
from codebook_jax.parallel.processes import peers
from codebook_jax.run import record as records
from codebook_jax.tasks import pretrain
from codebook_jax.weights.start import (
    Initial,
    Part,
    adopted,
    initial,
    placed,
    read_start,
    specs,
    tokenizer_of,
)

TASKS = {"pretrain": pretrain.create}


class Parts(NamedTuple):
    """What a run is made of; `config` has every automatic choice resolved."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    source: Source | None  # the training data; None if nothing is trained
    validation: Source | None
    tokenizer: Tokenizer
    task: Any
    device: memory.Memory | None = None  # of a device, and how else the task can be made
    compiled: memory.Compiled | None = None  # the step to run; None if nothing is trained
    start: Initial | None = None  # parameters to start from; None: fresh ones, or the run's own


def build_training(
    config: ml_collections.ConfigDict, workdir: Path, *, steps_saved: list[int], learns: bool = True
) -> Parts:
    """The parts of a training run in `workdir`; writes its record. Raises UserError if the config
    cannot be trained.

    `learns=False`, for a run that only keeps its weights, skips the memory check.
    """
    check(config)
    record = records.read_record(workdir)
    if record is None and steps_saved:
        raise UserError(
            f"--workdir={workdir} holds checkpoints but no {records.RECORD} to compare this config "
            "with: put the file back, or give another --workdir"
        )
    if record is not None:
        fsdp = axes.inherited(config.mesh, record["config"]["mesh"]["fsdp"])
        config = records.with_fields(config, {"mesh.fsdp": fsdp})
    asked_groups = config.itm.groups
    config, _ = _split(config, record)
    source = source_of(config, config.data.train, "train")
    validation = source_of(config, config.data.eval, "validation")
    start = () if steps_saved else read_start(config)
    config = _resolve_alpha(_adopt(config, start, record), len(source))
    fingerprint = source.fingerprint()
    saved = bool(steps_saved)
    changes = _changes(workdir, record, config, fingerprint, has_checkpoint=saved)
    tokenizer, keep = open_tokenizer(
        tokenizer_of(config, start),
        workdir,
        None if saved and specs(config.init) else source,  # its words came with the weights
        config.data.tokenizer_vocabulary,
        **spelling(config.data),
    )
    words = tokenizer.vocabulary
    facts = {"training data": fingerprint, "pairs": len(source), "vocabulary": words.size}
    peers.connected().compare("data", facts, "every host must read the same files")
    asked = records.with_fields(config, {"itm.groups": asked_groups})
    make = task_maker(asked, words, record=record, has_checkpoint=saved)
    device = memory.Memory(make, memory.device_memory())
    compiled, fsdp = None, axes.choices(config.mesh)
    if learns:
        compiled = device.first_fit(fsdp)
        # read again: compiling has taken some of a host's memory
        device = memory.Memory(make, memory.device_memory())
        device.check(compiled)
        task, config = compiled.task, compiled.task.config
    else:  # the choice is left to the start that trains, for its devices
        task = make({"mesh.fsdp": fsdp[-1]})
    mesh = task.mesh
    if "mesh.fsdp" in changes:
        changes["mesh.fsdp"][1] = config.mesh.fsdp
    first = initial(start, config, task.abstract_state()) if start else None
    if jax.process_index() == 0:
        keep()  # the first write: all checks have passed
        records.write_record(
            workdir,
            record,
            config,
            data={"train": repr(source), "examples": len(source), "fingerprint": fingerprint},
            devices={
                "kind": mesh.devices.flat[0].device_kind,
                "count": mesh.devices.size,
                "processes": jax.process_count(),
            },
            changes=changes,
            step=max(steps_saved, default=0),
        )
    return Parts(config, mesh, source, validation, tokenizer, task, device, compiled, first)


def _split(
    config: ml_collections.ConfigDict,
    record: dict[str, Any] | None,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[ml_collections.ConfigDict, jax.sharding.Mesh]:
    """The config with `itm.groups` resolved, and its mesh; raises UserError if the batch does not
    split over it.
    """
    mesh = sharding.mesh_of(config.mesh, devices)
    batch, passes = config.data.global_batch, config.optimizer.accumulation
    sharding.check_batch(mesh, batch, passes)
    config = records.resolve_groups(config, record, data_shards=sharding.data_shards(mesh))
    sharding.check_groups(mesh, batch, passes, config.itm.groups)
    return config, mesh


def task_maker(
    config: ml_collections.ConfigDict,
    vocabulary: Vocabulary,
    *,
    record: dict[str, Any] | None = None,
    has_checkpoint: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[Mapping[str, Any]], Any]:
    """A function from changes of the config, by dotted name, to the task with them; it raises
    UserError if they do not fit together or the run may not change them.
    """

    def make(changes: Mapping[str, Any]) -> Any:
        fixed = [name for name in changes if records.kind_of(name) != "free"]
        if has_checkpoint and fixed:
            raise UserError(f"a run with checkpoints keeps its {', '.join(fixed)}")
        changed, mesh = _split(records.with_fields(config, dict(changes)), record, devices)
        return _create_of(config)(changed, vocabulary, mesh)

    return make


def _changes(
    workdir: Path,
    record: dict[str, Any] | None,
    config: ml_collections.ConfigDict,
    fingerprint: str,
    *,
    has_checkpoint: bool,
) -> dict[str, list[Any]]:
    """Prints and returns what changed since the last start, {name: [old, new]}; raises UserError if
    it may not change.
    """
    if record is None:
        return {}
    changes, sentences = records.check_restart(
        workdir, record, config, fingerprint, has_checkpoint=has_checkpoint
    )
    for sentence in sentences:
        say(f"changed since the last start: {sentence}")
    return changes


def first_state(parts: Parts) -> Any:
    """The state that a run starts with: fresh, or with the parameters that config.init names;
    prints which were read.
    """
    state = parts.task.init_state(parts.config.seed)
    if parts.start is None:
        return state
    say(parts.start.report)
    return placed(state, parts.start.arrays)


def _resolve_alpha(config: ml_collections.ConfigDict, examples: int) -> ml_collections.ConfigDict:
    """The config with `teacher.alpha_steps` resolved: -1 means the steps of one epoch."""
    if config.teacher.alpha_steps >= 0:
        return config
    steps = max(1, examples // config.data.global_batch)
    return records.with_fields(config, {"teacher.alpha_steps": steps})


def _adopt(
    config: ml_collections.ConfigDict, start: tuple[Part, ...], record: dict[str, Any] | None
) -> ml_collections.ConfigDict:
    """The config with the fields that the weights, or the run, were made with; prints each
    change.
    """
    resolved = adopted(config, start, record)
    whose = "from the weights" if start else "from the run"
    for name, (old, new) in records.changed_fields(config.to_dict(), resolved.to_dict()).items():
        say(f"config.{name}={new} ({whose}) instead of {old}")
    return resolved


def build_trained(config: ml_collections.ConfigDict | None, workdir: Path) -> Parts:
    """The parts to use a trained run in `workdir`; `config` (None: the run's own) may change only
    how it is used.
    """
    record = records.read_record(workdir)
    if record is None:
        raise UserError(
            f"--workdir={workdir} holds no trained run (no {records.RECORD}): train one there first"
        )
    own = config is None
    if not own:
        check_values(config)
        config = adopted(config, (), record)
    config = records.trained_config(workdir, record, config)
    trained = axes.of_trained(config.mesh, record["config"]["mesh"]["fsdp"], asked=not own)
    config = records.with_fields(config, {"mesh": trained})
    mesh = sharding.mesh_of(config.mesh)
    tokenizer = tokenizer_for_run(
        config.data.tokenizer, workdir, None, config.data.tokenizer_vocabulary
    )
    return Parts(config, mesh, None, None, tokenizer, task_of(config, tokenizer, mesh))


def with_own_data(
    config: ml_collections.ConfigDict, workdir: Path, named: Container[str]
) -> ml_collections.ConfigDict:
    """The config to use a trained run with: its data settings are the run's, except the fields in
    `named`.

    A config file has data settings of its own, such as the built-in scenes, which the flags of the
    training replaced. Prints each one that is not used.
    """
    record = records.read_record(workdir)
    if record is None:
        return config
    own = records.recorded_config(record).to_dict()
    kept = {
        name: old
        for name, (old, new) in records.changed_fields(own, config.to_dict()).items()
        if name.startswith("data.") and records.kind_of(name) == "free" and name not in named
    }
    for name, value in kept.items():
        say(f"config.{name}={value}, the run's own: name it by a flag to change it")
    return records.with_fields(config, kept)


def task_of(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Any:
    """The task `config.task` names, for this mesh."""
    return _create_of(config)(config, tokenizer.vocabulary, mesh)


def _create_of(config: ml_collections.ConfigDict) -> Callable[..., Any]:
    if config.task not in TASKS:
        raise UserError(f"config.task={config.task!r} is not one of the tasks: {', '.join(TASKS)}")
    return TASKS[config.task]


def batches(parts: Parts, *, start_step: int) -> AbstractContextManager[Iterator[Batch]]:
    """This process's rows of every batch from `start_step` on; leaving the context ends the worker
    processes.
    """
    data, model = parts.config.data, parts.config.model
    stream = training_batches(
        parts.source,
        parts.tokenizer,
        seed=parts.config.seed,
        start_step=start_step,
        global_batch=data.global_batch,
        rows=sharding.process_rows(parts.mesh, data.global_batch),
        size_px=model.image.size_px,
        max_tokens=model.text.max_tokens,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        teacher_view=data.teacher_view,
        workers=data.workers,
        threads=data.threads,
        prefetch=data.prefetch,
    )
    return contextlib.closing(stream)


def validate(
    parts: Parts, state: Any, *, last: bool, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Retrieval on the validation data by protocol; re-ranked at the end of training, or always if
    so configured.
    """
    config = parts.config
    rerank = config.evaluation.rerank_top_k > 0 and (last or config.evaluation.rerank_on_schedule)
    return retrieval.evaluate(
        parts.task,
        state,
        parts.validation,
        parts.tokenizer,
        config,
        images=retrieval.images_to_evaluate(config),
        rerank=rerank,
        progress=progress,
    )


def announce(parts: Parts) -> None:
    """Prints a summary: the model, its data, how it is validated, and how it is split over several
    devices.
    """
    config, mesh = parts.config, parts.mesh
    parameters = parameter_count(parts.task.abstract_state().student)
    devices, processes = mesh.devices.size, jax.process_count()
    shards = sharding.data_shards(mesh)
    batch = config.data.global_batch
    say(
        f"model       {config.task}, size {config.size}: {parameters / 1e6:,.1f} M trained "
        "parameters\n"
        f"devices     {devices} device{'s' * (devices != 1)} ({mesh.devices.flat[0].device_kind}), "
        f"{processes} process{'es' * (processes > 1)}; a batch of {batch} pairs = {shards} data "
        f"shard{'s' * (shards != 1)} x "
        f"{batch // shards} (accumulation {config.optimizer.accumulation})\n"
        f"data        {_named(config.data.train)}"
    )
    for sentence in amount(parts.source, batch, config.train.steps):
        say(f"            {sentence}")
    unknown, records = unknown_in(parts.source, parts.tokenizer)
    spoken = said_unknown(unknown, f"the captions of {records:,} of {len(parts.source):,} pairs")
    say(f"words       {spoken}")
    say(f"validation  {_validation(parts)}")
    if len(parts.source) < batch:
        say(
            f"warning: config.data.global_batch={batch} is more than the {len(parts.source):,} "
            "training pairs, so a step contains the same pair several times: set "
            f"--config.data.global_batch={len(parts.source)} or less, or give more data"
        )
    if devices > 1:
        say(f"mesh {axes.describe(mesh, config.mesh.slices)}")
        say(sharding.describe(parts.task.abstract_state(), mesh))


def whereabouts(config: ml_collections.ConfigDict, workdir: Path) -> str:
    """Where a training run writes, and how to watch, stop and continue it."""
    kept = config.checkpoint
    return (
        f"written to  {workdir}: checkpoints every {kept.every_steps:,} steps (the newest "
        f"{kept.keep} and the best), "
        "metrics.jsonl\n"
        f"watch it    {modes.command_line('report', workdir)}, or tensorboard "
        f"--logdir={shlex.quote(str(workdir))}\n"
        "stop it     Ctrl-C saves and exits; the same command continues from there"
    )


def _named(spec: str) -> str:
    """A data source for the summary, which points out built-in data."""
    built_in = spec.split(":")[0] == "scenes"
    return spec + " (the built-in synthetic scenes, not real images)" * built_in


def _validation(parts: Parts) -> str:
    """On which images a training run validates, and when."""
    config = parts.config
    own = config.data.train.split(":")[0] != "scenes"
    spec = _named(config.data.eval) if own else config.data.eval
    if spec != config.data.eval:
        spec += ": name your own with --config.data.eval"
    every = config.evaluation.every_steps
    when = f"every {every:,} steps and at the end" if every else "at the end"
    images, listed = retrieval.images_to_evaluate(config), len(parts.validation)
    if not images or images >= listed:
        return f"all {listed:,} images of {spec}, {when}"
    why = ", since this is a CPU" if config.evaluation.images == -1 and images < 1000 else ""
    return f"{images:,} of {listed:,} images of {spec}{why} (config.evaluation.images), {when}"


def amount(source: Source, global_batch: int, steps: int) -> list[str]:
    """Sentences on how many of the listed pairs are used and how long an epoch is."""
    used = f"{len(source):,}"
    if source.listed > len(source):
        used += f" of {source.listed:,} listed pairs ({len(source) / source.listed:.1%})"
    else:
        used += " pairs"
    epochs = f"{steps * global_batch / len(source):.3g}"
    used += f"; an epoch is {len(source) / global_batch:,.1f} steps, {steps:,} steps are {epochs} "
    sentences = [used + f"epoch{'s' * (epochs != '1')}"]
    if isinstance(source, Mixture):
        weights = source.weights or [len(part) for part in source.sources]
        for part, weight in zip(source.sources, weights, strict=True):
            share = weight / sum(weights)
            rounds = share * len(source) / len(part)
            sentences.append(
                f"{share:.1%} of every epoch from {part!r}: each of its pairs {rounds:.3g} times"
            )
    return sentences


def parameter_count(tree: Any) -> int:
    """How many numbers a tree of arrays holds; the arrays may be abstract."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
