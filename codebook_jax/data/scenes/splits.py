"""The scenes of each split: training by index, evaluation with one caption each, and the hard
pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

from codebook_jax.data.scenes.captions import HARD_WORDINGS, test_caption, two_objects
from codebook_jax.data.scenes.world import (
    Scene,
    draw_background,
    draw_scene,
    held_out_pairs,
    pick,
    place,
    random_of,
)

EVALUATION_SCENES = 1000


def training_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the training data: two or three objects, no two of which are held out."""
    return draw_scene(random_of("train", seed, index), None)


@functools.cache
def evaluation_scenes(split: str, count: int = EVALUATION_SCENES) -> tuple[tuple[Scene, str], ...]:
    """The scenes of `split` ("validation" or "test"), each with its one caption.

    No caption, set of three objects, or related pair of objects occurs twice, so each caption has
    one best picture.
    """
    captions: set[str] = set()
    shown: set[frozenset] = set()
    chosen = []
    for index in itertools.count():
        if len(chosen) == count:
            return tuple(chosen)
        scene = draw_scene(random_of(split, 0, index), split)
        caption, content = test_caption(scene), _content(scene)
        if caption not in captions and content not in shown:
            captions.add(caption)
            shown.add(content)
            chosen.append((scene, caption))


def _content(scene: Scene) -> frozenset:
    """What every caption of the scene states: its objects and, if there are two, their relation."""
    kinds = [(thing.colour, thing.shape) for thing in scene.objects]
    if len(kinds) > 2:
        return frozenset(kinds)
    relations = ((kinds[first], word, kinds[second]) for first, word, second in scene.relations())
    return frozenset(relations)


@functools.cache
def hard_scenes(split: str, count: int = EVALUATION_SCENES) -> tuple[tuple[Scene, str], ...]:
    """Pairs of scenes 2k, 2k + 1 whose captions and pictures differ in one thing only; no caption
    twice.

    Alternately: which colour goes with which shape; which object is on which side of the other ("a
    left of b", "b left of a"); the relation ("a left of b", "a right of b").
    """
    seen: set[str] = set()
    chosen: list[tuple[Scene, str]] = []
    kinds = itertools.cycle(("binding", "order", "relation"))
    kind = next(kinds)
    for index in itertools.count():
        if len(chosen) >= count:
            return tuple(chosen[:count])
        pair = _hard_pair(random_of(f"hard {split}", 0, index), split, kind)
        captions = {caption for _, caption in pair}
        if len(captions) == 2 and not captions & seen:
            seen |= captions
            chosen += pair
            kind = next(kinds)


def _hard_pair(draw: random.Random, split: str, kind: str) -> list[tuple[Scene, str]]:
    while True:
        (first_colour, first_shape), (second_colour, second_shape) = pick(
            draw, held_out_pairs(split)
        )
        if first_colour == second_colour or first_shape == second_shape:
            continue  # swapping colours would change nothing
        objects = place(draw, ((first_colour, first_shape), (second_colour, second_shape)))
        if objects is not None:
            break
    background, seed = draw_background(draw), draw.getrandbits(48)
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
        (scene, two_objects(scene, first, random.Random(seed), HARD_WORDINGS))
        for scene, first in zip(scenes, firsts, strict=True)
    ]
