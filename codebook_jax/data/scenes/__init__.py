"""The built-in world: coloured shapes on textured backgrounds, and captions that are true of them.

A scene is a description first (`Scene`); its picture (`render`) and its words (`training_captions`, `test_caption`)
are made from it, and so can be whatever else is true or false of it. Everything follows from (split, seed, index).

A tenth of the ways to pair two colours with two shapes never occur in training. Half of those are the validation
split's and half the test split's: each of their scenes shows one. Captions name every object, so no caption of one
split is one of another.
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
