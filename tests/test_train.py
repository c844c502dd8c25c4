"""The loop, with a one-weight model: what is logged, saved, evaluated and counted."""

import contextlib
import json
import re
import time
from typing import NamedTuple

import jax
import pytest
from one_weight import PAIRS, OneWeight, assert_same_run, config_of, rows_of, saved_steps

from codebook_jax import build, train
from codebook_jax.errors import UserError
from codebook_jax.run.metrics import read_rows


def test_a_run_logs_saves_and_evaluates_on_schedule_and_at_the_end(world, tmp_path, capsys):
    train.fit(config_of(**{"train.steps": 13}), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval/score" in row] == [6, 12, 13]
    assert world.evaluated == [(6, False), (12, False), (13, True)]
    assert saved_steps(tmp_path) == [8, 12, 13]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 13
    timed = next(row for row in rows if row["step"] == 4)
    measured = {"step_s", "pairs_per_s", "data_wait_share"}
    assert {f"time/{name}" for name in measured} | {"data/skipped"} <= timed.keys()
    assert "step 13: scored 13.0" in capsys.readouterr().out


def test_the_next_batch_and_step_are_under_way_before_a_step_is_waited_for(
    world, tmp_path, monkeypatch
):
    events = []

    class Watched(NamedTuple):
        step: int
        value: jax.Array

        def __bool__(self):
            events.append(f"wait {self.step}")
            return bool(self.value)

        def item(self):
            return self.value.item()

    def watched(state, batch, real=OneWeight.step):
        state, scalars = real(state, batch)
        events.append(f"step {int(state.step)}")
        return state, scalars | {"bad_step": Watched(int(state.step), scalars["bad_step"])}

    def put(batch, mesh):
        events.append(f"put {batch.example[0] // PAIRS + 1}")
        return batch

    monkeypatch.setattr(OneWeight, "step", staticmethod(watched))
    monkeypatch.setattr(train.sharding, "put_batch", put)
    train.fit(config_of(**{"train.steps": 4}), tmp_path)
    expected = "put 1, step 1, put 2, step 2, wait 1, put 3, step 3, wait 2"
    assert ", ".join(events).startswith(expected), events


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
        if cut == 9:  # nor can the newest checkpoint be read
            (workdir / "checkpoints" / "8" / "student").rename(workdir / "student")
        world.before_batch = lambda step: None
        train.fit(config, workdir)
        assert_same_run(workdir, tmp_path / "straight")


def test_a_run_goes_on_where_it_was_and_says_so(world, tmp_path, capsys):
    train.fit(config_of(), tmp_path)
    capsys.readouterr()
    train.fit(config_of(), tmp_path)
    said = capsys.readouterr().out
    assert "step 12 of 12 is reached" in said and "raise config.train.steps" in said
    read = []
    world.before_batch = read.append
    train.fit(config_of(**{"train.steps": 14}), tmp_path)
    resumed = r"resuming at step 12 \(checkpoint \d+ s old, data position 48\)"
    assert re.search(resumed, capsys.readouterr().out)
    assert read == [12, 13]
    logged = [row["step"] for row in rows_of(tmp_path) if "loss" in row]
    assert logged == [1, *range(2, 15, 2)]


def test_a_bad_step_is_reported_with_its_losses_and_examples(world, tmp_path, capsys):
    world.poisoned = {4}
    train.fit(config_of(), tmp_path)
    said = capsys.readouterr().out
    assert "step 5 was skipped: loss/broken not finite" in said and "16, 17, 18, 19" in said
    row = next(row for row in rows_of(tmp_path) if row["step"] == 5)
    assert row["loss"] is None and row["bad/terms"] == "loss/broken"
    assert row["bad/examples"] == "[16, 17, 18, 19]"
    assert rows_of(tmp_path)[-1]["step"] == 12


def test_waiting_for_data_is_said_once(world, tmp_path, capsys):
    world.before_batch = lambda step: time.sleep(0.02)
    train.fit(config_of(), tmp_path)
    said = capsys.readouterr().out
    assert said.count("input-bound:") == 1 and "config.data.threads (now 2)" in said


@pytest.mark.parametrize("field, value", [("evaluation.batch", 0), ("model.dtype", "int8")])
def test_settings_that_no_trained_run_can_be_used_with_are_refused(field, value, tmp_path):
    config = config_of()
    record = {"config": config.to_dict(), "data": {"fingerprint": ""}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field}='?{value}"):
        build.build_trained(config, tmp_path)
