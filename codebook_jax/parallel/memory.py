"""Whether a training step fits into a device's memory, by XLA's own count.

The step is compiled before anything is allocated, and the loop then calls the compiled program, so
this costs no time. docs/scale.md says what is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
from jax.extend import core
from jaxtyping import PyTree

from codebook_jax.console import say
from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers

MARGIN = 0.05  # share of a device's memory left free for fragmentation and libraries' workspaces
PROCESS_BYTES = 100 * 10**6  # threads, small programs; measured by benchmarks/memory.py
REMATS = "none", "dots", "blocks"  # what `model.remat` recomputes, least first
MOST_TRIES = 6  # programs compiled to find settings that fit
# For programs that are not run: skips passes after buffers and collectives are settled.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Task(Protocol):
    """What this module asks of a task."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    step: jax.stages.Wrapped

    def abstract_state(self) -> PyTree[jax.ShapeDtypeStruct]: ...

    def abstract_batch(self) -> PyTree[jax.ShapeDtypeStruct]: ...


# From changes of the config, by dotted name, to the task with them; UserError if they do not fit.
Make = Callable[[Mapping[str, Any]], Task]


class Need(NamedTuple):
    """Bytes that one device needs for training."""

    state: int
    batches: int
    step: int  # what it holds while it computes, and the program itself
    host: int = 0  # on a CPU: what the process needs besides

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size_of(part)}" for name, part in self._asdict().items())
        return f"{size_of(self.total)} ({parts})"


class Compiled(NamedTuple):
    """A task with its compiled step; without program and need if the compiler ran out of memory."""

    task: Task
    program: jax.stages.Compiled | None
    need: Need | None
    refusal: str = ""  # what the compiler reported

    def __str__(self) -> str:
        return size_of(self.need.total) if self.need else f"more ({self.refusal})"


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a device, and the tasks that may have to fit into it."""

    make: Make
    has: float  # bytes; math.inf: unknown
    planned: bool = False  # the device is only described, and nothing will run here

    def compile(self, task: Task) -> Compiled:
        """The task with its step compiled for its mesh."""
        on_cpu = sharding.on_cpu(task.mesh)
        traced = task.step.trace(task.abstract_state(), task.abstract_batch())
        options = QUICK if self.planned and on_cpu else None
        try:
            program = traced.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if (refusal := out_of_memory(error)) is None:
                raise
            return Compiled(task, None, None, refusal)
        found, batch = program.memory_analysis(), held(task.abstract_batch())
        own = found.output_size_in_bytes - found.alias_size_in_bytes
        state = found.argument_size_in_bytes - batch + own
        step = found.temp_size_in_bytes + found.generated_code_size_in_bytes
        host = 0
        if on_cpu and not self.planned:  # a device's memory is the host's
            saving = state + 3 * state // 4  # a copy, and what is being encoded of it
            ahead = task.config.data.prefetch * batch
            host = saving + ahead + PROCESS_BYTES // jax.local_device_count()
        return Compiled(task, program, Need(state, 2 * batch, step, host))

    def fits(self, compiled: Compiled) -> bool:
        """Whether it fits with MARGIN left."""
        return compiled.need is not None and compiled.need.total <= self.has * (1 - MARGIN)

    def first_fit(self, sizes: Sequence[int], remats: Sequence[str]) -> Compiled:
        """The task with the first fsdp of `sizes`, and for it the first of `remats`, whose step,
        compiled, fits; else with the last of both.

        Those whose state alone takes more than half of the device are not compiled, nor those that
        keep more for the backward pass than the device has. Where nothing is known of a device, or
        it is a CPU, the last of `remats` is taken.
        """
        if self.has == math.inf or (not self.planned and jax.default_backend() == "cpu"):
            remats = remats[-1:]
        passed, ways = [], list(itertools.product(sizes, remats))
        for size, remat in ways:
            way = f"{size}" + f" with remat {remat}" * (len(remats) > 1)
            task = self.make({"mesh.fsdp": size, "model.remat": remat})
            state, last = held(task.abstract_state()), (size, remat) == ways[-1]
            if not last and state > self.has / 2:
                passed.append(f"{way} would need {size_of(state)} for the state alone")
            elif not last and (least := state + kept(task)) > self.has:
                passed.append(f"{way} would need {size_of(least)} or more")
            elif self.fits(compiled := self.compile(task)):
                break
            else:
                passed.append(f"{way} would need {compiled}")
        if len(ways) > 1:
            others = f" (fsdp {', '.join(passed)})" if passed else ""
            chosen = f"config.mesh.fsdp={size}" + f", config.model.remat={remat}" * (
                len(remats) > 1
            )
            say(f"{chosen}, chosen: needs {compiled} of {self}{others}")
        return compiled

    def check(self, compiled: Compiled) -> None:
        """Prints the memory that a device needs and has; raises UserError, with settings that fit,
        if it needs too much and `config.train.memory_check` is on, or if the compiler refused.
        """
        need = compiled.need
        if self.fits(compiled) or (need and not compiled.task.config.train.memory_check):
            say(f"memory per device: {need} of {self}")
            return
        kind = compiled.task.mesh.devices.flat[0].device_kind
        anyway = "; --config.train.memory_check=False tries anyway" if need else ""
        raise UserError(
            f"training needs {need or compiled} of memory per device, but {kind} has {self}: "
            f"{self.advice(compiled)}{anyway}"
        )

    def advice(self, compiled: Compiled) -> str:
        """Flags with which the compiled step fits, as part of a sentence."""
        times, need, tries = 2, compiled.need, 0
        if need:  # how many times smaller the step's own share has to be
            spare = self.has * (1 - MARGIN) - (need.total - need.step)
            times = 2 ** math.ceil(math.log2(max(need.step / max(spare, 1), 2)))
        for flags, task in self.savings(compiled.task, times):
            if tries < MOST_TRIES and held(task.abstract_state()) <= self.has:
                tries += 1
                say(f"too large: compiling the step with {flags}")
                if self.fits(found := self.compile(task)):
                    return f"what fits is {flags} ({found})"
        return (
            f"none of {tries} other settings of remat, dtype, accumulation, fsdp and batch size "
            "fits: use a smaller model or more devices"
        )

    def savings(self, task: Task, times: int) -> Iterator[tuple[str, Task]]:
        """Flags that save memory, mildest first, with their tasks; rows are divided by `times`."""
        config, mesh = task.config, task.mesh
        passes, rows = config.optimizer.accumulation, config.data.global_batch
        fewer = (times, 2 * times, 4 * times)
        larger = [n for n in sharding.possible_fsdp(mesh) if n > mesh.shape["fsdp"]]
        # a CPU computes bfloat16 in float32
        narrow = config.model.dtype == "float32" and not sharding.on_cpu(mesh)
        ways = [
            {},
            *[{"model.dtype": "bfloat16"}] * narrow,
            *({"optimizer.accumulation": passes * n} for n in fewer),
            *({"mesh.data": -1, "mesh.fsdp": n} for n in larger),
            *({"data.global_batch": rows // n} for n in fewer if rows % n == 0),
        ]
        remat = {"model.remat": "blocks"} if config.model.remat in REMATS[:-1] else {}
        for changes in filter(None, (remat | way for way in ways)):
            with contextlib.suppress(UserError):
                flags = (f"--config.{name}={value}" for name, value in changes.items())
                yield " ".join(flags), self.make(changes)

    @contextlib.contextmanager
    def explaining(self, compiled: Compiled) -> Iterator[None]:
        """Inside, a device out of memory raises UserError with settings that need less."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if (reason := out_of_memory(error)) is None:
                raise
            passes = compiled.task.config.optimizer.accumulation
            raise UserError(
                f"a device ran out of memory ({reason}); the step needs {compiled} of {self}: try "
                f"--config.model.remat=blocks or --config.optimizer.accumulation={2 * passes}"
            ) from error

    def __str__(self) -> str:
        return "an unknown amount" if self.has == math.inf else size_of(self.has)


