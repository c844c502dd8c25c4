"""A whole plan: the mesh, the memory, the real step compiled for virtual devices, and the bounds on
its time.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from codebook_jax import build
from codebook_jax import config as checks
from codebook_jax.config import with_fields
from codebook_jax.console import say
from codebook_jax.errors import UserError
from codebook_jax.files import write_json
from codebook_jax.parallel import axes, memory, sharding
from codebook_jax.tools.plan import hlo, operations, report, timing, tpu
from codebook_jax.tools.plan.chips import Chip, chip_of
from codebook_jax.tools.plan.options import PlanOptions
from codebook_jax.tools.plan.timing import Joined
from codebook_jax.weights.start import specs

BERT_WORDS = 30_522
# Collectives come from the partitioner, which runs before the passes that these skip: those only
# speed up CPU programs.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# An update reads a parameter, its gradient, two moments and the teacher's, and writes all but the
# gradient.
UPDATE_ACCESSES = 9


class Step(NamedTuple):
    """The step of a config on a mesh; holds no arrays."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    traced: Any
    parameters: int  # how many are trained


def foresee(config: ml_collections.ConfigDict, options: PlanOptions) -> dict[str, Any]:
    """Prints the figures of a plan, writes them to `options.json` and returns them.

    Raises UserError: see plan.plan.
    """
    chip = chip_of(options.chip)
    _check_options(options)
    described = tpu.devices(chip, options.devices) if options.compiler == "tpu" else None
    config = _plannable(config, options.slices)
    planner = memory.Planner(config, build.TASKS[config.task], _words(config), in_float32=False)
    planner.has = chip.memory
    config = axes.chosen(config, planner)
    step = _traced(planner, described)
    moved = _moved(planner, step)
    began = time.perf_counter()
    compiled = _compiled(planner, step, options)
    seconds = time.perf_counter() - began
    figures = {
        "chip": chip._asdict(),
        "devices": options.devices,
        "slices": options.slices,
        "compiler": options.compiler,
        "mesh": dict(step.mesh.shape),
        "batch": {
            "global": step.config.data.global_batch,
            "accumulation": step.config.optimizer.accumulation,
        },
        "train_steps": step.config.train.steps,
        "parameters": step.parameters,
        "memory": _memory_figures(planner, compiled, options.compiler),
        "compile_s": round(seconds, 1),
    }
    figures |= _time_figures(step, chip, options, moved, compiled.as_text())
    say(report.text(figures))
    if options.json:
        write_json(Path(options.json).expanduser(), figures)
    return figures


class Assigned(NamedTuple):
    """Bytes on a device: a compiled program's arguments and results, its temporaries, and the
    program itself.
    """

    held: int
    in_between: int
    program: int


