"""The stream of training batches, read, cropped and tokenised in threads and worker processes.

Row r of step s depends only on (seed, s, r), so the step is the only position that must be saved.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Generic, NamedTuple, Protocol, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8

from codebook_jax.console import say
from codebook_jax.data.alike import Alike, AlikeOrder
from codebook_jax.data.batch import Batch
from codebook_jax.data.crops import random_crops
from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.mirror import mirrored
from codebook_jax.data.sources import KINDS, Example, Record, Source, Story
from codebook_jax.data.sources.mixture import training_order
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.stop import serve_parent

MOST_SUBSTITUTES = 1000  # consecutive records that may be unreadable
_NAMED = 3  # unreadable images that a stream prints
_ROWS_A_TASK = 8  # per thread: enough for little overhead, few enough to occupy all threads
_READERS = 2  # batches made at once: threads need not wait for the previous batch's tokens

Told = TypeVar("Told")  # what a row holds besides its pictures
Made = TypeVar("Made", bound=tuple)  # a batch


class Spec(Protocol[Told, Made]):
    """What the batches hold, and how they are made of records."""

    seed: int
    global_batch: int
    rows: Sequence[int] | np.ndarray | slice  # of the global batch, that this process makes
    alike: Alike | None  # whether records of alike captions meet
    records: str  # what the source has, for messages
    replacement: str  # what happens to a record that cannot be read

    def pictures(self, rows: int) -> UInt8[np.ndarray, "views rows ..."]:
        """Where the pictures of so many rows are to be written."""

    def read(
        self,
        record: Record | Story | Example,
        rng: np.random.Generator,
        pictures: UInt8[np.ndarray, "views ..."],
    ) -> Told:
        """Writes all of a row's `pictures`, and returns what else it holds. Its draws depend on
        `rng` alone. Raises UnreadableImage.
        """

    def batch(
        self,
        pictures: UInt8[np.ndarray, "views rows ..."],
        told: Sequence[Told],
        tokenizer: Tokenizer,
        numbers: Mapping[str, Int32[np.ndarray, " rows"]],
    ) -> Made:
        """The batch of these rows; `numbers` are its fields `example` and `skipped`."""


class BatchSpec(NamedTuple):
    """Batches of pairs, and what they hold."""

    seed: int
    global_batch: int
    rows: Sequence[int] | np.ndarray | slice  # of the global batch, that this process makes
    size_px: int
    max_tokens: int
    crop_scale: Sequence[float]
    crop_ratio: Sequence[float]
    flip: bool  # half the rows are mirrored on the device, with left and right swapped in captions
    views: int  # 2: the teacher gets its own crop of the image; 1: the student's
    alike: Alike | None = None

    records = "pairs"
    replacement = "an image cannot be read and is replaced by the next one"

    def pictures(self, rows: int) -> UInt8[np.ndarray, "views rows size size 3"]:
        return np.empty((self.views, rows, self.size_px, self.size_px, 3), np.uint8)

    def read(
        self,
        record: Record,
        rng: np.random.Generator,
        pictures: UInt8[np.ndarray, "views size size 3"],
    ) -> tuple[str, bool, int]:
        """(caption, whether its picture is to be mirrored, image_id)"""
        drawn, flipped = rng.random(2)
        picture = Picture(record.image)
        random_crops(picture, rng, pictures, scale=self.crop_scale, ratio=self.crop_ratio)
        caption = record.captions[int(drawn * len(record.captions))]
        other = mirrored(caption) if self.flip and flipped < 0.5 else None
        return caption if other is None else other, other is not None, record.image_id

    def batch(
        self,
        pictures: UInt8[np.ndarray, "views rows size size 3"],
        told: Sequence[tuple[str, bool, int]],
        tokenizer: Tokenizer,
        numbers: Mapping[str, Int32[np.ndarray, " rows"]],
    ) -> Batch:
        """The batch of these rows; `numbers` are its fields `example` and `skipped`."""
        captions, flips, image_ids = zip(*told, strict=True)
        tokens, lengths, _ = tokenizer.encode(captions, self.max_tokens)
        return Batch(
            image=pictures[0],
            teacher_image=pictures[-1],
            flip=np.array(flips, bool),
            tokens=tokens,
            text_length=lengths,
            image_id=np.array(image_ids, np.int32),
            **numbers,
        )


class BatchStream(Iterator[Made]):
    """Batches from `start_step` on, endlessly; `close()` ends its threads and worker processes.

    An epoch has every record of the source once, in a new order, each with one caption, and the
    next one starts within the same batch. A record that cannot be read is replaced by the next one
    in the source. `next` raises UserError if nothing can be read.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        spec: Spec[Told, Made],
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

    def __next__(self) -> Made:
        batch, unreadable = next(self._batches)
        if batch is None:
            raise UserError(*unreadable)
        for sentence in unreadable[: self._unnamed]:
            self._unnamed -= 1
            say(f"{self._maker.spec.replacement}: {sentence}")
        return batch

    def close(self) -> None:
        """Ends the stream's threads and processes; it then has no more batches."""
        batches, self._batches = self._batches, iter(())
        if hasattr(batches, "close"):
            batches.close()
        self._maker.pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass
