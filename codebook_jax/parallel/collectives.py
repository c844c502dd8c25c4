"""What a compiled program sends between devices, read from its text (`compiled.as_text()`).

A collective in a loop counts once per iteration, and of a conditional only the branch that sends
most counts. A TPU's program repeats an asynchronous collective, with its channel, in every fusion
that overlaps with it: it counts once. A TPU also writes a reduce-scatter as a fusion of a sum and a
slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CALLS = ("while", "conditional", "call", "fusion", "async-start")
_INSTRUCTION = re.compile(
    rf" = (.*?) ({'|'.join((*(f'{k}(?:-start)?' for k in KINDS), *_CALLS))})\("
)
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([^\s(]+)\s*(\(.*)?\{\s*$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|(?:true|false)_computation|called_computations)="
    r"(\{[^}]*\}|%?[^\s,)]+)"
)


class Array(NamedTuple):
    """The type of an array on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # f32, bf16, s8, f8e4m3fn, ...; pred has none
        return math.ceil(math.prod(self.shape) * (int(bits.group()) if bits else 8) / 8)


class Collective(NamedTuple):
    """One collective of a program; sizes are per device."""

    kind: str
    results: tuple[Array, ...]
    devices: tuple[int, ...]  # of one group that takes part together, by their place in the mesh
    sent: float  # bytes that a device sends each time, in a ring: the minimum
    times: int  # how often a step runs it
    where: str  # the operation it belongs to, as JAX names it
    channel: str  # its number in the program, if XLA gives it one


def collectives(text: str) -> list[Collective]:
    """Every collective that one run of the program executes, and how often."""
    computations: dict[str, list[str]] = {}
    entry, own = "", []
    for line in text.splitlines():
        if head := None if line.startswith("HloModule") else _HEAD.match(line):
            own = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif " = " in line:
            own.append(re.sub(r"/\*.*?\*/", "", line))
    count = re.search(r"num_partitions=(\d+)", text)
    return list(_walk(computations, entry, 1, int(count.group(1)) if count else 1))


def axes_of(devices: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh in which these devices differ; they are numbered in the axes' order."""
    places = np.unravel_index(devices, tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if len(set(place)) > 1)


def _walk(
    computations: Mapping[str, list[str]], name: str, times: int, count: int
) -> Iterator[Collective]:
    """The collectives of a computation that is run `times` times, and of those it calls."""
    overlapping: set[str] = set()  # channels of collectives that go on beside fusions
    for line in computations.get(name, ()):
        if (found := _INSTRUCTION.search(line)) is None:
            continue
        types, opcode = found.groups()
        if opcode not in _CALLS:
            yield _read(line, types, opcode, times, count)
            continue
        turns = times * _turns(computations, line) if opcode == "while" else times
        names = [
            part for group in _CALLED.findall(line) for part in re.findall(r"[^\s,{}%]+", group)
        ]
        called = {name: list(_walk(computations, name, turns, count)) for name in names}
        if opcode == "conditional":
            yield from max(called.values(), key=lambda own: sum(c.sent * c.times for c in own))
            continue
        for name, inner in called.items():
            for each in inner:
                if opcode == "fusion" and each.channel in overlapping:
                    continue
                if opcode == "fusion" and each.channel:
                    overlapping.add(each.channel)
                if name.startswith("all-reduce-scatter"):
                    each = each._replace(kind="reduce-scatter", sent=each.sent / 2)
                yield each


def _read(line: str, types: str, opcode: str, times: int, count: int) -> Collective:
    arrays = tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", types))
    )
    kind = opcode.removesuffix("-start")
    if kind != opcode and kind != "all-reduce":  # (operands, results, the runtime's own numbers)
        arrays = tuple(array for array in arrays if array.shape)
        arrays = arrays[len(arrays) // 2 :]
    devices = _devices(line, count)
    n, size = 2 if kind == "collective-permute" else len(devices), sum(a.bytes for a in arrays)
    share = (n - 1) / n
    if kind in ("collective-permute", "collective-broadcast"):
        share = 1 if n > 1 else 0
    sent = size * share * {"all-reduce": 2, "reduce-scatter": n}.get(kind, 1)
    operation = re.search(r'op_name="([^"]*)"', line)
    channel = re.search(r"\bchannel_id=(\d+)", line)
    where, number = (found.group(1) if found else "" for found in (operation, channel))
    return Collective(kind, arrays, devices, sent, times, where, number)


def _turns(computations: Mapping[str, list[str]], line: str) -> int:
    """How often a loop runs, as XLA states it, or else from the bound in its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known.group(1))
    condition = re.search(r"condition=%?([^\s,)]+)", line).group(1)
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition]))
    if len(bounds) != 1:
        raise ValueError(f"a loop does not say how often it runs: {line.strip()[:200]}")
    return int(bounds[0])


def _devices(line: str, count: int) -> tuple[int, ...]:
    """The first group that takes part together: of explicit lists, an iota, or axes of a mesh; all
    devices of a permutation, or if none are named.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return tuple(sorted(set(map(int, re.findall(r"\d+", pairs.group(1))))))
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))?\s*\{([^}]*)\}", line
    ):
        return _of_axes(*named.groups())
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return tuple(_iota(iota.group(1))[0].tolist())
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, lists.group(1).split(",")))
    return tuple(range(count))


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): the numbers from 0 in the second shape, its axes in the order after T, in
    the first shape. [2,3]T(1,0): the numbers in that shape, its axes in that order.
    """
    parts = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text).groups()
    made, counted, order = ([int(n) for n in part.split(",")] if part else None for part in parts)
    numbers = np.arange(math.prod(made)).reshape(counted or made).transpose(order)
    return numbers.reshape(made) if counted else numbers


def _of_axes(mesh: str, ids: str | None, axes: str) -> tuple[int, ...]:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: devices that differ only in these axes.

    An axis may be a part of one: 'b':(2)2 is the 2 inside the first 2 of b.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = _iota(ids).ravel() if ids else np.arange(math.prod(sizes.values()))
    parts = dict(re.findall(r"'([^']+)'((?::\(\d+\)\d+)?)", axes))
    shape, place = [], []
    for name, whole in sizes.items():
        part = re.findall(r"\d+", parts.get(name, ":(1)1")) or (1, whole)
        before, size = map(int, part)
        shape += [before, size, whole // (before * size)]
        place += [0, slice(None) if name in parts else 0, 0]
    return tuple(numbers.reshape(shape)[tuple(place)].ravel().tolist())
