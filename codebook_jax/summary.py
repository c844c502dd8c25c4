"""What a training run prints at its start: model, data, validation, where it writes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections

from codebook_jax import build, modes
from codebook_jax.console import say
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.record import sample_captions
from codebook_jax.data.text import SAMPLED, said_unknown, unknown_in
from codebook_jax.parallel import sharding
from codebook_jax.tasks.task import Evaluation


def announce(parts: build.Parts) -> None:
    """Prints a summary of the model, its data, its validation, and its split over devices."""
    config, mesh = parts.config, parts.mesh
    parameters = build.trained_parameters(parts.task) / 1e6
    devices, processes = mesh.devices.size, jax.process_count()
    shards, batch = sharding.data_shards(mesh), config.data.global_batch
    say(f"model       {config.task}, size {config.size}: {parameters:,.1f} M trained parameters")
    say(
        f"devices     {_count(devices, 'device')} ({mesh.devices.flat[0].device_kind}), "
        f"{_count(processes, 'process', 'es')}; a batch of {batch} {parts.source.learned} = "
        f"{_count(shards, 'data shard')} x {batch // shards} "
        f"(accumulation {config.optimizer.accumulation})"
    )
    say(f"data        {_named(config.data.train)}")
    for sentence in amount(parts.source, batch, config.train.steps):
        say(f"            {sentence}")
    sample = list(sample_captions(parts.source, SAMPLED))
    captions = f"{len(sample):,} training captions"
    say(f"words       {said_unknown(*unknown_in(sample, parts.tokenizer), captions)}")
    say(f"validation  {_validation(config, parts.validation)}")
    if len(parts.source) < batch:
        say(
            f"warning: config.data.global_batch={batch} is more than the {len(parts.source)} "
            f"training {parts.source.learned}, so a step repeats some: set it to that or less, or "
            "give more data"
        )
    for sentence in parts.task.cautions(config):
        say(f"warning: {sentence}")
    if devices > 1:
        say(f"mesh {sharding.described_axes(mesh, config.mesh.slices)}")
        say(sharding.describe(parts.task.abstract_state(), mesh))


def whereabouts(config: ml_collections.ConfigDict, workdir: Path) -> str:
    """Where a training run writes, and how to watch, stop and continue it."""
    every, newest = config.checkpoint.every_steps, config.checkpoint.keep
    return (
        f"written to  {workdir}: checkpoints every {every:,} steps (the newest {newest} and the "
        "best), metrics.jsonl\n"
        f"watch it    {modes.command_line('report', workdir)}, or tensorboard "
        f"--logdir={shlex.quote(str(workdir))}\n"
        "stop it     Ctrl-C saves and exits; the same command continues from there"
    )


def next_steps(step: int, workdir: Path) -> str:
    """What a trained run can be used for, with the command for each."""
    uses = ("eval", "report", "export")
    lines = [f"  {name:6}  {modes.command_line(name, workdir)}" for name in uses]
    first = f"{workdir} holds the model of step {step:,}; what you can do with it:"
    return "\n".join([first, *lines])


def below_start(config: ml_collections.ConfigDict, found: Evaluation, start: float) -> str:
    """A warning about a validation worse than that before the first step."""
    rate, batch = config.optimizer.learning_rate, config.data.global_batch
    return (
        f"warning: the {found.metric} is {found.score:.2f}, below the {start:.2f} before the first "
        f"step: likely causes are a learning rate too high (now {rate:g}), a batch too small (now "
        f"{batch}), or wrong labels or image ids in the data"
    )


def best_between(curve: Mapping[float, float], kept: int, score: float) -> str:
    """The scores of weights between the first and the last ones, by the share of the way, and which
    to use: the checkpoint `kept` as the best, unless others have more than its score.
    """
    best = max(sorted(curve), key=curve.__getitem__)  # the least of equals
    points = ", ".join(f"{share:g}: {score:.2f}" for share, score in sorted(curve.items()))
    use = f"the best share is {best:g}: export it with --config.export.between={best:g}"
    if not curve[best] > score:
        use = f"none is above the {score:.2f} of step {kept:,}, the best checkpoint"
    return f"weights between start and end: {points}; {use}"


def amount(source: Source, global_batch: int, steps: int) -> list[str]:
    """Sentences on how much of what is listed is used and how long an epoch is."""
    pairs, listed, share = len(source), source.listed, f" {source.learned}"
    if listed > pairs:
        share = f" of {listed:,} listed {source.learned} ({pairs / listed:.1%})"
    epochs = f"{steps * global_batch / pairs:.3g}"
    sentences = [
        f"{pairs:,}{share}; an epoch is {pairs / global_batch:,.1f} steps, {steps:,} steps are "
        f"{epochs} epoch{'s' * (epochs != '1')}"
    ]
    if isinstance(source, Mixture):
        weights = source.weights or [len(part) for part in source.sources]
        for part, weight in zip(source.sources, weights, strict=True):
            own = weight / sum(weights)
            times = f"each of its pairs {own * pairs / len(part):.3g} times"
            sentences.append(f"{own:.1%} of every epoch from {part!r}: {times}")
    return sentences


def _validation(config: ml_collections.ConfigDict, source: Source) -> str:
    """On what a training run validates, and when."""
    spec, listed, images = config.data.eval, len(source), build.validation_images(config)
    if config.data.train.split(":")[0] != "scenes" and _named(spec) != spec:
        spec = f"{_named(spec)}: name your own with --config.data.eval"
    every = config.evaluation.every_steps
    when = f"every {every:,} steps and at the end" if every else "at the end"
    if not images or images >= listed:
        return f"all {listed:,} {source.evaluated} of {spec}, {when}"
    part = f"{images:,} of {listed:,} {source.evaluated}"
    return f"{part} of {spec} (config.evaluation.images), {when}"


def _named(spec: str) -> str:
    """A data source, pointing out built-in data."""
    built_in = spec.split(":")[0] == "scenes"
    return spec + " (the built-in synthetic scenes, not real images)" * built_in


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number} {name}{plural * (number != 1)}"
