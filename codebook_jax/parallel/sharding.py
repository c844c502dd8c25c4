"""Where everything lives: the mesh, the rows of the batch, and one ordered table from parameter
name to axes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codebook_jax.errors import UserError
from codebook_jax.parallel import slices as device_slices

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch is split over both together

# Name in the printed table, pattern, axes. First match wins; student, teacher and optimizer moments
# have the same names, so one table shards them alike. The first axis of everything in `blocks`
# counts the layers. An axis that does not divide evenly is not split.
TABLE: tuple[tuple[str, str, P], ...] = (
    ("attention", r"blocks/.*(qkv|key_value)/kernel$", P(None, "fsdp", None, "tensor", None)),
    ("attention", r"blocks/.*(qkv|key_value)/bias$", P(None, None, "tensor", None)),
    ("attention", r"blocks/.*query/kernel$", P(None, "fsdp", "tensor", None)),
    ("attention", r"blocks/.*query/bias$", P(None, "tensor", None)),
    ("attention", r"blocks/.*out/kernel$", P(None, "tensor", None, "fsdp")),
    ("feed-forward", r"blocks/.*up/kernel$", P(None, "fsdp", "tensor")),
    ("feed-forward", r"blocks/.*up/bias$", P(None, "tensor")),
    ("feed-forward", r"blocks/.*down/kernel$", P(None, "tensor", "fsdp")),
    # Over fsdp alone: split over tensor too, XLA (jax 0.10) gets the gradient of L_mlm wrong on
    # mesh data 2, fsdp 2, tensor 2.
    ("word embeddings", r"text/words$", P(None, "fsdp")),
    ("masked-word head", r"masked_words/transform/kernel$", P("fsdp", "tensor")),
    ("patches, projections", r"(patches|(image|text)_projection)/kernel$", P("fsdp", None)),
    ("codebook", r"codebook/codes$", P("tensor", None)),
    ("queues", r"queue/(image|text)$", P("tensor", None)),
    ("all else", r".*", P()),
)


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    *,
    slices: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh over all devices, or those given; one of the three sizes may be -1 and takes what
    the others leave.

    fsdp 0 means not chosen yet (axes.py does that): 1, or what the others leave if both are given.
    `slices`: see slices.py. Raises UserError, with the numbers, if the sizes do not fit the
    devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.devices() if devices is None else devices
    given = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
    if fsdp == 0:
        sizes["fsdp"] = 1 if -1 in (data, tensor) else -1
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"{given}: give whole numbers from 1; at most one may be -1, and only fsdp may be 0"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    if math.prod(sizes.values()) != len(devices):
        plural = "s" * (len(devices) != 1)
        raise UserError(
            f"{given} does not fit {len(devices)} device{plural}: their product must be that number"
        )
    shape = tuple(sizes.values())
    # Auto axes: the partitioner places gathers and reshapes of the batch.
    types = (AxisType.Auto,) * len(AXES)
    placed = device_slices.arranged(shape, devices, slices)
    if placed is None:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    return Mesh(placed, AXES, axis_types=types)


def mesh_of(axes: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, over all devices or those given."""
    return make_mesh(axes.data, axes.fsdp, axes.tensor, slices=axes.slices, devices=devices)


def data_shards(mesh: Mesh) -> int:
    """The number of parts that the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def possible_fsdp(mesh: Mesh) -> list[int]:
    """The possible fsdp with the same number of data shards, smallest first."""
    shards = data_shards(mesh)
    return [size for size in range(1, shards + 1) if shards % size == 0]


def fits(data: int, fsdp: int, tensor: int, *, slices: int = 0) -> bool:
    """Whether the available devices can form a mesh of these sizes."""
    try:
        make_mesh(data, fsdp, tensor, slices=slices)
    except UserError:
        return False
    return True


def check_batch(mesh: Mesh, global_batch: int, accumulation: int) -> None:
    """Raises UserError if the batch does not split evenly over the mesh and the passes."""
    shards = data_shards(mesh)
    if global_batch % (shards * accumulation):
        nearest = max(1, round(global_batch / (shards * accumulation))) * shards * accumulation
        passes = f" x {accumulation} passes" if accumulation > 1 else ""
        raise UserError(
            f"config.data.global_batch={global_batch} does not split over {shards} data shards "
            f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}){passes}: {nearest} would"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH))


def process_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, ascending."""
    held = batch_sharding(mesh).addressable_devices_indices_map((global_batch,)).values()
    rows = np.arange(global_batch)
    return np.unique(np.concatenate([rows[index] for index in held]))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of every field as global arrays."""
    placement = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(placement, np.asarray(rows)), batch
    )


def to_device(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """A batch that every process holds whole, split over the mesh's batch axes."""
    placement = batch_sharding(mesh)
    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array as NumPy, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The table's axes for a parameter, without those that do not divide its shape."""
    spec = _rule(name)[1]
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return P(*axes)


