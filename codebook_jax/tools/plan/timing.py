"""The least time of a step, from what it computes, what it moves in memory and what it sends.

Sending is a ring among chips joined by links, and rings over the network in between; a group with m
members in each slice or node uses the network shares of all m. Every hop adds its latency, which is
the whole cost of small collectives. How much
XLA sends while it computes is not known before it runs, so both ends are given: all of it and none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from codebook_jax.tools.plan.chips import Chip, torus
from codebook_jax.tools.plan.hlo import Collective
from codebook_jax.tools.plan.operations import Operations

# share of the peak that products reach: an assumption, of the order reported for ViTs and BERTs
UTILISATION = 0.4


class Sent(NamedTuple):
    """What a step sends by collectives of one kind over the same axes; bytes and seconds are per
    device.
    """

    kind: str
    axes: str  # of the mesh, separated by commas; "+ network" if they leave a slice or node
    count: int
    bytes: float
    seconds: float
    latency: float  # the part of the seconds that does not depend on the bytes
    early: float = 0.0  # the part of the bytes that is started before it is awaited


class Times(NamedTuple):
    """Seconds of a step."""

    compute_at_peak: float
    compute: float  # at UTILISATION
    memory: float
    communication: float
    waiting: float  # the part of communication that is latency

    @property
    def work(self) -> float:
        return max(self.compute, self.memory)

    @property
    def overlapped(self) -> float:
        """If everything is sent during computation: the minimum."""
        return max(self.work, self.communication)

    @property
    def serial(self) -> float:
        """If nothing is sent during computation."""
        return self.work + self.communication

    @property
    def bound_by(self) -> str:
        most = max(self.compute, self.memory, self.communication)
        if most == self.communication:
            return "latency of collectives" if self.waiting > most / 2 else "bandwidth of links"
        return "matrix products" if most == self.compute else "memory bandwidth"


def times(chip: Chip, own: Operations, sent: Iterable[Sent]) -> Times:
    """The times of a step in which each device does its `own` operations."""
    at_peak = (own.products - own.exact) / chip.peak + own.exact / chip.exact
    sent = list(sent)
    return Times(
        at_peak,
        at_peak / UTILISATION,
        own.moved / chip.memory_rate,
        sum(part.seconds for part in sent),
        sum(part.latency for part in sent),
    )


class Joined(NamedTuple):
    """How devices, by their place in the mesh, are joined."""

    chip: Chip
    slice_size: int
    domains: tuple[int, ...]  # the slice or node of each device


def sent_by_axes(found: Iterable[Collective], mesh: dict[str, int], joined: Joined) -> list[Sent]:
    """Collectives by kind and by the axes of the mesh that they span, most seconds first."""
    rows: dict[tuple[str, str], Sent] = {}
    for collective in found:
        if collective.group_size < 2:
            continue
        axes = ", ".join(spanned(collective.groups, mesh))
        if any(
            len({joined.domains[device] for device in group}) > 1 for group in collective.groups
        ):
            axes += " + network"
        latency, seconds = _seconds(collective, joined)
        row = rows.get((collective.kind, axes), Sent(collective.kind, axes, 0, 0.0, 0.0, 0.0))
        n = collective.times
        rows[collective.kind, axes] = row._replace(
            count=row.count + n,
            bytes=row.bytes + n * collective.sent,
            seconds=row.seconds + n * seconds,
            latency=row.latency + n * latency,
            early=row.early + n * collective.sent * collective.early,
        )
    return sorted(rows.values(), key=lambda row: -row.seconds)


def spanned(groups: Iterable[tuple[int, ...]], mesh: dict[str, int]) -> list[str]:
    """The axes of a mesh in which members of a group differ; devices are numbered in the order of
    the axes.
    """
    found = set()
    for group in groups:
        places = [_place(device, mesh) for device in group]
        found |= {axis for axis, *values in zip(mesh, *places, strict=True) if len(set(values)) > 1}
    return [axis for axis in mesh if axis in found]


def _place(device: int, mesh: dict[str, int]) -> list[int]:
    place = []
    for size in reversed(mesh.values()):
        device, own = divmod(device, size)
        place.append(own)
    return place[::-1]


def _seconds(collective: Collective, joined: Joined) -> tuple[float, float]:
    """(latency, total) seconds of one collective."""
    chip = joined.chip
    of_groups = [{joined.domains[device] for device in group} for group in collective.groups]
    group, domains = len(collective.groups[0]), max(map(len, of_groups))
    inside = math.ceil(group / domains)
    if collective.kind == "collective-permute":
        rate = (
            chip.network_rate if domains > 1 else chip.link_rate / max(2 * chip.axes, 1)
        )  # of one link
        latency = chip.network_latency if domains > 1 else chip.link_latency
        return latency, latency + collective.sent / rate
    share, hops = _links(chip, inside, joined.slice_size)
    rate = chip.link_rate * share
    if domains > 1:
        network = inside * chip.network_rate
        rate = min(rate, network) if inside > 1 else network
    latency = hops * chip.link_latency + math.ceil(math.log2(domains)) * chip.network_latency
    latency *= 2 if collective.kind == "all-reduce" else 1  # there and back
    return latency, latency + collective.sent / rate


def _links(chip: Chip, members: int, slice_size: int) -> tuple[float, int]:
    """(the share of a chip's links that a group uses, the hops to its farthest member)."""
    if members < 2:
        return 1.0, 0
    if not chip.axes:
        return 1.0, math.ceil(math.log2(members))
    sizes = torus(slice_size, chip.axes)
    used = next(n for n in range(1, len(sizes) + 1) if math.prod(sizes[:n]) >= members)
    rings = [size for size in sizes[:used] if size > 1]
    wraps = [size >= chip.wraps_from for size in rings]
    # A ring with joined ends uses both directions, a line only one.
    share = sum(1.0 if joined else 0.5 for joined in wraps) / chip.axes
    hops = sum(size // 2 if joined else size - 1 for size, joined in zip(rings, wraps, strict=True))
    return share, hops
