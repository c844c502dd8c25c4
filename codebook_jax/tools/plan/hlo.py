"""The collectives of a compiled program, read from its text (`compiled.as_text()`): what is sent,
how often, between whom.

A collective in a loop counts once per iteration, and of a conditional only the branch that sends
most counts. An asynchronous one (started here, awaited there) counts once, although a TPU's program
repeats it, with its channel, in every fusion that overlaps with it. A TPU's program also writes a
reduce-scatter as a fusion of a sum and a slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
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
_SIZES = {
    "pred": 1,
    "token": 0,
    "opaque": 0,
    "s4": 0.5,
    "u4": 0.5,
    "s2": 0.25,
    "u2": 0.25,
    "c64": 8,
    "c128": 16,
}
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([^\s(]+)\s*(\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?([^\s=]+)\s*=\s*(.*)$")
_SENDS = re.compile(rf"\b(?:{'|'.join(KINDS)}|while|conditional|call|fusion|async)(?:-start)?\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[^\s,)]+)"
)


class Array(NamedTuple):
    """The type of an array on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = _SIZES.get(self.dtype)
        if size is None:
            size = int(re.search(r"\d+", self.dtype).group()) / 8  # f32, bf16, s8, f8e4m3fn, ...
        return math.ceil(math.prod(self.shape) * size)


