"""Pictures of one object, to be classified by its colour and shape; every class is as frequent."""

from __future__ import annotations

import itertools

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.tasks.example import SceneExample, start

KINDS = tuple(itertools.product(world.COLOURS, world.SHAPES))


def labelled(role: str, seed: int, index: int) -> SceneExample:
    """A picture without a text, answered by a colour and a shape: "red circle"."""
    draw, _ = start("labels", role, seed, index)
    kind = KINDS[index % len(KINDS)]
    thing = world.draw_object(draw, kind)
    scene = world.Scene((thing,), world.draw_background(draw), draw.getrandbits(48))
    return SceneExample((scene,), "", (" ".join(kind),), index, index)
