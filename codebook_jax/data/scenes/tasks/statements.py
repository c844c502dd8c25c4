"""Statements that a picture proves, leaves open or refutes.

Examples 3k, 3k + 1 and 3k + 2 have one statement and three pictures, one for each label, so the
words alone tell nothing. A picture leaves open what is said of an object that it does not show.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import RELATION_WORDS, SIZE_WORDS
from codebook_jax.data.scenes.tasks.example import Noun, SceneExample, draw_pair, exchanged, start
from codebook_jax.data.scenes.world import Kind, Scene, pick

LABELS = ("entailment", "neutral", "contradiction")
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

Pair = tuple[Kind, Kind]
Judge = Callable[[Scene], str | None]  # one of LABELS; None: the picture is unclear
Stated = tuple[str, Judge, Sequence[Pair]]  # a statement, and the kinds to show for each label


def statement(role: str, seed: int, index: int) -> SceneExample:
    """A statement about one scene, answered by one of LABELS."""
    draw, split = start("statements", role, seed, index // 3)
    state = pick(draw, (_attribute, _size, _relation))
    text, judge, shown = state(draw, draw_pair(draw, split))
    draw, split = start("pictures of statements", role, seed, index)
    label, kinds = LABELS[index % 3], shown[index % 3]
    while True:
        scene = world.draw_scene(draw, split, kinds)
        if judge(scene) == label:
            return SceneExample((scene,), text, (label,), index, index)


def _attribute(draw: random.Random, pair: Pair) -> Stated:
    """The colour of the only object of a shape, or the shape of the only one of a colour; when left
    open, another object has the colour or shape that is stated.
    """
    colour, shape = pair[0]
    subject, stated, words = Noun(shape=shape), Noun(colour=colour), colour
    if draw.random() < 0.5:
        subject, stated, words = stated, subject, subject.with_article

    def judge(scene: Scene) -> str | None:
        subjects, such = subject.among(scene), stated.among(scene)
        if len(subjects) == 1:
            return "entailment" if subjects[0] in such else "contradiction"
        return "neutral" if such and not subjects else None

    return f"the {subject} is {words}", judge, (pair, (), exchanged(*pair))


def _size(draw: random.Random, pair: Pair) -> Stated:
    noun, size = Noun(None, *pair[0]), pick(draw, tuple(SIZE_WORDS))

    def judge(scene: Scene) -> str:
        sizes = [thing.size for thing in noun.among(scene)]
        return "neutral" if not sizes else "entailment" if sizes == [size] else "contradiction"

    return f"the {noun} is {pick(draw, SIZE_WORDS[size])}", judge, (pair, exchanged(*pair), pair)


def _relation(draw: random.Random, pair: Pair) -> Stated:
    (first, second), side = (Noun(None, *kind) for kind in pair), pick(draw, tuple(_OPPOSITE))
    labels = {side: "entailment", _OPPOSITE[side]: "contradiction"}

    def judge(scene: Scene) -> str | None:
        things = first.among(scene) + second.among(scene)
        return "neutral" if len(things) < 2 else labels.get(things[0].relation_to(things[1]))

    text = f"the {first} is {pick(draw, RELATION_WORDS[side])} the {second}"
    return text, judge, (pair, exchanged(*pair), pair)
