"""Step time, compile time and peak memory of the training step: `python benchmarks/train_step.py`.

One process per row, so that peak memory is the row's own, started with the huge pages that the
command uses; batches are random, nothing is read. Each row runs `--steps` steps after three that do
not count, and reports their median. The first line is the rate of a large matrix product on the
same machine, in float32 on a CPU and in bfloat16 elsewhere. A row's share of it counts the products
of a step without those that are computed again (`model.remat`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from codebook_jax.console import HUGE_PAGES

# name, size, fields. The two-loss row has the size for which a prototype's step took 0.39 s on two
# other cores.
ROWS = {
    "tiny": ("tiny", {}),
    "tiny, alignment and codebook only": (
        "tiny",
        {"losses.matching": 0.0, "losses.masked_lm": 0.0},
    ),
    "base, batch 4, float32": (
        "base",
        {
            "data.global_batch": 4,
            "model.dtype": "float32",
            "model.remat": "none",
            "model.text.dropout": 0.0,
        },
    ),
    "base, batch 4": ("base", {"data.global_batch": 4}),
    **{
        f"base, batch {pairs}{note}": ("base", {"data.global_batch": pairs, "model.remat": remat})
        for remat, note in (("blocks", ""), ("dots", ", products kept"), ("none", ", no remat"))
        for pairs in (64, 128, 256)
    },
}
ON_A_CPU = list(ROWS)[:4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=None, help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*ROWS[options.one], options.steps)))
        return
    figures = {"machine": machine()}
    print(json.dumps(figures["machine"]), flush=True)
    print(
        f"{'':36} {'step, s':>8} {'pairs/s':>8} {'compile, s':>10} {'peak, GB':>9} "
        f"{'of ceiling':>10}",
        flush=True,
    )
    names = options.rows if options.rows is not None else ON_A_CPU
    for name in names:
        row = run_alone(__file__, ["--one", name, "--steps", str(options.steps)])
        rate = row["operations"] / row["step_s"]
        row["of_ceiling"] = rate / (1e9 * figures["machine"]["matmul_gflops"])
        figures[name] = row
        print(
            f"{name:36} {row['step_s']:8.3f} {row['pairs_per_s']:8.2f} {row['compile_s']:10.1f} "
            f"{row['peak_gb']:9.2f} {row['of_ceiling']:10.0%}",
            flush=True,
        )
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(figures, indent=1) + "\n")


def run_alone(script: str, arguments: list[str]) -> dict[str, Any]:
    """Runs one process of a benchmark; returns the JSON in its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=HUGE_PAGES | os.environ, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, object]:
    """The devices, the versions, and the rate of a product of 2 048 x 2 048 random numbers, of
    8 192 x 8 192 on an accelerator.
    """
    program = (
        "import jax, jax.numpy as jnp, time, json\n"
        "cpu = jax.default_backend() == 'cpu'\n"
        "n, dtype = (2048, jnp.float32) if cpu else (8192, jnp.bfloat16)\n"
        "x = jax.random.normal(jax.random.key(0), (n, n), dtype)\n"
        "f = jax.jit(lambda x: x @ x); f(x).block_until_ready(); times = []\n"
        "for _ in range(10):\n"
        "    began = time.perf_counter(); f(x).block_until_ready(); "
        "times.append(time.perf_counter() - began)\n"
        "print(json.dumps({'device': jax.devices()[0].device_kind, 'devices': jax.device_count(),\n"
        "  'jax': jax.__version__, 'matmul_gflops': round(2 * n**3 / sorted(times)[5] / 1e9)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"cores": os.cpu_count(), "python": platform.python_version()}


def random_task(size: str, fields: dict[str, object], recipe: str = "paper") -> tuple[Any, Any]:
    """The pre-training task of a size over all devices, and a random batch placed for it."""
    import numpy as np

    from codebook_jax.data.batch import Batch
    from codebook_jax.data.text import Vocabulary
    from codebook_jax.parallel import sharding
    from codebook_jax.tasks import pretrain

    config = importlib.import_module(f"configs.{recipe}").get_config(size)
    config.update_from_flattened_dict(fields)
    mesh = sharding.make_mesh(-1, 1, 1)
    config = pretrain.Pretraining.resolve(
        config, None, shards=sharding.data_shards(mesh), examples=1
    )
    words = 500 if size == "tiny" else 30_522
    task = pretrain.Pretraining(config, Vocabulary(words, 0, 2, 3, 4, (0, 1, 2, 3, 4)), mesh)
    draw = np.random.default_rng(0)
    pairs, side, tokens = (
        config.data.global_batch,
        config.model.image.size_px,
        config.model.text.max_tokens,
    )
    images = draw.integers(0, 255, (2, pairs, side, side, 3), dtype=np.uint8)
    ids = np.arange(pairs, dtype=np.int32)
    text = draw.integers(5, words, (pairs, tokens), dtype=np.int32)
    batch = Batch(
        images[0],
        images[1],
        np.zeros(pairs, bool),
        text,
        np.full(pairs, tokens, np.int32),
        ids,
        ids,
        0 * ids,
    )
    return task, sharding.put_batch(batch, mesh)


def measure(
    size: str, fields: dict[str, object], steps: int, recipe: str = "paper"
) -> dict[str, float]:
    """The median seconds of a step, and the other figures of a row."""
    import jax
    import numpy as np

    from codebook_jax.tools.plan import products

    plain, batch = random_task(size, fields | {"model.remat": "none"}, recipe)
    operations = products(plain.step.trace(plain.abstract_state(), batch).jaxpr.jaxpr)
    task, batch = random_task(size, fields, recipe)
    pairs = len(batch.tokens)
    state = task.init_state(0)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    began = time.perf_counter()
    step = task.step.lower(state, batch).compile()
    compiled = time.perf_counter() - began
    times = []
    for _ in range(3 + steps):
        began = time.perf_counter()
        state, scalars = step(state, batch)
        jax.block_until_ready((state, scalars))
        times.append(time.perf_counter() - began)
    seconds = float(np.median(times[3:]))
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {
        "step_s": seconds,
        "fastest_s": min(times[3:]),
        "pairs_per_s": pairs / seconds,
        "compile_s": compiled,
        "peak_gb": peak / 1e9,
        "state_mb": state_bytes / 1e6,
        "operations": operations,
    }


if __name__ == "__main__":
    main()
