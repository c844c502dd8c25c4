"""Where everything lives: the mesh, the rows of the batch, and one ordered table from parameter name to axes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codebook_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch is split over both together

# First match wins; the same names stand in student, teacher and optimizer moments, so one table shards them alike.
# The first axis of what is in `blocks` counts the layers. An axis that does not divide is left whole.
TABLE: tuple[tuple[str, P], ...] = (
    (r"blocks/.*(qkv|key_value)/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*(qkv|key_value)/bias$", P(None, None, "tensor", None)),
    (r"blocks/.*query/kernel$", P(None, "fsdp", "tensor", None)),
    (r"blocks/.*query/bias$", P(None, "tensor", None)),
    (r"blocks/.*out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"blocks/.*up/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*up/bias$", P(None, "tensor")),
    (r"blocks/.*down/kernel$", P(None, "tensor", "fsdp")),
    # Over fsdp alone: split over tensor too, XLA (jax 0.10) gets the gradient of L_mlm wrong on mesh data 2, fsdp 2, tensor 2.
    (r"text/words$", P(None, "fsdp")),
    (r"masked_words/transform/kernel$", P("fsdp", "tensor")),
    (r"(patches|image_projection|text_projection)/kernel$", P("fsdp", None)),
    (r"codebook/codes$", P("tensor", None)),
    (r"queue/(image|text)$", P("tensor", None)),
    (r".*", P()),
)


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh over all devices; one of the three sizes may be -1 and takes what the others leave.

    Raises UserError, with the numbers, for sizes that do not fit the devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.device_count()
    given = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{given}: give whole numbers from 1, and -1 for at most one of them")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(devices // fixed, 1)
    if math.prod(sizes.values()) != devices:
        plural = "s" if devices != 1 else ""
        raise UserError(
            f"{given} does not fit {devices} device{plural}: their product must be the number of devices"
        )
    # Auto axes: gathers and reshapes of the batch are the partitioner's to place.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_shards(mesh: Mesh) -> int:
    """How many parts the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def fits(*sizes: int) -> bool:
    """Whether a mesh of these sizes, -1 for what is left, can be made of the devices there are."""
    fixed = math.prod(size for size in sizes if size != -1)
    return jax.device_count() % fixed == 0 if -1 in sizes else jax.device_count() == fixed


def check_batch(mesh: Mesh, global_batch: int, accumulation: int) -> None:
    """Raises UserError when the batch does not split over the mesh and the passes."""
    shards = data_shards(mesh)
    if global_batch % (shards * accumulation):
        nearest = max(1, round(global_batch / (shards * accumulation))) * shards * accumulation
        passes = f" x {accumulation} passes" if accumulation > 1 else ""
        raise UserError(
            f"config.data.global_batch={global_batch} does not split over {shards} data shards "
            f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}){passes}: {nearest} would"
        )


def check_groups(mesh: Mesh, global_batch: int, accumulation: int, groups: int) -> None:
    """Raises UserError when a group of negatives would not be in one pass, or be one pair."""
    shards = data_shards(mesh)
    if accumulation > 1 and groups % (shards * accumulation):
        raise UserError(
            f"config.optimizer.accumulation={accumulation} on {shards} data shards needs config.itm.groups to be a "
            f"multiple of {shards * accumulation}, and it is {groups}: a group of negatives has to be in one pass"
        )
    if global_batch // groups < 2:
        raise UserError(
            f"config.itm.groups={groups} of config.data.global_batch={global_batch} leaves one pair a group, and so no "
            "negatives: choose a larger batch or fewer groups"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes, all else whole."""
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


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The table's axes for a parameter, without those that do not divide its shape."""
    spec = next(spec for pattern, spec in TABLE if re.search(pattern, name))
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return P(*axes)


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf with its name, such as student/towers/image/cls."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a train state."""
    names, leaves = zip(*named(abstract_state), strict=True)
    shardings = [
        NamedSharding(mesh, spec_of(name, leaf.shape, mesh))
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), shardings)


def gathered(parameters: Any, mesh: Mesh | None, *, in_blocks: bool = False) -> Any:
    """Parameters as a layer uses them: whole over fsdp, which splits what is kept, not what is computed.

    Of a tree of towers what stands in `blocks` is left alone: each block is gathered when it runs, `in_blocks`, without
    its axis over the layers. Left to itself, XLA may gather the rows of the batch instead.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return parameters

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
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
    """`x` with its first axis split as the batch's rows are, where it divides."""
    if mesh is None or x.shape[0] % data_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def split_rows(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[rows, ...] as [parts, rows / parts, ...], each part holding equally many rows of every shard."""
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


def describe(abstract_state: Any, mesh: Mesh) -> str:
    """The part of the table that matched: pattern, axes, how many arrays, bytes in all and a device."""
    rows: dict[str, list[Any]] = {}
    for name, leaf in named(abstract_state):
        pattern = next(pattern for pattern, _ in TABLE if re.search(pattern, name))
        spec = spec_of(name, leaf.shape, mesh)
        split = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        row = rows.setdefault(f"{pattern}|{spec}", [pattern, spec, 0, 0, 0])
        row[2:] = [row[2] + 1, row[3] + size, row[4] + size // split]
    lines = [f"{'parameters matching':44} {'split over':44} arrays     MB  MB a device"]
    for pattern, spec, count, size, own in sorted(rows.values(), key=lambda row: -row[3]):
        axes = ", ".join("-" if axis is None else axis for axis in spec) or "whole"
        lines.append(f"{pattern:44} {axes:44} {count:6} {size / 1e6:6,.0f} {own / 1e6:12,.0f}")
    return "\n".join(lines)
