"""The built-in world: coloured shapes on textured backgrounds, and captions that are true of them.

A scene is a description first (`Scene`); its picture (`render`) and its words (`training_captions`, `test_caption`)
are made from it, and so can be whatever else is true or false of it. Everything follows from (split, seed, index).

A tenth of the ways to pair two colours with two shapes never occur in training. Half of those are the validation
split's and half the test split's: each of their scenes shows one. Captions name every object, so no caption of one
split is one of another.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

WORLD = 1  # raise it when any scene or caption changes: fingerprints hold it
SPLITS = ("train", "validation", "test")
EVALUATION_SCENES = 1000
CAPTIONS = 4  # a training scene
MOST_WORDS = 22  # 24 tokens with [CLS] and [SEP]

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
SIZES = {"small": 0.11, "large": 0.165}  # half an object's width, of the picture's
TEXTURES = ("plain", "striped", "checked", "dotted")
TONES = {"dark": (52, 52, 56), "light": (206, 206, 202)}

# From an object's centre to the picture's edge: crops of 70 % of the area keep nearly every object.
_MARGIN = 0.2
_GAP = 0.05  # between two objects
_CLEAR = 0.22  # least distance along its axis for a relation to be said
_SKEW = 0.6  # most distance across a relation's axis, of that along it
_SIZE_WORD = 0.75  # share of the mentions of an object that tell its size
_BACKGROUND_WORDS = 0.3  # share of the captions that tell the background, where there is room
_UNSEEN_WORDING = 0.25  # share of the evaluation captions in a wording that training has not
_SUPERSAMPLING = 4
_CONTRAST = 16  # of a texture, of 255
_NOISE = 7  # standard deviation of the clouds over it, of 255


class Background(NamedTuple):
    texture: str
    tone: str
    colour: tuple[int, int, int]
    angle: float  # radians
    periods: float  # across the picture
    phase: float
    noise_seed: int


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape. Positions are shares of the picture's side, from its left and its top."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    paint: tuple[int, int, int]

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom)."""
        r = self.radius
        return self.x - r, self.y - r, self.x + r, self.y + r


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows. No two objects agree in both colour and shape, and none overlap."""

    objects: tuple[SceneObject, ...]
    background: Background
    wording_seed: int

    def relation(self, first: int, second: int) -> str | None:
        """How object `first` lies to object `second`: left, right, above, below, or None where it is not clear."""
        return relation_between(self.objects[first], self.objects[second])

    def relations(self) -> list[tuple[int, str, int]]:
        """Every (first, relation, second) that holds, both ways round."""
        pairs = itertools.permutations(range(len(self.objects)), 2)
        found = [(first, self.relation(first, second), second) for first, second in pairs]
        return [(first, relation, second) for first, relation, second in found if relation]


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """left, right, above or below, where `first` clearly lies so to `second`."""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) >= _CLEAR and abs(down) <= _SKEW * abs(right):
        return "right" if right > 0 else "left"
    if abs(down) >= _CLEAR and abs(right) <= _SKEW * abs(down):
        return "below" if down > 0 else "above"
    return None


# What is held out


Kind = tuple[str, str]  # (colour, shape)


@functools.cache
def held_out(first: Kind, second: Kind) -> str | None:
    """The split that alone shows these two together, in either binding of the colours; None: training may.

    Depends on nothing but the names, so every seed and every length of the training data holds out the same.
    """
    colours, shapes = zip(first, second, strict=True)
    draw = _number(f"held out {'/'.join((*sorted(colours), *sorted(shapes)))}") % 20
    return {0: "validation", 1: "test"}.get(draw)


@functools.cache
def _held_out_pairs(split: str) -> tuple[tuple[Kind, Kind], ...]:
    kinds = itertools.product(COLOURS, SHAPES)
    return tuple(pair for pair in itertools.permutations(kinds, 2) if held_out(*pair) == split)


# Scenes


def training_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the training data: two or three objects, no two of which are held out."""
    return _draw_scene(_random("train", seed, index), None)


