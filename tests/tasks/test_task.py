"""What every task has from its class."""

import re

import jax
import numpy as np
import pytest
from small_task import task_on

from codebook_jax.method.numerics import key_of, own_settings


@pytest.mark.slow
def test_a_fresh_state_is_that_of_a_program_that_is_optimised_fully():
    task = task_on(1, 1, 1)
    full = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    expected = jax.jit(own_settings(task.fresh), compiler_options=full)(key_of(0))
    jax.tree.map(np.testing.assert_array_equal, task.init_state(0), jax.device_get(expected))


def test_a_step_on_a_cpu_changes_parameters_and_moments_without_a_copy_of_them():
    task = task_on(1, 1, 1)
    program = task.step.lower(task.abstract_state(), task.abstract_batch()).compile().as_text()
    copied = re.findall(r"\w+(\[.*?\]).* copy\(%state_(student|teacher|moments)", program)
    assert "copy(" in program and {shape for shape, _ in copied} <= {"[]"}
