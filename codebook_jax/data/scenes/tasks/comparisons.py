"""True and false sentences about two pictures.

A set is two pairs of pictures and two sentences, each true of one pair and false of the other, so
neither the words alone nor the pictures alone tell the answer. The second pair is new, or the first
with its pictures exchanged, or the first with its objects elsewhere.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import RELATION_WORDS
from codebook_jax.data.scenes.tasks.example import Noun, SceneExample, is_beside, noun_of, start
from codebook_jax.data.scenes.world import Scene, SceneObject, pick

_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_PARTS = (("shape",), ("colour",), ("colour", "shape"))  # by which objects are named
_SHOWING = {  # of whether the left and the right picture show A, which may be two objects
    "both pictures show {A}": lambda left, right: left and right,
    "at least one picture shows {A}": lambda left, right: left or right,
    "neither picture shows {A}": lambda left, right: not (left or right),
    "exactly one picture shows {A}": lambda left, right: left != right,
    "the left picture shows {A}": lambda left, right: left,
    "the right picture shows {A}": lambda left, right: right,
    "only the left picture shows {A}": lambda left, right: left and not right,
    "only the right picture shows {A}": lambda left, right: right and not left,
}
_COUNTING = {  # n, or the truth, of the numbers of objects in the left and in the right picture
    "there are {n} objects in the two pictures": lambda left, right: left + right,
    "both pictures show {n} objects": lambda left, right: left == right and left,
    "one picture shows two objects and the other three": lambda left, right: left != right,
    "the left picture shows more objects than the right": lambda left, right: left > right,
    "the right picture shows more objects than the left": lambda left, right: right > left,
}
_RELATING = {  # which picture
    "the left picture shows {A} {r} {B}": 0,
    "the right picture shows {A} {r} {B}": 1,
}
_OF_SIDES = tuple(w for w in (*_SHOWING, *_COUNTING, *_RELATING) if "left" in w or "right" in w)
_WORDINGS = {  # that can tell the pairs of a set apart
    "new": tuple(w for w in (*_SHOWING, *_COUNTING) if w not in _OF_SIDES),
    "exchanged": _OF_SIDES,
    "moved": tuple(_RELATING),
}
_SECOND = ("new", "new", "exchanged", "moved")  # how often each: half of the sets have new pairs

Pair = tuple[Scene, Scene]


def comparison(role: str, seed: int, index: int) -> SceneExample:
    """Sentence t of pair p of set s, answered "true" or "false"; index = 4s + 2p + t."""
    number, (pair, sentence) = index // 4, divmod(index % 4, 2)
    draw, split = start("comparisons", role, seed, number)
    second, sentences = pick(draw, _SECOND), (None, None)
    while None in sentences:
        pairs = _draw_pairs(draw, split, second)
        wordings = [pick(draw, _WORDINGS[second]) for _ in pairs]
        orders = pairs, pairs[::-1]
        sentences = [_fill(draw, *each) for each in zip(wordings, orders, strict=True)]
    key = f"{role}-{number}-{pair}-{sentence}"  # as in NLVR2: split, set, pair, sentence
    answer = "true" if pair == sentence else "false"
    return SceneExample(pairs[pair], sentences[sentence], (answer,), key, index - sentence)


def _draw_pairs(draw: random.Random, split: str | None, second: str) -> tuple[Pair, Pair]:
    first = world.draw_scene(draw, split), world.draw_scene(draw, split)
    if second == "exchanged":
        return first, first[::-1]
    if second == "moved":
        return first, (_moved(draw, first[0]), _moved(draw, first[1]))
    return first, (world.draw_scene(draw, split), world.draw_scene(draw, split))


def _moved(draw: random.Random, scene: Scene) -> Scene:
    objects = None
    while objects is None:
        objects = world.place(draw, [thing[:2] for thing in scene.objects])
    return scene._replace(objects=objects)


def _fill(draw: random.Random, wording: str, pairs: tuple[Pair, Pair]) -> str | None:
    """The wording filled in, true of the first pair and false of the second; None: impossible."""
    if wording in _COUNTING:
        told, other = (_COUNTING[wording](*(len(s.objects) for s in pair)) for pair in pairs)
        return wording.format(n=_NUMBERS.get(told)) if told and told != other else None
    found = list((_relating if wording in _RELATING else _showing)(draw, wording, *pairs))
    return pick(draw, found) if found else None


def _showing(draw: random.Random, wording: str, pair: Pair, other: Pair) -> Iterator[str]:
    for nouns in _draw_phrases(draw, (*pair, *other)):
        holds, misleads = (
            _SHOWING[wording](*(all(noun.among(scene) for noun in nouns) for scene in each))
            for each in (pair, other)
        )
        if holds and not misleads:
            yield wording.format(A=" and ".join(noun.with_article for noun in nouns))


def _relating(draw: random.Random, wording: str, pair: Pair, other: Pair) -> Iterator[str]:
    at = _RELATING[wording]
    things = pair[at].objects
    for a, side, b in pair[at].relations():
        words = pick(draw, RELATION_WORDS[side])
        for first, second in itertools.product(_nouns([things[a]]), _nouns([things[b]])):
            if is_beside(other[at], first, side, second) is False:
                yield wording.format(A=first.with_article, r=words, B=second.with_article)


def _draw_phrases(draw: random.Random, scenes: Sequence[Scene]) -> Iterator[tuple[Noun, ...]]:
    """Descriptions of one object of a scene, or of two together."""
    if draw.random() < 0.5:
        yield from ((noun,) for scene in scenes for noun in _nouns(scene.objects))
        return
    for scene in scenes:
        whole = [noun_of(thing, "colour", "shape") for thing in scene.objects]
        yield from itertools.permutations(whole, 2)


def _nouns(things: Sequence[SceneObject]) -> list[Noun]:
    return [noun_of(thing, *parts) for thing in things for parts in _PARTS]
