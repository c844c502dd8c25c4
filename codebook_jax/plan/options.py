"""What a plan is asked for, and the environment that it needs; imports no JAX."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from codebook_jax.errors import UserError

VIRTUAL = "--xla_force_host_platform_device_count"


class PlanOptions(NamedTuple):
    """The hardware to plan for: `devices` chips of a kind, in `slices` equal parts joined by the network alone."""

    chip: str = "h200"  # a name in chips.CHIPS
    devices: int = 8
    slices: int = 1
    json: str = ""  # a file for the figures; empty: none


def environment(devices: int) -> dict[str, str]:
    """Variables with which JAX, imported after they are set, has `devices` virtual CPU devices.

    Raises UserError for fewer than one device.
    """
    if devices < 1:
        raise UserError(f"--plan.devices={devices} is not a number of chips: give 1 or more")
    others = re.sub(rf"{VIRTUAL}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return {"XLA_FLAGS": f"{others} {VIRTUAL}={devices}".strip(), "JAX_PLATFORMS": "cpu"}
