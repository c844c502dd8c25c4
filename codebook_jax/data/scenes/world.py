"""Scenes and how they are drawn: objects, positions, relations, and what each split holds out.

Draws use only `random` and `getrandbits` of random.Random, whose numbers Python promises to keep.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

WORLD = 1  # increase it when any scene or caption changes: fingerprints include it

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (130, 50, 170),
    "orange": (245, 130, 30),
    "pink": (250, 130, 190),
    "cyan": (50, 205, 220),
    "brown": (126, 78, 44),
    "lime": (176, 226, 46),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")
SIZES = {"small": 0.11, "large": 0.165}  # half an object's width, as a share of the picture's
TEXTURES = ("plain", "striped", "checked", "dotted")
TONES = {"dark": (52, 52, 56), "light": (206, 206, 202)}

_MARGIN = 0.2  # to the picture's edge: crops of 70 % of the area keep nearly every object
_GAP = 0.05  # between two objects
_CLEAR = 0.22  # least distance along its axis for a relation to hold
_SKEW = 0.6  # greatest distance across a relation's axis, as a share of that along it

Kind = tuple[str, str]  # (colour, shape)
Paint = tuple[int, int, int]
Look = tuple[str, Paint]  # (size, paint)
Choice = TypeVar("Choice")


class Background(NamedTuple):
    texture: str
    tone: str
    colour: Paint
    angle: float  # radians
    periods: float  # across the picture
    phase: float
    noise_seed: int


class SceneObject(NamedTuple):
    """One shape. Positions are shares of the picture's side, from its left and its top."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    paint: Paint

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom)."""
        r = self.radius
        return self.x - r, self.y - r, self.x + r, self.y + r

    def relation_to(self, other: SceneObject) -> str | None:
        """left, right, above or below, if this object is clearly there relative to the other."""
        right, down = self.x - other.x, self.y - other.y
        if abs(right) >= _CLEAR and abs(down) <= _SKEW * abs(right):
            return "right" if right > 0 else "left"
        if abs(down) >= _CLEAR and abs(right) <= _SKEW * abs(down):
            return "below" if down > 0 else "above"
        return None

    def is_towards(self, side: str, other: SceneObject) -> bool:
        """Whether its centre is left, right, above or below of the other's, clearly or not."""
        right, down = self.x - other.x, self.y - other.y
        return {"left": -right, "right": right, "above": -down, "below": down}[side] > 0


class Scene(NamedTuple):
    """The content of a picture: objects that differ in colour or shape and do not overlap."""

    objects: tuple[SceneObject, ...]
    background: Background
    wording_seed: int

    def relations(self) -> list[tuple[int, str, int]]:
        """Every (first, relation, second) that holds, both ways round."""
        pairs = itertools.permutations(range(len(self.objects)), 2)
        found = [(a, self.objects[a].relation_to(self.objects[b]), b) for a, b in pairs]
        return [each for each in found if each[1]]


@functools.cache
def held_out(first: Kind, second: Kind) -> str | None:
    """The only split that shows these two together, in any binding of colours; None: training."""
    colours, shapes = zip(first, second, strict=True)
    draw = _number(f"held out {'/'.join((*sorted(colours), *sorted(shapes)))}") % 20
    return {0: "validation", 1: "test"}.get(draw)


@functools.cache
def held_out_pairs(split: str | None) -> tuple[tuple[Kind, Kind], ...]:
    """Every two that only `split` shows together, in both orders; None: those of training."""
    kinds = itertools.product(COLOURS, SHAPES)
    return tuple(pair for pair in itertools.permutations(kinds, 2) if held_out(*pair) == split)


@functools.cache
def partners(kind: Kind, split: str | None) -> tuple[Kind, ...]:
    """The kinds that `held_out_pairs` shows together with this one."""
    return tuple(second for first, second in held_out_pairs(split) if first == kind)


def draw_scene(draw: random.Random, split: str | None, pair: Sequence[Kind] = ()) -> Scene:
    """A scene with a pair that only `split` may show, `pair` if it is given; None: a scene without
    held-out pairs.
    """
    objects = None
    while objects is None:
        objects = place(draw, _draw_kinds(draw, 2 if draw.random() < 0.35 else 3, split, pair))
    return Scene(objects, draw_background(draw), draw.getrandbits(48))


def draw_object(draw: random.Random, kind: Kind) -> SceneObject:
    """One object anywhere; it may overlap others."""
    size, paint = draw_look(draw, kind)
    return SceneObject(*kind, size, _position(draw), _position(draw), paint)


def _draw_kinds(
    draw: random.Random, count: int, split: str | None, pair: Sequence[Kind]
) -> list[Kind]:
    """`count` different kinds, including `pair` or a pair of `split`, and none of another split."""
    while True:
        kinds = list(pair or (pick(draw, held_out_pairs(split)) if split else ()))
        while len(kinds) < count:
            kinds.append((pick(draw, tuple(COLOURS)), pick(draw, SHAPES)))
        splits = {held_out(*pair) for pair in itertools.combinations(kinds, 2)}
        if len(set(kinds)) == count and splits <= {None, split}:
            return kinds


def place(draw: random.Random, kinds: Sequence[Kind]) -> tuple[SceneObject, ...] | None:
    """Objects of these kinds with sizes and shades drawn anew, as `arrange` places them."""
    return arrange(draw, kinds, [draw_look(draw, kind) for kind in kinds])


def draw_look(draw: random.Random, kind: Kind) -> Look:
    """A size, and a shade of the kind's colour."""
    return pick(draw, tuple(SIZES)), _shade(draw, COLOURS[kind[0]])


def arrange(
    draw: random.Random, kinds: Sequence[Kind], looks: Sequence[Look]
) -> tuple[SceneObject, ...] | None:
    """The objects, apart from each other and each clearly related to another; None: not found."""
    for _ in range(50):
        objects = tuple(
            SceneObject(*kind, size, _position(draw), _position(draw), paint)
            for kind, (size, paint) in zip(kinds, looks, strict=True)
        )
        apart = all(
            math.hypot(a.x - b.x, a.y - b.y) >= math.sqrt(2) * (a.radius + b.radius) + _GAP
            or max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + _GAP
            for a, b in itertools.combinations(objects, 2)
        )
        related = all(any(a.relation_to(b) for b in objects if b is not a) for a in objects)
        if apart and related:
            return objects
    return None


def draw_background(draw: random.Random) -> Background:
    """The texture, tone and colour behind the objects."""
    tone = pick(draw, tuple(TONES))
    return Background(
        texture=pick(draw, TEXTURES),
        tone=tone,
        colour=_shade(draw, TONES[tone]),
        angle=math.pi * draw.random(),
        periods=5 + 3 * draw.random(),
        phase=2 * math.pi * draw.random(),
        noise_seed=draw.getrandbits(32),
    )


def random_of(split: str, seed: int, index: int) -> random.Random:
    """The random generator of one scene; it depends only on these three and WORLD."""
    return random.Random(_number(f"world {WORLD}: {split} {seed} {index}"))


def _number(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def pick(draw: random.Random, choices: Sequence[Choice]) -> Choice:
    """One of the choices, with equal probability."""
    return choices[int(draw.random() * len(choices))]


def _position(draw: random.Random) -> float:
    return _MARGIN + (1 - 2 * _MARGIN) * draw.random()


def _shade(draw: random.Random, colour: Paint) -> Paint:
    return tuple(min(255, max(0, part + int(25 * draw.random()) - 12)) for part in colour)
