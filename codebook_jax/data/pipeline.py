"""The stream of training batches: read, decoded, cropped twice and tokenised in threads and worker
processes.

Row r of step s depends only on (seed, s, r). The numbers of workers, threads and processes, the
read-ahead and the first step change when a row is made, not its content. So the step is the only
position that must be saved.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from codebook_jax.data.batch import Batch
from codebook_jax.data.crops import random_crops
from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.mirror import mirrored
from codebook_jax.data.sources import Record, Source
from codebook_jax.data.sources.mixture import training_order
from codebook_jax.data.stop import serve_parent
from codebook_jax.data.text import UNREAD, Tokenizer
from codebook_jax.errors import UserError, refuse_below

MOST_SUBSTITUTES = 1000  # consecutive records that may be unreadable
_NAMED = 3  # unreadable images that a stream prints
_ROWS_A_TASK = 8  # per thread: enough for little overhead, few enough to occupy all threads
_READERS = 2  # batches made at once, so that threads need not wait for the previous batch's tokens


def training_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    seed: int,
    start_step: int,
    global_batch: int,
    rows: Sequence[int] | np.ndarray | slice,
    size_px: int,
    max_tokens: int,
    crop_scale: Sequence[float],
    crop_ratio: Sequence[float],
    flip: bool,
    teacher_view: str,
    workers: int,
    threads: int,
    prefetch: int,
) -> BatchStream:
    """This process's `rows` of every global batch from `start_step` on, endlessly; call `close()`
    after use.

    An epoch has every record of the source once, in a new order, and the next one starts within the
    same batch. One caption of a record is drawn. With `flip`, half the rows are marked to be
    mirrored on the device, and left and right are swapped in their captions, except where
    `mirrored` finds the caption unclear. `teacher_view` is "independent" (its own crop of the same
    image) or "same".

    A record whose image cannot be read is replaced by the next one in the source. Raises UserError
    for invalid settings, and from `next` if nothing can be read.
    """
    if teacher_view not in ("independent", "same"):
        raise UserError(
            f'config.data.teacher_view={teacher_view!r} is neither "independent" nor "same"'
        )
    for name, value, least in (
        ("workers", workers, 0),
        ("threads", threads, 1),
        ("prefetch", prefetch, 1),
    ):
        refuse_below(f"data.{name}", value, least)
    if len(source) == 0:
        raise UserError(f"{source!r} has no records to train on")
    maker = _Maker(
        source,
        tokenizer,
        seed=seed,
        global_batch=global_batch,
        rows=np.arange(global_batch)[rows],
        size_px=size_px,
        max_tokens=max_tokens,
        crop_scale=tuple(crop_scale),
        crop_ratio=tuple(crop_ratio),
        flip=flip,
        same_view=teacher_view == "same",
        threads=threads,
    )
    return BatchStream(maker, start_step=start_step, workers=workers, prefetch=prefetch)


class BatchStream(Iterator[Batch]):
    """The batches of successive steps; `close()` ends its threads and worker processes."""

    def __init__(self, maker: _Maker, *, start_step: int, workers: int, prefetch: int) -> None:
        if (
            not flags.FLAGS.is_parsed()
        ):  # Grain's workers read absl flags, even in programs that have none
            flags.FLAGS.mark_as_parsed()
        self._maker = maker
        self._named: list[str] = []
        steps = sys.maxsize // maker.global_batch  # Grain's own limit is sys.maxsize examples
        ahead = math.ceil(prefetch / max(1, workers))
        reading = grain.ReadOptions(num_threads=min(_READERS, ahead), prefetch_buffer_size=ahead)
        batches = grain.MapDataset.range(start_step, steps).map(maker).to_iter_dataset(reading)
        if workers:
            _start_resource_tracker()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                worker_init_fn=_start_worker,
            )
        self._batches = iter(batches)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        made = next(self._batches)
        for sentence in made.unreadable[: _NAMED - len(self._named)]:
            self._named.append(sentence)
            _say(f"an image cannot be read and is replaced by the next one: {sentence}")
        if made.failure:
            raise UserError(made.failure)
        return made.batch

    def close(self) -> None:
        """Ends the threads and processes that make batches; the stream then has no more."""
        batches, self._batches = self._batches, iter(())
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        self._maker.close()


class BadRate:
    """Counts unreadable images, and stops the run if there are too many."""

    def __init__(self, max_rate: float, unreadable: int) -> None:
        """`unreadable`: the count before this start of the run; reported, but not held against
        `max_rate`.
        """
        self._max_rate = max_rate
        self._before = unreadable
        self._unreadable = self._read = 0

    @property
    def unreadable(self) -> int:
        """Since the first start of the run."""
        return self._before + self._unreadable

    def add(self, *, unreadable: int, read: int) -> None:
        """Counts a batch. Raises UserError if the unreadable share exceeds the rate by more than
        two standard errors.

        So five bad images in a row stop a run, but a share just below the rate does not stop it by
        chance.
        """
        self._unreadable += unreadable
        self._read += read
        tried = self._unreadable + self._read
        allowed = self._max_rate * tried
        if self._max_rate > 0:
            allowed += 2 * math.sqrt(self._unreadable)
        if self._unreadable > allowed:
            raise UserError(
                f"{self._unreadable:,} of {tried:,} images could not be read, more than "
                f"config.data.max_bad_rate={self._max_rate:g} allows (the first are named above): "
                "--mode=check-data finds them all and lists the good ones; or raise the rate"
            )


class _Made(NamedTuple):
    """A batch as a worker sends it, with messages: exceptions would lose their type on the way."""

    batch: Batch
    unreadable: tuple[str, ...]  # a sentence for each image
    failure: str  # why there is no batch; empty if there is one


class _Row(NamedTuple):
    """One row of a batch."""

    example: int
    record: Record
    caption: str
    flip: bool
    reasons: list[str]  # why the records before it could not be read


class _Maker:
    """Makes the batch of a step.

    It is pickled into every worker process, where it starts its own threads.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seed: int,
        global_batch: int,
        rows: np.ndarray,
        size_px: int,
        max_tokens: int,
        crop_scale: tuple[float, ...],
        crop_ratio: tuple[float, ...],
        flip: bool,
        same_view: bool,
        threads: int,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.seed, self.global_batch, self.rows = seed, global_batch, rows
        self.size_px, self.max_tokens = size_px, max_tokens
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.flip, self.same_view, self.threads = flip, same_view, threads
        self.order = training_order(source, seed)
        self._start_pool()

    def _start_pool(self) -> None:
        self._lock, self._pool, self._closed = threading.Lock(), None, False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_pool()

    def __repr__(self) -> str:
        return f"_Maker({self.source!r})"

    def __call__(self, step: int) -> _Made:
        count = len(self.rows)
        views = np.empty(
            (1 if self.same_view else 2, count, self.size_px, self.size_px, 3), np.uint8
        )
        numbers = np.zeros((3, count), np.int32)  # image id, example, skipped
        flips = np.zeros(count, bool)
        captions: list[str] = [""] * count
        reasons: list[list[str]] = [[] for _ in range(count)]

        def fill(part: range) -> None:
            """Reads, crops and captions these rows."""
            for at in part:
                position = int(step) * self.global_batch + int(self.rows[at])
                row = self._read(position, views[:, at])
                reasons[at], captions[at], flips[at] = row.reasons, row.caption, row.flip
                numbers[:, at] = row.record.image_id, row.example, len(row.reasons)

        parts = [range(at, min(at + _ROWS_A_TASK, count)) for at in range(0, count, _ROWS_A_TASK)]
        failure = ""
        try:
            if self.threads == 1:
                fill(range(count))
            else:
                list(self._threads().map(fill, parts))
        except UserError as error:
            failure = str(error)
        tokens, lengths, _ = self.tokenizer.encode(captions, self.max_tokens)
        batch = Batch(views[0], views[-1], flips, tokens, lengths, *numbers)
        return _Made(batch, tuple(why for row in reasons for why in row)[:_NAMED], failure)

    def _read(self, position: int, views: np.ndarray) -> _Row:
        """The record at this position of the run, or the next readable one of the source, cropped
        into `views`.

        The random draws depend only on the position, in a fixed order, whichever record is used.
        """
        first = int(self.order[position])
        reasons: list[str] = []
        for further in range(min(len(self.source), MOST_SUBSTITUTES)):
            example = (first + further) % len(self.source)
            rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, position]))
            drawn, flipped = rng.random(2)
            try:
                record = self.source[example]
                caption = self._drawn_caption(record, drawn, example)
                random_crops(
                    Picture(record.image),
                    rng,
                    len(views),
                    scale=self.crop_scale,
                    ratio=self.crop_ratio,
                    size_px=self.size_px,
                    out=views,
                )
            except UnreadableImage as error:
                reasons.append(str(error))
                continue
            other = mirrored(caption) if self.flip and flipped < 0.5 else None
            flip = other is not None
            return _Row(example, record, other if flip else caption, flip, reasons)
        raise UserError(
            f"{self.source!r}: none of {len(reasons):,} pairs in a row could be read (first: "
            f"{reasons[0]}): check config.data.image_root and the files"
        )

    def _drawn_caption(self, record: Record, drawn: float, example: int) -> str:
        """One of the captions that give at least one token; raises UnreadableImage if there is
        none.
        """
        captions = self.tokenizer.readable(record.captions)
        if not captions:
            raise UnreadableImage(f"{self.source.name(example)} {UNREAD}")
        return captions[int(drawn * len(captions))]

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise RuntimeError("the stream of batches is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="read")
            return self._pool

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)


def _start_resource_tracker() -> None:
    """Starts Python's process that cleans up shared memory so that SIGUSR1 does not end it.

    It ignores only SIGINT and SIGTERM, and without it the run fails on a broken pipe. A signal that
    is blocked while a program starts stays blocked in it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    """Called by Grain first in each worker process."""
    serve_parent((signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))


def _say(sentence: str) -> None:
    from codebook_jax.console import say

    say(sentence)
