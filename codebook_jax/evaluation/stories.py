"""Retrieval of whole stories, and whether a story is told apart from itself in another order.

A story is a sequence of frames and one of sentences. Two sequences are compared by `ordered`
(order-preserving alignment), `bag` (alignment that ignores the order) and `mean` (the cosine of
their mean features, which cannot know any order).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from codebook_jax.console import say
from codebook_jax.data.images import UnreadableImage, decode, resize_square
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.record import Story
from codebook_jax.data.stories import evenly_spaced
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation.encoding import (
    encode_rows,
    report_unreadable,
    rows_over_shards,
    run_towers,
)
from codebook_jax.evaluation.recall import chance_at_k, recall_at_k
from codebook_jax.evaluation.retrieval import Recalls, recall_table, recalls_of
from codebook_jax.evaluation.stage import Progress
from codebook_jax.method.ordering import (
    Order,
    align_steps,
    cosines,
    sequence_similarities,
    sequence_similarity,
)
from codebook_jax.models.codis import Model

TIED = 1e-5  # similarities this close are equal: sums in another order differ by rounding
# of the names of each protocol's figures in metrics.jsonl; the teacher's others are in eval.json
PREFIXES = {
    "student/ordered": "",
    "student/bag": "bag_",
    "student/mean": "mean_",
    "teacher/ordered": "teacher_",
}


class Steps(NamedTuple):
    """Unit features of the steps of some sequences."""

    features: Float[np.ndarray | Array, "stories steps dim"]
    here: Bool[np.ndarray | Array, "stories steps"]

    def reordered(self, places: Int[np.ndarray, "stories steps"]) -> Steps:
        """The steps at these places of their sequence."""
        return Steps(np.take_along_axis(self.features, places[:, :, None], axis=1), self.here)


class Stories(NamedTuple):
    """The stories of a source that could be read, as features."""

    frames: Steps
    sentences: Steps
    positions: Int[np.ndarray, " stories"]  # in the source
    listed: int
    left_out: int  # a frame could not be read
    shortened: int  # had more frames or sentences than the model reads

    def alignments(self, order: Order | None) -> Float[np.ndarray, "stories frames sentences"]:
        """The alignment of each story's own frames and sentences."""
        return np.asarray(_alignments(self.frames, self.sentences, order))


def encode_stories(
    model: Model,
    towers: Mapping[str, PyTree],
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    stories: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Stories]:
    """The first `stories` (0: all) of a source through each of the `towers`.

    Of a story longer than `config.sequences` allows, evenly spaced frames or sentences are read. A
    story with an unreadable frame is left out and reported. Raises UserError if none is left.
    """
    count, limits = min(stories or len(source), len(source)), config.sequences
    frames_of, sentences_of = limits.max_frames, limits.max_sentences
    rows = rows_over_shards(max(frames_of, config.evaluation.batch), model.mesh)
    of_frames = _Encoder(model.encode_images, towers, rows, model.mesh)
    told: list[list[str]] = []
    kept, frame_counts, unreadable, shortened = [], [], [], 0
    for position, story, frames in _read(source, count, config):
        progress("stories", position + 1, count)
        if story is None:
            unreadable.append(frames)
            continue
        of_frames.add(frames)
        kept.append(position)
        frame_counts.append(len(frames))
        told.append([story.captions[at] for at in evenly_spaced(len(story.captions), sentences_of)])
        shortened += len(story.frames) > len(frames) or len(story.captions) > len(told[-1])
    report_unreadable(source, unreadable, count, "story", "stories")
    if shortened:
        say(
            f"{shortened:,} of {len(kept):,} stories have more than {frames_of} frames or "
            f"{sentences_of} sentences: evenly spaced ones are read"
        )
    sentences = [sentence for each in told for sentence in each]
    tokens, lengths, _ = tokenizer.encode(sentences, config.model.text.max_tokens)
    of_texts = _Encoder(model.encode_texts, towers, rows, model.mesh)
    of_texts.add(tokens, lengths)
    frames, texts = of_frames.features(), of_texts.features()
    about = np.array(kept), len(source), len(unreadable), shortened
    return {
        name: Stories(
            _steps(frames[name], frame_counts, frames_of),
            _steps(texts[name], [len(each) for each in told], sentences_of),
            *about,
        )
        for name in towers
    }


