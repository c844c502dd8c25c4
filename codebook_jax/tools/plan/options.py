"""The options of a plan, and the environment that it needs; imports no JAX."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

from codebook_jax.errors import UserError

VIRTUAL = "--xla_force_host_platform_device_count"
COMPILERS = ("cpu", "tpu")
# libtpu can describe and compile for any slice; without these it first looks for the one that it
# might be running on.
DESCRIBED_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class PlanOptions(NamedTuple):
    """The hardware to plan for: `devices` chips of a kind, in `slices` equal parts joined only by
    the network.
    """

    chip: str = "h200"  # a name in chips.CHIPS
    devices: int = 8
    slices: int = 1
    compiler: str = "cpu"  # XLA's for the virtual devices, or a TPU's own
    json: str = ""  # a file for the figures; empty: none


def environment(options: PlanOptions) -> dict[str, str]:
    """Variables that give JAX, imported after they are set, `options.devices` virtual CPU devices.

    Raises UserError for fewer than one device, an unknown compiler or a missing libtpu.
    """
    if options.devices < 1:
        raise UserError(
            f"--plan.devices={options.devices} is not a number of chips: give 1 or more"
        )
    if options.compiler not in COMPILERS:
        raise UserError(f"--plan.compiler={options.compiler} is not one of {', '.join(COMPILERS)}")
    if options.compiler == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--plan.compiler=tpu needs libtpu, which is not installed: pip install -e .[tpu]"
        )
    others = re.sub(rf"{VIRTUAL}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    own = {"XLA_FLAGS": f"{others} {VIRTUAL}={options.devices}".strip(), "JAX_PLATFORMS": "cpu"}
    return own | (DESCRIBED_ALONE if options.compiler == "tpu" else {})
