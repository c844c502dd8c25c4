"""TPU slices that libtpu describes and compiles for without a TPU."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies

from codebook_jax.errors import UserError
from codebook_jax.tools.plan.chips import Chip, torus

ON_A_HOST = 4  # chips per host of a slice; a smaller slice is part of a host


def layout(chip: Chip, count: int) -> tuple[str, tuple[int, ...]]:
    """(libtpu's name of a slice of `count` chips, the layout of the chips on one host).

    Raises UserError if the chip is not a TPU.
    """
    if not chip.axes:
        raise UserError(
            f"--plan.compiler=tpu compiles for TPUs, but --plan.chip={chip.name} is not one: leave "
            "the flag out"
        )
    sizes = torus(count, chip.axes)
    host = sizes if count < ON_A_HOST else (2, 2)
    return f"{chip.name}:{'x'.join(map(str, sizes))}", (*host, *(1,) * (3 - len(host)))


def devices(chip: Chip, count: int) -> list[Any]:
    """The `count` chips of a slice, to build a mesh from and compile for; nothing can run on them.

    Raises UserError if libtpu has no such slice.
    """
    name, host = layout(chip, count)
    try:
        found = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=host).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(
            f"libtpu cannot describe the slice {name}: {str(error).splitlines()[0]}"
        ) from error
    if len(found) != count:
        raise UserError(
            f"libtpu describes {name} as {len(found)} devices instead of {count} chips: leave out "
            "--plan.compiler=tpu, or plan for v5e, v5p or v6e"
        )
    return found
