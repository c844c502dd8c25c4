"""The loop, with a model of one weight: what is logged, saved, evaluated, counted, and how a run ends."""

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from codebook_jax import build, train
from codebook_jax.data.batch import Batch
from codebook_jax.errors import UserError
from codebook_jax.metrics import read_rows
from configs import base

PAIRS = 4


@flax.struct.dataclass
class State:
    step: Any
    student: Any
    teacher: Any
    moments: Any
    queue: Any
    bad_in_row: Any


class OneWeight:
    """A task whose step is bad when the batch's first image holds 255, or the weight is not finite."""

    def init_state(self, seed: int) -> State:
        weight = {"w": jax.random.normal(jax.random.key(seed), (3,))}
        copies = [jax.tree.map(jnp.copy, weight) for _ in range(3)]
        return State(jnp.int32(0), weight, *copies, jnp.int32(0))

    def abstract_state(self) -> State:
        leaves = jax.eval_shape(self.init_state, 0)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), leaves
        )

    @staticmethod
    @jax.jit
    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        bad = (batch.image[0] == 255) | ~jnp.isfinite(state.student["w"]).all()
        loss = jnp.where(bad, jnp.nan, (state.student["w"] ** 2).sum())
        moved = 0.9 * state.student["w"] + 0.001 * batch.example.sum()
        weight = {"w": jnp.where(bad, state.student["w"], moved)}
        row = jnp.where(bad, state.bad_in_row + 1, 0)
        scalars = {
            "loss": loss,
            "loss/good": jnp.float32(1),
            "loss/broken": loss,
            "bad_step": bad,
            "bad_in_row": row,
        }
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


@pytest.fixture
def world(monkeypatch):
    """What a test may change: which steps are poisoned, what reading does, how evaluation scores."""
    world = SimpleNamespace(
        poisoned=set(), unreadable={}, before_batch=lambda step: None, evaluated=[]
    )
    world.score = lambda step: float(step)
    world.during_evaluation = lambda: None

    def stream(start_step):
        for step in itertools.count(start_step):
            world.before_batch(step)
            yield batch_at(step, step in world.poisoned, world.unreadable.get(step, 0))

    def validate(parts, state, *, last):
        world.during_evaluation()
        step = int(state.step)
        world.evaluated.append((step, last))
        recalls = {f"{side}_r{k}": world.score(step) for side in ("txt", "img") for k in (1, 5, 10)}
        return {
            "student/dual": recalls | {"chance_r1": 0.1},
            "teacher/dual": recalls | {"chance_r1": 0.1},
        }

    def parts(config, workdir, *, steps_saved):
        return build.Parts(config, None, Source(), None, None, OneWeight())

    monkeypatch.setattr(build, "build_training", parts)
    monkeypatch.setattr(build, "announce", lambda parts: None)
    monkeypatch.setattr(
        build, "batches", lambda parts, *, start_step: contextlib.closing(stream(start_step))
    )
    monkeypatch.setattr(build, "validate", validate)
    monkeypatch.setattr(
        train.sharding, "put_batch", lambda batch, mesh: jax.tree.map(jnp.asarray, batch)
    )
    return world


def config_of(**changes: Any) -> ml_collections.ConfigDict:
    config = base.get_config("tiny")
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
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )


