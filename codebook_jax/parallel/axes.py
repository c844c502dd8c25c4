"""How many devices share one copy of the parameters when config.mesh.fsdp=0 leaves the choice to a
rule.

The rule: the batch is split over data x fsdp whatever fsdp is, so fsdp may be any divisor of the
data shards. It becomes the smallest one whose estimated memory per device (memory.py) fits what a
device has, less MARGIN: a larger one stores less per device but communicates more. Those that stay
within one slice (slices.py) come before those that would gather parameters over the slower network.
It is 1 if one device can hold everything, if there is one data shard, or if the memory of a device
is not known; if nothing fits, it is the one that needs least, and memory.check then stops the run
and lists settings that would fit.

A restarted run keeps its own fsdp as long as it fits the number of devices, however much memory is
free at that moment: the order in which gradients are summed, and so the last bits of the weights,
depend on it. A given number is never
changed, and tensor is never chosen: it splits the work inside a layer, which costs communication in
every layer and pays only on a fast network when a device's share of the batch is already small; no
memory estimate can tell that.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_collections

from codebook_jax.config import with_fields
from codebook_jax.console import say
from codebook_jax.parallel import sharding, slices
from codebook_jax.parallel.memory import MARGIN, Planner, size_of


def kept(
    config: ml_collections.ConfigDict, record: dict[str, Any] | None
) -> ml_collections.ConfigDict:
    """The config with the run's own fsdp if 0 is asked for and the devices allow such a mesh."""
    if config.mesh.fsdp or record is None:
        return config
    own = record["config"]["mesh"]["fsdp"]
    if not sharding.fits(config.mesh.data, own, config.mesh.tensor, slices=config.mesh.slices):
        return config
    return with_fields(config, {"mesh.fsdp": own})


def chosen(config: ml_collections.ConfigDict, planner: Planner) -> ml_collections.ConfigDict:
    """The config with `mesh.fsdp` chosen by the rule above, which it prints if there was a choice.

    `planner` must have the same mesh, and gets the same number. All processes reach the same
    answer.
    """
    if config.mesh.fsdp:
        return config
    mesh = sharding.mesh_of(config.mesh)
    fsdp, why = mesh.shape["fsdp"], ""
    if config.mesh.data == -1 and sharding.data_shards(mesh) > 1:
        fsdp, why = _first_that_fits(planner, possible(mesh, config.mesh.slices))
    planner.settle({"mesh.fsdp": fsdp})
    if why:
        say(f"config.mesh.fsdp={fsdp}, chosen: {why}")
    return with_fields(config, {"mesh.fsdp": fsdp})


def of_trained(
    config: ml_collections.ConfigDict, record: dict[str, Any], *, asked: bool
) -> ml_collections.ConfigDict:
    """The config to use a trained run with: unless another mesh is `asked` for, its own as far as
    the devices allow.
    """
    own = record["config"]["mesh"]["fsdp"]
    free = not asked or not config.mesh.fsdp
    if not config.mesh.fsdp:
        config = with_fields(config, {"mesh.fsdp": own})
    of = config.mesh
    if not free or sharding.fits(of.data, of.fsdp, of.tensor, slices=of.slices):
        return config
    share = math.gcd(max(own, 1), jax.device_count())  # trained on other devices
    return with_fields(config, {"mesh": {"data": -1, "fsdp": share, "tensor": 1, "slices": 0}})


def possible(mesh: Any, asked_slices: int) -> list[int]:
    """The possible fsdp on these data shards: those inside one slice first, each kind from small to
    large.
    """
    shards, tensor = sharding.data_shards(mesh), mesh.shape["tensor"]
    count = len(slices.groups_of(list(mesh.devices.flat), asked_slices))
    return sorted(
        sharding.possible_fsdp(mesh),
        key=lambda n: slices.across((shards // n, n, tensor), count)[1] > 1,
    )


def said(mesh: Any, asked_slices: int) -> str:
    """The sizes of a mesh's axes, and how several slices are joined."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = len(slices.groups_of(list(mesh.devices.flat), asked_slices))
    if count == 1:
        return sizes
    over = slices.across(tuple(mesh.shape.values()), count)
    parts = [f"{axis} {n}" for axis, n in zip(sharding.AXES, over, strict=True) if n > 1]
    return f"{sizes}; over {count} slices: {', '.join(parts)}"


def _first_that_fits(planner: Planner, sizes: list[int]) -> tuple[int, str]:
    """(fsdp, why) of the first of these sizes that fits, or of the one that needs least."""
    has = planner.has
    if has is None:
        return 1, "how much memory a device has is not known"
    needs: dict[int, int] = {}
    for size in sizes:
        needs[size] = planner.estimate({"mesh.fsdp": size}).total
        if needs[size] <= has * (1 - MARGIN):
            break
    else:
        size = min(needs, key=needs.__getitem__)
        return size, f"needs least, {size_of(needs[size])} per device, which has {size_of(has)}"
    why = f"needs {size_of(needs.pop(size))} per device, which has {size_of(has)}"
    refused = [f"{other} would need {size_of(need)}" for other, need in needs.items()]
    return size, why + (f" (fsdp {', '.join(refused)})" if refused else "")
