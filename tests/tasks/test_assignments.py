"""Assignments in pre-training: those there are, and a new one by a function and a line."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_task import BATCH, assert_close, batch_of, read_back, run, task_on

from codebook_jax.errors import UserError
from codebook_jax.tasks.limits import ASSIGNMENTS


def all_on_one(section):
    """Each feature's whole mass on the codeword nearest to it."""

    def assign(cost, here):
        share = here / jnp.maximum(here.sum(), 1)
        return jax.nn.one_hot(cost.argmin(axis=1), cost.shape[1]) * share[:, None]

    return assign


def test_a_new_assignment_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(ASSIGNMENTS, "all on one", all_on_one)
    task = task_on(1, 1, 1, **{"codebook.solver": "all on one"})
    task.check(task.config)
    first = jax.device_get(task.init_state(0))
    states, scalars = run(task, first, [batch_of(seed) for seed in range(2)])
    assert all(np.isfinite(one["loss"]) for one in scalars)
    assert scalars[0]["codebook/assignment_entropy"] == 0  # all on one codeword
    assert (states[1].usage.winners[:, : 2 * BATCH] >= 0).all()


def test_an_unknown_assignment_is_refused_with_the_known_ones():
    task = task_on(1, 1, 1)
    with pytest.raises(UserError, match="config.codebook.solver='best' .* sinkhorn, ipot"):
        with task.config.unlocked():
            task.config.codebook.solver = "best"
        task.check(task.config)


@pytest.mark.parametrize(
    "solver",
    [
        "nearest",
        pytest.param("softmax", marks=pytest.mark.slow),
        pytest.param("swav", marks=pytest.mark.slow),
        pytest.param("unbalanced", marks=pytest.mark.slow),
    ],
)
def test_what_an_assignment_remembers_is_saved_and_goes_on_bit_for_bit(solver, tmp_path):
    task = task_on(1, 1, 1, **{"codebook.solver": solver, "codebook.move_unused_after": 2})
    first, batches = jax.device_get(task.init_state(0)), [batch_of(seed) for seed in range(4)]
    states, scalars = run(task, first, batches)
    assert all(np.isfinite(one["loss"]) for one in scalars)
    codes = [state.student["codebook"]["codes"] for state in (first, *states)]
    assert all((a != b).any() for a, b in itertools.pairwise(codes))
    if solver == "nearest":
        np.testing.assert_allclose(codes[-1], states[-1].running.codes, atol=1e-6)
        assert (states[-1].running.idle <= 2).all()  # the others have moved
    elif solver == "softmax":
        assert (states[-1].running != states[-2].running).all()
    else:
        assert states[-1].running is None
    again, _ = run(task, read_back(task, states[1], tmp_path), batches[2:])
    assert_close(again[-1], states[-1], rtol=0)


@pytest.mark.slow
def test_nearest_codes_on_eight_devices_are_those_of_one():
    changes = {"codebook.solver": "nearest", "codebook.move_unused_after": 2}
    one, eight = task_on(1, 1, 1, **changes), task_on(4, 2, 1, **changes)
    first = jax.device_get(one.init_state(0))
    (ours, _), (theirs, _) = (run(task, first, [batch_of(0)]) for task in (eight, one))
    assert_close(ours[0].running, theirs[0].running, rtol=1e-5)
