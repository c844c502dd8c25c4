"""`--mode=plan`: what training needs on a machine that is only described.

The real step is compiled for that many virtual CPU devices, or by libtpu for the TPUs themselves,
as training would compile it. XLA's own `cost_analysis` counts the body of a loop once, and the
layers are a loop; so the operations are those of the matrix products in the traced step, times the
turns of their loops (checked against `cost_analysis` of a step without loops in the tests).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies
from jax.extend import core

from codebook_jax import build
from codebook_jax.config import with_fields
from codebook_jax.console import say
from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs, refused, write_json
from codebook_jax.parallel import axes
from codebook_jax.parallel.collectives import axes_of, collectives
from codebook_jax.parallel.memory import Compiled, Memory, size_of
from codebook_jax.tools.chips import CHIPS, PlanOptions
from codebook_jax.weights.start import specs

UTILISATION = 0.4  # share of the peak that training is assumed to reach
BERT_WORDS = 30_522
ON_A_HOST = 4  # chips per host of a slice of TPUs; a smaller slice is part of a host


def plan(config: ml_collections.ConfigDict, options: PlanOptions) -> dict[str, Any]:
    """Prints what training with `config` on `options.devices` chips needs, and returns the figures.

    Raises UserError for settings that do not fit together. JAX must have that many devices: set
    chips.environment(options) before importing it.
    """
    if options.json:
        path = Path(options.json)
        with refused(path):
            is_there = path.absolute().parent.is_dir()
        if not is_there:
            raise UserError(f"--plan.json={options.json}: there is no folder {path.parent}")
        check_outputs(path.parent, (path.name,))
    if jax.device_count() != options.devices:
        raise UserError(
            f"--plan.devices={options.devices} needs as many virtual devices, but this process has "
            f"{jax.device_count()}: start it as `python -m codebook_jax.main --mode=plan`"
        )
    # No data is read for a plan, so the config need not name any.
    named = {f"data.{name}": config.data[name] or "scenes" for name in ("train", "eval")}
    config = with_fields(config, named | {"mesh.slices": options.slices})
    build.check(config)
    described = described_tpus(options) if options.compiler == "tpu" else None
    trained = config.data.tokenizer or {"text", "model"} & specs(config.init).keys()
    words = BERT_WORDS if trained else config.data.tokenizer_vocabulary
    vocabulary = Vocabulary(words, 0, 1, 2, 3, (0, 1, 2, 3))  # which ids does not matter
    make = build.task_maker(config, vocabulary, devices=described)
    memory = Memory(make, int(CHIPS[options.chip].memory), planned=True)
    began = time.perf_counter()
    compiled = memory.first_fit(axes.choices(config.mesh))
    if compiled.program is None:
        raise UserError(
            f"the compiler for {options.chip} reports that the step does not fit "
            f"({compiled.refusal}): {memory.advice(compiled)}"
        )
    figures = figures_of(compiled, options) | {"compile_s": round(time.perf_counter() - began, 1)}
    fits = memory.fits(compiled)
    figures["memory"] |= {"has": memory.has, "fits": fits}
    figures["memory"]["what_fits"] = "" if fits else memory.advice(compiled)
    say(text(figures))
    if options.json:
        write_json(path, figures)
    return figures


def figures_of(compiled: Compiled, options: PlanOptions) -> dict[str, Any]:
    """What a step and a training need, from the compiled step."""
    task, program, need, _ = compiled
    config, mesh = task.config, dict(task.mesh.shape)
    traced = task.step.trace(task.abstract_state(), task.abstract_batch())
    operations = products(traced.jaxpr.jaxpr)
    rate = options.devices * UTILISATION * CHIPS[options.chip].peak
    sent: dict[tuple[str, str], dict[str, Any]] = {}
    for each in collectives(program.as_text()):
        key = each.kind, ", ".join(axes_of(each.devices, mesh))
        row = sent.setdefault(key, {"kind": key[0], "axes": key[1], "count": 0, "bytes": 0.0})
        row["count"] += each.times
        row["bytes"] += each.times * each.sent
    return {
        "chip": options.chip,
        "peak": CHIPS[options.chip].peak,
        "devices": options.devices,
        "slices": options.slices,
        "compiler": options.compiler,
        "mesh": mesh,
        "batch": config.data.global_batch,
        "accumulation": config.optimizer.accumulation,
        "train_steps": config.train.steps,
        "memory": {**need._asdict(), "total": need.total},
        "operations": operations,
        "sent": sorted(sent.values(), key=lambda row: -row["bytes"]),
        "step_s": operations / rate,
        "images_per_s": config.data.global_batch * rate / operations,
        "chip_hours": config.train.steps * operations / rate / 3600 * options.devices,
    }


def products(jaxpr: core.Jaxpr) -> int:
    """The operations of a program's matrix products and convolutions, two for a multiplication and
    an addition; of branches, those of the one that computes most.
    """
    total = 0
    for eqn in jaxpr.eqns:
        bodies = [products(body) for body in core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(bodies)
        elif bodies:
            total += eqn.params.get("length", 1) * sum(bodies)
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            depth = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    return total


def described_tpus(options: PlanOptions) -> list[jax.Device]:
    """The chips of a slice, to build a mesh from and compile for; nothing can run on them."""
    count, axes_of_torus = options.devices, CHIPS[options.chip].torus
    sizes = torus(count, axes_of_torus)
    host = sizes if count < ON_A_HOST else (2, 2)
    name = f"{options.chip}:{'x'.join(map(str, sizes))}"
    bounds = (*host, *(1,) * (3 - len(host)))
    try:
        found = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=bounds).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(
            f"libtpu cannot describe the slice {name}: {str(error).splitlines()[0]}"
        ) from error
    if len(found) != count:
        raise UserError(
            f"libtpu describes {name} as {len(found)} devices instead of {count} chips: leave out "
            "--plan.compiler=tpu, or plan for v5e, v5p or v6e"
        )
    return found


def torus(chips: int, axes: int) -> tuple[int, ...]:
    """The most even sizes of a torus of this many chips, largest first: 256 on three axes are 8 x 8
    x 4.
    """
    if axes == 1:
        return (chips,)
    most = math.floor(chips ** (1 / axes) + 1e-9)
    least = max(n for n in range(1, most + 1) if chips % n == 0)
    return (*torus(chips // least, axes - 1), least)


def text(figures: dict[str, Any]) -> str:
    """The plan for people, one fact per line."""
    memory, mesh, rate = figures["memory"], figures["mesh"], f"{UTILISATION:.0%} of the peak"
    own = figures["batch"] // (mesh["data"] * mesh["fsdp"])
    slices = f" in {figures['slices']} slices" if figures["slices"] > 1 else ""
    parts = ", ".join(f"{name} {size_of(memory[name])}" for name in ("state", "batches", "step"))
    by = "libtpu" if figures["compiler"] == "tpu" else "XLA for a CPU (bfloat16 in four bytes)"
    fits = "fits" if memory["fits"] else f"DOES NOT FIT: {memory['what_fits']}"
    lines = [
        f"plan for {figures['devices']} x {figures['chip']}{slices}: "
        f"{figures['peak'] / 1e12:,.0f} TFLOP/s in bfloat16, {size_of(memory['has'])}",
        f"mesh        {', '.join(f'{axis} {size}' for axis, size in mesh.items())}",
        f"batch       {figures['batch']:,} pairs, {own} a data shard, accumulation "
        f"{figures['accumulation']}",
        f"memory      {size_of(memory['total'])} of {size_of(memory['has'])} a chip: {fits}",
        f"            {parts}; as assigned by {by}",
        f"operations  {figures['operations'] / 1e12:,.2f} TFLOP a step in matrix products",
        f"sent        {size_of(sum(row['bytes'] for row in figures['sent']))} a step by each chip",
        *(
            f"            {size_of(row['bytes']):>9}  {row['kind']} over {row['axes']}, "
            f"{row['count']} times"
            for row in figures["sent"]
            if row["bytes"]
        ),
        f"time        {1e3 * figures['step_s']:,.1f} ms a step at {rate} (an assumption; nothing "
        f"else counted): {figures['images_per_s']:,.0f} images/s",
        f"            {figures['train_steps']:,} steps are {figures['chip_hours']:,.1f} chip-hours "
        "without start-up, saving and evaluation",
    ]
    return "\n".join(lines)
