"""Long work in rows: each process has its share of them, and a killed evaluation goes on.

A stage makes the rows of some arrays, a call at a time, every call of one shape. With a cache, the
rows are in files beside a journal of those that are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from codebook_jax.console import say
from codebook_jax.files import check_room, parse_json
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers

RECORD_EVERY_S = 5.0  # a killed evaluation repeats at most so much, and one call

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, out of how many


class Cache(NamedTuple):
    """Where an evaluation keeps what it has made, and all that this depends on, as a digest."""

    folder: Path  # of this process
    key: str


class Bookkeeping(NamedTuple):
    """Whom an evaluation tells how far it is, and where it goes on from if it was killed."""

    progress: Progress | None = None
    cache: Cache | None = None  # None: all is kept in memory


IN_MEMORY = Bookkeeping()


class Shares(NamedTuple):
    """How the rows of a call are shared: each owner, mostly one process, fills its part of them."""

    parts: list[Int[np.ndarray, " part"]]  # by owner
    own: Int[np.ndarray, " own"]  # the rows that this process fills: some of the parts

    @classmethod
    def over(cls, mesh: jax.sharding.Mesh, rows: int) -> Shares:
        """Those of `rows` that are split over the mesh like a batch."""
        return cls(sharding.rows_by_holders(mesh, rows), sharding.process_rows(mesh, rows))

    @classmethod
    def everyone(cls, rows: int) -> Shares:
        """Those of `rows` that every process fills."""
        return cls([np.arange(rows)], np.arange(rows))

    def owners(self, places: Int[np.ndarray, " places"], total: int) -> Int[np.ndarray, " places"]:
        """The owner of each of these places out of `total`, which are shared in blocks."""
        return places * len(self.parts) // total

    def is_own(self, owners: Int[np.ndarray, " places"]) -> Bool[np.ndarray, " places"]:
        return np.isin([part[0] for part in self.parts], self.own)[owners]


class FileRows:
    """Rows of an array in a file. It is mapped to read some, and written without: a full disk would
    kill a process that writes to mapped memory.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(np.memmap(self.path, self.dtype, "r", shape=self.shape)[rows])

    def __setitem__(self, rows: Int[np.ndarray, " rows"], values: np.ndarray) -> None:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        with open(self.path, "r+b") as file:
            for run in np.split(np.arange(len(rows)), breaks):
                file.seek(int(rows[run[0]]) * self.row_bytes)
                file.write(values[run].tobytes())


Rows = np.ndarray | FileRows


class Stage:
    """The rows of some arrays, and which are done. They stay only for the same `made_of`.

    `like` has an array with any number of rows for each, or its shape and type; a row counts as
    `each` when progress is told.
    """

    def __init__(
        self,
        books: Bookkeeping,
        name: str,
        made_of: str,
        total: int,
        like: Mapping[str, jax.ShapeDtypeStruct],
        *,
        each: int = 1,
    ) -> None:
        self._books, self._name, self._each = books, name, each
        self.done = np.zeros(total, bool)
        self.notes: dict[int, Any] = {}  # of rows that are done
        self._unrecorded: tuple[list[int], list[Any]] = [], []
        self._recorded_at, self._after, self._left = time.monotonic(), iter(()), total
        shapes = {key: ((total, *array.shape[1:]), array.dtype) for key, array in like.items()}
        self.arrays: dict[str, Rows]
        if books.cache is None:
            self.arrays = {key: np.empty(*of) for key, of in shapes.items()}
            return
        folder = books.cache.folder / name
        self._journal = folder / "done.jsonl"
        self.arrays = {key: FileRows(folder / key, *of) for key, of in shapes.items()}
        self._open({"key": books.cache.key, "made_of": made_of, "rows": total})

    def calls(
        self, shares: Shares, owners: Int[np.ndarray, " places"] | None = None
    ) -> Int[np.ndarray, "calls own"]:
        """What this process's rows of each call make: places that are not done yet, -1 for none,
        all by their owners (None: in blocks). All processes must `write` after every call.
        """
        total = len(self.done)
        owners = shares.owners(np.arange(total), total) if owners is None else owners
        own = np.flatnonzero(shares.is_own(owners) & ~self.done)
        if self._books.cache is not None:
            size = len(own) * sum(array.row_bytes for array in self.arrays.values())
            check_room(self._journal.parent, size)
        left = np.unique(np.concatenate(peers.connected().exchange(f"{self._name} left", own)))
        queues = [left[owners[left] == owner] for owner in range(len(shares.parts))]
        each = list(zip(queues, shares.parts, strict=True))
        count = max(-(-len(queue) // len(part)) for queue, part in each)
        places = np.full((count, sum(map(len, shares.parts))), -1)
        for queue, part in each:
            call, row = np.divmod(np.arange(len(queue)), len(part))
            places[call, part[row]] = queue
        if before := (total - len(left)) * self._each:
            of = f"{total * self._each:,} {self._name}"
            say(f"a stopped evaluation goes on: {before:,} of {of} are done already")
        self._left, self._after = len(left), iter(np.cumsum((places >= 0).sum(axis=1)).tolist())
        self._tell(0)
        return places[:, shares.own]

    def write(
        self,
        rows: Int[np.ndarray, " rows"],
        arrays: Mapping[str, np.ndarray],
        notes: Sequence[Any] = (),
    ) -> None:
        """What a call made of these places; `notes`, one each or none, are kept beside them."""
        if len(rows):
            for key, values in arrays.items():
                self.arrays[key][rows] = values
            self._remember(rows.tolist(), notes)
        after = next(self._after)
        if self._books.cache is not None:
            self._unrecorded[0].extend(rows.tolist())
            self._unrecorded[1].extend(notes)
            is_late = time.monotonic() - self._recorded_at >= RECORD_EVERY_S
            if is_late or after == self._left:
                self._record()
        self._tell(after)

    def _tell(self, done: int) -> None:
        """How many are done since this start, of those that were left then."""
        if self._books.progress is not None:
            self._books.progress(self._name, done * self._each, self._left * self._each)

    def _remember(self, rows: list[int], notes: Sequence[Any]) -> None:
        self.done[rows] = True
        self.notes.update(zip(rows, notes, strict=False))

    def _record(self) -> None:
        """First the rows, then that they are done, reach the disk."""
        for array in self.arrays.values():
            with open(array.path, "r+b") as file:
                os.fsync(file.fileno())
        rows, notes = self._unrecorded
        with open(self._journal, "a") as file:
            file.write(json.dumps([rows, notes]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._unrecorded, self._recorded_at = ([], []), time.monotonic()

    def _open(self, head: dict[str, Any]) -> None:
        """Reads the journal up to a line that was cut off; begins anew if its head is another."""
        good, lines = 0, []
        if self._journal.exists() and all(array.path.exists() for array in self.arrays.values()):
            lines = self._journal.read_bytes().splitlines(keepends=True)
        for line in lines:
            try:
                found = parse_json(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or (not good and found != head):
                break
            if good:
                self._remember(*found)
            good += len(line)
        if good:
            os.truncate(self._journal, good)
            return
        shutil.rmtree(self._journal.parent, ignore_errors=True)
        self._journal.parent.mkdir(parents=True)
        for array in self.arrays.values():
            with open(array.path, "xb") as file:
                file.truncate(array.shape[0] * array.row_bytes)
        self._journal.write_text(json.dumps(head) + "\n")


def digest(arrays: Iterable[np.ndarray]) -> str:
    """A digest of the content of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()
