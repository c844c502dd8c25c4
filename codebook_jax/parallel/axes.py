"""Which fsdp a run gets: how many devices share one copy of the parameters.

docs/scale.md has the rule. A restarted run keeps its own: the order in which gradients are summed,
and so the last bits of the weights, depend on it.
"""

from __future__ import annotations

import math

import jax
import ml_collections

from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding


def inherited(axes: ml_collections.ConfigDict, own: int) -> int:
    """The fsdp to restart a run with: its `own` if `axes` leave the choice and the devices fit."""
    return axes.fsdp or (own if own in choices(axes) else 0)


def choices(axes: ml_collections.ConfigDict) -> list[int]:
    """The fsdp to try: those inside a slice first, then smaller ones, which communicate less."""
    mesh = sharding.mesh_of(axes)
    if axes.fsdp or axes.data != -1:
        return [mesh.shape["fsdp"]]
    shards, tensor = sharding.data_shards(mesh), mesh.shape["tensor"]
    count = len(sharding.slice_groups(list(mesh.devices.flat), axes.slices))
    spans = lambda n: sharding.slices_over((shards // n, n, tensor), count)[1]  # noqa: E731
    return sorted(sharding.possible_fsdp(mesh), key=lambda n: spans(n) > 1)


def of_trained(axes: ml_collections.ConfigDict, own: int, *, asked: bool) -> dict[str, int]:
    """The axes to use a trained run with: `asked` ones, or its `own` fsdp if the devices fit."""
    found = {**axes, "fsdp": axes.fsdp or own}
    try:
        if not (asked and axes.fsdp):
            sharding.make_mesh(**found)
    except UserError:  # trained on other devices
        share = math.gcd(max(own, 1), jax.device_count())
        return {"data": -1, "fsdp": share, "tensor": 1, "slices": 0}
    return found


def describe(mesh: jax.sharding.Mesh, slices: int) -> str:
    """The sizes of a mesh's axes, and how several slices are joined."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = len(sharding.slice_groups(list(mesh.devices.flat), slices))
    if count == 1:
        return sizes
    over = zip(mesh.shape, sharding.slices_over(tuple(mesh.shape.values()), count), strict=True)
    parts = ", ".join(f"{axis} {n}" for axis, n in over if n > 1)
    return f"{sizes}; over {count} slices: {parts}"
