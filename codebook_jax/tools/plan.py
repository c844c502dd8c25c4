"""`--mode=plan`: what training needs on a machine that is only described.

The real step is compiled for that many virtual CPU devices, or by libtpu for the TPUs themselves,
as training would compile it. XLA's own count takes the body of a loop once, and the layers are a
loop; so the operations are those of the matrix products in the traced step.
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
from codebook_jax.errors import UserError, reason
from codebook_jax.files import check_outputs, write_json
from codebook_jax.parallel import sharding
from codebook_jax.parallel.collectives import axes_of, collectives
from codebook_jax.parallel.memory import Compiled, Memory, remats_of, size_of
from codebook_jax.tools.chips import CHIPS, PlanOptions
from codebook_jax.weights.start import specs

UTILISATION = 0.4  # share of the peak that training is assumed to reach
BERT_WORDS = 30_522
ON_A_HOST = 4  # chips per host of a slice of TPUs; a smaller slice is part of a host


def plan(config: ml_collections.ConfigDict, options: PlanOptions) -> dict[str, Any]:
    """Prints what training with `config` on these chips needs, and returns the figures.

    JAX must have that many devices: set chips.environment(options) before importing it.
    """
    path = Path(options.json)
    if options.json:
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
    compiled = memory.first_fit(sharding.fsdp_choices(config.mesh), remats_of(config.model.remat))
    compile_s = round(time.perf_counter() - began, 1)
    fits = memory.fits(compiled)
    advice = "" if fits else memory.advice(compiled)
    if compiled.program is None:
        raise UserError(
            f"the compiler for {options.chip} reports that the step does not fit "
            f"({compiled.refusal}): {advice}"
        )
    figures = figures_of(compiled, options) | {"compile_s": compile_s}
    figures["memory"] |= {"has": memory.has, "fits": fits, "what_fits": advice}
    say(text(figures))
    if options.json:
        write_json(path, figures)
    return figures


def figures_of(compiled: Compiled, options: PlanOptions) -> dict[str, Any]:
    """What a step and a training need, from the compiled step."""
    task, program, need, _ = compiled
    config, mesh, peak = task.config, dict(task.mesh.shape), CHIPS[options.chip].peak
    traced = task.step.trace(task.abstract_state(), task.abstract_batch())
    operations = products(traced.jaxpr.jaxpr)
    step_s = operations / (options.devices * UTILISATION * peak)
    sent: dict[tuple[str, str], dict[str, Any]] = {}
    for each in collectives(program.as_text()):
        key = each.kind, ", ".join(axes_of(each.devices, mesh))
        row = sent.setdefault(key, {"kind": key[0], "axes": key[1], "count": 0, "bytes": 0.0})
        row["count"] += each.times
        row["bytes"] += each.times * each.sent
    return {
        **{name: value for name, value in options._asdict().items() if name != "json"},
        "peak": peak,
        "mesh": mesh,
        "batch": config.data.global_batch,
        "accumulation": config.optimizer.accumulation,
        "train_steps": config.train.steps,
        "memory": {**need._asdict(), "total": need.total},
        "operations": operations,
        "sent": sorted(sent.values(), key=lambda row: -row["bytes"]),
        "step_s": step_s,
        "images_per_s": config.data.global_batch / step_s,
        "chip_hours": config.train.steps * step_s / 3600 * options.devices,
    }


def products(jaxpr: core.Jaxpr) -> int:
    """The operations of a program's matrix products and convolutions, two for a multiplication and
    an addition; of branches, those of the one that computes most.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, bodies = eqn.primitive.name, list(map(products, core.jaxprs_in_params(eqn.params)))
        if name == "cond":
            total += max(bodies)
        elif bodies:
            total += eqn.params.get("length", 1) * sum(bodies)
        elif name in ("dot_general", "conv_general_dilated"):
            numbers, (left, right, *_) = eqn.params["dimension_numbers"], eqn.invars
            if name == "dot_general":
                depth = math.prod(left.aval.shape[axis] for axis in numbers[0][0])
            else:
                depth = right.aval.size // right.aval.shape[numbers.rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * depth
    return total


def described_tpus(options: PlanOptions) -> list[jax.Device]:
    """The chips of a slice, to build a mesh from and compile for; nothing can run on them."""
    count, sizes = options.devices, torus(options.devices, CHIPS[options.chip].torus)
    name = f"{options.chip}:{'x'.join(map(str, sizes))}"
    bounds = (*(sizes if count < ON_A_HOST else (2, 2)), 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=bounds).devices
        if len(found) != count:
            raise RuntimeError(f"it has {len(found)} devices instead of {count} chips")
    except RuntimeError as error:
        raise UserError(
            f"libtpu cannot describe the slice {name} ({reason(error)}): leave out "
            "--plan.compiler=tpu, or plan for v5e, v5p or v6e"
        ) from error
    return found


def torus(chips: int, axes: int) -> tuple[int, ...]:
    """The most even sizes of a torus of this many chips, largest first: 8, 8, 4 for 256 and 3."""
    if axes == 1:
        return (chips,)
    least = max(n for n in range(1, chips + 1) if chips % n == 0 and n**axes <= chips)
    return (*torus(chips // least, axes - 1), least)


def text(figures: dict[str, Any]) -> str:
    """The plan for people, one fact per line."""
    memory, mesh, sent = figures["memory"], figures["mesh"], figures["sent"]
    own = figures["batch"] // (mesh["data"] * mesh["fsdp"])
    slices = f" in {figures['slices']} slices" if figures["slices"] > 1 else ""
    parts = ", ".join(f"{name} {size_of(memory[name])}" for name in ("state", "batches", "step"))
    by = "libtpu" if figures["compiler"] == "tpu" else "XLA for a CPU (bfloat16 in four bytes)"
    fits = "fits" if memory["fits"] else f"DOES NOT FIT: {memory['what_fits']}"
    kinds = "".join(
        f"\n            {size_of(row['bytes']):>9}  {row['kind']} over {row['axes']}, "
        f"{row['count']} times"
        for row in sent
        if row["bytes"]
    )
    return f"""\
plan for {figures["devices"]} x {figures["chip"]}{slices}: \
{figures["peak"] / 1e12:,.0f} TFLOP/s in bfloat16, {size_of(memory["has"])}
mesh        {", ".join(f"{axis} {size}" for axis, size in mesh.items())}
batch       {figures["batch"]:,} pairs, {own} a data shard, accumulation {figures["accumulation"]}
memory      {size_of(memory["total"])} of {size_of(memory["has"])} a chip: {fits}
            {parts}; as assigned by {by}
operations  {figures["operations"] / 1e12:,.2f} TFLOP a step in matrix products
sent        {size_of(sum(row["bytes"] for row in sent))} a step by each chip{kinds}
time        {1e3 * figures["step_s"]:,.1f} ms a step at {UTILISATION:.0%} of the peak (an \
assumption; nothing else counted): {figures["images_per_s"]:,.0f} images/s
            {figures["train_steps"]:,} steps are {figures["chip_hours"]:,.1f} chip-hours without \
start-up, saving and evaluation"""