def assigned_by_xla(compiled: Any) -> Assigned:
    """How much of a device's memory the compiler assigns to its program."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Assigned(held, found.temp_size_in_bytes, found.generated_code_size_in_bytes)


def _check_options(options: PlanOptions) -> None:
    """Raises UserError if the devices or slices do not fit, or if the file's folder does not
    exist.
    """
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(
            f"--plan.json={options.json}: there is no folder {Path(options.json).parent}"
        )
    if jax.device_count() != options.devices:
        raise UserError(
            f"--plan.devices={options.devices} needs as many virtual devices, but this process has "
            f"{jax.device_count()}: start it as `python -m codebook_jax.main --mode=plan`"
        )
    if options.slices < 1 or options.devices % options.slices:
        raise UserError(
            f"--plan.slices={options.slices} does not split --plan.devices={options.devices} into "
            "equal parts: give a divisor"
        )
    if options.compiler == "tpu" and options.slices > 1:
        raise UserError(
            f"--plan.compiler=tpu plans for one slice, but --plan.slices={options.slices} is "
            "given, and libtpu's traffic between slices is not read here: leave out one of the "
            "two flags"
        )


def _plannable(config: ml_collections.ConfigDict, slices: int) -> ml_collections.ConfigDict:
    """The config, checked; no data is read for a plan, so it need not name any."""
    named = {f"data.{name}": config.data[name] or "scenes" for name in ("train", "eval")}
    config = with_fields(config, named | {"mesh.slices": slices})
    checks.check(config)
    if config.task not in build.TASKS:
        raise UserError(
            f"config.task={config.task!r} is not one of the tasks: {', '.join(build.TASKS)}"
        )
    return config


def _words(config: ml_collections.ConfigDict) -> int:
    """The vocabulary's size: BERT's if a tokenizer, or weights that bring one, are named, otherwise
    the maximum.
    """
    given = config.data.tokenizer or {"text", "model"} & specs(config.init).keys()
    return BERT_WORDS if given else config.data.tokenizer_vocabulary


def _by_fsdp(planner: memory.Planner) -> dict[str, int]:
    """The memory per device for each possible fsdp on the same devices and data shards."""
    found = {}
    for size in sharding.possible_fsdp(planner.with_changes({})[1]):
        changes = {"mesh.data": -1, "mesh.fsdp": size}
        if planner.possible(changes):
            found[str(size)] = planner.estimate(changes).total
    return found


def _traced(planner: memory.Planner, described: list[Any] | None) -> Step:
    """The step traced for the virtual devices, or for those that a compiler describes."""
    config, _ = planner.with_changes({})
    mesh = sharding.mesh_of(config.mesh, described)
    task = planner.create(config, planner.vocabulary, mesh)
    state = task.abstract_state()
    traced = task.step.trace(state, memory.abstract_batch(config))
    return Step(config, mesh, traced, build.parameter_count(state.student))


def _compiled(planner: memory.Planner, step: Step, options: PlanOptions) -> Any:
    """The compiled step; raises UserError, with settings that would fit, if the compiler runs out
    of the chip's memory.
    """
    lowered = step.traced.lower()
    if options.compiler == "cpu":
        return lowered.compile(compiler_options=QUICK)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (said := memory.out_of_memory(error)) is None:
            raise
        need = planner.estimate()
        advice = memory.advice(planner, need, min(planner.has, need.total * memory.AGAIN))
        raise UserError(
            f"the compiler for {options.chip} reports that the step does not fit ({said}); the "
            f"estimate was {need}: {advice}"
        ) from error


def _moved(planner: memory.Planner, step: Step) -> dict[operations.Key, operations.Operations]:
    """The bytes that a device moves in its memory, by part and pass."""
    _, _, program = planner.traced_on_one_device(step.config, step.mesh)
    found = operations.count(program, lambda aval: math.prod(aval.shape) * aval.dtype.itemsize)
    own = {key: part.times(1 / step.mesh.shape["tensor"]) for key, part in found.items()}
    key = "optimizer and teacher's average", "forward"
    update = operations.Operations(moved=UPDATE_ACCESSES * planner.estimate().parameters)
    return own | {key: own.get(key, operations.Operations()) + update}


def _memory_figures(planner: memory.Planner, compiled: Any, compiler: str) -> dict[str, Any]:
    need, limit = planner.estimate(), planner.has * (1 - memory.MARGIN)
    fits = need.total <= limit or compiler == "tpu"  # which refuses what does not fit
    ways = [] if fits else memory.fitting_settings(planner, need, limit)
    return {
        "need": {**need._asdict(), "total": need.total},
        "has": planner.has,
        "fits": fits,
        "what_fits": [{"changes": changes, "total": estimate.total} for changes, estimate in ways],
        "assigned_by_xla": assigned_by_xla(compiled)._asdict(),
        "by_fsdp": _by_fsdp(planner),
    }


def _time_figures(
    step: Step,
    chip: Chip,
    options: PlanOptions,
    moved: dict[operations.Key, operations.Operations],
    program: str,
) -> dict[str, Any]:
    found = operations.count(step.traced.jaxpr.jaxpr, lambda aval: 0)
    whole = operations.total(found)
    own = whole.times(1 / options.devices)._replace(moved=operations.total(moved).moved)
    slice_size = options.devices // options.slices
    domain = min(chip.domain or slice_size, slice_size)
    domains = tuple(device.id // domain for device in step.mesh.devices.flat)
    sent = timing.sent_by_axes(
        hlo.collectives(program), dict(step.mesh.shape), Joined(chip, slice_size, domains)
    )
    times = timing.times(chip, own, sent)
    ends = {"overlapped": times.overlapped, "serial": times.serial}
    rows, steps = step.config.data.global_batch, step.config.train.steps
    return {
        "operations": {
            part: {name: of.products for name, of in passes.items()}
            for part, passes in operations.by_part(found).items()
        },
        "operations_total": whole.products,
        "moved": {
            part: sum(of.moved for of in passes.values())
            for part, passes in operations.by_part(moved).items()
        },
        "sent": [part._asdict() for part in sent],
        "seconds": times._asdict() | ends | {"at_the_least": _least(times)},
        "utilisation_assumed": timing.UTILISATION,
        "bound_by": times.bound_by,
        "communication_share": times.communication / times.serial,
        "images_per_s": {name: rows / seconds for name, seconds in ends.items()},
        "days": {name: steps * seconds / 86_400 for name, seconds in ends.items()},
        "chip_hours": {
            name: steps * seconds / 3_600 * options.devices for name, seconds in ends.items()
        },
    }


def _least(times: timing.Times) -> float:
    """Seconds that no step can beat: products at the peak, and everything sent meanwhile."""
    return max(times.compute_at_peak, times.memory, times.communication)
