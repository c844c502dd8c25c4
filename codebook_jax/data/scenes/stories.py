"""Stories of the built-in world: two objects change and move from frame to frame, and a sentence
describes each frame, or each but one.

Everything depends only on (split, seed, index). The two objects of a frame may be shown together in
the split, as in single scenes, so no sentence occurs in two splits. Sentences tell the state of a
frame and never mention time: a story's order is only in the order of its frames and sentences.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import evaluation_caption, training_captions
from codebook_jax.data.scenes.world import Kind, Scene

STORIES = 1  # increase it when any story changes: fingerprints include it
EVALUATION_STORIES = 400
_LENGTHS = (5, 6)  # frames
_ALL_TOLD = 0.5  # share of the stories with a sentence for each frame
_SIMILAR = 2 / 3  # share of the changes, if the split allows, of the colour or shape alone

Step = tuple[Scene, str | None]  # a frame and its sentence; None: it is not told


class SceneStory(NamedTuple):
    frames: tuple[Scene, ...]
    captions: tuple[str, ...]


def training_story(seed: int, index: int) -> SceneStory:
    """Story `index` of the training data."""
    return _story(_draw_steps(world.random_of("stories train", seed, index), None))


@functools.cache
def evaluation_stories(split: str) -> tuple[SceneStory, ...]:
    """The stories of `split` ("validation" or "test"): 2k, 2k + 1 have the same steps in different
    orders, and no others have the same objects in all their frames.
    """
    seen: set[frozenset] = set()
    chosen: list[SceneStory] = []
    indices = itertools.count()
    while len(chosen) < EVALUATION_STORIES:
        draw = world.random_of(f"stories {split}", 0, next(indices))
        steps = _draw_steps(draw, split)
        kinds = [frozenset(thing[:2] for thing in scene.objects) for scene, _ in steps]
        content = frozenset(kinds)
        if content not in seen:
            seen.add(content)
            chosen += _story(steps), _story(_reordered(draw, steps))
    return tuple(chosen)


def _story(steps: Sequence[Step]) -> SceneStory:
    captions = tuple(caption for _, caption in steps if caption is not None)
    return SceneStory(tuple(scene for scene, _ in steps), captions)


def _draw_steps(draw: random.Random, split: str | None) -> list[Step]:
    """Frames of one background; an object keeps its size and shade until it changes."""
    pairs = None
    while pairs is None:
        pairs = _draw_pairs(draw, world.pick(draw, _LENGTHS), split)
    background = world.draw_background(draw)
    looks = {kind: world.draw_look(draw, kind) for kind in dict.fromkeys(itertools.chain(*pairs))}
    scenes = []
    for pair in pairs:
        objects = None
        while objects is None:
            objects = world.arrange(draw, pair, [looks[kind] for kind in pair])
        scenes.append(Scene(objects, background, draw.getrandbits(48)))
    untold = None if draw.random() < _ALL_TOLD else int(len(scenes) * draw.random())
    return [
        (scene, None if number == untold else _caption(scene, split))
        for number, scene in enumerate(scenes)
    ]


def _caption(scene: Scene, split: str | None) -> str:
    return evaluation_caption(scene) if split else training_captions(scene, 1)[0]


def _draw_pairs(
    draw: random.Random, count: int, split: str | None
) -> list[tuple[Kind, Kind]] | None:
    """The kinds of each frame's two objects, of which one and the other change in turn; no two
    frames have the same. None if the first pair cannot be continued.
    """
    pairs = [world.pick(draw, world.held_out_pairs(split))]
    changing = int(2 * draw.random())
    while len(pairs) < count:
        old, kept = pairs[-1][changing], pairs[-1][1 - changing]
        shown = {frozenset(pair) for pair in pairs}
        kinds = [k for k in world.partners(kept, split) if frozenset((k, kept)) not in shown]
        similar = [kind for kind in kinds if kind[0] == old[0] or kind[1] == old[1]]
        if not kinds:
            return None
        new = world.pick(draw, similar if similar and draw.random() < _SIMILAR else kinds)
        pairs.append((kept, new) if changing else (new, kept))
        changing = 1 - changing
    return pairs


def _reordered(draw: random.Random, steps: Sequence[Step]) -> list[Step]:
    """The steps in another order, at least two swaps of neighbours away for frames and for
    sentences.
    """
    told = [number for number, (_, caption) in enumerate(steps) if caption is not None]
    while True:
        order = sorted(range(len(steps)), key=lambda _: draw.random())
        sentences = [number for number in order if number in told]
        if min(map(_inversions, (order, sentences))) > 1:
            return [steps[number] for number in order]


def _inversions(order: Sequence[int]) -> int:
    return sum(first > second for first, second in itertools.combinations(order, 2))
