"""Expressions that refer to one object of a scene, and the boxes to choose it from."""

from __future__ import annotations

import random
from collections.abc import Sequence

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import RELATION_WORDS
from codebook_jax.data.scenes.tasks.example import Noun, SceneExample, beside, names, noun_of, start
from codebook_jax.data.scenes.world import Scene, SceneObject, pick

CANDIDATES = 4  # the two or three objects of the scene and places without one
_APART = 0.8  # least distance of such a place to an object, as a share of the sum of their radii
_TRIES = 50


def expression(role: str, seed: int, index: int) -> SceneExample:
    """An expression for one object of a scene, and the candidates in any order."""
    draw, split = start("expressions", role, seed, index)
    told = elsewhere = None
    refer = pick(draw, (_by_name, _by_relation))
    while told is None or elsewhere is None:
        scene = world.draw_scene(draw, split)
        told, elsewhere = refer(draw, scene), _draw_elsewhere(draw, scene.objects)
    text, referent = told
    candidates = sorted((*scene.objects, *elsewhere), key=lambda _: draw.random())
    return SceneExample((scene,), text, (), index, index, referent, tuple(candidates))


def _by_name(draw: random.Random, scene: Scene) -> tuple[str, SceneObject]:
    thing = pick(draw, scene.objects)
    return f"the {pick(draw, names(scene, thing))}", thing


def _by_relation(draw: random.Random, scene: Scene) -> tuple[str, SceneObject] | None:
    thing, anchor = pick(draw, scene.objects), pick(draw, scene.objects)
    side = pick(draw, tuple(RELATION_WORDS))
    noun = pick(draw, (Noun(), noun_of(thing, "shape"), noun_of(thing, "colour")))
    if beside(scene, noun, side, anchor) != thing:
        return None
    words = pick(draw, RELATION_WORDS[side])
    return f"the {noun} {words} the {pick(draw, names(scene, anchor))}", thing


def _draw_elsewhere(
    draw: random.Random, objects: Sequence[SceneObject]
) -> tuple[SceneObject, ...] | None:
    """Objects that the scene lacks, where they would cover little of its own; None: no room."""
    found: list[SceneObject] = []
    for _ in range(_TRIES):
        if len(objects) + len(found) == CANDIDATES:
            return tuple(found)
        kind = pick(draw, tuple(world.COLOURS)), pick(draw, world.SHAPES)
        thing = world.draw_object(draw, kind)
        gaps = (
            max(abs(thing.x - other.x), abs(thing.y - other.y)) / (thing.radius + other.radius)
            for other in (*objects, *found)
        )
        if min(gaps) >= _APART:
            found.append(thing)
    return None
