"""Work on a source, spread over processes of this machine that never outlive it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from codebook_jax.data.sources import Source
from codebook_jax.data.stop import serve_parent
from codebook_jax.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")
Tell = Callable[[int, int], None]  # (records done since the last call, bad ones among them)
Work = Callable[[Source, Task, Tell], Result]

_LISTEN_EVERY_S = 0.5


def process_count(processes: int, tasks: int) -> int:
    """How many processes do `tasks` tasks; `processes` 0: one per CPU."""
    return max(1, min(processes or os.cpu_count() or 1, tasks))


def spread(
    work: Work, source: Source, tasks: Sequence[Task], *, processes: int, field: str, tell: Tell
) -> Iterator[tuple[Task, Result]]:
    """(task, `work(source, task, tell)`) of every task as it finishes, in this process if one is
    enough.

    Always close it: that ends the processes. `field` of the config holds `processes`. Raises
    UserError if a process is killed, and whatever a task raises.
    """
    count = process_count(processes, len(tasks))
    if count == 1:
        for task in tasks:
            yield task, work(source, task, tell)
        return
    context = multiprocessing.get_context("spawn")
    news = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, context, _start, (work, source, news.put)) as pool:
        try:
            waiting = iter(tasks)
            running = {
                pool.submit(_do, task): task for task in itertools.islice(waiting, 2 * count)
            }
            while running:
                finished, _ = wait(running, _LISTEN_EVERY_S, FIRST_COMPLETED)
                while not news.empty():
                    tell(*news.get())
                for future in finished:
                    yield running.pop(future), future.result()
                    running |= {
                        pool.submit(_do, task): task for task in itertools.islice(waiting, 1)
                    }
        except BrokenProcessPool as failure:
            raise UserError(
                "a worker process was killed, as Linux does when memory runs out: run the same "
                "command again, or with fewer processes, such as "
                f"--config.{field}={max(1, count // 2)}"
            ) from failure
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()  # otherwise the pool would wait for their tasks
            raise


def quiet_pillow() -> None:
    """Silences what Pillow warns of, such as broken EXIF blocks: what matters raises."""
    warnings.filterwarnings("ignore", module="PIL")


def _start(work: Work, source: Source, put: Callable[[tuple[int, int]], None]) -> None:
    """Called first in a worker process: leaves signals to the parent, and exits with it."""
    global _work, _source, _put
    serve_parent()
    quiet_pillow()
    _work, _source, _put = work, source, put


def _do(task: Task) -> Result:
    return _work(_source, task, lambda *counts: _put(counts))
