"""What accelerators can do, each number from its maker's page; if the page leaves a choice, the
smaller one.

Rates are per chip, in bytes or operations per second; sizes are in bytes. No maker states
latencies: ours are of the order measured with small all-reduces (NCCL's, and 1 us per hop on a
torus).
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

from codebook_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One kind of accelerator, and how its chips are joined."""

    name: str
    peak: float  # operations per second of dense bfloat16 products
    exact: float  # the same for products in full float32
    memory: float
    memory_rate: float
    link_rate: float  # one way, all links of a chip together
    axes: int  # of the torus that links form in a slice; 0: a switch joins the chips of a node
    wraps_from: int  # least chips along an axis of the torus for its ends to be joined
    network_rate: float  # one way, a chip's share of its host's network
    domain: int  # how many chips links join: those of a node; 0: those of a slice
    link_latency: float  # seconds per hop
    network_latency: float


# H100, H200: nvidia.com/en-us/data-center/h100, h200 (SXM; the tables' rates with sparsity,
# halved); float32 without TensorFloat-32 67e12. NVLink 900 GB/s is both ways. Network: DGX
# H100/H200, eight 400 Gb/s ports for eight GPUs. A100: the data sheet of the A100 80GB SXM, NVLink
# 600 GB/s both ways; DGX A100, eight 200 Gb/s ports. TPUs: docs.cloud.google.com/tpu/docs/v4, v5p,
# v5e, v6e; a product in full float32 takes six in bfloat16 (jax.lax.Precision.HIGHEST). ICI: half
# of "bidirectional bandwidth per chip"; v4: its "all-reduce bandwidth per pod" by 4 096 chips.
# Network: v5p 50 Gb/s per chip; v5e two 100 Gb/s ports, v6e four 200 Gb/s ports for eight chips; v4
# states none: v5e's. The ends of a torus axis are joined in whole cubes of 4 x 4 x 4 (v4, v5p) or
# with 16 or more chips along it (v5e, v6e).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 0, 0, 50e9, 8, 3e-6, 5e-6),
        Chip("h100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 0, 0, 50e9, 8, 3e-6, 5e-6),
        Chip("a100", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 0, 0, 25e9, 8, 3e-6, 5e-6),
        Chip("v4", 275e12, 275e12 / 6, 32 * GIB, 1.2e12, 268e9, 3, 4, 3.125e9, 0, 1e-6, 20e-6),
        Chip("v5e", 197e12, 197e12 / 6, 16e9, 0.8e12, 200e9, 2, 16, 3.125e9, 0, 1e-6, 20e-6),
        Chip("v5p", 459e12, 459e12 / 6, 95e9, 2.765e12, 600e9, 3, 4, 6.25e9, 0, 1e-6, 20e-6),
        Chip("v6e", 918e12, 918e12 / 6, 32e9, 1.6e12, 400e9, 2, 16, 12.5e9, 0, 1e-6, 20e-6),
    )
}


def chip_of(name: str) -> Chip:
    """The chip of this name; raises UserError for one that is not listed."""
    if name not in CHIPS:
        close = difflib.get_close_matches(name, CHIPS, n=1)
        hint = f" ... did you mean {close[0]}?" if close else ""
        raise UserError(f"--plan.chip={name} is not one of {', '.join(CHIPS)}{hint}")
    return CHIPS[name]


def torus(chips: int, axes: int) -> tuple[int, ...]:
    """The most even sizes of a torus of this many chips, largest first: 256 on three axes are 8 x 8
    x 4.
    """
    if axes == 1:
        return (chips,)
    near = chips ** (1 / axes)
    least = max(n for n in range(1, math.floor(near + 1e-9) + 1) if chips % n == 0)
    return (*torus(chips // least, axes - 1), least)
