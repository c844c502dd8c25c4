"""The built-in world: coloured shapes on textured backgrounds, with captions that are true of them.

Everything depends only on (split, seed, index). A tenth of the ways to pair two colours with two
shapes never occur in training: half of those belong to the validation split, half to the test
split, and each of their scenes shows one. Captions name every object, so no caption occurs in two
splits.
"""

from codebook_jax.data.scenes.captions import training_captions
from codebook_jax.data.scenes.pictures import render
from codebook_jax.data.scenes.splits import evaluation_scenes, hard_scenes, training_scene
from codebook_jax.data.scenes.world import WORLD

__all__ = [
    "WORLD",
    "evaluation_scenes",
    "hard_scenes",
    "render",
    "training_captions",
    "training_scene",
]
