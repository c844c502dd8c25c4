"""What must fit together in a pre-training config, and its automatic choices."""

from __future__ import annotations

import ml_collections

from codebook_jax import config as fields
from codebook_jax.config import with_fields
from codebook_jax.errors import UserError
from codebook_jax.tasks.assignments import ASSIGNMENTS


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field and its value, if pre-training cannot run with it."""
    fields.check(config)
    if config.codebook.solver not in ASSIGNMENTS:
        raise UserError(
            f"config.codebook.solver={config.codebook.solver!r} is not one of "
            f"{', '.join(ASSIGNMENTS)}"
        )


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
    _check_groups(batch, passes, shards, groups)
    if alpha_steps < 0:
        alpha_steps = max(1, examples // batch)
    return with_fields(config, {"itm.groups": groups, "teacher.alpha_steps": alpha_steps})


def _check_groups(batch: int, passes: int, shards: int, groups: int) -> None:
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
