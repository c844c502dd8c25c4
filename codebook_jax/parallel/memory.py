"""How much memory a device needs for a step, estimated before anything is compiled, and what to
change if it is too much.

What the state holds is counted exactly from its shapes and shardings. What a step holds besides
comes from tracing the real step (a second or two, nothing is compiled): the program is walked in
order and all live values are added up, as XLA does when it assigns buffers. So remat, accumulation
and changes of the objective are included automatically. The traced
step is that of one device: its share of the batch, against all candidates. Parameters are split as
the mesh splits them, intermediate values over `tensor` if they have the axes of heads or of the
feed-forward part.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from codebook_jax.config import restart_of, with_fields
from codebook_jax.console import say
from codebook_jax.data.batch import Batch
from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding
from codebook_jax.parallel.capacity import device_memory
from codebook_jax.parallel.liveness import Bytes, peak

MARGIN = (
    0.05  # share of a device's memory left free for fragmentation and libraries' own workspaces
)
AGAIN = 0.8  # share of an estimate that proved too low: advice must stay below it

Create = Callable[[ml_collections.ConfigDict, Vocabulary, jax.sharding.Mesh], Any]  # of a task


class Estimate(NamedTuple):
    """Bytes that one device needs for training."""

    parameters: int  # the student's
    teacher: int
    moments: int
    queues: int  # and the codewords' usage counts
    gradients: int  # and the copies of parameters made while new ones are written over the old
    activations: int  # the batch, what the backward pass needs, and intermediate values

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        return f"{size_of(self.total)} ({self.parts()})"

    def parts(self) -> str:
        """Each part in the unit of the total."""
        unit, digits = (1e9, 1) if self.total >= 1e9 else (1e6, 0)
        return ", ".join(
            f"{name} {part / unit:.{digits}f}" for name, part in self._asdict().items()
        )


class Planner:
    """Estimates of one run under changes of its config; each takes about two seconds, a repeated
    one no time.

    Estimates that differ only in the mesh, with the same number of data shards, take a tenth: their
    step is traced once.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        create: Create,
        resolve: Callable[..., ml_collections.ConfigDict],
        vocabulary_size: int,
        *,
        has_checkpoint: bool = False,
        in_float32: bool | None = None,
    ) -> None:
        self.config, self.create = config, create
        # Whether bfloat16 is computed in float32; None: as on this machine (on a CPU, XLA does so).
        self.in_float32 = in_float32
        self.resolve, self.has_checkpoint = resolve, has_checkpoint  # what an existing run fixes
        self.vocabulary = Vocabulary(
            vocabulary_size, 0, 1, 2, 3, (0, 1, 2, 3)
        )  # ids do not matter here
        self._traced: dict[Any, tuple[Any, Any, Any]] = {}
        self._estimated: dict[Any, Estimate] = {}

    @functools.cached_property
    def has(self) -> int | None:
        """Bytes that the run can use on a device, asked once; None if unknown."""
        return device_memory()

    def settle(self, changes: Mapping[str, Any]) -> None:
        """Applies `changes` to the config that all later changes are based on."""
        self.config = with_fields(self.config, changes)

    def with_changes(
        self, changes: Mapping[str, Any]
    ) -> tuple[ml_collections.ConfigDict, jax.sharding.Mesh]:
        """The config with `changes` by dotted name, and its mesh; raises UserError if they do not
        fit together.
        """
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.update_from_flattened_dict(changes)
        mesh = sharding.mesh_of(config.mesh)
        batch, passes = config.data.global_batch, config.optimizer.accumulation
        sharding.check_batch(mesh, batch, passes)
        return self.resolve(config, shards=sharding.data_shards(mesh)), mesh

    def possible(self, changes: Mapping[str, Any]) -> bool:
        """Whether the run, which may already exist, can be started with `changes`."""
        if self.has_checkpoint and any(restart_of(name) != "free" for name in changes):
            return False
        try:
            self.with_changes(changes)
        except UserError:
            return False
        return True

    def estimate(self, changes: Mapping[str, Any] = MappingProxyType({})) -> Estimate:
        """The estimate for the config with `changes` by dotted name; raises UserError if they do
        not fit together.
        """
        config, mesh = self.with_changes(changes)
        known = _identity(config), tuple(mesh.shape.values())
        if known not in self._estimated:
            self._estimated[known] = self._estimate(config, mesh)
        return self._estimated[known]

    def _estimate(self, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Estimate:
        state, batch, program = self.traced_on_one_device(config, mesh)
        queue = jax.tree.map(  # the traced one is longer: see on_one_device
            lambda leaf: (
                jax.ShapeDtypeStruct((config.queue.size, *leaf.shape[1:]), leaf.dtype)
                if leaf.ndim
                else leaf
            ),
            state.queue,
        )
        places = sharding.state_shardings(state.replace(queue=queue), mesh)
        student = _held(state.student, places.student)
        between = peak(
            program,
            _splitter(config, state.student, places.student, mesh, self.in_float32),
            in_place=True,
        )
        # Donated parameters are still read while the new ones are written: XLA copies them.
        # Learning holds gradients, updates and that copy.
        between = max(between, 2 * student) + student
        images = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
        gradients = 2 * student
        return Estimate(
            parameters=student,
            teacher=_held(state.teacher, places.teacher),
            moments=_held(state.moments, places.moments),
            queues=_held(queue, places.queue) + _held(state.usage, places.usage),
            gradients=gradients,
            activations=max(between - gradients, 0)
            + 2 * images,  # the next batch is already loaded
        )

    def traced_on_one_device(
        self, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
    ) -> tuple[Any, Any, Any]:
        """(state, batch, program) of one device's step, all abstract; traced once per number of
        data shards.
        """
        shards = sharding.data_shards(mesh)
        known = _identity(config), shards
        if known not in self._traced:
            task = self.on_one_device(config, shards)
            state, batch = task.abstract_state(), abstract_batch(task.config)
            self._traced[known] = state, batch, task.step.trace(state, batch).jaxpr.jaxpr
        return self._traced[known]

    def on_one_device(self, config: ml_collections.ConfigDict, shards: int) -> Any:
        """The task with one device's share of the batch; the queue stands in for the batch's other
        candidates.
        """
        rows = max(config.data.global_batch // shards, 2)
        own = with_fields(
            config,
            {
                "data.global_batch": rows,
                "itm.groups": max(config.itm.groups // shards, 1),
                "queue.size": config.queue.size + config.data.global_batch - rows,
            },
        )
        device = jax.local_devices()[:1]
        axes = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
        mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axes, devices=device)
        return self.create(own, self.vocabulary, mesh)


def check(planner: Planner) -> None:
    """Prints the memory that a device needs and has; raises UserError, with settings that fit, if
    it needs too much.

    If `config.train.memory_check` is False it only prints.
    """
    need, has = planner.estimate(), planner.has
    if has is None:
        say(f"memory per device: {need}; how much a device has is not known")
        return
    if need.total <= has * (1 - MARGIN) or not planner.config.train.memory_check:
        say(f"memory per device: {size_of(need.total)} of {size_of(has)} ({need.parts()})")
        return
    raise UserError(
        f"training needs {need} of memory per device, but {jax.local_devices()[0].device_kind} has "
        f"{size_of(has)}: {advice(planner, need, has * (1 - MARGIN))}; "
        "--config.train.memory_check=False tries anyway"
    )


@contextlib.contextmanager
def explaining(planner: Planner | None) -> Iterator[None]:
    """Inside, a device that runs out of memory raises UserError with settings that need less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = out_of_memory(error)
        if reason is None or planner is None:
            raise
        need = planner.estimate()
        raise UserError(
            f"a device ran out of memory ({reason}); training was estimated to need {need}: "
            f"{advice(planner, need, need.total * AGAIN)}"
        ) from error


def out_of_memory(error: Exception) -> str | None:
    """What a device, or a compiler for TPUs, says about needed and available memory; None for
    another error.
    """
    _, exhausted, said = str(error).partition("RESOURCE_EXHAUSTED:")
    if not exhausted:
        return None
    by_libtpu = re.search(
        r"[Uu]sed \S+ of \S+ hbm|[\w ]+\(\S+\) exceeds available HBM \(\S+?\)", said
    )
    return by_libtpu.group(0).strip() if by_libtpu else said.strip().split("\n")[0].rstrip(".")


def advice(planner: Planner, need: Estimate, limit: float) -> str:
    """Flags that bring the estimate below `limit`, each with its new estimate, as part of a
    sentence.
    """
    found = fitting_settings(planner, need, limit)
    if not found:
        return "no batch size, accumulation, remat, dtype or fsdp would fit: use a smaller model or more devices"
    ways = [
        f"{' '.join(f'--config.{name}={value}' for name, value in changes.items())} "
        f"({size_of(estimate.total)})"
        for changes, estimate in found
    ]
    return f"what fits is {', or '.join(ways)}"


def fitting_settings(
    planner: Planner, need: Estimate, limit: float
) -> list[tuple[dict[str, Any], Estimate]]:
    """Config changes that need at most `limit`, cheapest first, with their estimates; empty if
    there are none.

    Each of remat, bfloat16, accumulation, fsdp and a smaller batch alone, if that is enough;
    otherwise one combination, to which they are added in this order until it fits. Each answer is
    checked with an estimate of its own.
    """
    singles = [{"model.remat": "blocks"}, {"model.dtype": "bfloat16"}]
    singles = [c for c in singles if not _holds(planner.config, c) and planner.possible(c)]
    found = [(changes, planner.estimate(changes)) for changes in singles]
    together = {name: value for c, e in found if e.total < need.total for name, value in c.items()}
    found = [(changes, estimate) for changes, estimate in found if estimate.total <= limit]
    for ladder in LADDERS:
        if (step := _first_that_fits(planner, {}, ladder, need, limit)[0]) is not None:
            found.append(step)
    if found:
        return found
    estimate = planner.estimate(together) if together else need
    if estimate.total <= limit:
        return [(together, estimate)]
    for ladder in LADDERS:
        step, (together, estimate) = _first_that_fits(planner, together, ladder, estimate, limit)
        if step is not None:
            return [step]
    return []


def _accumulations(planner: Planner) -> list[tuple[float, dict[str, Any]]]:
    now, rows = planner.config.optimizer.accumulation, planner.config.data.global_batch
    return [(1 / 2**k, {"optimizer.accumulation": now * 2**k}) for k in range(1, rows.bit_length())]


def _fsdps(planner: Planner) -> list[tuple[float, dict[str, Any]]]:
    mesh = planner.with_changes({})[1]
    now = mesh.shape["fsdp"]
    return [
        (now / n, {"mesh.data": -1, "mesh.fsdp": n})
        for n in sharding.possible_fsdp(mesh)
        if n > now
    ]


def _batches(planner: Planner) -> list[tuple[float, dict[str, Any]]]:
    rows = planner.config.data.global_batch
    return [
        (1 / 2**k, {"data.global_batch": rows // 2**k})
        for k in range(1, rows.bit_length())
        if rows % 2**k == 0
    ]


LADDERS = (
    _accumulations,
    _fsdps,
    _batches,
)  # (remaining share of the need, changes), mildest first
_Step = tuple[dict[str, Any], Estimate]


def _first_that_fits(
    planner: Planner, given: dict[str, Any], ladder: Any, need: Estimate, limit: float
) -> tuple[_Step | None, _Step]:
    """The mildest step of a ladder that fits on top of `given`, and the one that needs least: the
    last, or `given` itself.

    Memory is nearly linear in the share of the rows, so most of the ladder is skipped without an
    estimate.
    """
    steps = [(share, given | changes) for share, changes in ladder(planner)]
    steps = [(share, changes) for share, changes in steps if planner.possible(changes)]
    if not steps:
        return None, (given, need)
    least, last = steps[-1]
    most = planner.estimate(last)
    if most.total > limit:
        return None, ((last, most) if most.total < need.total else (given, need))
    slope = (need.total - most.total) / (1 - least)
    for share, changes in steps[:-1]:
        if most.total + slope * (share - least) > limit * 1.02:
            continue
        estimate = planner.estimate(changes)
        if estimate.total <= limit:
            return (changes, estimate), (changes, estimate)
    return (last, most), (last, most)


def abstract_batch(config: ml_collections.ConfigDict) -> Batch:
    """The shapes and types of a whole batch."""
    rows, side, length = (
        config.data.global_batch,
        config.model.image.size_px,
        config.model.text.max_tokens,
    )
    array = jax.ShapeDtypeStruct
    image, number = array((rows, side, side, 3), jnp.uint8), array((rows,), jnp.int32)
    tokens = array((rows, length), jnp.int32)
    return Batch(image, image, array((rows,), bool), tokens, number, number, number, number)


def _held(tree: Any, places: Any) -> int:
    """Bytes of a tree on one device."""
    parts = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in parts
    )


def _splitter(
    config: ml_collections.ConfigDict,
    student: Any,
    places: Any,
    mesh: jax.sharding.Mesh,
    in_float32: bool | None,
) -> Bytes:
    """A function to the bytes per device of a value that a step computes, judged by its shape."""
    split = {}
    for leaf, place in zip(jax.tree.leaves(student), jax.tree.leaves(places), strict=True):
        split[leaf.shape] = math.prod(place.shard_shape(leaf.shape)) / math.prod(leaf.shape)
    towers = (config.model.image, config.model.text)
    tensor_axes = {
        size
        for tower in towers
        for size in (tower.heads, tower.mlp_width or 4 * tower.width)
        if size % mesh.shape["tensor"] == 0
    }
    if in_float32 is None:
        in_float32 = jax.default_backend() == "cpu"

    def bytes_of(aval: Any) -> int:
        dtype = getattr(aval, "dtype", None)
        size = getattr(dtype, "itemsize", 4)
        if in_float32 and dtype == jnp.bfloat16:
            size = 4
        share = split.get(aval.shape) if len(aval.shape) > 1 else None
        if share is None:
            share = 1 / mesh.shape["tensor"] if tensor_axes & set(aval.shape) else 1
        return int(math.prod(aval.shape) * size * share)

    return bytes_of


def _identity(config: ml_collections.ConfigDict) -> str:
    """Everything in a config except its mesh, as a key."""
    return repr(
        sorted((name, repr(part)) for name, part in config.to_dict().items() if name != "mesh")
    )


def _holds(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> bool:
    now = config.to_dict()
    return all(
        now["model"][name.removeprefix("model.")] == value for name, value in changes.items()
    )


def size_of(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
