"""The built-in world: coloured shapes on textured backgrounds, and captions that are true of them.

A scene is a description (`Scene`); its picture (`render`) and captions (`training_captions`,
`test_caption`) are made from it, so other true or false statements about it can be made too.
Everything depends only on (split, seed, index).

A tenth of the ways to pair two colours with two shapes never occur in training. Half of those
belong to the
validation split and half to the test split: each of their scenes shows one. Captions name every
object, so no caption occurs in two splits.
"""

from codebook_jax.data.scenes.captions import CAPTIONS, test_caption, training_captions
from codebook_jax.data.scenes.pictures import render
from codebook_jax.data.scenes.splits import evaluation_scenes, hard_scenes, training_scene
from codebook_jax.data.scenes.world import (
    COLOURS,
    SHAPES,
    WORLD,
    Background,
    Scene,
    SceneObject,
    relation_between,
)

__all__ = [
    "CAPTIONS",
    "COLOURS",
    "SHAPES",
    "WORLD",
    "Background",
    "Scene",
    "SceneObject",
    "evaluation_scenes",
    "hard_scenes",
    "relation_between",
    "render",
    "test_caption",
    "training_captions",
    "training_scene",
]
