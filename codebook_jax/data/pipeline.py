"""The stream of training batches, read, cropped and tokenised in threads and worker processes.

Row r of step s depends only on (seed, s, r), so the step is the only position that must be saved.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from codebook_jax.console import say
from codebook_jax.data.batch import Batch
from codebook_jax.data.crops import random_crops
from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.mirror import mirrored
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.mixture import training_order
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.stop import serve_parent

MOST_SUBSTITUTES = 1000  # consecutive records that may be unreadable
_NAMED = 3  # unreadable images that a stream prints
_ROWS_A_TASK = 8  # per thread: enough for little overhead, few enough to occupy all threads
_READERS = 2  # batches made at once: threads need not wait for the previous batch's tokens


class BatchSpec(NamedTuple):
    """What the batches hold."""

    seed: int
    global_batch: int
    rows: Sequence[int] | np.ndarray | slice  # of the global batch, that this process makes
    size_px: int
    max_tokens: int
    crop_scale: Sequence[float]
    crop_ratio: Sequence[float]
    flip: bool  # half the rows are mirrored on the device, with left and right swapped in captions
    views: int  # 2: the teacher gets its own crop of the image; 1: the student's


class BatchStream(Iterator[Batch]):
    """Batches from `start_step` on, endlessly; `close()` ends its threads and worker processes.

    An epoch has every record of the source once, in a new order, each with one caption, and the
    next one starts within the same batch. A record that cannot be read is replaced by the next one
    in the source. `next` raises UserError if nothing can be read.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        spec: BatchSpec,
        *,
        workers: int = 0,
        threads: int = 1,
        prefetch: int = 1,
        start_step: int = 0,
    ) -> None:
        """Makes `prefetch` batches ahead, in worker processes (0: in this one) of `threads` threads
        each; none of the three changes a batch.
        """
        if len(source) == 0:
            raise UserError(f"{source!r} has no records to train on")
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, if there are any or not
            flags.FLAGS.mark_as_parsed()
        self._maker, self._unnamed = _Maker(source, tokenizer, spec, threads), _NAMED
        steps = sys.maxsize // spec.global_batch  # Grain's own limit is sys.maxsize examples
        ahead = math.ceil(prefetch / max(1, workers))
        options = grain.ReadOptions(num_threads=min(_READERS, ahead), prefetch_buffer_size=ahead)
        batches = grain.MapDataset.range(start_step, steps).map(self._maker)
        batches = batches.to_iter_dataset(options)
        if workers:
            # Python's process that cleans up shared memory would be killed by SIGUSR1, unless the
            # signal is blocked while that process starts.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        self._batches = iter(batches)

    def __next__(self) -> Batch:
        batch, unreadable = next(self._batches)
        if batch is None:
            raise UserError(*unreadable)
        for sentence in unreadable[: self._unnamed]:
            self._unnamed -= 1
            say(f"an image cannot be read and is replaced by the next one: {sentence}")
        return batch

    def close(self) -> None:
        """Ends the stream's threads and processes; it then has no more batches."""
        batches, self._batches = self._batches, iter(())
        if hasattr(batches, "close"):
            batches.close()
        self._maker.pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass
class BadRate:
    """Counts unreadable images, and stops the run if there are too many."""

    max_rate: float
    unreadable: int  # since the first start of the run; those before this start are not judged
    bad: int = 0  # since this start
    tried: int = 0

    def add(self, *, unreadable: int, read: int) -> None:
        """Counts a batch; raises UserError if the unreadable share is above `max_rate` by more than
        two standard errors, which does not happen by chance.
        """
        self.unreadable += unreadable
        self.bad += unreadable
        self.tried += unreadable + read
        margin = 2 * math.sqrt(self.bad) if self.max_rate > 0 else 0
        if self.bad > self.max_rate * self.tried + margin:
            raise UserError(
                f"{self.bad:,} of {self.tried:,} images could not be read, more than "
                f"config.data.max_bad_rate={self.max_rate:g} allows (the first are named above): "
                "--mode=check-data finds them all and lists the good ones; or raise the rate"
            )


# Of a row: its example, image_id, caption and flip, and why each record before it was unreadable.
_Row = tuple[int, int, str, bool, list[str]]


class _Maker:
    """Makes the batch of a step. Pickled into a worker process, it has threads of its own there."""

    def __init__(self, source: Source, tokenizer: Tokenizer, spec: BatchSpec, threads: int) -> None:
        self.source, self.tokenizer, self.spec, self.threads = source, tokenizer, spec, threads
        self._rows = np.arange(spec.global_batch)[spec.rows]
        self._order = training_order(source, spec.seed)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def __reduce__(self) -> tuple:
        return _Maker, (self.source, self.tokenizer, self.spec, self.threads)

    def __call__(self, step: int) -> tuple[Batch | None, list[str]]:
        """(batch, a sentence on each of the first unreadable images), or (None, [a user error]):
        exceptions lose their type on the way from a worker process.
        """
        count, size_px = len(self._rows), self.spec.size_px
        positions = (int(step) * self.spec.global_batch + self._rows).tolist()
        views = np.empty((self.spec.views, count, size_px, size_px, 3), np.uint8)

        def read(start: int) -> list[_Row]:
            part = range(start, min(start + _ROWS_A_TASK, count))
            return [self._read(positions[row], views[:, row]) for row in part]

        run = map if self.threads == 1 else self.pool.map
        try:
            rows = [row for part in run(read, range(0, count, _ROWS_A_TASK)) for row in part]
        except UserError as error:
            return None, [str(error)]
        examples, image_ids, captions, flips, unreadable = zip(*rows, strict=True)
        tokens, lengths, _ = self.tokenizer.encode(captions, self.spec.max_tokens)
        batch = Batch(
            image=views[0],
            teacher_image=views[-1],
            flip=np.array(flips, bool),
            tokens=tokens,
            text_length=lengths,
            image_id=np.array(image_ids, np.int32),
            example=np.array(examples, np.int32),
            skipped=np.array(list(map(len, unreadable)), np.int32),
        )
        return batch, list(itertools.chain(*unreadable))[:_NAMED]

    def _read(self, position: int, views: UInt8[np.ndarray, "views size size 3"]) -> _Row:
        """The record at this position of the run, or the next readable one, cropped into `views`.

        The random draws depend only on the position, in a fixed order, whichever record is used.
        """
        spec, first = self.spec, int(self._order[position])
        unreadable: list[str] = []
        for further in range(min(len(self.source), MOST_SUBSTITUTES)):
            example = (first + further) % len(self.source)
            rng = np.random.Generator(np.random.Philox(key=[spec.seed % 2**64, position]))
            drawn, flipped = rng.random(2)
            try:
                record = self.source[example]
                picture = Picture(record.image)
                random_crops(picture, rng, views, scale=spec.crop_scale, ratio=spec.crop_ratio)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            caption = record.captions[int(drawn * len(record.captions))]
            other = mirrored(caption) if spec.flip and flipped < 0.5 else None
            flip = other is not None
            return example, record.image_id, other if flip else caption, flip, unreadable
        raise UserError(
            f"{self.source!r}: none of {len(unreadable):,} pairs in a row could be read (first: "
            f"{unreadable[0]}): check config.data.image_root and the files"
        )


def _start_worker(index: int, count: int) -> None:
    serve_parent((signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