@functools.cache
def evaluation_scenes(split: str, count: int = EVALUATION_SCENES) -> tuple[tuple[Scene, str], ...]:
    """The scenes of `split` ("validation" or "test"), each with its one caption.

    No caption comes twice, nor three objects, nor two in the same relation, so each caption has one best picture.
    """
    captions: set[str] = set()
    shown: set[frozenset] = set()
    chosen = []
    for index in itertools.count():
        if len(chosen) == count:
            return tuple(chosen)
        scene = _draw_scene(_random(split, 0, index), split)
        caption, content = test_caption(scene), _content(scene)
        if caption not in captions and content not in shown:
            captions.add(caption)
            shown.add(content)
            chosen.append((scene, caption))


def _content(scene: Scene) -> frozenset:
    """What every caption of the scene tells: its objects, and of two their relation."""
    kinds = [(thing.colour, thing.shape) for thing in scene.objects]
    if len(kinds) > 2:
        return frozenset(kinds)
    relations = ((kinds[first], word, kinds[second]) for first, word, second in scene.relations())
    return frozenset(relations)


@functools.cache
def hard_scenes(split: str, count: int = EVALUATION_SCENES) -> tuple[tuple[Scene, str], ...]:
    """Pairs of scenes 2k, 2k + 1 whose captions and pictures differ in one thing alone; no caption twice.

    In turn: which colour goes with which shape; which object is which side of the other ("a left of b", "b left of
    a"); the relation ("a left of b", "a right of b").
    """
    seen: set[str] = set()
    chosen: list[tuple[Scene, str]] = []
    kinds = itertools.cycle(("binding", "order", "relation"))
    kind = next(kinds)
    for index in itertools.count():
        if len(chosen) >= count:
            return tuple(chosen[:count])
        pair = _hard_pair(_random(f"hard {split}", 0, index), split, kind)
        captions = {caption for _, caption in pair}
        if len(captions) == 2 and not captions & seen:
            seen |= captions
            chosen += pair
            kind = next(kinds)


def _draw_scene(draw: random.Random, split: str | None) -> Scene:
    while True:
        kinds = _draw_kinds(draw, 2 if draw.random() < 0.35 else 3, split)
        objects = _place(draw, kinds)
        if objects is not None:
            return Scene(objects, _draw_background(draw), draw.getrandbits(48))


def _draw_kinds(draw: random.Random, count: int, split: str | None) -> list[Kind]:
    """`count` different (colour, shape), with a pair of `split` among them, and none of another split."""
    while True:
        kinds = list(_pick(draw, _held_out_pairs(split))) if split else []
        while len(kinds) < count:
            kinds.append((_pick(draw, tuple(COLOURS)), _pick(draw, SHAPES)))
        splits = {held_out(*pair) for pair in itertools.combinations(kinds, 2)}
        if len(set(kinds)) == count and splits <= {None, split}:
            return kinds


def _place(draw: random.Random, kinds: Sequence[Kind]) -> tuple[SceneObject, ...] | None:
    """The objects where they do not overlap and each clearly lies some way to another; None if that was not found."""
    looks = [(_pick(draw, tuple(SIZES)), _shade(draw, COLOURS[colour])) for colour, _ in kinds]
    for _ in range(50):
        objects = tuple(
            SceneObject(*kind, size, _between(draw, _MARGIN), _between(draw, _MARGIN), paint)
            for kind, (size, paint) in zip(kinds, looks, strict=True)
        )
        apart = all(
            math.hypot(a.x - b.x, a.y - b.y) >= math.sqrt(2) * (a.radius + b.radius) + _GAP
            or max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + _GAP
            for a, b in itertools.combinations(objects, 2)
        )
        related = all(any(relation_between(a, b) for b in objects if b is not a) for a in objects)
        if apart and related:
            return objects
    return None


