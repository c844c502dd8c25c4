"""Which fsdp a run gets: how many devices share one copy of the parameters.

With config.mesh.fsdp=0 it is the smallest divisor of the data shards whose state fits half of a
device's memory and whose compiled step fits it (memory.first_fit): a larger one stores less per
device but communicates more. Divisors inside one slice (slices.py) come before those that would
gather parameters over the slower network. A restarted run keeps its own fsdp as long as it fits the
number of devices, however much memory is free at that moment: the order in which gradients are
summed, and so the last bits of the weights, depend on it. A given number is never changed, and
tensor is never chosen: it costs communication in every layer, and no count of memory tells whether
that pays.
"""

from __future__ import annotations

import math

import jax
import ml_collections

from codebook_jax.parallel import sharding, slices


def inherited(axes: ml_collections.ConfigDict, own: int) -> int:
    """The fsdp to restart a run with that had `own`: that one if `axes` leave the choice and the
    devices allow it.
    """
    if axes.fsdp or not sharding.fits(axes.data, own, axes.tensor, slices=axes.slices):
        return axes.fsdp
    return own


def choices(axes: ml_collections.ConfigDict) -> list[int]:
    """The fsdp to try, in this order; a single one if there is no choice."""
    mesh = sharding.mesh_of(axes)
    if axes.fsdp or axes.data != -1:
        return [mesh.shape["fsdp"]]
    shards, tensor = sharding.data_shards(mesh), mesh.shape["tensor"]
    count = len(slices.groups_of(list(mesh.devices.flat), axes.slices))
    return sorted(
        sharding.possible_fsdp(mesh),
        key=lambda n: slices.across((shards // n, n, tensor), count)[1] > 1,
    )


def of_trained(axes: ml_collections.ConfigDict, own: int, *, asked: bool) -> dict[str, int]:
    """The axes to use a trained run with that had fsdp `own`: unless others are `asked` for, its
    own as far as the devices allow.
    """
    free = not asked or not axes.fsdp
    found = {**axes, "fsdp": axes.fsdp or own}
    if not free or sharding.fits(**found):
        return found
    share = math.gcd(max(own, 1), jax.device_count())  # trained on other devices
    return {"data": -1, "fsdp": share, "tensor": 1, "slices": 0}


def describe(mesh: jax.sharding.Mesh, asked_slices: int) -> str:
    """The sizes of a mesh's axes, and how several slices are joined."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = len(slices.groups_of(list(mesh.devices.flat), asked_slices))
    if count == 1:
        return sizes
    over = slices.across(tuple(mesh.shape.values()), count)
    parts = [f"{axis} {n}" for axis, n in zip(sharding.AXES, over, strict=True) if n > 1]
    return f"{sizes}; over {count} slices: {', '.join(parts)}"