class BadRate:
    """Counts unreadable records, and stops the run if there are too many."""

    max_rate: float
    unreadable: int  # since the first start of the run; those before this start are not judged
    kind: str = "pairs"  # of the records; check-data reads no stories
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
            cure = "--mode=check-data finds them all and lists the good ones"
            cure = "repair the files" if self.kind == "stories" else cure
            raise UserError(
                f"{self.bad:,} of {self.tried:,} {KINDS[self.kind][1]} could not be read, more "
                f"than config.data.max_bad_rate={self.max_rate:g} allows (the first are named "
                f"above): {cure}; or raise the rate"
            )


class _Maker(Generic[Told, Made]):
    """Makes the batch of a step. Pickled into a worker process, it has threads of its own there."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, spec: Spec[Told, Made], threads: int
    ) -> None:
        self.source, self.tokenizer, self.spec, self.threads = source, tokenizer, spec, threads
        self._rows = np.arange(spec.global_batch)[spec.rows]
        self._order = training_order(source, spec.seed)
        if spec.alike is not None:
            self._order = AlikeOrder(self._order, source, tokenizer, spec.seed, spec.alike)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def __reduce__(self) -> tuple:
        return _Maker, (self.source, self.tokenizer, self.spec, self.threads)

    def __call__(self, step: int) -> tuple[Made | None, list[str]]:
        """(batch, a sentence on each of the first unreadable images), or (None, [a user error]):
        exceptions lose their type on the way from a worker process.
        """
        count = len(self._rows)
        positions = (int(step) * self.spec.global_batch + self._rows).tolist()
        pictures = self.spec.pictures(count)

        def read(start: int) -> list[tuple[Told, int, list[str]]]:
            part = range(start, min(start + _ROWS_A_TASK, count))
            return [self._read(positions[row], pictures[:, row]) for row in part]

        run = map if self.threads == 1 else self.pool.map
        try:
            rows = [row for part in run(read, range(0, count, _ROWS_A_TASK)) for row in part]
        except UserError as error:
            return None, [str(error)]
        told, examples, unreadable = zip(*rows, strict=True)
        numbers = {
            "example": np.array(examples, np.int32),
            "skipped": np.array(list(map(len, unreadable)), np.int32),
        }
        batch = self.spec.batch(pictures, told, self.tokenizer, numbers)
        return batch, list(itertools.chain(*unreadable))[:_NAMED]

    def _read(
        self, position: int, pictures: UInt8[np.ndarray, "views ..."]
    ) -> tuple[Told, int, list[str]]:
        """What the spec reads of the record at this position of the run, or of the next readable
        one; its index; and why each record before it was unreadable.

        The random draws depend only on the position, in a fixed order, whichever record is used.
        """
        seed, first = self.spec.seed % 2**64, int(self._order[position])
        unreadable: list[str] = []
        for further in range(min(len(self.source), MOST_SUBSTITUTES)):
            example = (first + further) % len(self.source)
            rng = np.random.Generator(np.random.Philox(key=[seed, position]))
            try:
                return self.spec.read(self.source[example], rng, pictures), example, unreadable
            except UnreadableImage as error:
                unreadable.append(str(error))
        raise UserError(
            f"{self.source!r}: none of {len(unreadable):,} {self.spec.records} in a row could be "
            f"read (first: {unreadable[0]}): check config.data.image_root and the files"
        )


def _start_worker(index: int, count: int) -> None:
    serve_parent((signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