class Collective(NamedTuple):
    """One collective of a program; sizes are per device."""

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    groups: tuple[
        tuple[int, ...], ...
    ]  # of devices by their place in the mesh; pairs (from, to) of a permutation
    times: int  # how often a step runs it
    where: str  # the operation it belongs to, as JAX names it
    channel: str = ""  # its unique number in the program, if XLA gives it one
    early: bool = False  # started before it is awaited, so that it may overlap with computation

    @property
    def group_size(self) -> int:
        """The number of devices that take part together."""
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, in a ring: the minimum for these kinds."""
        n = self.group_size
        given, made = (
            sum(array.bytes for array in arrays) for arrays in (self.operands, self.results)
        )
        if n < 2:
            return 0.0
        if self.kind == "all-gather":
            return made * (n - 1) / n
        if self.kind == "all-reduce":
            return 2 * given * (n - 1) / n
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(given)
        return given * (n - 1) / n


def collectives(text: str) -> list[Collective]:
    """Every collective that one run of the program executes, and how often."""
    program = _Program(text)
    return [found._replace(times=times) for found, times in program.walk(program.entry, 1) if times]


class _Instruction(NamedTuple):
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    line: str


class _Program:
    """Computations by name, each a list of instruction lines; only instructions that may send are
    parsed.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        own: list[str] | None = None
        for line in text.splitlines():
            if own is None:
                head = _HEAD.match(line)
                if head and not line.startswith("HloModule"):
                    own = self.computations.setdefault(head.group(2), [])
                    self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                own = None
            elif " = " in line:
                own.append(line)
        devices = re.search(r"num_partitions=(\d+)", text) or re.search(
            r"replica_count=(\d+)", text
        )
        self.devices = int(devices.group(1)) if devices else 1

    def walk(self, name: str, times: int) -> Iterator[tuple[Collective, int]]:
        """The collectives of a computation that is run `times` times, and of those it calls."""
        lines = self.computations.get(name.lstrip("%"), [])
        named: dict[str, str] = {}
        under_way: set[str] = set()
        for line in lines:
            named[line.split(" = ", 1)[0].split()[-1].lstrip("%")] = line
            if _SENDS.search(line) is None or (instruction := _read(line)) is None:
                continue
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                yield self._collective(instruction, kind, named), times
            elif opcode == "while":
                body = _attribute(instruction.line, "body")
                yield from self.walk(body, times * self._turns(instruction))
            elif opcode == "conditional":
                branches = [list(self.walk(branch, times)) for branch in _called(instruction.line)]
                yield from max(
                    branches, key=lambda found: sum(c.sent * n for c, n in found), default=[]
                )
            elif opcode in (
                "call",
                "async-start",
            ):  # the function that a reduction applies sends nothing
                for called in _called(instruction.line):
                    yield from self.walk(called, times)
            elif opcode == "fusion":
                for called in _called(instruction.line):
                    for found, n in self.walk(called, times):
                        if found.channel in under_way:
                            continue
                        if self._starts(called):
                            under_way.add(found.channel)
                            found = found._replace(early=True)
                        if called.startswith("all-reduce-scatter"):
                            found = found._replace(kind="reduce-scatter")
                        yield found, n

    def _collective(self, own: _Instruction, kind: str, named: dict[str, str]) -> Collective:
        given = [_read(named[name]) for name in own.operands]
        operands = tuple(array for instruction in given for array in instruction.results)
        results = own.results
        if (
            own.opcode.endswith("-start")
            and len(results) > len(operands) > 0
            and kind != "all-reduce"
        ):
            results = results[
                len(operands) : 2 * len(operands)
            ]  # (operands, results, what the runtime keeps)
        operation = re.search(r'op_name="([^"]*)"', own.line)
        channel = re.search(r"\bchannel_id=(\d+)", own.line)
        return Collective(
            kind,
            operands or results,
            results,
            _groups(own.line, self.devices),
            1,
            operation.group(1) if operation else "",
            channel.group(1) if channel else "",
            own.opcode.endswith("-start"),
        )

    def _starts(self, fusion: str) -> bool:
        """Whether this fusion starts a collective that other fusions of the same channel
        continue.
        """
        return any(
            'custom_call_target="AsyncCollectiveStart"' in line
            for line in self.computations.get(fusion, [])
        )

    def _turns(self, loop: _Instruction) -> int:
        """How often a loop runs, as XLA states it, or else from the bound in its condition."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line)
        if known:
            return int(known.group(1))
        condition = "\n".join(self.computations.get(_attribute(loop.line, "condition"), []))
        bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition)
        if len(bounds) != 1:
            raise ValueError(f"a loop does not say how often it runs: {loop.line.strip()[:200]}")
        return int(bounds[0])


def _read(line: str) -> _Instruction | None:
    """The instruction of a line: its types come before its opcode, its operands in the brackets
    after it.
    """
    found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
    if found is None:
        return None
    name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if opcode is None:
        return None
    opened = end + opcode.end() - 1
    inside = rest[opened + 1 : _closing(rest, opened)]
    operands = tuple(re.findall(r"%([^\s,()]+)", inside)) or tuple(
        part.split()[-1] for part in inside.split(", ") if part and "[" not in part
    )
    return _Instruction(name, opcode.group(1), _arrays(rest[:end]), operands, line)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", text))
    )


def _closing(text: str, opened: int) -> int:
    """The place where the bracket opened at `opened` closes."""
    depth = 0
    for place in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def _attribute(line: str, name: str) -> str:
    return re.search(rf"\b{name}=%?([^\s,)]+)", line).group(1)


def _called(line: str) -> list[str]:
    return [
        name.lstrip("%")
        for found in _CALLED.findall(line)
        for name in re.findall(r"[^\s,{}]+", found)
    ]


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that take part together: explicit lists, an iota, or axes of a mesh; all devices
    if none are named.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))?\s*\{([^}]*)\}", line
    )
    if named:
        return _of_axes(*named.groups())
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _rows(_iota(iota.group(1)))
    lists = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if lists:
        return tuple(
            tuple(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", lists.group(1))
        )
    return (tuple(range(devices)),)


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): the numbers from 0 in the second shape, its axes in the order after T, in
    the first shape.
    """
    made, counted, order = re.match(
        r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text
    ).groups()
    made, counted, order = (
        [int(n) for n in part.split(",")] if part else None for part in (made, counted, order)
    )
    order_of_axes = order or list(range(len(counted or made)))
    if counted is None:  # [2,3]T(1,0) of a mesh: numbers in that shape, their axes in this order
        return np.arange(math.prod(made)).reshape(made).transpose(order_of_axes)
    return np.arange(math.prod(counted)).reshape(counted).transpose(order_of_axes).reshape(made)


def _of_axes(mesh: str, ids: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: devices that differ only in these axes.

    An axis may be a part of one: 'b':(2)2 is the 2 inside the first 2 of b.
    """
    names, sizes = zip(*((n, int(s)) for n, s in re.findall(r"'([^']+)'=(\d+)", mesh)), strict=True)
    numbers = _iota(ids).reshape(-1) if ids else np.arange(math.prod(sizes))
    shape: list[int] = []
    chosen: list[int] = []
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, whole in zip(names, sizes, strict=True):
        before, size = parts.get(name, (1, 1))
        size = size or whole
        if name in parts:
            chosen.append(len(shape) + 1)
        shape += [before, size, whole // (before * size)]
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    together = math.prod(shape[axis] for axis in chosen)
    return _rows(numbers.reshape(shape).transpose(others + chosen).reshape(-1, together))


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups.tolist()))
