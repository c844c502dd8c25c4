"""Step time, share of the matrix products' ceiling, bytes, compile time and peak memory of the
training step: `python benchmarks/train_step.py`.

One process per row, so that peak memory is the row's own, started with the huge pages that the
command uses; batches are random, nothing is read. Each row runs `--steps` steps after three that do
not count, and reports their medians. Between two steps, a large matrix product is timed, in float32
on a CPU and in bfloat16 elsewhere: the ceiling. A row's share of it counts the products of a step
without those that are computed again (`model.remat`). "bytes" is what XLA counts that a step's
instructions read and write.

`--pytorch=PYTHON`, an interpreter that has torch, instead runs a step of this project and one of
benchmarks/pytorch_step.py in turn, in two processes of which one always waits, so that what else
the machine does meets both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
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
PAIRED = {"tiny": "tiny", "base": "base, batch 4, float32"}  # rows beside PyTorch's step
DTYPES, HOWS = ("float32", "bfloat16"), ("eager", "compiled")
RECIPE = "paper"  # as pytorch_step.py has it
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=ON_A_CPU, help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pytorch", metavar="PYTHON", help="an interpreter that has torch")
    parser.add_argument("--sizes", nargs="*", default=list(PAIRED), help="beside PyTorch")
    parser.add_argument("--dtypes", nargs="*", default=DTYPES, help="beside PyTorch")
    parser.add_argument("--hows", nargs="*", default=HOWS, help="of PyTorch")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--in-turn", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*ROWS[options.one], options.steps)))
        return
    if options.in_turn:
        name, dtype = options.in_turn
        size, fields = ROWS[name]
        in_turn(prepared(size, fields | {"model.dtype": dtype})[0])
        return
    figures = {"machine": machine()}
    print(json.dumps(figures["machine"]), flush=True)
    figures |= paired(options) if options.pytorch else alone(options)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(figures, indent=1) + "\n")


def alone(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the rows."""
    figures = {}
    print(
        f"{'':36} {'step, s':>8} {'of CPUs':>8} {'pairs/s':>8} {'of ceiling':>10} {'bytes, GB':>9} "
        f"{'compile, s':>10} {'peak, GB':>9}",
        flush=True,
    )
    for name in options.rows:
        row = run_alone(__file__, ["--one", name, "--steps", str(options.steps)])
        figures[name] = row
        print(
            f"{name:36} {row['step_s']:8.3f} {row['cpu_s']:8.3f} {row['pairs_per_s']:8.2f} "
            f"{row['of_ceiling']:10.0%} {row['bytes'] / 1e9:9.1f} {row['compile_s']:10.1f} "
            f"{row['peak_gb']:9.2f}",
            flush=True,
        )
    return figures


def paired(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints this project's steps and PyTorch's, in turn."""
    figures = {}
    for size in options.sizes:
        for dtype in options.dtypes:
            with turns([sys.executable, __file__, "--in-turn", PAIRED[size], dtype]) as ours:
                for how in options.hows:
                    torch = [options.pytorch, str(ROOT / "benchmarks" / "pytorch_step.py")]
                    with turns([*torch, "--in-turn", size, dtype, how]) as theirs:
                        both = [(ours(), theirs()) for _ in range(WARM_UP + options.steps)]
                    medians = [
                        {by: median(turn[by] for turn in of) for by in ("s", "cpu_s")}
                        for of in zip(*both[WARM_UP:], strict=True)
                    ]
                    name = f"{PAIRED[size].removesuffix(', float32')}, {dtype}, {how}"
                    figures[name] = dict(zip(("ours", "pytorch"), medians, strict=True))
                    own, other = ((found["s"], found["cpu_s"]) for found in medians)
                    print(
                        f"{name:36} {own[0]:.3f} s, PyTorch {other[0]:.3f} s: "
                        f"{other[0] / own[0]:.2f} times as fast ({other[1] / own[1]:.2f} by CPU s)",
                        flush=True,
                    )
    return figures


@contextlib.contextmanager
def turns(command: list[str]) -> Iterator[Callable[[], dict[str, float]]]:
    """A process that calls `in_turn`, as a function that lets it take one step."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # idle threads of PyTorch would take the other's time
        env=HUGE_PAGES | {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ,
        cwd=ROOT,
    )

    def answer() -> dict[str, float]:
        line = process.stdout.readline()
        if not line:
            sys.exit(f"{command} has ended")
        return json.loads(line)

    def step() -> dict[str, float]:
        process.stdin.write("\n")
        process.stdin.flush()
        return answer()

    with process:
        answer()
        yield step


def in_turn(step: Callable[[], object]) -> None:
    """Takes a step for each line of the standard input, and prints its seconds."""
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(step)), flush=True)


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Seconds on the wall and of all CPUs that a call takes."""
    wall, cpus = time.perf_counter(), time.process_time()
    call()
    return {"s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpus}


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
    """The devices and the versions."""
    program = (
        "import jax, json\n"
        "print(json.dumps({'device': jax.devices()[0].device_kind, 'devices': jax.device_count(),\n"
        "  'jax': jax.__version__}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"cores": os.cpu_count(), "python": platform.python_version()}


def random_task(size: str, fields: dict[str, object], recipe: str = RECIPE) -> tuple[Any, Any]:
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
    size: str, fields: dict[str, object], steps: int, recipe: str = RECIPE
) -> dict[str, float]:
    """The median seconds of a step, and the other figures of a row."""
    import jax

    from codebook_jax.tools.plan import products

    plain, batch = random_task(size, fields | {"model.remat": "none"}, recipe)
    operations = products(plain.step.trace(plain.abstract_state(), batch).jaxpr.jaxpr)
    step, figures = prepared(size, fields, recipe)
    for _ in range(WARM_UP):
        step()
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    product, of_product = large_product()
    taken = [(timed(step), timed(product)["s"]) for _ in range(steps)]
    seconds = median(found["s"] for found, _ in taken)
    ceiling = of_product / median(own for _, own in taken)
    return figures | {
        "step_s": seconds,
        "fastest_s": min(found["s"] for found, _ in taken),
        "cpu_s": median(found["cpu_s"] for found, _ in taken),
        "pairs_per_s": len(batch.tokens) / seconds,
        "peak_gb": peak / 1e9,
        "operations": operations,
        "matmul_gflops": ceiling / 1e9,
        "of_ceiling": operations / seconds / ceiling,
    }


def prepared(
    size: str, fields: dict[str, object], recipe: str = RECIPE
) -> tuple[Callable[[], None], dict[str, float]]:
    """A function that takes a training step, and what is known before the first one."""
    import jax

    from codebook_jax import programs

    task, batch = random_task(size, fields, recipe)
    state = task.init_state(0)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    began = time.perf_counter()
    program = task.step.lower(state, batch).compile()
    compiled = time.perf_counter() - began
    programs.release()  # as a run does

    def step() -> None:
        nonlocal state
        state, scalars = program(state, batch)
        jax.block_until_ready((state, scalars))

    return step, {
        "compile_s": compiled,
        "state_mb": state_bytes / 1e6,
        "bytes": program.cost_analysis()["bytes accessed"],
        "temporary_gb": program.memory_analysis().temp_size_in_bytes / 1e9,
    }


def large_product() -> tuple[Callable[[], object], float]:
    """A product of two random matrices, compiled, and its operations."""
    import jax
    import jax.numpy as jnp

    side, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return lambda: product(x, x).block_until_ready(), 2 * side**3


if __name__ == "__main__":
    main()
