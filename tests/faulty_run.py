"""The command with a fault injected into a process of the run; used by tests and
benchmarks/faults.py.

FAULT in the environment is `KIND:PROCESS:STEP` (PROCESS * for all): before the batch after STEP the
process is killed, loses a data worker (kill-worker), hangs (stop), does not get its batch (stuck)
or fails (raise), from then on it is slow; its codebook is nan in STEP; its code is another from the
start. kill-evaluation: it is killed after STEP calls of an evaluation, each of which is recorded.
The flags are those of codebook_jax.main.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    from codebook_jax import console

    console.begin()
    from codebook_jax import main as command

    kind, process, step = os.environ.get("FAULT", "none:0:0").split(":")
    if kind != "none" and process in ("*", os.environ.get("JAX_PROCESS_ID", "0")):
        put(kind, int(step))
    command.command()


def put(kind: str, step: int) -> None:
    """Injects this process's fault at the batch of `step`."""
    if kind == "code":
        from codebook_jax.run import record as workdir

        workdir.code_digest = lambda: "other code"
    elif kind == "nan":
        _poison(step)
    elif kind == "kill-evaluation":
        _after_calls(step)
    else:
        _before_batches(lambda at: _act(kind, at, step))


def _act(kind: str, at: int, step: int) -> None:
    if kind == "slow" and at >= step:
        time.sleep(0.3)
    if at != step:
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "kill-worker":
        import multiprocessing

        multiprocessing.active_children()[0].kill()
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "stuck":
        time.sleep(3600)
    elif kind == "raise":
        raise RuntimeError("something that nobody foresaw")


def _before_batches(act: Callable[[int], None]) -> None:
    """Calls `act` with the number of each batch before yielding it."""
    from codebook_jax import build

    real = build.batches

    @contextlib.contextmanager
    def batches(parts: Any, *, start_step: int, **settings: Any) -> Iterator[Iterator[Any]]:
        steps = itertools.count(start_step)
        with real(parts, start_step=start_step, **settings) as stream:
            yield map(lambda batch: act(next(steps)) or batch, stream)

    build.batches = batches


def _after_calls(count: int) -> None:
    """Kills this process after so many calls of an evaluation."""
    from codebook_jax.evaluation import stage

    real, made = stage.Stage.write, itertools.count(1)

    def write(*given: Any) -> None:
        real(*given)
        if next(made) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    stage.Stage.write, stage.RECORD_EVERY_S = write, 0.0


def _poison(step: int) -> None:
    """The codebook becomes NaN before a step, as if a chip had miscomputed."""
    import jax
    import jax.numpy as jnp

    from codebook_jax.parallel.memory import Compiled, Memory

    real, done = Memory.compile, [0]

    def compiled(self: Any, task: Any) -> Compiled:
        found = real(self, task)

        def poisoned(state: Any, batch: Any) -> Any:
            done[0] += 1
            if done[0] == step:
                broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.student["codebook"])
                state = state.replace(student={**state.student, "codebook": broken})
            return found.program(state, batch)

        return found._replace(program=poisoned)

    Memory.compile = compiled


if __name__ == "__main__":
    main()
