"""What must fit together in a pre-training config, and its automatic choices."""

from __future__ import annotations

import ml_collections

from codebook_jax.config import check_fields, with_fields
from codebook_jax.errors import UserError
from codebook_jax.tasks.assignments import ASSIGNMENTS


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, with the fields and their values, if no pre-training can start so."""
    check_fields(config)
    batch, queue, codebook = config.data.global_batch, config.queue.size, config.codebook
    alignment, mlm = config.alignment, config.mlm
    least, first, most = (alignment[f"temperature{end}"] for end in ("_min", "", "_max"))
    for name in ("train", "eval"):
        _refuse_if(
            not config.data[name],
            f"config.data.{name} is empty: name your pairs, e.g. --config.data.{name}=json:PATH, "
            "or scenes",
        )
    _refuse_if(
        not any(config.losses.values()),
        "every weight in config.losses is 0: nothing would be learned",
    )
    _refuse_if(
        codebook.solver not in ASSIGNMENTS,
        f"config.codebook.solver={codebook.solver!r} is not one of {', '.join(ASSIGNMENTS)}",
    )
    _refuse_if(
        queue < batch,
        f"config.queue.size={queue} is smaller than config.data.global_batch={batch}: one step's "
        "features must fit, so give at least the batch",
    )
    _refuse_if(
        codebook.queue_samples > queue,
        f"config.codebook.queue_samples={codebook.queue_samples} is more than "
        f"config.queue.size={queue} holds",
    )
    _refuse_if(
        not least <= first <= most,
        f"config.alignment.temperature={first} is not between "
        f"config.alignment.temperature_min={least} and config.alignment.temperature_max={most}",
    )
    _refuse_if(
        mlm.mask_share + mlm.random_share > 1,
        f"config.mlm.mask_share={mlm.mask_share} and config.mlm.random_share={mlm.random_share} "
        "are together more than 1",
    )
    _check_encoders(config.model.image, config.model.text)


def resolve(
    config: ml_collections.ConfigDict,
    before: ml_collections.ConfigDict | None,
    *,
    shards: int,
    examples: int,
) -> ml_collections.ConfigDict:
    """Groups of negatives: the given number, else the run's, else data shards x accumulation.

    `teacher.alpha_steps` -1 means the steps of one epoch.
    """
    groups, alpha_steps = config.itm.groups, config.teacher.alpha_steps
    batch, passes = config.data.global_batch, config.optimizer.accumulation
    if groups == 0:
        groups = before.itm.groups if before is not None else shards * passes
    check_groups(batch, passes, shards, groups)
    if alpha_steps < 0:
        alpha_steps = max(1, examples // batch)
    return with_fields(config, {"itm.groups": groups, "teacher.alpha_steps": alpha_steps})


def check_groups(batch: int, passes: int, shards: int, groups: int) -> None:
    """Raises UserError if the batch cannot be split into these groups of negatives."""
    if groups < 1 or batch % groups:
        raise UserError(
            f"config.itm.groups={groups} does not split config.data.global_batch={batch} into "
            "equal groups: choose a divisor of the batch, or another batch"
        )
    if passes > 1 and groups % (shards * passes):
        raise UserError(
            f"config.optimizer.accumulation={passes} on {shards} data shards needs "
            f"config.itm.groups to be a multiple of {shards * passes}, but it is {groups}: a group "
            "of negatives must lie in one pass"
        )
    if batch // groups < 2:
        raise UserError(
            f"config.itm.groups={groups} of config.data.global_batch={batch} leaves one pair per "
            "group and so no negatives: choose a larger batch or fewer groups"
        )


def _check_encoders(image: ml_collections.ConfigDict, text: ml_collections.ConfigDict) -> None:
    _refuse_if(
        text.max_tokens > text.max_positions,
        f"config.model.text.max_tokens={text.max_tokens} is more than the "
        f"config.model.text.max_positions={text.max_positions} that have an embedding",
    )
    _refuse_if(
        image.size_px % image.patch_px,
        f"config.model.image.size_px={image.size_px} is not a multiple of "
        f"config.model.image.patch_px={image.patch_px}",
    )
    for name, encoder in (("image", image), ("text", text)):
        _refuse_if(
            encoder.width % encoder.heads,
            f"config.model.{name}.width={encoder.width} is not divisible by "
            f"config.model.{name}.heads={encoder.heads}",
        )


def _refuse_if(mismatch: bool | int, sentence: str) -> None:
    if mismatch:
        raise UserError(sentence)
