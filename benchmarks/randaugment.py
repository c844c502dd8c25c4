"""The cost that RandAugment on the device adds to a training step: `python
benchmarks/randaugment.py`.

Two layers on both views of a batch, against the step of `--size` without them: floating-point
operations and bytes as XLA counts them, in the program as written (nothing fused: more bytes than
any device moves) and as compiled for the devices here. Loops are unrolled in the counted step,
since XLA would count each as one iteration, and its backward pass recomputes nothing, so that the
step is as small as possible. The compiled bytes give an estimate for GPUs: RandAugment at the
memory's full rate, the step at 40 % of the peak in bfloat16. Last come the seconds of a step of
`tiny`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from train_step import ROOT, machine, measure

from codebook_jax.data.augment import augment
from codebook_jax.data.text import Vocabulary
from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from configs import base

LAYERS, MAGNITUDE = 2, 7
GPUS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
}  # bfloat16 operations and bytes per second, SXM
UTILISATION = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of `tiny` to time with and without it; 0: none"
    )
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    figures = {"machine": machine(), "size": options.size, "batch": options.batch}
    print(json.dumps(figures), flush=True)
    side = base.get_config(options.size).model.image.size_px
    added = {name: 2 * cost for name, cost in costs(*augmentation(options.batch, side)).items()}
    step = costs(*step_without(options.size, options.batch))
    print(f"{'':28} {'RandAugment':>12} {'step':>12} {'share':>8}")
    for name, cost in step.items():
        print(f"{name:28} {added[name]:12.3e} {cost:12.3e} {added[name] / cost:8.2%}")
    figures |= {"RandAugment": added, "step": step}
    figures |= {"share": {name: added[name] / cost for name, cost in step.items()}}
    figures["share of time, estimated"] = estimated(added, step)
    print(json.dumps(figures["share of time, estimated"]), flush=True)
    figures["seconds on this machine"] = timed(options.batch, side, options.steps)
    print(json.dumps(figures["seconds on this machine"]))
    if options.out:
        Path(ROOT / options.out).write_text(json.dumps(figures, indent=1) + "\n")


def augmentation(batch: int, side: int) -> tuple[Any, ...]:
    """The jitted augmentation of one view, and its arguments."""
    images = jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8)
    flip = jax.ShapeDtypeStruct((batch,), bool)

    def layers(images: jax.Array, flip: jax.Array) -> jax.Array:
        return augment(images, flip, jax.random.key(0), layers=LAYERS, magnitude=MAGNITUDE)

    return jax.jit(layers), images, flip


def step_without(size: str, batch: int) -> tuple[Any, ...]:
    """The jitted training step on one device without flips and RandAugment, and its arguments."""
    config = base.paper(size)
    depth = max(config.model.image.depth, config.model.text.depth, config.model.text.fusion_depth)
    changed = {"data.global_batch": batch, "model.remat": "none", "model.scan_unroll": depth}
    changed |= {"data.flip": False, "data.randaugment_layers": 0}
    config.update_from_flattened_dict(changed)
    axes = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axes, devices=jax.devices()[:1])
    config = pretrain.Pretraining.resolve(config, None, shards=1, examples=1)
    words = 500 if size == "tiny" else 30_522
    task = pretrain.Pretraining(config, Vocabulary(words, 0, 2, 3, 4, (0, 1, 2, 3, 4)), mesh)
    return task.step, task.abstract_state(), task.abstract_batch()


def costs(program: Any, *arguments: Any) -> dict[str, float]:
    """Operations and bytes as XLA counts them."""
    lowered = program.lower(*arguments)
    found = {}
    for name, counted in (("as written", lowered), ("compiled", lowered.compile())):
        analysis = counted.cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) else analysis
        found[f"operations, {name}"] = analysis["flops"]
        found[f"bytes, {name}"] = analysis["bytes accessed"]
    return found


def estimated(added: dict[str, float], step: dict[str, float]) -> dict[str, float]:
    """RandAugment's share of a step's time on each GPU."""
    return {
        name: (added["bytes, compiled"] / rate)
        / (step["operations, as written"] / (UTILISATION * peak))
        for name, (peak, rate) in GPUS.items()
    }


def timed(batch: int, side: int, steps: int) -> dict[str, float]:
    """Seconds of the augmentation of a view, and of a step of `tiny` with and without it."""
    if not steps:
        return {}
    program, images, flip = augmentation(batch, side)
    draw = np.random.default_rng(0)
    arrays = draw.integers(0, 256, images.shape, np.uint8), np.zeros(flip.shape, bool)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        times.append(time.perf_counter() - began)
    found = {f"one view, {batch} x {side} x {side}": min(times)}
    for layers in (0, LAYERS):
        fields = {"data.randaugment_layers": layers, "data.flip": bool(layers)}
        found[f"step of tiny, {layers} layers"] = measure("tiny", fields, steps)["fastest_s"]
    return found


if __name__ == "__main__":
    main()
