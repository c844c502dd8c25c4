"""Where everything lives: the mesh, a batch's rows, one ordered table from parameter to axes."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codebook_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch is split over both together
# Up to here, a pass over an array in a device's cache takes less than a sum over devices.
SMALL_BYTES = 32 * 10**6
_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")

# Pattern of a name, axes. First match wins; all copies of a parameter have its name. The first axis
# of everything in `blocks` counts the layers. An axis that does not divide evenly is not split.
TABLE: tuple[tuple[str, P], ...] = (
    (r"blocks/.*(qkv|key_value)/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*(qkv|key_value)/bias$", P(None, None, "tensor", None)),
    (r"blocks/.*query/kernel$", P(None, "fsdp", "tensor", None)),
    (r"blocks/.*query/bias$", P(None, "tensor", None)),
    (r"blocks/.*out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"blocks/.*up/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*up/bias$", P(None, "tensor")),
    (r"blocks/.*down/kernel$", P(None, "tensor", "fsdp")),
    # Over fsdp alone: split over tensor too, XLA (jax 0.10) gets the gradient of L_mlm wrong on
    # mesh data 2, fsdp 2, tensor 2.
    (r"text/words$", P(None, "fsdp")),
    (r"masked_words/transform/kernel$", P("fsdp", "tensor")),
    (r"(patches|(image|text)_projection)/kernel$", P("fsdp", None)),
    (r"codebook/codes$", P("tensor", None)),
    (r"queue/(image|text)$", P("tensor", None)),
    (r".*", P()),
)


def make_mesh(
    data: int, fsdp: int, tensor: int, *, slices: int = 0, devices: list[jax.Device] | None = None
) -> Mesh:
    """The mesh over all devices, or those given; one of the sizes may be -1: what the others leave.

    fsdp 0 means not chosen yet (`fsdp_choices`): 1, or what the others leave if both are given.
    """
    devices = jax.devices() if devices is None else devices
    chosen = fsdp or (1 if -1 in (data, tensor) else -1)
    try:
        sizes = np.empty(len(devices)).reshape(data, chosen, tensor).shape
    except ValueError as error:
        raise UserError(
            f"config.mesh.data={data}, config.mesh.fsdp={fsdp}, config.mesh.tensor={tensor} does "
            f"not fit {len(devices)} device{'s' * (len(devices) != 1)}: their product must be that "
            "number; at most one may be -1, and only fsdp may be 0"
        ) from error
    # Auto axes: the partitioner places gathers and reshapes of the batch.
    types = (AxisType.Auto,) * len(AXES)
    placed = arranged(sizes, devices, slices)
    if placed is None:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return Mesh(placed, AXES, axis_types=types)


def mesh_of(axes: ml_collections.ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, over all devices or those given."""
    return make_mesh(axes.data, axes.fsdp, axes.tensor, slices=axes.slices, devices=devices)


def slice_groups(devices: Sequence[Any], slices: int = 0) -> list[list[Any]]:
    """The devices of each slice (of a TPU pod, or GPU hosts), which a slower network joins: by
    their `slice_index`, or in order if another number of `slices` than they report is given.
    """
    reported = sorted(set(map(_slice_index, devices)))
    groups = [[each for each in devices if _slice_index(each) == index] for index in reported]
    if slices not in (0, len(groups)):
        groups = [group.tolist() for group in np.array_split(np.array(devices), slices)]
    counts = [len(group) for group in groups]
    if len(set(counts)) > 1:
        raise UserError(
            f"config.mesh.slices={slices} means slices of {', '.join(map(str, counts))} devices, "
            "but a mesh needs slices of equal size: give a divisor of their number, such as 1"
        )
    return groups


def slices_over(sizes: Sequence[int], slices: int) -> tuple[int, int, int]:
    """How many slices each axis of a mesh spans: first data, which sends least; then fsdp; never
    tensor, which sums in every layer: UserError if it would have to.
    """
    data, fsdp, tensor = sizes
    over_data = math.gcd(data, slices)
    if fsdp % (slices // over_data):
        own = math.prod(sizes) // slices
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not a multiple of the {slices} "
            f"slices of {own} devices, and config.mesh.tensor={tensor} must stay inside one: give "
            f"a tensor that divides {own}, or --config.mesh.slices=1"
        )
    return over_data, slices // over_data, 1


