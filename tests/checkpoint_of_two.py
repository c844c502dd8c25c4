"""One of two processes that save a state split over both, or read it: `checkpoint_of_two.py WORKDIR
save|restore`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent / "run"))

import jax
import numpy as np
from test_checkpoint import abstract

from codebook_jax.parallel.processes import joining, peers
from codebook_jax.run.checkpoint import Checkpoints
from codebook_jax.tasks.pretrain import Pretraining
from codebook_jax.tasks.state import TrainState

joining.join(joining.find(os.environ), timeout_s=60)
peers.connect(None)
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
whole = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
place = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))


def state(step):
    """A half of every array on each process."""
    array = jax.make_array_from_callback(whole.shape, place, lambda index: step * whole[index])
    return TrainState(array, *[{"w": array}] * 4, *[array] * 3)


with Checkpoints(sys.argv[1], Pretraining.checkpoint_items().alone, keep=3) as checkpoints:
    if sys.argv[2] == "save":
        checkpoints.save(1, state(1), {})
        checkpoints.save(2, state(2), {})
    else:
        restored = checkpoints.restore_newest(abstract(state(0)))
        own = restored.state.student["w"].addressable_shards[0]
        np.testing.assert_array_equal(own.data, restored.step * whole[own.index])
        print(f"restored {restored.step}; there are {checkpoints.steps()}")
