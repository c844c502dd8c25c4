"""Freezing by name, and smaller steps for lower layers, on the parameters of real tasks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import VOCABULARY
from small_finetune import config_of

from codebook_jax.errors import UserError
from codebook_jax.models.finetuned import Network
from codebook_jax.parallel import sharding
from codebook_jax.tasks import optimizer

FROZEN = r"^towers/(image|text)/"
DEPTHS = {"model.image.depth": 3, "model.text.depth": 2, "model.text.fusion_depth": 2}


def named(tree):
    return dict(sharding.named(tree))


def parameters_of(config, seed=0):
    """The shapes of the task's network, filled with noise."""
    shapes = jax.eval_shape(Network(config, VOCABULARY.size).init, jax.random.key(0))
    draw = np.random.default_rng(seed)
    noise = lambda leaf: draw.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, shapes)


def one_step(config, parameters, gradients):
    """(parameters, moments) after a step."""
    _, transform = optimizer.from_config(config)
    given = config, transform, gradients, parameters, transform.init(parameters)
    return jax.jit(lambda: optimizer.updated(*given))()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_frozen_stays_bit_for_bit_and_has_no_moments_and_all_else_moves(name):
    config = config_of("entailment", **{"optimizer.name": name, "optimizer.freeze": FROZEN})
    before, gradients = parameters_of(config), parameters_of(config, seed=1)
    after, moments = one_step(config, before, gradients)
    changed = {n: np.abs(x - named(before)[n]).max() for n, x in named(after).items()}
    frozen = {n for n in changed if re.search(FROZEN, n)}
    assert 10 < len(frozen) < len(changed)
    assert {n for n, by in changed.items() if by == 0} == frozen
    kept = [n for n, x in named(moments).items() if np.ndim(x)]
    assert not [n for n in kept if re.search(r"towers/(image|text)/", n)]
    whole = {n: x.shape for n, x in named(after).items() if n not in frozen}
    assert all(any(n.endswith(name) for n in kept) for name in whole)


def test_frozen_parameters_have_a_gradient_of_zero_and_so_do_not_count_in_its_norm():
    config = config_of("entailment", **{"optimizer.freeze": FROZEN})
    found = named(optimizer.trained(config, parameters_of(config)))
    assert {n for n, x in found.items() if not np.any(x)} == {
        n for n in found if re.search(FROZEN, n)
    }


@pytest.mark.parametrize(
    "pattern, which", [("^student/", "no parameter"), ("towers|head", "every parameter")]
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused_with_some_names(pattern, which):
    config = config_of("entailment", **{"optimizer.freeze": pattern})
    _, transform = optimizer.from_config(config)
    with pytest.raises(UserError, match=f"config.optimizer.freeze='.*' matches {which}") as caught:
        jax.eval_shape(transform.init, parameters_of(config))
    assert re.search(r"head/|towers/", str(caught.value).split("which are")[1])


@pytest.mark.slow
def test_a_decoder_learns_with_muon_and_layer_decay():
    config = config_of("vqa", **{"optimizer.name": "muon", "optimizer.layer_decay": 0.5})
    before = parameters_of(config)
    after, _ = one_step(config, before, parameters_of(config, seed=1))
    assert all(np.isfinite(x).all() for x in named(after).values())


@pytest.mark.parametrize(
    "task", ["vqa", *(pytest.param(task, marks=pytest.mark.slow) for task in ("nlvr2", "labels"))]
)
def test_each_layer_takes_steps_smaller_by_the_decay_for_every_layer_above_it(task):
    changes = DEPTHS | {"optimizer.weight_decay": 0.0, "optimizer.freeze": ""}
    steps = {}
    for decay in (1.0, 0.5):
        config = config_of(task, **changes | {"optimizer.layer_decay": decay})
        before, gradients = parameters_of(config), parameters_of(config, seed=1)
        _, transform = optimizer.from_config(config)
        given = gradients, transform.init(before), before
        steps[decay] = named(jax.jit(transform.update)(*given)[0])
    texts = 2 + 2  # layers of the text encoder, which the fusion encoder continues
    per_layer = {  # (tower: layers above each of its blocks)
        "image": jnp.arange(3, 0, -1),
        "text": texts - jnp.arange(2),
        "fusion": texts - 2 - jnp.arange(2),
    }
    checked = set()
    for name, whole in steps[1.0].items():
        parts = name.split("/")
        tower = parts[1] if parts[0] == "towers" else ""
        if tower in per_layer and parts[2] == "blocks":
            above = per_layer[tower].reshape(-1, *(1,) * (whole.ndim - 1))
        elif tower == "image" and parts[2] == "norm":
            above = 0  # it follows the last block
        elif tower in ("image", "text"):
            above = {"image": 3, "text": texts}[tower] + 1  # embeddings: below the first block
        else:
            above = 0  # the head, the decoder
        checked.add((tower, parts[2] if tower else ""))
        expected = whole * 0.5**above
        np.testing.assert_allclose(steps[0.5][name], expected, rtol=1e-5, err_msg=name)
    assert {("image", "blocks"), ("image", "norm"), ("", "")} <= checked
    assert task == "labels" or {("text", "words"), ("fusion", "blocks")} <= checked