def arranged(sizes: Sequence[int], devices: Sequence[Any], slices: int = 0) -> np.ndarray | None:
    """The devices as an array of these sizes; None for one slice, whose order JAX chooses."""
    groups, reported = slice_groups(devices, slices), len(set(map(_slice_index, devices)))
    if len(groups) == reported == 1:
        return None
    between = slices_over(sizes, len(groups))
    inside = tuple(size // count for size, count in zip(sizes, between, strict=True))
    if reported == len(groups):
        return mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    # Slice by slice along each axis, within a slice in order: each [over, inside] becomes one axis.
    blocks = np.array(groups).reshape(*between, *inside)
    return blocks.transpose(0, 3, 1, 4, 2, 5).reshape(sizes)


def _slice_index(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0  # libtpu leaves it out for a single slice


def data_shards(mesh: Mesh) -> int:
    """The number of parts that the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def possible_fsdp(mesh: Mesh) -> list[int]:
    """The possible fsdp with the same number of data shards, smallest first."""
    shards = data_shards(mesh)
    return [size for size in range(1, shards + 1) if shards % size == 0]


def fsdp_choices(axes: ml_collections.ConfigDict) -> list[int]:
    """The fsdp to try: those inside a slice first, then smaller ones, which communicate less."""
    mesh = mesh_of(axes)
    if axes.fsdp or axes.data != -1:
        return [mesh.shape["fsdp"]]
    shards, tensor = data_shards(mesh), mesh.shape["tensor"]
    count = len(slice_groups(list(mesh.devices.flat), axes.slices))
    return sorted(
        possible_fsdp(mesh), key=lambda n: slices_over((shards // n, n, tensor), count)[1] > 1
    )


def axes_of_trained(axes: ml_collections.ConfigDict, own: int, *, asked: bool) -> dict[str, int]:
    """The axes to use a trained run with: `asked` ones, or its `own` fsdp if the devices fit."""
    found = {**axes, "fsdp": axes.fsdp or own}
    try:
        if not (asked and axes.fsdp):
            make_mesh(**found)
    except UserError:  # trained on other devices
        share = math.gcd(max(own, 1), jax.device_count())
        return {"data": -1, "fsdp": share, "tensor": 1, "slices": 0}
    return found


def described_axes(mesh: Mesh, slices: int) -> str:
    """The sizes of a mesh's axes, and how several slices are joined."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = len(slice_groups(list(mesh.devices.flat), slices))
    if count == 1:
        return sizes
    over = zip(AXES, slices_over(tuple(mesh.shape.values()), count), strict=True)
    parts = ", ".join(f"{axis} {n}" for axis, n in over if n > 1)
    return f"{sizes}; over {count} slices: {parts}"


def check_batch(mesh: Mesh, global_batch: int, accumulation: int) -> None:
    """Raises UserError if the batch does not split evenly over the mesh and the passes."""
    shards = data_shards(mesh)
    parts = shards * accumulation
    if global_batch % parts:
        raise UserError(
            f"config.data.global_batch={global_batch} does not split over {shards} data shards "
            f"(config.mesh.data x config.mesh.fsdp) x config.optimizer.accumulation={accumulation}:"
            f" {max(1, round(global_batch / parts)) * parts} would"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH))


def process_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, ascending."""
    held = batch_sharding(mesh).addressable_devices_indices_map((global_batch,)).values()
    return np.unique([np.arange(global_batch)[index] for index in held])


def rows_by_holders(mesh: Mesh, global_batch: int) -> list[np.ndarray]:
    """The rows of the global batch in parts, each held by the devices of the same processes."""
    holders: list[set[int]] = [set() for _ in range(global_batch)]
    held = batch_sharding(mesh).devices_indices_map((global_batch,))
    for device, (index,) in held.items():
        for processes in holders[index]:
            processes.add(device.process_index)
    parts = defaultdict(list)
    for row, processes in enumerate(holders):
        parts[frozenset(processes)].append(row)
    return list(map(np.array, parts.values()))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of every field as global arrays."""
    place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(lambda rows: place(np.asarray(rows)), batch)


def own_rows(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """This process's rows of a global array, as `put_batch` takes them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = jax.device_put(array, batch_sharding(mesh)).addressable_shards
    parts = {shard.index[0].start or 0: shard.data for shard in shards}  # of copies, one
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


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
    spec = next(spec for pattern, spec in TABLE if re.search(pattern, name))
    axes = zip(spec, shape, strict=False)
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in axes))


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with its name, such as student/towers/image/cls."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), leaf


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(_name(path), leaf.shape, mesh)),
        abstract_state,
    )


def on_cpu(mesh: Mesh) -> bool:
    """Whether its devices are CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def gathered(parameters: Any, mesh: Mesh | None, *, in_blocks: bool = False) -> Any:
    """Parameters as a layer uses them: whole over fsdp. Else XLA may gather the batch's rows.

    Of a tree of towers, each block is gathered when it runs (`in_blocks`), without its first axis.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return parameters

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        if "blocks/" in (name := _name(path)):
            return leaf
        folder, layers = ("blocks/", (1,)) if in_blocks else ("", ())
        spec = spec_of(folder + name, layers + leaf.shape, mesh)[len(layers) :]
        used = P(*(None if axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, used))

    return jax.tree_util.tree_map_with_path(gather, parameters)


def by_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x` with its first axis split like the rows of a batch, if it divides evenly."""
    if mesh is None or x.shape[0] % data_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def whole(tree: Any, mesh: Mesh) -> Any:
    """`tree` with every array whole on every device."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def whole_if_small(tree: Any, mesh: Mesh, *, size: int) -> Any:
    """`whole`, for a problem of `size` bytes that one device solves sooner than many together."""
    return whole(tree, mesh) if size <= SMALL_BYTES else tree


def split_rows(tree: Any, parts: int, mesh: Mesh) -> Any:
    """[rows, ...] as [parts, rows / parts, ...]; each part has equally many rows of every shard."""

    def split(x: jax.Array) -> jax.Array:
        chunks = x.reshape(data_shards(mesh), parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return chunks.reshape(parts, -1, *x.shape[1:])

    place = NamedSharding(mesh, P(None, BATCH))
    return jax.lax.with_sharding_constraint(jax.tree.map(split, tree), place)


def join_rows(tree: Any, mesh: Mesh) -> Any:
    """The inverse of `split_rows`."""

    def join(x: jax.Array) -> jax.Array:
        chunks = x.reshape(x.shape[0], data_shards(mesh), -1, *x.shape[2:]).swapaxes(0, 1)
        return chunks.reshape(-1, *x.shape[2:])

    return jax.lax.with_sharding_constraint(jax.tree.map(join, tree), batch_sharding(mesh))


def describe(abstract_state: Any, mesh: Mesh) -> str:
    """A table of how the arrays of a state are split, with their megabytes on each device."""
    rows: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, leaf in named(abstract_state):
        spec = spec_of(name, leaf.shape, mesh)
        axes = [axis if axis and mesh.shape[axis] > 1 else "-" for axis in spec]
        split = " x ".join(axes) if set(axes) - {"-"} else "whole on every device"
        size = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows[split].append((size, f"{name} {' x '.join(map(str, leaf.shape))}"))
    lines = [
        (sum(size for size, _ in arrays) / 1e6, len(arrays), split, max(arrays)[1])
        for split, arrays in rows.items()
    ]
    lines.sort(reverse=True)
    lines.append((sum(line[0] for line in lines), sum(line[1] for line in lines), "sum", ""))
    head = f"{'split over':28}{'arrays':>7}{'MB':>11}  the largest"
    return "\n".join([head, *("{2:28}{1:7}{0:11,.2f}  {3}".format(*line) for line in lines)])
