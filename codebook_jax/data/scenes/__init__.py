"""The built-in world: coloured shapes on textured backgrounds, with captions that are true of them.

Everything depends only on (split, seed, index). A tenth of the ways to pair two colours with two
shapes never occur in training: half of those belong to the validation split, half to the test
split, and each of their scenes shows one. Captions name every object, so no caption occurs in two
splits.
"""

from __future__ import annotations

import functools
import itertools
import random

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import HARD_WORDINGS, evaluation_caption, two_objects
from codebook_jax.data.scenes.captions import training_captions as training_captions
from codebook_jax.data.scenes.pictures import render as render
from codebook_jax.data.scenes.world import WORLD as WORLD
from codebook_jax.data.scenes.world import Scene

EVALUATION_SCENES = 1000
Captioned = tuple[Scene, str]


def training_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the training data: two or three objects, no two of which are held out."""
    return world.draw_scene(world.random_of("train", seed, index), None)


@functools.cache
def evaluation_scenes(split: str) -> tuple[Captioned, ...]:
    """The scenes of `split` ("validation" or "test"), each with its one caption.

    No caption, set of three objects, or related pair of objects occurs twice, so each caption has
    one best picture.
    """
    seen: set[str | frozenset] = set()
    chosen: list[Captioned] = []
    indices = itertools.count()
    while len(chosen) < EVALUATION_SCENES:
        scene = world.draw_scene(world.random_of(split, 0, next(indices)), split)
        caption, content = evaluation_caption(scene), _content(scene)
        if seen.isdisjoint((caption, content)):
            seen |= {caption, content}
            chosen.append((scene, caption))
    return tuple(chosen)


def _content(scene: Scene) -> frozenset:
    """What every caption of the scene states: its objects, and of two also their relation."""
    kinds = [thing[:2] for thing in scene.objects]  # (colour, shape)
    if len(kinds) > 2:
        return frozenset(kinds)
    return frozenset((kinds[a], relation, kinds[b]) for a, relation, b in scene.relations())


@functools.cache
def hard_scenes(split: str) -> tuple[Captioned, ...]:
    """Pairs of scenes 2k, 2k + 1 whose captions and pictures differ in one thing; no caption twice.

    Alternately: which colour goes with which shape; which object is on which side of the other ("a
    left of b", "b left of a"); the relation ("a left of b", "a right of b").
    """
    seen: set[str] = set()
    chosen: list[Captioned] = []
    indices = itertools.count()
    while len(chosen) < EVALUATION_SCENES:
        kind = ("binding", "order", "relation")[len(chosen) // 2 % 3]
        pair = _hard_pair(world.random_of(f"hard {split}", 0, next(indices)), split, kind)
        captions = {caption for _, caption in pair}
        if len(captions) == 2 and seen.isdisjoint(captions):
            seen |= captions
            chosen += pair
    return tuple(chosen)


def _hard_pair(draw: random.Random, split: str, kind: str) -> list[Captioned]:
    objects = None
    while objects is None:
        first, second = world.pick(draw, world.held_out_pairs(split))
        if first[0] != second[0] and first[1] != second[1]:  # else swapping colours changes nothing
            objects = world.place(draw, (first, second))
    a, b = objects
    background, seed = world.draw_background(draw), draw.getrandbits(48)
    exchanged = ("colour", "paint") if kind == "binding" else ("x", "y")
    swapped = tuple(
        thing._replace(**{field: getattr(other, field) for field in exchanged})
        for thing, other in ((a, b), (b, a))
    )
    scenes = Scene(objects, background, seed), Scene(swapped, background, seed)
    return [
        (scene, two_objects(scene, first, random.Random(seed), HARD_WORDINGS))
        for scene, first in zip(scenes, (0, int(kind == "order")), strict=True)
    ]
