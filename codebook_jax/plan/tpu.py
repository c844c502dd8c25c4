"""Slices of TPUs that libtpu describes and compiles for, with no TPU at hand."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies

from codebook_jax.errors import UserError
from codebook_jax.plan.chips import Chip, torus

ON_A_HOST = 4  # chips of a host of a slice; fewer are a part of one


def layout(chip: Chip, count: int) -> tuple[str, tuple[int, ...]]:
    """(libtpu's name of a slice of `count` chips, the sizes of what one host of it has).

    Raises UserError for a chip that is no TPU.
    """
    if not chip.axes:
        raise UserError(
            f"--plan.compiler=tpu compiles for TPUs, and --plan.chip={chip.name} is none: leave the flag out"
        )
    sizes = torus(count, chip.axes)
    host = sizes if count < ON_A_HOST else (2, 2)
    return f"{chip.name}:{'x'.join(map(str, sizes))}", (*host, *(1,) * (3 - len(host)))


def devices(chip: Chip, count: int) -> list[Any]:
    """The `count` chips of a slice, to make a mesh of and compile for; nothing can run on them.

    Raises UserError where libtpu has no such slice.
    """
    name, host = layout(chip, count)
    try:
        found = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=host).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"libtpu describes no slice {name}: {str(error).splitlines()[0]}") from error
    if len(found) != count:
        raise UserError(
            f"libtpu describes {name} by {len(found)} devices, not by its {count} chips: leave --plan.compiler=tpu out, "
            "or plan for v5e, v5p or v6e"
        )
    return found
