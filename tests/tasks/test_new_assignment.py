"""A new assignment is one function and one line in the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_task import BATCH, batch_of, run, task_on

from codebook_jax.errors import UserError
from codebook_jax.tasks.limits import ASSIGNMENTS

pytestmark = pytest.mark.usefixtures("programs_that_compile_fast")


def nearest(section):
    """Each feature's whole mass on the codeword nearest to it."""

    def assign(cost, here):
        share = here / jnp.maximum(here.sum(), 1)
        return jax.nn.one_hot(cost.argmin(axis=1), cost.shape[1]) * share[:, None]

    return assign


def test_a_new_assignment_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(ASSIGNMENTS, "nearest", nearest)
    task = task_on(1, 1, 1, **{"codebook.solver": "nearest"})
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
