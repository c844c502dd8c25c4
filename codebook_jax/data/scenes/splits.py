"""The scenes of each split: training by index, evaluation with one caption each, and hard pairs."""

from __future__ import annotations

import functools
import itertools
import random

from codebook_jax.data.scenes.captions import HARD_WORDINGS, evaluation_caption, two_objects
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
    chosen: list[tuple[Scene, str]] = []
    for index in itertools.count():
        if len(chosen) == count:
            return tuple(chosen)
        scene = draw_scene(random_of(split, 0, index), split)
        caption, content = evaluation_caption(scene), _content(scene)
        if caption not in captions and content not in shown:
            captions.add(caption)
            shown.add(content)
            chosen.append((scene, caption))


def _content(scene: Scene) -> frozenset:
    """What every caption of the scene states: its objects, and of two also their relation."""
    kinds = [thing.kind for thing in scene.objects]
    if len(kinds) > 2:
        return frozenset(kinds)
    return frozenset((kinds[a], relation, kinds[b]) for a, relation, b in scene.relations())


@functools.cache
def hard_scenes(split: str, count: int = EVALUATION_SCENES) -> tuple[tuple[Scene, str], ...]:
    """Pairs of scenes 2k, 2k + 1 whose captions and pictures differ in one thing; no caption twice.

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
    objects = None
    while objects is None:
        first, second = pick(draw, held_out_pairs(split))
        if first[0] != second[0] and first[1] != second[1]:  # else swapping colours changes nothing
            objects = place(draw, (first, second))
    a, b = objects
    background, seed = draw_background(draw), draw.getrandbits(48)
    if kind == "binding":
        swapped = (
            a._replace(colour=b.colour, paint=b.paint),
            b._replace(colour=a.colour, paint=a.paint),
        )
    else:
        swapped = a._replace(x=b.x, y=b.y), b._replace(x=a.x, y=a.y)
    first_of_other = 1 if kind == "order" else 0
    return [
        (scene, two_objects(scene, first, random.Random(seed), HARD_WORDINGS))
        for scene, first in (
            (Scene(objects, background, seed), 0),
            (Scene(swapped, background, seed), first_of_other),
        )
    ]
