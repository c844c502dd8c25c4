"""Every loss's gradient is its central differences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from codebook_jax import method
from codebook_jax.tasks.sequences import Steps, step_alignment

DRAW = np.random.default_rng(0)


def unit_rows(*shape):
    x = DRAW.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


TEACHER = {name: unit_rows(5, 4) for name in ("a", "b", "c")}
OF_STEPS = Steps(unit_rows(3, 4, 6), unit_rows(3, 2, 6))
PLAN, HERE = DRAW.uniform(size=(3, 4, 2)), Steps(np.ones((3, 4), bool), np.ones((3, 2), bool))
WORDS, MATCH = np.array([3, 0, 6, 2]), np.array([True, False, True, True, False])
WEIGHTS, SOFT = DRAW.uniform(size=5), DRAW.normal(size=(4, 7))


def aligned(*student):
    student = dict(zip("abc", student, strict=True))
    return method.instance_alignment(student, TEACHER, temperature=0.3, alpha=0.3)[0]


def contrasted(a, b, temperature):
    z = {"a": a, "b": b}
    return method.instance_alignment(z, temperature=temperature, intra_weight=0)[0]


def in_order(frames, sentences, codes):
    z = {"frames": frames, "sentences": sentences}
    options = dict(teacher=OF_STEPS._asdict(), order=method.Order())
    return method.codebook_alignment(z, codes, **options)[0]


def stepped(frames, sentences, temperature):
    options = dict(temperature=temperature, intra_weight=0.5)
    return step_alignment(Steps(frames, sentences), OF_STEPS, PLAN, HERE, jnp.arange(3), **options)


LOSSES = {
    "instance alignment of three": (aligned, [unit_rows(5, 4) for _ in "abc"]),
    "without a teacher": (contrasted, [unit_rows(5, 4), unit_rows(5, 4), np.float64(0.4)]),
    "matching": (
        lambda logits: method.matching_loss(logits, MATCH, WEIGHTS),
        [DRAW.normal(size=(5, 2))],
    ),
    "masked words": (
        lambda logits: method.masked_word_loss(logits, SOFT, WORDS, WEIGHTS[:4], alpha=0.4),
        [DRAW.normal(size=(4, 7))],
    ),
    "codes in order": (in_order, [unit_rows(3, 4, 6), unit_rows(3, 2, 6), unit_rows(8, 6)]),
    "steps": (stepped, [unit_rows(3, 4, 6), unit_rows(3, 2, 6), np.float64(0.5)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_its_central_differences(name):
    """Codewords also choose by the plan, which gets no gradient: there, only the features move."""
    loss, inputs = LOSSES[name]
    with jax.enable_x64(True):
        moving = inputs[:2] if name == "codes in order" else inputs
        fixed = [jnp.asarray(x) for x in inputs[len(moving) :]]
        of = jax.jit(lambda *given: loss(*given, *fixed))
        check_grads(of, [jnp.asarray(x) for x in moving], order=1, modes=["rev"], rtol=1e-6)
