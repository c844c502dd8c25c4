"""Work on a source, spread over processes of this machine that never outlive it."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError
from codebook_jax.stop import serve_parent

Task, Result = TypeVar("Task"), TypeVar("Result")
Tell = Callable[[int, int], None]  # (records done since the last call, bad ones among them)
Work = Callable[[Source, Task, Tell], Result]

_LISTEN_EVERY_S = 0.5


def process_count(processes: int, tasks: int) -> int:
    """How many processes do `tasks` tasks; `processes` 0: one per CPU."""
    return max(1, min(processes or os.cpu_count() or 1, tasks))


def spread(
    work: Work, source: Source, tasks: Sequence[Task], *, processes: int, field: str, tell: Tell
) -> list[Result]:
    """`work(source, task, tell)` of every task, in this process if one is enough. Raises UserError,
    naming config's `field`, if a process is killed, and whatever a task raises; none is left.
    """
    count = process_count(processes, len(tasks))
    if count == 1:
        return [work(source, task, tell) for task in tasks]
    context = multiprocessing.get_context("spawn")
    news = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    results = []
    with ProcessPoolExecutor(count, context, _start, (work, source, news.put)) as pool:
        try:
            for future in [pool.submit(_do, task) for task in tasks]:
                while wait([future], _LISTEN_EVERY_S).not_done or not news.empty():
                    while not news.empty():
                        tell(*news.get())
                results.append(future.result())
        except BaseException as failure:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()  # otherwise the pool would wait for their tasks
            if isinstance(failure, BrokenProcessPool):
                raise UserError(
                    "a worker process was killed, as Linux does when memory runs out: run the same "
                    "command again, or with fewer processes, such as "
                    f"--config.{field}={max(1, count // 2)}"
                ) from failure
            raise
    return results


def _start(work: Work, source: Source, put: Callable[[tuple[int, int]], None]) -> None:
    """Called first in a worker process: leaves signals to the parent, and exits with it."""
    global _work, _source, _put
    serve_parent()
    warnings.filterwarnings("ignore", module="PIL")  # of broken EXIF blocks: what matters raises
    _work, _source, _put = work, source, put


def _do(task: Task) -> Result:
    return _work(_source, task, lambda *counts: _put(counts))
