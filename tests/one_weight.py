"""A run whose model is a single weight, in a world that a test may change."""

import contextlib
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from codebook_jax import build, summary, train
from codebook_jax.data.batch import Batch
from codebook_jax.run.checkpoint import Checkpoints
from codebook_jax.run.metrics import read_rows
from codebook_jax.tasks.pretrain import Pretraining
from codebook_jax.tasks.state import TrainState
from codebook_jax.tasks.task import Evaluation
from configs import base

PAIRS = 4


class OneWeight:
    """A task whose step is bad when the batch's first image holds 255, or the weight is not
    finite.
    """

    checkpoint_items = staticmethod(Pretraining.checkpoint_items)
    cautions = staticmethod(lambda config: [])
    reads = "pairs"

    def __init__(self, world=None):
        self.world = world

    def batches(self, source, tokenizer, *, start_step, workers):
        def stream():
            for step in itertools.count(start_step):
                self.world.before_batch(step)
                poisoned = step in self.world.poisoned
                yield batch_at(step, poisoned, self.world.unreadable.get(step, 0))

        return contextlib.closing(stream())

    def evaluate(self, state, source, tokenizer, *, images, final, progress=None):
        self.world.during_evaluation()
        progress("images", 1, 1)
        step = int(state.step)
        self.world.evaluated.append((step, final))
        score = self.world.score(step)
        return Evaluation({}, {"eval/score": score}, score, "score", f"scored {score:.1f}", "")

    def init_state(self, seed: int) -> TrainState:
        weight = {"w": jax.random.normal(jax.random.key(seed), (3,))}
        copies = [jax.tree.map(jnp.copy, weight) for _ in range(4)]
        return TrainState(jnp.int32(0), weight, *copies, jnp.int32(0), jnp.int32(0))

    def abstract_state(self) -> TrainState:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        return jax.tree.map(on_device, jax.eval_shape(self.init_state, 0))

    @staticmethod
    @jax.jit
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        bad = (batch.image[0] == 255) | ~jnp.isfinite(state.student["w"]).all()
        loss = jnp.where(bad, jnp.nan, (state.student["w"] ** 2).sum())
        moved = 0.9 * state.student["w"] + 0.001 * batch.example.sum()
        weight = {"w": jnp.where(bad, state.student["w"], moved)}
        row = jnp.where(bad, state.bad_in_row + 1, 0)
        losses = {"loss": loss, "loss/good": jnp.float32(1), "loss/broken": loss}
        scalars = losses | {"bad_step": bad, "bad_in_row": row}
        return state.replace(step=state.step + 1, student=weight, bad_in_row=row), scalars


def batch_at(step: int, poisoned: bool = False, unreadable: int = 0) -> Batch:
    examples = np.arange(step * PAIRS, (step + 1) * PAIRS, dtype=np.int32)
    image = np.full(PAIRS, 255 if poisoned else 0, np.uint8)
    skipped = np.array([unreadable] + [0] * (PAIRS - 1), np.int32)
    return Batch(image, image, image, image, image, examples, examples, skipped)


class Source:
    def fingerprint(self) -> str:
        return "fixed"

    def __len__(self) -> int:
        return 1000


def make_world(monkeypatch):
    """What a test may change: which steps are bad, what reading does, how evaluation scores."""
    world = SimpleNamespace(poisoned=set(), unreadable={}, evaluated=[], score=float)
    world.before_batch = lambda step: None
    world.during_evaluation = lambda: None

    def parts(config, workdir, *, steps_saved):
        return build.Parts(config, None, Source(), None, None, OneWeight(world))

    monkeypatch.setattr(build, "build_training", parts)
    monkeypatch.setattr(summary, "announce", lambda parts: None)
    put = lambda batch, mesh: jax.tree.map(jnp.asarray, batch)  # noqa: E731
    monkeypatch.setattr(train.sharding, "put_batch", put)
    return world


def config_of(**changes: Any) -> ml_collections.ConfigDict:
    config = base.paper("tiny")
    values = {
        "train.steps": 12,
        "data.global_batch": PAIRS,
        "log_every_steps": 2,
        "checkpoint.every_steps": 4,
        "evaluation.every_steps": 6,
    }
    config.update_from_flattened_dict(values | changes)
    return config


def saved_steps(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def rows_of(workdir):
    """Rows without the fields that measure time."""
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def final_weight(workdir, step=12):
    with Checkpoints(workdir, OneWeight.checkpoint_items().alone, keep=3) as checkpoints:
        restored = checkpoints.restore(step, OneWeight().abstract_state())
    return np.asarray(restored.state.student["w"])


def assert_same_run(workdir, other):
    assert rows_of(workdir) == rows_of(other)
    np.testing.assert_array_equal(final_weight(workdir), final_weight(other))