class _Encoder:
    """Collects inputs and encodes them, `rows` at a time, with each of the towers."""

    def __init__(
        self,
        encode: Callable[..., tuple[Array, Array]],
        towers: Mapping[str, PyTree],
        rows: int,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self._rows, self._mesh, self._waiting = rows, mesh, ()
        self._encode = functools.partial(run_towers, encode, (), towers)
        self._found: list[dict[str, np.ndarray]] = []

    def add(self, *inputs: np.ndarray) -> None:
        waiting = self._waiting or tuple(array[:0] for array in inputs)
        self._waiting = tuple(map(np.concatenate, zip(waiting, inputs, strict=True)))
        while len(self._waiting[0]) >= self._rows:
            self._encode_rows()

    def features(self) -> dict[str, Float[np.ndarray, "rows dim"]]:
        """By the name of the towers, the features of all that was added."""
        if len(self._waiting[0]):
            self._encode_rows()
        return jax.tree.map(lambda *parts: np.concatenate(parts), *self._found)

    def _encode_rows(self) -> None:
        inputs = [array[: self._rows] for array in self._waiting]
        self._found.append(encode_rows(self._encode, self._mesh, self._rows, *inputs))
        self._waiting = tuple(array[self._rows :] for array in self._waiting)


def evaluate(stories: Stories, order: Order) -> dict[str, Recalls]:
    """By `ordered`, `bag` and `mean`: R@k in percent (`txt_r1`: frames find their sentences, ...,
    `img_r1`, ...), chance levels, and `right_order`: of the stories with two or more
    sentences, the percentage whose own order is more similar than a shuffled one (ties count half).
    """
    ids = np.arange(len(stories.positions))
    shared = chance_at_k(ids, ids) | {
        "stories": len(ids),
        "stories_listed": stories.listed,
        "left_out": stories.left_out,
        "shortened": stories.shortened,
    }
    each = zip(stories.sentences.here, stories.positions, strict=True)
    places = np.stack([_shuffled(here, int(position)) for here, position in each])
    several = stories.sentences.here.sum(axis=1) > 1
    shuffled = stories.sentences.reordered(places)
    results = {}
    for name, (of_pairs, of_all) in _comparisons(order).items():
        own, other = (
            np.asarray(of_pairs(stories.frames, told))[several]
            for told in (stories.sentences, shuffled)
        )
        scores = np.asarray(of_all(stories.frames, stories.sentences), np.float64)
        results[name] = recall_at_k(scores, ids, ids) | shared
        if several.any():
            chosen = np.where(np.abs(own - other) <= TIED, 0.5, own > other)
            right = 100 * float(chosen.mean())
            results[name] |= {"right_order": right, "right_order_chance": 50.0}
    return results


def flat(results: Mapping[str, Recalls]) -> dict[str, float]:
    """`eval/txt_r1`, ... of student/ordered with chance and counts; `eval/bag_txt_r1`, ... of the
    student's other comparisons, `eval/teacher_txt_r1`, ... of teacher/ordered.
    """
    row = {f"eval/{name}": value for name, value in results["student/ordered"].items()}
    for protocol, prefix in PREFIXES.items():
        of = results[protocol]
        found = recalls_of(of) | {name: of[name] for name in ("right_order",) if name in of}
        row |= {f"eval/{prefix}{name}": value for name, value in found.items()}
    return row


def summary(found: Recalls) -> str:
    """One line on the results of one comparison."""
    order = f"; right order {found['right_order']:.1f} %" if "right_order" in found else ""
    return (
        f"R@1 frames to sentences {found['txt_r1']:.1f} %, sentences to frames "
        f"{found['img_r1']:.1f} % (chance {found['chance_r1']:.1f} %){order} on {counted(found)}"
    )


def format_table(results: Mapping[str, Recalls]) -> str:
    """A table for a terminal: recalls of whole stories, and how often the right order is chosen."""
    first = next(iter(results.values()))
    sides = "frames to sentences", "sentences to frames"
    lines = recall_table(results, counted(first), sides)
    if "right_order" in first:
        lines.append("right order rather than a shuffled one (chance 50 %):")
        width = max(map(len, results))
        lines += [f"{name:{width}} {of['right_order']:8.2f} %" for name, of in results.items()]
    return "\n".join(lines)


def counted(found: Recalls) -> str:
    """How many stories were evaluated, out of how many if limited, and what was left out."""
    listed, left_out = found["stories_listed"], found["left_out"]
    cut = found["stories"] + left_out < listed
    text = f"{found['stories']:,}" + f" of {listed:,}" * cut + " stories"
    text += f"; {left_out:,} with unreadable frames left out" if left_out else ""
    return text + (f"; {found['shortened']:,} shortened" if found["shortened"] else "")


def _comparisons(order: Order) -> dict:
    """By name, similarities of frames to sentences: of each story to its own, and of all to all."""
    ordered, bag = (
        (functools.partial(_aligned, order=each), functools.partial(_all_aligned, order=each))
        for each in (order, None)
    )
    mean = (lambda a, b: np.sum(_mean(a) * _mean(b), axis=-1), lambda a, b: _mean(a) @ _mean(b).T)
    return {"ordered": ordered, "bag": bag, "mean": mean}


@functools.partial(jax.jit, static_argnames="order")
def _aligned(a: Steps, b: Steps, *, order: Order | None) -> Array:
    return sequence_similarity(a.features, b.features, _alignments(a, b, order))


@functools.partial(jax.jit, static_argnames="order")
def _all_aligned(a: Steps, b: Steps, *, order: Order | None) -> Array:
    return sequence_similarities(a.features, b.features, order, a.here, b.here)


@functools.partial(jax.jit, static_argnums=2)
def _alignments(a: Steps, b: Steps, order: Order | None) -> Array:
    cost = 1 - cosines(jnp.asarray(a.features), jnp.asarray(b.features))
    return align_steps(cost, order, a.here, b.here)


def _mean(steps: Steps) -> Float[np.ndarray, "stories dim"]:
    total = np.where(steps.here[:, :, None], steps.features, 0).sum(axis=1, dtype=np.float64)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)


