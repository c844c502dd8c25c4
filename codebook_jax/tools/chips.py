"""The accelerators that a plan knows, and how JAX is told of them; imports no JAX."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

from codebook_jax.errors import UserError, did_you_mean

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


class Chip(NamedTuple):
    """One kind of accelerator."""

    peak: float  # operations per second of dense bfloat16 products
    memory: float  # bytes
    torus: int = 0  # axes of a slice of TPUs; 0: not a TPU


# H100, H200: nvidia.com/en-us/data-center/h100, h200 (SXM; rates with sparsity, halved). A100: the
# data sheet of the A100 80GB SXM. TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e.
CHIPS = {
    "h200": Chip(989e12, 141e9),
    "h100": Chip(989e12, 80e9),
    "a100": Chip(312e12, 80e9),
    "v4": Chip(275e12, 32 * 2**30, 3),
    "v5e": Chip(197e12, 16e9, 2),
    "v5p": Chip(459e12, 95e9, 3),
    "v6e": Chip(918e12, 32e9, 2),
}


class PlanOptions(NamedTuple):
    """The hardware to plan for: chips of a kind, in equal slices joined only by the network."""

    chip: str = "h200"  # a name in CHIPS
    devices: int = 8
    slices: int = 1
    compiler: str = "cpu"  # XLA's for virtual CPU devices, or a TPU's own
    json: str = ""  # a file for the figures; empty: none


def environment(options: PlanOptions) -> dict[str, str]:
    """Variables, set before JAX is imported, that give it `options.devices` virtual devices."""
    chip, devices, slices, compiler, _ = options
    for flag, name, known in (("chip", chip, CHIPS), ("compiler", compiler, COMPILERS)):
        if name not in known:
            names = f"{', '.join(known)}{did_you_mean(name, known)}"
            raise UserError(f"--plan.{flag}={name} is not one of {names}")
    if devices < 1 or slices < 1 or devices % slices:
        raise UserError(
            f"--plan.slices={slices} does not split --plan.devices={devices} into equal parts: "
            "give 1 or more chips and a divisor of their number"
        )
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    if compiler == "tpu" and not (CHIPS[chip].torus and slices == 1 and has_libtpu):
        raise UserError(
            f"--plan.compiler=tpu needs a TPU (--plan.chip={chip} is given), one slice "
            f"(--plan.slices={slices} is given) and libtpu (pip install -e .[tpu])"
        )
    others = re.sub(rf"{VIRTUAL}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    own = {"XLA_FLAGS": f"{others} {VIRTUAL}={devices}".strip(), "JAX_PLATFORMS": "cpu"}
    return own | (DESCRIBED_ALONE if compiler == "tpu" else {})
