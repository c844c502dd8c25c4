"""One of two processes that save a state split over both twice, and restore it after one file of
process 1 was damaged: `checkpoint_of_two.py WORKDIR`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent / "run"))

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from test_checkpoint import ITEMS, abstract, largest

from codebook_jax.parallel.processes import joining, peers
from codebook_jax.run.checkpoint import Checkpoints
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


workdir = Path(sys.argv[1])
with Checkpoints(workdir, ITEMS, keep=3) as checkpoints:
    checkpoints.save(1, state(1), {})
    checkpoints.save(2, state(2), {})
sync_global_devices("saved")
if jax.process_index() == 1:
    os.truncate(largest(workdir / "checkpoints" / "2" / "student" / "ocdbt.process_1"), 20)
sync_global_devices("damaged")
with Checkpoints(workdir, ITEMS, keep=3) as checkpoints:
    restored = checkpoints.restore_newest(abstract(state(0)))
    own = restored.state.student["w"].addressable_shards[0]
    np.testing.assert_array_equal(own.data, restored.step * whole[own.index])
    print(f"restored {restored.step}; there are {checkpoints.steps()}")