def _draw_background(draw: random.Random) -> Background:
    tone = _pick(draw, tuple(TONES))
    return Background(
        texture=_pick(draw, TEXTURES),
        tone=tone,
        colour=_shade(draw, TONES[tone]),
        angle=math.pi * draw.random(),
        periods=5 + 3 * draw.random(),
        phase=2 * math.pi * draw.random(),
        noise_seed=draw.getrandbits(32),
    )


def _hard_pair(draw: random.Random, split: str, kind: str) -> list[tuple[Scene, str]]:
    while True:
        (first_colour, first_shape), (second_colour, second_shape) = _pick(
            draw, _held_out_pairs(split)
        )
        if first_colour == second_colour or first_shape == second_shape:
            continue  # the other binding would be the same
        objects = _place(draw, ((first_colour, first_shape), (second_colour, second_shape)))
        if objects is not None:
            break
    background, seed = _draw_background(draw), draw.getrandbits(48)
    a, b = objects
    if kind == "binding":
        others = (
            dataclasses.replace(a, colour=b.colour, paint=b.paint),
            dataclasses.replace(b, colour=a.colour, paint=a.paint),
        )
    else:
        others = (dataclasses.replace(a, x=b.x, y=b.y), dataclasses.replace(b, x=a.x, y=a.y))
    scenes = Scene(objects, background, seed), Scene(others, background, seed)
    firsts = (0, 1) if kind == "order" else (0, 0)
    return [
        (scene, _two_objects(scene, first, random.Random(seed), _WORDINGS_OF_HARD))
        for scene, first in zip(scenes, firsts, strict=True)
    ]


# Captions

_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
_OPENINGS = ("", "", "", "a picture of", "an image of")

# A, B, C: an object with its article; r: a relation; a, b: "the" object; t: the object that C is related to.
_TWO = ("{A} {r} {B}", "{A} is {r} {B}", "there is {A} {r} {B}", "{r} {B} there is {A}")
_TWO += ("{A} and {B}, {a} {r} {b}",)
_TWO_UNSEEN = ("{A} and {B}: {a} is {r} {b}", "{r} {B} is {A}")
_THREE = ("{A} {r} {B} with {C} {s} {t}", "{A} is {r} {B}, and {C} is {s} {t}")
_THREE += ("there is {A} {r} {B}, {s} {t} is {C}", "{A}, {B} and {C}, {a} {r} {b}")
_THREE_UNSEEN = ("{r} {B} is {A}, and {s} {t} is {C}", "there is {A}, {B} and {C}, {a} is {r} {b}")
_WORDINGS_OF_HARD = ("{A} {r} {B}", "{A} is {r} {B}", "there is {A} {r} {B}", "{A} that is {r} {B}")


def training_captions(scene: Scene) -> tuple[str, ...]:
    """Four captions of the scene in training's wordings; some may be the same."""
    draw = random.Random(scene.wording_seed)
    return tuple(_caption(scene, draw, _TWO, _THREE) for _ in range(CAPTIONS))


def test_caption(scene: Scene) -> str:
    """The scene's one caption in evaluation, now and then in a wording that training does not have."""
    draw = random.Random(scene.wording_seed)
    if draw.random() < _UNSEEN_WORDING:
        return _caption(scene, draw, _TWO_UNSEEN, _THREE_UNSEEN)
    return _caption(scene, draw, _TWO, _THREE)


test_caption.__test__ = False  # pytest: not a test


def _caption(scene: Scene, draw: random.Random, two: Sequence[str], three: Sequence[str]) -> str:
    if len(scene.objects) == 2:
        return _two_objects(scene, int(2 * draw.random()), draw, two)
    return _three_objects(scene, draw, three)