def rows_of(workdir):
    """Rows without the fields that measure time."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")} for row in rows
    ]


def final_weight(workdir, step):
    from codebook_jax.checkpoint import Checkpoints

    with Checkpoints(workdir, keep=3) as checkpoints:
        return np.asarray(
            checkpoints.restore(step, OneWeight().abstract_state()).state.student["w"]
        )


def test_a_run_logs_saves_and_evaluates_on_schedule_and_at_the_end(world, tmp_path, capsys):
    train.fit(config_of(**{"train.steps": 13}), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval/txt_r1" in row] == [6, 12, 13]
    assert world.evaluated == [(6, False), (12, False), (13, True)]
    assert saved_steps(tmp_path) == [8, 12, 13]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 13
    timed = next(row for row in rows if row["step"] == 4)
    assert {
        "time/step_s",
        "time/pairs_per_s",
        "time/data_wait_share",
        "data/skipped",
    } <= timed.keys()
    assert "eval/teacher_img_r10" in rows[-1] and "eval/teacher_chance_r1" not in rows[-1]
    assert "step 13: R@1 of texts 13.0 %" in capsys.readouterr().out


def test_the_next_batch_is_on_the_device_before_a_step_is_waited_for(world, tmp_path, monkeypatch):
    events = []

    class Watched:
        def __init__(self, step, value):
            self.step, self.value = step, value

        def __bool__(self):
            events.append(f"wait {self.step}")
            return bool(self.value)

        def item(self):
            return self.value.item()

    def watched(state, batch, real=OneWeight.step):
        state, scalars = real(state, batch)
        step = int(state.step)
        return state, scalars | {"bad_step": Watched(step, scalars["bad_step"])}

    def put(batch, mesh):
        events.append(f"put {batch.example[0] // PAIRS + 1}")
        return batch

    monkeypatch.setattr(OneWeight, "step", staticmethod(watched))
    monkeypatch.setattr(train.sharding, "put_batch", put)
    train.fit(config_of(**{"train.steps": 4}), tmp_path)
    assert events[:5] == ["put 1", "put 2", "wait 1", "put 3", "wait 2"]


def test_the_best_checkpoint_outlives_the_newest(world, tmp_path):
    world.score = lambda step: 100.0 - step
    train.fit(config_of(**{"train.steps": 40, "checkpoint.keep": 1}), tmp_path)
    assert saved_steps(tmp_path) == [6, 40]


def test_a_run_cut_at_any_step_leaves_the_rows_and_weights_of_a_straight_one(world, tmp_path):
    world.unreadable = {3: 1, 7: 2}
    config = config_of(**{"data.max_bad_rate": 1.0})
    train.fit(config, tmp_path / "straight")

    class Killed(Exception):
        pass

    for cut in (2, 6, 9):
        workdir = tmp_path / f"cut{cut}"

        def kill(step, cut=cut):
            if step == cut:
                raise Killed

        world.before_batch = kill
        with contextlib.suppress(Killed):
            train.fit(config, workdir)
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write('{"step": 11, "lo')
        world.before_batch = lambda step: None
        train.fit(config, workdir)
        assert rows_of(workdir) == rows_of(tmp_path / "straight")
        np.testing.assert_array_equal(
            final_weight(workdir, 12), final_weight(tmp_path / "straight", 12)
        )


def test_a_run_goes_on_where_it_was_and_says_so(world, tmp_path, capsys):
    train.fit(config_of(), tmp_path)
    capsys.readouterr()
    train.fit(config_of(), tmp_path)
    assert "step 12 of 12 is reached" in capsys.readouterr().out
    read = []
    world.before_batch = read.append
    train.fit(config_of(**{"train.steps": 14}), tmp_path)
    assert "resuming at step 12 (checkpoint 0 min old, data position 48)" in capsys.readouterr().out
    assert read == [12, 13]
    assert [row["step"] for row in rows_of(tmp_path) if "loss" in row] == [
        1,
        2,
        4,
        6,
        8,
        10,
        12,
        14,
    ]


def test_a_bad_step_is_reported_with_its_losses_and_examples(world, tmp_path, capsys):
    world.poisoned = {4}
    train.fit(config_of(), tmp_path)
    said = capsys.readouterr().out
    assert (
        "step 5 was left out: loss/broken not finite; 1 in a row" in said
        and "16, 17, 18, 19" in said
    )
    row = next(row for row in rows_of(tmp_path) if row["step"] == 5)
    assert (
        row["loss"] is None
        and row["bad/terms"] == "loss/broken"
        and row["bad/examples"] == "[16, 17, 18, 19]"
    )
    assert rows_of(tmp_path)[-1]["step"] == 12


def test_too_many_bad_steps_in_a_row_stop_the_run_and_leave_good_checkpoints(
    world, tmp_path, capsys
):
    world.poisoned = set(range(5, 100))
    config = config_of(**{"train.steps": 50, "optimizer.max_bad_steps": 6, "checkpoint.keep": 1})
    with pytest.raises(
        UserError, match=r"step 11: 6 steps in a row were not finite \(loss/broken\).*step 4 is unt"
    ):
        train.fit(config, tmp_path)
    assert "step 8 is not saved: the last 3 steps were not finite" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [4]
    assert np.isfinite(final_weight(tmp_path, 4)).all()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_step_in_progress_and_the_next_start_goes_on_exactly(
    name, world, tmp_path, capsys
):
    train.fit(config_of(), tmp_path / "straight")
    world.before_batch = lambda step: step == 6 and os.kill(os.getpid(), getattr(signal, name))
    handler = signal.getsignal(signal.SIGTERM)
    train.fit(config_of(), tmp_path / "cut")
    assert f"saved step 7 on {name}" in capsys.readouterr().out
    assert saved_steps(tmp_path / "cut") == [4, 6, 7]
    assert signal.getsignal(signal.SIGTERM) is handler
    world.before_batch = lambda step: None
    train.fit(config_of(), tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "straight")
    np.testing.assert_array_equal(
        final_weight(tmp_path / "cut", 12), final_weight(tmp_path / "straight", 12)
    )


def test_workers_that_die_of_the_same_signal_do_not_keep_the_run_from_saving(
    world, tmp_path, capsys
):
    def die(step):
        if step == 6:
            # The signal reaches this process after its workers.
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -15")

    world.before_batch = die
    train.fit(config_of(), tmp_path)
    assert "saved step 6 on SIGTERM" in capsys.readouterr().out and saved_steps(tmp_path)[-1] == 6


def test_a_batch_that_does_not_come_is_waited_for_aloud_then_the_step_is_saved_and_the_run_ends(
    world, tmp_path, monkeypatch, capfd
):
    class Ended(BaseException):
        pass

    def end(sentence, code):
        raise Ended(sentence, code)

    monkeypatch.setattr(train, "end", end)  # it would leave this process
    world.before_batch = lambda step: step == 7 and time.sleep(60)
    config = config_of(**{"data.patience_s": 1.0})
    with pytest.raises(Ended) as ended:
        train.fit(config, tmp_path)
    sentence, code = ended.value.args
    assert "the batch of step 8 did not come in 1 s; step 7 is saved" in sentence and code == 1
    assert "waiting for the batch of step 8 for 0 s; after 1 s the run ends" in capfd.readouterr().err
    world.before_batch = lambda step: None
    train.fit(config, tmp_path)
    train.fit(config_of(), tmp_path / "straight")
    assert rows_of(tmp_path) == rows_of(tmp_path / "straight")


def test_a_run_says_whether_it_came_to_its_end(world, tmp_path):
    world.before_batch = lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM)
    assert train.fit(config_of(), tmp_path) is False
    world.before_batch = lambda step: None
    assert train.fit(config_of(), tmp_path) is True


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_built(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written to .*: give a folder that can"):
        train.fit(config_of(), tmp_path / "file" / "run")


def test_workers_that_die_of_something_else_end_the_run(world, tmp_path, monkeypatch):
    def die(step):
        if step == 6:
            raise RuntimeError("a worker died")

    monkeypatch.setattr(train.Interruption, "arrives_within", lambda self, seconds: False)
    world.before_batch = die
    with pytest.raises(RuntimeError, match="a worker died"):
        train.fit(config_of(), tmp_path)
    assert saved_steps(tmp_path) == [4, 6]


def test_an_evaluation_that_a_signal_cut_short_is_done_at_the_next_start(world, tmp_path, capsys):
    train.fit(config_of(), tmp_path / "straight")
    world.during_evaluation = lambda: (signal.raise_signal(signal.SIGTERM), time.sleep(30))
    began = time.monotonic()
    train.fit(config_of(), tmp_path / "cut")
    assert time.monotonic() - began < 20
    assert "saved step 6 on SIGTERM" in capsys.readouterr().out
    world.during_evaluation = lambda: None
    train.fit(config_of(), tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "straight")
    assert (tmp_path / "cut" / "best.json").read_text() == (
        tmp_path / "straight" / "best.json"
    ).read_text()


def test_waiting_for_data_is_said_once(world, tmp_path, capsys):
    world.before_batch = lambda step: time.sleep(0.02)
    train.fit(config_of(), tmp_path)
    said = capsys.readouterr().out
    assert said.count("input-bound:") == 1 and "config.data.threads (now 2)" in said


def test_the_step_after_is_under_way_before_scalars_are_read(world, tmp_path, monkeypatch):
    order = []
    step, settle = OneWeight.step, train.Run.settle
    monkeypatch.setattr(
        OneWeight, "step", staticmethod(lambda s, b: order.append("step") or step(s, b))
    )
    monkeypatch.setattr(
        train.Run, "settle", lambda self, p: order.append(p and p.step) or settle(self, p)
    )
    train.fit(config_of(**{"train.steps": 3}), tmp_path)
    assert order == ["step", None, "step", 1, "step", 2, 3]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("train.steps", 0, "config.train.steps=0 is too small: give at least 1"),
        ("checkpoint.keep", 0, "config.checkpoint.keep=0"),
        ("data.max_bad_rate", 1.5, "share of the images"),
        ("data.crop_scale", (0.9, 0.5), "is not a range"),
        ("data.crop_ratio", ("hello",), "is not a range"),
    ],
)
def test_numbers_the_loop_cannot_run_with_are_refused(field, value, words):
    config = config_of()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        build.check(config)