def remats_of(asked: str, own: str = "") -> list[str]:
    """The `model.remat` to try for the one that is asked for, from the run's `own` on."""
    ways = list(REMATS) if asked == "auto" else [asked]
    return ways[ways.index(own) :] if own in ways else ways


def kept(task: Task) -> int:
    """About the bytes that a device keeps for the backward pass: what the traced step's loops over
    blocks hand on. Tracing takes seconds where compiling takes minutes.
    """
    traced = task.step.trace(task.abstract_state(), task.abstract_batch())
    scans = (eqn for eqn in equations(traced.jaxpr.jaxpr) if eqn.primitive.name == "scan")
    bodies = ((eqn, body) for eqn in scans for body in core.jaxprs_in_params(eqn.params))
    outputs = (pair for eqn, body in bodies for pair in zip(eqn.outvars, body.outvars, strict=True))
    stacked = (whole.aval for whole, of_one in outputs if whole.aval.ndim > of_one.aval.ndim)
    return sum(each.size * each.dtype.itemsize for each in stacked) // task.mesh.size


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Those of a traced program, and of the programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in core.jaxprs_in_params(eqn.params):
            yield from equations(body)


def held(tree: PyTree[jax.ShapeDtypeStruct]) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def out_of_memory(error: Exception) -> str | None:
    """What a device or a compiler says of the memory that it lacks; None for another error."""
    _, exhausted, report = str(error).partition("RESOURCE_EXHAUSTED:")
    return report.strip().split("\n")[0].rstrip(".") if exhausted else None


def device_memory() -> float:
    """Bytes that this run can use on every process's devices; math.inf if unknown."""
    device, found, group = jax.local_devices()[0], [math.inf], Path("/sys/fs/cgroup")
    if device.platform != "cpu":
        found.append((device.memory_stats() or {}).get("bytes_limit", math.inf))
    else:  # a share of what is free on the host, or what its container may still use
        with contextlib.suppress(OSError, TypeError):
            free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
            found.append(1024 * int(free[1]) / jax.local_device_count())
        with contextlib.suppress(OSError, ValueError):  # "max" if there is no limit
            limit = int((group / "memory.max").read_text())
            cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())
            used = int((group / "memory.current").read_text()) - int(cached[1] if cached else 0)
            found.append(max(limit - used, 0) / jax.local_device_count())
    return min(peers.connected().exchange("memory", min(found)))  # all must reach the same answer


def size_of(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