def _two_objects(scene: Scene, first: int, draw: random.Random, wordings: Sequence[str]) -> str:
    mentions = [_mention(thing, draw) for thing in scene.objects]
    relation = scene.relation(first, 1 - first)
    parts = {
        "A": mentions[first],
        "B": mentions[1 - first],
        "r": _pick(draw, _RELATION_WORDS[relation]),
        "a": _short(scene.objects[first], scene),
        "b": _short(scene.objects[1 - first], scene),
    }
    return _finish(_pick(draw, wordings), parts, scene, draw)


def _three_objects(scene: Scene, draw: random.Random, wordings: Sequence[str]) -> str:
    first, relation, second = _pick(draw, scene.relations())
    third = 3 - first - second
    links = [(other, scene.relation(third, other)) for other in (first, second)]
    other, second_relation = _pick(draw, [link for link in links if link[1]])
    a, b, c = scene.objects[first], scene.objects[second], scene.objects[third]
    parts = {
        "A": _mention(a, draw),
        "B": _mention(b, draw),
        "C": _mention(c, draw),
        "r": _pick(draw, _RELATION_WORDS[relation]),
        "s": _pick(draw, _RELATION_WORDS[second_relation]),
        "a": _short(a, scene),
        "b": _short(b, scene),
        "t": _short(scene.objects[other], scene),
    }
    return _finish(_pick(draw, wordings), parts, scene, draw)


def _finish(wording: str, parts: dict[str, str], scene: Scene, draw: random.Random) -> str:
    """The wording filled in, shortened to fit, with an opening and the background where there is room."""
    opening, ending = _pick(draw, _OPENINGS), _background_words(scene.background, draw)
    caption = wording.format(**parts)
    while len(caption.split()) > MOST_WORDS:
        longest = max(parts, key=lambda name: len(parts[name].split()))
        parts = parts | {longest: _shorter(parts[longest])}
        caption = wording.format(**parts)
    if opening and wording.startswith("{A}") and " is " not in wording:
        if len(caption.split()) + len(opening.split()) <= MOST_WORDS:
            caption = f"{opening} {caption}"
    if ending and len(caption.split()) + len(ending.split()) <= MOST_WORDS:
        caption = f"{caption} {ending}"
    return caption


def _shorter(words: str) -> str:
    """A relation or a mention in fewer words that say less or the same."""
    if words.startswith("to the "):
        return words.removeprefix("to the ")
    article, *others = words.split()
    noun = " ".join(others[1:])  # without the word for its size
    return f"the {noun}" if article == "the" else f"{_article(noun)} {noun}"


def _background_words(background: Background, draw: random.Random) -> str:
    if draw.random() >= _BACKGROUND_WORDS:
        return ""
    word = background.texture if draw.random() < 0.7 else background.tone
    return f"on a {word} background"


def _mention(thing: SceneObject, draw: random.Random) -> str:
    words = f"{thing.colour} {thing.shape}"
    size = _pick(draw, _SIZE_WORDS[thing.size])
    if draw.random() < _SIZE_WORD:
        words = f"{size} {words}"
    return f"{_article(words)} {words}"


def _short(thing: SceneObject, scene: Scene) -> str:
    """The object in as few words as tell it from the scene's others."""
    alike = sum(other.shape == thing.shape for other in scene.objects)
    return f"the {thing.shape}" if alike == 1 else f"the {thing.colour} {thing.shape}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


# Pictures


def render(scene: Scene, size_px: int) -> UInt8[np.ndarray, "size_px size_px 3"]:
    """The scene's picture, RGB, `size_px` a side; the same picture at every size but for its detail."""
    image = _paint_background(scene.background, size_px)
    for thing in scene.objects:
        _paint_object(image, thing)
    return np.asarray(image)


