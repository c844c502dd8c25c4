"""What a compiled program sends between devices, read from its text (`compiled.as_text()`).

A collective in a loop counts once per iteration; of branches, the one that sends most counts. A
TPU's program repeats an asynchronous collective, with its channel, in every fusion that overlaps
with it: it counts once. A TPU also writes a reduce-scatter as a fusion of a sum and a slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

# Each with the bytes that a device sends in a ring of n, the minimum, as a multiple of its result.
KINDS = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: min(n - 1, 1),
    "collective-permute": lambda n: 1,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
}
_CALLS = ("while", "conditional", "call", "fusion", "async-start")
_INSTRUCTION = re.compile(
    rf" = (.*?) ({'|'.join((*(f'{kind}(?:-start)?' for kind in KINDS), *_CALLS))})\("
)
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([^\s(]+)\s*(\(.*)?\{\s*$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|(?:true|false)_computation|called_computations)="
    r"(\{[^}]*\}|%?[^\s,)]+)"
)


class Collective(NamedTuple):
    """One collective of a program; sizes are per device."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of its results
    devices: tuple[int, ...]  # of one group that takes part together, by their place in the mesh
    sent: float  # bytes that a device sends each time
    times: int  # how often a step runs it
    where: str  # the operation it belongs to, as JAX names it
    channel: str  # its number in the program, if XLA gives it one


def collectives(text: str) -> list[Collective]:
    """Every collective that one run of the program executes, and how often."""
    computations: dict[str, list[str]] = {}
    entry, own = "", []
    for line in text.splitlines():
        if head := None if line.startswith("HloModule") else _HEAD.match(line):
            own = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif " = " in line:
            own.append(re.sub(r"/\*.*?\*/", "", line))
    count = int(_first(r"num_partitions=(\d+)", text) or 1)
    return list(_walk(computations, entry, 1, count))


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
        names = re.findall(r"[^\s,{}%]+", " ".join(_CALLED.findall(line)))
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
    arrays = _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", types))
    kind = opcode.removesuffix("-start")
    if kind != opcode and kind != "all-reduce":  # (operands, results, the runtime's own numbers)
        arrays = [(dtype, sizes) for dtype, sizes in arrays if sizes]
        arrays = arrays[len(arrays) // 2 :]
    shapes = tuple(tuple(map(int, re.findall(r"\d+", sizes))) for _, sizes in arrays)
    # f32, bf16, s8, f8e4m3fn, ...; pred has no number
    bits = [int(_first(r"(\d+)", dtype) or 8) for dtype, _ in arrays]
    size = sum(math.ceil(math.prod(shape) * n / 8) for shape, n in zip(shapes, bits, strict=True))
    devices = _devices(line, count)
    where, channel = _first(r'op_name="([^"]*)"', line), _first(r"\bchannel_id=(\d+)", line)
    sent = size * KINDS[kind](len(devices))
    return Collective(kind, shapes, devices, sent, times, where, channel)


def _first(pattern: str, text: str) -> str:
    """What the pattern's group first matches; empty for nothing."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _turns(computations: Mapping[str, list[str]], line: str) -> int:
    """How often a loop runs, as XLA states it, or else from the bound in its condition."""
    if known := _first(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known)
    condition = computations[_first(r"condition=%?([^\s,)]+)", line)]
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(bounds) != 1:
        raise ValueError(f"a loop does not say how often it runs: {line.strip()[:200]}")
    return int(bounds[0])


def _devices(line: str, count: int) -> tuple[int, ...]:
    """The first group that takes part together; all of a permutation, or if none are named."""
    if pairs := _first(r"source_target_pairs=\{(\{.*?\})\}", line):
        return tuple(sorted(set(map(int, re.findall(r"\d+", pairs)))))
    if lists := _first(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, lists.split(",")))
    if iota := _first(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return tuple(_iota(iota)[0].tolist())
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))?\s*\{([^}]*)\}", line
    ):
        return _of_axes(*named.groups())
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
