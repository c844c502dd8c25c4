"""Devices in several slices, joined by a slower network: which place in the mesh each one gets.

The devices' `slice_index` tells their slice: a slice of a TPU pod, or a GPU host. The data axis is
split over the slices first, because it sends least: it sums the gradients once per step. If slices
remain, fsdp is split over them, which gathers the parameters of every block; tensor, which sums in
every layer, never crosses from one slice to another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from codebook_jax.errors import UserError


def groups_of(devices: Sequence[Any], slices: int = 0) -> list[list[Any]]:
    """The devices of each slice; `slices` 0: as the devices report; a number: that many, in order
    if they report another.

    Raises UserError if the slices differ in size.
    """
    reported = _reported(devices)
    groups = [[device for device in devices if _slice_index(device) == index] for index in reported]
    if slices and slices != len(reported):
        if slices < 0 or len(devices) % slices:
            raise UserError(
                f"config.mesh.slices={slices} does not split {len(devices)} devices into equal "
                "parts: give a divisor of their number, or 0 for what the devices report"
            )
        own = len(devices) // slices
        groups = [list(devices[start : start + own]) for start in range(0, len(devices), own)]
    counts = [len(group) for group in groups]
    if len(set(counts)) > 1:
        raise UserError(
            f"the slices have {', '.join(map(str, counts))} devices, but a mesh needs slices of "
            "equal size: --config.mesh.slices=1 takes all devices as one slice"
        )
    return groups


def across(sizes: Sequence[int], slices: int) -> tuple[int, int, int]:
    """How many slices each axis of a mesh (data, fsdp, tensor) spans; raises UserError if tensor
    would span several.
    """
    data, fsdp, tensor = sizes
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    if fsdp % over_fsdp:
        own = math.prod(sizes) // slices
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not a multiple of the {slices} "
            f"slices of {own} devices, and config.mesh.tensor={tensor} must stay inside one: give "
            f"a tensor that divides {own}, or --config.mesh.slices=1 to take all devices as one "
            "slice"
        )
    return over_data, over_fsdp, 1


def arranged(sizes: Sequence[int], devices: Sequence[Any], slices: int = 0) -> np.ndarray | None:
    """The devices as an array of these sizes (data, fsdp, tensor); None for one slice, whose order
    JAX chooses.
    """
    groups = groups_of(devices, slices)
    reported = len(_reported(devices))
    if len(groups) == 1:
        return None if reported == 1 else np.array(devices).reshape(sizes)
    between = across(sizes, len(groups))
    inside = tuple(size // count for size, count in zip(sizes, between, strict=True))
    if reported == len(groups):
        return mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    # Slice by slice along each axis, and within a slice in order: [over, inside] of every axis
    # becomes one.
    blocks = np.array(groups).reshape(*between, *inside)
    return blocks.transpose(0, 3, 1, 4, 2, 5).reshape(sizes)


def _slice_index(device: Any) -> int:
    # libtpu describes the devices of a single slice without one
    return getattr(device, "slice_index", None) or 0


def _reported(devices: Sequence[Any]) -> list[int]:
    return sorted({_slice_index(device) for device in devices})
