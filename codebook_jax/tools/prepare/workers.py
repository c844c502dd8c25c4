"""Packs shards in processes on this machine; if one dies, only its current shard is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from codebook_jax.data.packing import Packing, Told, full_disk_named, write_shard
from codebook_jax.data.sources import Source
from codebook_jax.data.stop import serve_parent
from codebook_jax.errors import UserError
from codebook_jax.tools.prepare.folder import keep


class Job(NamedTuple):
    """Everything a process needs to pack any shard."""

    folder: Path
    source_file: Path  # the source, pickled
    packing: Packing

    def source(self) -> Source:
        return pickle.loads(self.source_file.read_bytes())

    def pack(self, source: Source, shard: int, tell: Told | None = None) -> None:
        """Packs a shard and keeps its receipt; raises UserError if the disk is full."""
        with full_disk_named(self.folder):
            keep(self.folder, shard, write_shard(source, shard, self.folder, self.packing, tell))


def pack(job: Job, source: Source, shards: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """Packs these shards in `count` processes; yields (records read, skipped) as they progress.

    Always close it: that ends the processes. With `count` 1, packs in this process. Raises
    UserError if a process is killed or raises one.
    """
    if count == 1:
        return _pack_here(job, source, shards)
    return _pack_in_processes(job, shards, count)


def _pack_here(job: Job, source: Source, shards: Sequence[int]) -> Iterator[tuple[int, int]]:
    for shard in shards:
        read: list[tuple[int, int]] = []
        job.pack(source, shard, lambda *news, read=read: read.append(news))
        yield from read


def _pack_in_processes(job: Job, shards: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, BaseProcess] = {}
    todo = iter(shards)
    try:
        for number in range(count):
            own, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, theirs), name=f"pack-{number}")
            process.start()
            theirs.close()  # so that our end notices when the process is gone
            processes[own] = process
        while processes:
            for connection in wait(list(processes)):
                news = _received(connection, processes[connection], len(processes))
                if news is not None:
                    yield news
                    continue
                shard = next(todo, None)
                with contextlib.suppress(OSError):  # it is gone; the next read raises
                    connection.send(shard)
                if shard is None:
                    processes.pop(connection).join()
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _received(connection: Connection, process: BaseProcess, count: int) -> tuple[int, int] | None:
    """(read, skipped), or None if the process asks for a shard; raises its failure."""
    try:
        news = connection.recv()
    except (EOFError, OSError):
        process.join()
        raise UserError(_died(process.exitcode, count)) from None
    if isinstance(news, UserError):
        raise news
    if isinstance(news, str):
        raise RuntimeError(f"a packing process failed:\n{news}")
    return news


def _died(code: int | None, count: int) -> str:
    if code is not None and code < 0:
        how = f"by {signal.Signals(-code).name}"
        how += ", as Linux does when memory runs out" if code == -signal.SIGKILL else ""
    else:
        how = f"with exit code {code}"
    fewer = f" with fewer processes: --config.prepare.processes={max(1, count // 2)}"
    return f"a packing process ended {how}: run the same command again to continue, if necessary{fewer}"


def _work(job: Job, connection: Connection) -> None:
    """Runs in each process: packs the shards it receives, until it receives None."""
    serve_parent()
    warnings.filterwarnings("ignore", module="PIL")  # about broken EXIF blocks, one line each
    try:
        source = job.source()
        connection.send(None)
        while (shard := connection.recv()) is not None:
            job.pack(source, shard, lambda *news: connection.send(news))
            connection.send(None)
    except (EOFError, BrokenPipeError):
        return
    except UserError as failure:
        connection.send(failure)
    except Exception:
        connection.send(traceback.format_exc())