def _paint_background(background: Background, size_px: int) -> Image.Image:
    """Lightness alone is computed for each pixel; a table turns it into the background's colour."""
    along = (np.arange(size_px, dtype=np.float32) + np.float32(0.5)) * np.float32(
        2 * math.pi * background.periods / size_px
    )
    phase = np.float32(background.phase)
    if background.texture == "striped":
        across, down = math.cos(background.angle), math.sin(background.angle)
        wave = np.sin((along * np.float32(down) + phase)[:, None] + along * np.float32(across))
    elif background.texture == "checked":
        wave = np.multiply.outer(np.sin(along + phase), np.sin(along + phase))
    elif background.texture == "dotted":
        wave = np.add.outer(np.cos(along + phase) - np.float32(1.1), np.cos(along + phase))
    else:
        wave = np.zeros((size_px, size_px), np.float32)
    wave *= np.float32(4 * _CONTRAST)
    np.clip(wave, -_CONTRAST, _CONTRAST, out=wave)
    noise = np.random.default_rng(background.noise_seed).normal(128, _NOISE, (16, 16))
    clouds = Image.fromarray(noise.astype(np.float32))
    wave += np.asarray(clouds.resize((size_px, size_px), Image.Resampling.BILINEAR))
    lightness = wave.astype(np.uint8).tobytes()
    levels = np.arange(-128, 128) + np.array(background.colour)[:, None]
    tables = np.clip(levels, 0, 255).astype(np.uint8)
    channels = [lightness.translate(table.tobytes()) for table in tables]
    return Image.merge("RGB", [Image.frombytes("L", (size_px, size_px), c) for c in channels])


def _paint_object(image: Image.Image, thing: SceneObject) -> None:
    """Draws the object larger than it is, in its box alone, and shrinks it: smooth edges at little cost."""
    side = image.width
    left, top, right, bottom = (value * side for value in thing.box)
    box = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    fine = _SUPERSAMPLING
    mask = Image.new("L", (fine * (box[2] - box[0]), fine * (box[3] - box[1])))
    centre = fine * (thing.x * side - box[0]), fine * (thing.y * side - box[1])
    _draw_shape(ImageDraw.Draw(mask), thing.shape, *centre, fine * thing.radius * side)
    image.paste(thing.paint, box, mask.reduce(fine))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    def ellipse(across: float, down: float, radius: float, fill: int) -> None:
        pen.ellipse((across - radius, down - radius, across + radius, down + radius), fill=fill)

    if shape in ("circle", "ring", "moon"):
        ellipse(x, y, r, 255)
    if shape == "ring":
        ellipse(x, y, 0.5 * r, 0)
    elif shape == "moon":
        ellipse(x + 0.5 * r, y - 0.2 * r, 0.8 * r, 0)
    elif shape != "circle":
        pen.polygon([(x + r * right, y + r * down) for right, down in _corners(shape)], fill=255)


@functools.cache
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape in a box of -1 to 1."""
    if shape == "square":
        return (-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)
    if shape == "triangle":
        return (0, -0.95), (1, 0.85), (-1, 0.85)
    if shape == "diamond":
        return (0, -1), (0.72, 0), (0, 1), (-0.72, 0)
    if shape == "cross":
        arm = 0.33
        quarter = ((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm))
        return (*quarter, (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm))
    if shape == "star":
        angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
        reach = itertools.cycle((1.0, 0.42))
        return tuple(
            (r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, reach, strict=False)
        )
    raise ValueError(f"no shape {shape!r}: {', '.join(SHAPES)}")


# Draws: `random.Random.random` and `getrandbits` alone are promised to stay what they are in every Python.


def _number(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def _random(split: str, seed: int, index: int) -> random.Random:
    return random.Random(_number(f"world {WORLD}: {split} {seed} {index}"))


def _pick(draw: random.Random, choices: Sequence):
    return choices[int(draw.random() * len(choices))]


def _between(draw: random.Random, margin: float) -> float:
    return margin + (1 - 2 * margin) * draw.random()


def _shade(draw: random.Random, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(min(255, max(0, part + int(25 * draw.random()) - 12)) for part in colour)
