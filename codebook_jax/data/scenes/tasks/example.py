"""What an example of a task is, and the words and facts that the tasks share."""

from __future__ import annotations

import random
from typing import NamedTuple

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import with_article
from codebook_jax.data.scenes.world import Kind, Scene, SceneObject

_NAMES = (("shape",), ("colour",), ("size",))
_NAMES += (("colour", "shape"), ("size", "shape"), ("size", "colour"))


class SceneExample(NamedTuple):
    """Scenes with a text, and what is to be answered; the fields are those of `Example`."""

    scenes: tuple[Scene, ...]
    text: str
    answers: tuple[str, ...]
    key: int | str
    image_id: int
    referent: SceneObject | None = None  # of an expression
    candidates: tuple[SceneObject, ...] = ()  # to choose it from; some are not in the picture


class Noun(NamedTuple):
    """A description of objects: what is None may be anything."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "object") if word)

    @property
    def with_article(self) -> str:
        return with_article(str(self))

    @property
    def plural(self) -> str:
        return f"{self}es" if self.shape == "cross" else f"{self}s"

    def among(self, scene: Scene) -> list[SceneObject]:
        """The objects of the scene that it describes."""
        size, colour, shape = self
        return [
            thing
            for thing in scene.objects
            if (colour or thing.colour, shape or thing.shape) == thing[:2]
            and size in (None, thing.size)
        ]


def noun_of(thing: SceneObject, *parts: str) -> Noun:
    """The object's description by these parts: size, colour, shape."""
    return Noun(**{part: getattr(thing, part) for part in parts})


def names(scene: Scene, thing: SceneObject, without: str | None = None) -> list[Noun]:
    """The descriptions in at most two words that fit this object of the scene alone."""
    nouns = [noun_of(thing, *parts) for parts in _NAMES if without not in parts]
    return [noun for noun in nouns if len(noun.among(scene)) == 1]


def beside(scene: Scene, noun: Noun, side: str, anchor: SceneObject) -> SceneObject | None:
    """The one object of this description on that side of the anchor; None if there is none, if
    there are several, or if it is not clearly there.
    """
    found = [thing for thing in noun.among(scene) if thing.is_towards(side, anchor)]
    clear = len(found) == 1 and found[0].relation_to(anchor) == side
    return found[0] if clear else None


def is_beside(scene: Scene, first: Noun, side: str, second: Noun) -> bool | None:
    """Whether such a first object is on that side of such a second one; None: not clearly so."""
    pairs = [(a, b) for a in first.among(scene) for b in second.among(scene)]
    if any(a.relation_to(b) == side for a, b in pairs):
        return True
    return None if any(a.is_towards(side, b) for a, b in pairs) else False


def start(task: str, role: str, seed: int, number: int) -> tuple[random.Random, str | None]:
    """The random generator of an example, and the split whose pairs its scenes show."""
    return world.random_of(f"{task} {role}", seed, number), None if role == "train" else role


def draw_pair(draw: random.Random, split: str | None) -> tuple[Kind, Kind]:
    """Two kinds, of different colours and shapes, that only `split` shows together."""
    while True:
        first, second = world.pick(draw, world.held_out_pairs(split))
        if first[0] != second[0] and first[1] != second[1]:
            return first, second


def exchanged(first: Kind, second: Kind) -> tuple[Kind, Kind]:
    """The two kinds with each other's colour; the same split shows them."""
    return (second[0], first[1]), (first[0], second[1])
