"""How many devices share one copy of the parameters where config.mesh.fsdp=0 leaves it to a rule.

The rule. The batch is split over data x fsdp whatever fsdp is, so it may be any divisor of these data shards. The smallest
is taken with which the memory that memory.py estimates a device to need fits, MARGIN left, into what a device has: each
device that shares more has less to keep and more to wait for. Those whose devices stand in one slice (slices.py) come
before those that would gather parameters over the slower network. It is 1 where one device can hold everything, where
there is one data shard, and where nobody knows what a device has; where nothing fits it is what needs least, and
memory.check then refuses the run with what would fit.

A run that is started again keeps its own as long as it fits the number of devices, whatever memory is free just then: the
order in which gradients are added up, and so the last bits of the weights, depend on it. A number that is given is never
changed, nor is tensor ever chosen: it splits the work inside a layer, which costs an exchange in every one, and pays only
on a fast network and where a device's share of the batch is small already; no estimate of memory can tell that.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_collections

from codebook_jax import sharding, slices
from codebook_jax import workdir as records
from codebook_jax.memory import MARGIN, Planner, size_of
from codebook_jax.metrics import say


def kept(config: ml_collections.ConfigDict, record: dict[str, Any] | None) -> ml_collections.ConfigDict:
    """The config with the run's own fsdp where 0 is asked for and the devices make up such a mesh."""
    if config.mesh.fsdp or record is None:
        return config
    own = record["config"]["mesh"]["fsdp"]
    if not sharding.fits(config.mesh.data, own, config.mesh.tensor, slices=config.mesh.slices):
        return config
    return records.with_fields(config, {"mesh.fsdp": own})


def chosen(config: ml_collections.ConfigDict, planner: Planner) -> ml_collections.ConfigDict:
    """The config with `mesh.fsdp` a number, by the rule above, which is said where there was a choice.

    `planner` has the same mesh, and has the number too from here on. All processes come to the same answer.
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
    return records.with_fields(config, {"mesh.fsdp": fsdp})


def of_trained(
    config: ml_collections.ConfigDict, record: dict[str, Any], *, asked: bool
) -> ml_collections.ConfigDict:
    """The config to use a trained run with: its own mesh where none is `asked` for, as far as the devices make up one."""
    own = record["config"]["mesh"]["fsdp"]
    free = not asked or not config.mesh.fsdp
    if not config.mesh.fsdp:
        config = records.with_fields(config, {"mesh.fsdp": own})
    of = config.mesh
    if not free or sharding.fits(of.data, of.fsdp, of.tensor, slices=of.slices):
        return config
    share = math.gcd(max(own, 1), jax.device_count())  # trained on other devices
    return records.with_fields(config, {"mesh": {"data": -1, "fsdp": share, "tensor": 1, "slices": 0}})


def possible(mesh: Any, asked_slices: int) -> list[int]:
    """What fsdp may be on these data shards: inside a slice first, there and beyond from small to large."""
    shards, tensor = sharding.data_shards(mesh), mesh.shape["tensor"]
    count = len(slices.groups_of(list(mesh.devices.flat), asked_slices))
    return sorted(sharding.possible_fsdp(mesh), key=lambda n: slices.across((shards // n, n, tensor), count)[1] > 1)


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
    """(fsdp, why) of the first of these that fits, or of what needs least."""
    has = planner.has
    if has is None:
        return 1, "what a device has of memory is not known"
    needs: dict[int, int] = {}
    for size in sizes:
        needs[size] = planner.estimate({"mesh.fsdp": size}).total
        if needs[size] <= has * (1 - MARGIN):
            break
    else:
        size = min(needs, key=needs.__getitem__)
        return size, f"needs least, {size_of(needs[size])} a device that has {size_of(has)}"
    why = f"needs {size_of(needs.pop(size))} a device that has {size_of(has)}"
    refused = [f"{other} {size_of(need)}" for other, need in needs.items()]
    return size, why + (f", and {', '.join(refused)}" if refused else "")