def _shuffled(here: Bool[np.ndarray, " steps"], story: int) -> Int[np.ndarray, " steps"]:
    """Another order of the first steps, which are there; always the same for one story."""
    places, count = np.arange(len(here)), int(here.sum())
    draw = np.random.Generator(np.random.Philox(key=[story, 0]))
    while count > 1 and (places[:count] == np.arange(count)).all():
        places[:count] = draw.random(count).argsort()
    return places


def _steps(features: Float[np.ndarray, "all dim"], counts: Sequence[int], most: int) -> Steps:
    """Splits the features of all steps, one after the other, into one padded row per story."""
    here = np.arange(most) < np.array(counts)[:, None]
    padded = np.zeros((*here.shape, features.shape[-1]), features.dtype)
    padded[here] = features
    return Steps(padded, here)


def _read(
    source: Source, count: int, config: ml_collections.ConfigDict
) -> Iterator[tuple[int, Story | None, np.ndarray | str]]:
    """(position, story, frames to read) or (position, None, why), in order; reads ahead."""

    def read(position: int) -> tuple[int, Story | None, np.ndarray | str]:
        try:
            story = source[position]
            places = evenly_spaced(len(story.frames), config.sequences.max_frames)
            side = config.model.image.size_px
            frames = [resize_square(decode(story.frames[at]), side) for at in places]
            return position, story, np.stack(frames)
        except UnreadableImage as error:
            return position, None, str(error)

    with ThreadPoolExecutor(config.data.threads) as pool:
        ahead = 2 * config.data.threads
        jobs = [pool.submit(read, at) for at in range(min(ahead, count))]
        for position in range(count):
            found = jobs.pop(0).result()
            if position + ahead < count:
                jobs.append(pool.submit(read, position + ahead))
            yield found
