"""What the pre-training step costs on an accelerator, read from its program and not from a clock:
`python benchmarks/program.py`. Needs a CPU alone, for a few minutes.

Prints what docs/scale.md ("What a step keeps and sends") lists.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from codebook_jax import build
from codebook_jax.data.text import Vocabulary
from codebook_jax.models import layers, vit
from codebook_jax.parallel import sharding
from codebook_jax.parallel.collectives import collectives
from codebook_jax.parallel.memory import QUICK, equations
from configs import base

ROWS, TOKENS, WIDTH, HEADS, DEPTH = 16, 256, 768, 12, 2
SMALL = {"model.image.depth": 1, "model.text.depth": 1, "model.text.fusion_depth": 1}


def main() -> None:
    print(f"kept by a block of ViT-B in bfloat16, x batch x tokens x width: {kept():.1f} bytes")
    whole, half = (block_over(tensor) for tensor in (1, 2))
    for name in ("flops", "bytes"):
        share = getattr(half, name) / getattr(whole, name)
        print(
            f"its gradient on one of two devices over tensor, {name} of those on one: {share:.0%}"
        )
    task = small_step()
    traced = task.step.trace(task.abstract_state(), task.abstract_batch())
    shapes = ", ".join(map(str, sums_by_place(traced.jaxpr.jaxpr)))
    print(f"sums of floats by place in a step of tiny: {shapes}")
    program = traced.lower().compile(compiler_options=QUICK)
    sent = collectives(program.as_text())
    sums = [each for each in sent if each.kind == "all-reduce"]
    own = [each for each in sums if "assign" in each.where]
    print(f"all-reduces of such a step on {DEVICES} devices: {sum(each.times for each in sums)}")
    print(f"of these in the transport: {sum(each.times for each in own)}")


def block(compute: layers.Compute) -> tuple[Any, Any]:
    """The function and the abstract parameters of DEPTH blocks of ViT-B."""
    spec = SimpleNamespace(
        width=WIDTH, heads=HEADS, mlp_width=0, init_std=0.02, layer_norm_eps=1e-6
    )
    make = lambda rngs: vit.VisionBlock(spec, compute, rngs)  # noqa: E731
    blocks = nnx.eval_shape(lambda: layers.stack(make, DEPTH, nnx.Rngs(0)))
    graph, state = nnx.split(blocks)

    def run(parameters: Any, x: jax.Array) -> jax.Array:
        apply = lambda block, x, _: block(x)  # noqa: E731
        return layers.scan(nnx.merge(graph, nnx.State(parameters)), apply, x, None, compute)

    return run, nnx.to_pure_dict(state)


def kept() -> float:
    """Bytes that the backward pass of a block keeps of its rows, without those of attention."""
    run, state = block(layers.Compute(jnp.dtype("bfloat16"), "none", 1, "xla", None))
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16)
    pulled = jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], state, x)
    of_rows = [leaf for leaf in jax.tree.leaves(pulled) if {ROWS, ROWS * TOKENS} & {*leaf.shape}]
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in of_rows if HEADS not in leaf.shape)
    return found / (DEPTH * math.prod(x.shape))


def block_over(tensor: int) -> SimpleNamespace:
    """Operations and bytes of one device for a block's gradient, split over so many by `tensor`."""
    mesh = sharding.make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    run, state = block(layers.Compute(jnp.dtype("bfloat16"), "none", 1, "xla", mesh))
    places = sharding.state_shardings({"blocks": state}, mesh)["blocks"]
    place = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)  # noqa: E731
    x = place(
        jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16), sharding.batch_sharding(mesh)
    )
    loss = lambda *given: jnp.sum(run(*given).astype(jnp.float32))  # noqa: E731
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(places, x.sharding))
    program = gradient.lower(jax.tree.map(place, state, places), x).compile(compiler_options=QUICK)
    held = program.memory_analysis().temp_size_in_bytes
    return SimpleNamespace(flops=program.cost_analysis()["flops"], bytes=held)


def small_step() -> Any:
    config = base.paper("tiny")
    config.update_from_flattened_dict(SMALL)
    return build.task_maker(config, Vocabulary(500, 0, 1, 2, 3, (0, 1, 2, 3)))({})


def sums_by_place(jaxpr: core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of the float arrays that a program adds to entry by entry."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scatter-add" and eqn.outvars[0].aval.dtype.kind in "fV":
            yield eqn.outvars[0].aval.shape


if __name__ == "__main__":
    main()