def _rule(name: str) -> tuple[str, P]:
    """The table's name and axes for a parameter."""
    return next((group, spec) for group, pattern, spec in TABLE if re.search(pattern, name))


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with its name, such as student/towers/image/cls."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), leaf


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(_name(path), leaf.shape, mesh)),
        abstract_state,
    )


def gathered(parameters: Any, mesh: Mesh | None, *, in_blocks: bool = False) -> Any:
    """Parameters as a layer uses them: whole over fsdp, which splits what is stored, not what is
    computed.

    In a tree of towers, everything in `blocks` is left alone: each block is gathered when it runs
    (`in_blocks`), without its axis over the layers. Without this, XLA may gather the rows of the
    batch instead.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return parameters

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        name = _name(path)
        if in_blocks:
            spec = spec_of(f"blocks/{name}", (1, *leaf.shape), mesh)[1:]
        elif "blocks/" in name:
            return leaf
        else:
            spec = spec_of(name, leaf.shape, mesh)
        whole = P(*(None if axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))

    return jax.tree_util.tree_map_with_path(gather, parameters)


def by_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x` with its first axis split like the rows of a batch, if it divides evenly."""
    if mesh is None or x.shape[0] % data_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def whole(tree: Any, mesh: Mesh) -> Any:
    """`tree` with every array whole on every device."""
    place = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), tree)


def split_rows(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[rows, ...] as [parts, rows / parts, ...]; each part has equally many rows of every shard."""
    shards = data_shards(mesh)
    chunks = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    rows = chunks.reshape(parts, -1, *x.shape[1:])
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, P(None, BATCH)))


def join_rows(parts: jax.Array, mesh: Mesh) -> jax.Array:
    """The inverse of `split_rows`."""
    shards = data_shards(mesh)
    count, _, *rest = parts.shape
    chunks = parts.reshape(count, shards, -1, *rest).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(chunks.reshape(-1, *rest), batch_sharding(mesh))


class Row(NamedTuple):
    """A line of the printed table: arrays of a state with the same group in TABLE and split."""

    group: str
    arrays: int
    largest: tuple[int, ...]  # shape of the largest of them
    spec: P  # its axes
    bytes: int  # per device


def table(abstract_state: Any, mesh: Mesh) -> list[Row]:
    """Where the arrays of a state are, most bytes first; those that are not split form one row."""
    rows: dict[tuple[str, frozenset[str]], Row] = {}
    for name, leaf in named(abstract_state):
        spec = spec_of(name, leaf.shape, mesh)
        axes = frozenset(axis for axis in spec if axis is not None and mesh.shape[axis] > 1)
        group = _rule(name)[0] if axes else "whole on every device"
        own = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        row = rows.get((group, axes), Row(group, 0, (), P(), 0))
        if math.prod(leaf.shape) >= math.prod(row.largest):
            row = row._replace(largest=leaf.shape, spec=spec)
        size = row.bytes + math.prod(own) * leaf.dtype.itemsize
        rows[group, axes] = row._replace(arrays=row.arrays + 1, bytes=size)
    return sorted(rows.values(), key=lambda row: -row.bytes)


def describe(abstract_state: Any, mesh: Mesh) -> str:
    """The table as text: how each group is split, and megabytes per device with their sum."""
    rows = table(abstract_state, mesh)
    lines = [("on each device", "arrays", "largest", "split over", "MB")]
    for row in rows:
        axes = [axis if axis is not None and mesh.shape[axis] > 1 else "-" for axis in row.spec]
        split = " x ".join(axes) if set(axes) - {"-"} else ""
        shape = " x ".join(map(str, row.largest)) or "1"
        lines.append((row.group, str(row.arrays), shape, split, f"{row.bytes / 1e6:,.2f}"))
    arrays, size = sum(row.arrays for row in rows), sum(row.bytes for row in rows)
    lines.append(("sum", str(arrays), "", "", f"{size / 1e6:,.2f}"))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    sides = "<><<>"  # left, right
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*line).rstrip() for line in lines)
