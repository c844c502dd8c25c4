"""Downstream tasks in the built-in world: what is asked about scenes, and the right answers.

An example depends only on (role, seed, index). Scenes of training are drawn as in pre-training;
each scene of "validation" and "test" shows a pair of objects that only this split shows, except
those of `labels`, which have one object. Nothing is asked that the picture leaves open.
"""

from __future__ import annotations

from codebook_jax.data.scenes.tasks.comparisons import comparison
from codebook_jax.data.scenes.tasks.example import SceneExample as SceneExample
from codebook_jax.data.scenes.tasks.expressions import expression
from codebook_jax.data.scenes.tasks.labels import labelled
from codebook_jax.data.scenes.tasks.questions import question
from codebook_jax.data.scenes.tasks.statements import statement

EXAMPLES = 2  # increase it when any example changes: fingerprints include it
EVALUATION_EXAMPLES = 1000

TASKS = {  # of (role, seed, index)
    "questions": question,
    "comparisons": comparison,
    "statements": statement,
    "expressions": expression,
    "labels": labelled,
}
