"""The memory a device needs: what XLA counts, which settings fit, and what the user reads."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from one_weight import config_of
from small_run import SMALL

from codebook_jax import build, train
from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.parallel import memory, sharding
from codebook_jax.parallel.memory import Memory
from codebook_jax.tasks.task import Task
from configs import base

FIELDS = {"model.image.size_px": 40, "data.global_batch": 64, "queue.size": 64}
NUMBERS = 100_000  # of the toy's state
MB = 10**6


def make_real(changes):
    config = base.paper("tiny")
    config.update_from_flattened_dict(SMALL | FIELDS | changes)
    return build.task_maker(config, Vocabulary(211, 0, 1, 2, 3, (0, 1, 2, 3)))({})


class Toy:
    """A task whose step holds NUMBERS floats for each row of a pass, half as many with remat."""

    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh
        self.place = NamedSharding(mesh, P("fsdp"))
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        self.step = jax.jit(
            self._step,
            in_shardings=(self.place, rows),
            out_shardings=(self.place, None),
            donate_argnums=0,
        )

    abstract_batch = Task.abstract_batch

    def abstract_state(self):
        return jax.ShapeDtypeStruct((NUMBERS,), jnp.float32, sharding=self.place)

    def _step(self, state, batch):
        numbers = batch.example.astype(jnp.float32)
        parts = sharding.split_rows(numbers, self.config.optimizer.accumulation, self.mesh)
        half = state if self.config.model.remat == "none" else state[::2]
        return state * 0.9, jax.lax.map(lambda part: self._products(part, half), parts).sum()

    def _products(self, part, state):
        hidden = jnp.sin(part[:, None] + state)
        return (hidden @ hidden.T).sum()


def make_toy(changes):
    config = base.paper("tiny")
    tiny = {"model.image.size_px": 2, "data.prefetch": 1, "data.global_batch": 256}
    config.update_from_flattened_dict(tiny | changes)
    mesh = sharding.mesh_of(config.mesh)
    sharding.check_batch(mesh, config.data.global_batch, config.optimizer.accumulation)
    return Toy(config, mesh)


def toy(has, **changes):
    """The memory of a described device that has so many bytes."""
    return Memory(lambda more: make_toy(changes | more), has, planned=True)


def need_of(changes):
    return toy(math.inf).compile(make_toy(changes)).need


@pytest.mark.slow
def test_xla_recomputes_what_remat_says_and_gathers_weights_but_no_rows_for_fsdp():
    step_of = lambda **changes: (  # noqa: E731
        Memory(make_real, math.inf, planned=True).compile(make_real(changes)).need.step
    )
    changes = {"data.global_batch": 256, "queue.size": 256, "model.image.depth": 3}
    plain = step_of(**changes)
    recomputed = step_of(**changes, **{"model.remat": "blocks"})
    split = step_of(**changes, **{"model.remat": "blocks", "mesh.fsdp": 4})
    assert recomputed < 0.8 * plain
    assert 0.3 * plain < memory.kept(make_real(changes)) < plain
    assert split < 1.05 * recomputed


def test_a_host_needs_more_than_a_device_that_is_only_described():
    described, here = (
        Memory(make_toy, math.inf, planned=planned).compile(make_toy({})).need
        for planned in (True, False)
    )
    assert described.host == 0 and here.state == described.state
    own = memory.PROCESS_BYTES // jax.local_device_count()
    assert here.host == 1.75 * here.state + here.batches / 2 + own


@pytest.mark.parametrize(
    ("megabytes", "fsdp"), [(30, 1), (0.75, 2), (0.3, 4), (0.001, 8)]
)  # the state has 0.4, the step 13
def test_sizes_whose_state_takes_more_than_half_are_passed_over(
    megabytes, fsdp, monkeypatch, capsys
):
    monkeypatch.setattr(Memory, "fits", lambda self, compiled: True)
    compiled = toy(int(megabytes * MB)).first_fit([1, 2, 4, 8], ["none"])
    assert compiled.task.mesh.shape["fsdp"] == fsdp
    (sentence,) = capsys.readouterr().out.splitlines()
    passed_over = [size for size in (1, 2, 4, 8) if size < fsdp]
    assert f"config.mesh.fsdp={fsdp}, chosen" in sentence
    assert [int(n) for n in re.findall(r"(\d) would need", sentence)] == passed_over


@pytest.mark.parametrize(
    ("megabytes", "fsdp"), [(math.inf, 1), (110, 1), (100, 2), (50, 4), (5, 8)]
)
def test_the_first_size_that_fits_is_taken_and_the_last_if_none_does(
    megabytes, fsdp, monkeypatch, capsys
):
    needs = {1: 100, 2: 60, 4: 40, 8: 30}  # megabytes

    def compile_step(self, task):
        need = memory.Need(needs[task.mesh.shape["fsdp"]] * MB, 0, 0)
        return memory.Compiled(task, None, need)

    monkeypatch.setattr(Memory, "compile", compile_step)
    device = toy(megabytes * MB)
    assert device.first_fit(list(needs), ["none"]).task.mesh.shape["fsdp"] == fsdp
    printed = re.findall(r"(\d+) MB", capsys.readouterr().out)
    passed_over = [str(need) for size, need in needs.items() if size < fsdp]
    assert printed[0] == str(needs[fsdp]) and set(passed_over) <= set(printed)


@pytest.mark.parametrize(
    ("megabytes", "remat", "tried"),
    [
        (200, "none", ["none"]),
        (120, "dots", ["none", "dots"]),
        (90, "dots", ["dots"]),  # without remat alone the rows that are kept do not fit
        (50, "blocks", ["blocks"]),
        (5, "blocks", ["blocks"]),  # refused afterwards, with what would fit
        (math.inf, "blocks", ["blocks"]),  # unknown
    ],
)
def test_as_little_is_recomputed_as_fits_and_no_program_is_compiled_in_vain(
    megabytes, remat, tried, monkeypatch, capsys
):
    needs, keeps = {"none": 150, "dots": 80, "blocks": 40}, {"none": 100, "dots": 60, "blocks": 1}
    asked = []

    def compile_step(self, task):
        asked.append(task.config.model.remat)
        return memory.Compiled(task, None, memory.Need(needs[asked[-1]] * MB, 0, 0))

    monkeypatch.setattr(Memory, "compile", compile_step)
    monkeypatch.setattr(memory, "kept", lambda task: keeps[task.config.model.remat] * MB)
    found = toy(megabytes * MB).first_fit([1], memory.remats_of("auto"))
    assert (found.task.config.model.remat, asked) == (remat, tried)
    said = f"config.model.remat={remat}, chosen" in capsys.readouterr().out
    assert said == (megabytes != math.inf)


def test_a_cpu_recomputes_blocks_and_a_started_run_what_it_did_or_more(monkeypatch):
    asked = []
    monkeypatch.setattr(Memory, "compile", lambda self, task: asked.append(task) or None)
    monkeypatch.setattr(Memory, "fits", lambda self, compiled: True)
    Memory(make_toy, 10**12).first_fit([1], memory.remats_of("auto"))
    assert [task.config.model.remat for task in asked] == ["blocks"]
    assert memory.remats_of("auto", "dots") == ["dots", "blocks"]
    assert memory.remats_of("auto", "") == ["none", "dots", "blocks"]
    assert memory.remats_of("none", "blocks") == memory.remats_of("none") == ["none"]


def test_what_is_kept_for_the_backward_pass_is_seen_before_compiling():
    plain, recomputed = (
        memory.kept(make_real({"model.remat": remat})) for remat in ("none", "blocks")
    )
    assert plain > 2 * recomputed > 0


@pytest.mark.parametrize(
    ("share", "changes"),
    [
        (0.7, {"model.remat": "blocks"}),
        (0.3, {"model.remat": "blocks", "optimizer.accumulation": 4}),
        (0.1, {"model.remat": "blocks", "optimizer.accumulation": 16}),
    ],
)
def test_what_does_not_fit_is_refused_with_flags_that_do(share, changes):
    own = {"model.dtype": "bfloat16", "mesh.fsdp": 1}
    need = need_of(own)
    device = toy(int(share * need.total), **own)
    with pytest.raises(UserError, match="train.memory_check=False") as refusal:
        device.check(device.compile(device.make({})))
    sentence = str(refusal.value)
    assert memory.size_of(need.total) in sentence and str(device) in sentence
    flags = dict(re.findall(r"--config\.([\w.]+)=(\w+)", sentence.partition("what fits is")[2]))
    flags.pop("train.memory_check")
    assert flags.keys() == changes.keys()
    assert flags["model.remat"] == "blocks"
    numbers = {name: int(value) for name, value in flags.items() if value.isdigit()}
    assert need_of(own | {"model.remat": "blocks"} | numbers).total <= device.has * 0.95
    assert all(numbers[name] <= changes[name] for name in numbers)


@pytest.mark.parametrize(
    ("has", "changes", "most", "words"),
    [(1000, {}, 0, "smaller model"), (700_000, {"mesh.fsdp": 1}, memory.MOST_TRIES, "")],
    ids=["the state alone is too large", "only so many programs are compiled"],
)
def test_what_can_fit_is_looked_for_in_a_few_programs(has, changes, most, words, capsys):
    device = toy(has, **changes)
    assert words in device.advice(device.compile(device.make({})))
    assert capsys.readouterr().out.count("compiling") <= most


def test_a_check_that_is_off_or_lacks_the_numbers_refuses_nothing(capsys):
    off = toy(MB, **{"train.memory_check": False})
    off.check(off.compile(off.make({})))
    assert "of 1 MB" in capsys.readouterr().out
    unknown = toy(math.inf)
    unknown.check(unknown.compile(unknown.make({})))
    assert "unknown" in capsys.readouterr().out


def test_a_compiler_that_runs_out_of_memory_counts_as_too_large():
    def refuse(compiler_options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 17.1G of 15.7G hbm. Exceeded")

    def make(changes):
        task = make_toy(changes)
        if task.config.optimizer.accumulation == 1:
            lowered = SimpleNamespace(compile=refuse)
            task.step = SimpleNamespace(trace=lambda *_: SimpleNamespace(lower=lambda: lowered))
        return task

    device = Memory(make, 10**9, planned=True)
    with pytest.raises(UserError, match="Used 17.1G of 15.7G hbm") as refusal:
        device.check(device.compile(make({"train.memory_check": False})))
    assert "optimizer.accumulation=2" in str(refusal.value)


def test_a_run_with_checkpoints_is_told_only_what_it_may_change():
    config = base.paper("tiny")
    vocabulary = Vocabulary(211, 0, 1, 2, 3, (0, 1, 2, 3))
    make = build.task_maker(config, vocabulary, has_checkpoint=True)
    for fixed in ("data.global_batch", "model.dtype"):
        with pytest.raises(UserError, match=fixed):
            make({fixed: getattr(config, fixed, 32)})
    assert make({"model.remat": "blocks"}).config.model.remat == "blocks"


def test_virtual_devices_share_the_memory_of_their_host():
    (total,) = re.findall(r"MemTotal:\s+(\d+)", open("/proc/meminfo").read())
    assert 0 < memory.device_memory() <= 1024 * int(total) / jax.local_device_count()


def test_a_device_that_runs_out_of_memory_in_the_loop_is_a_sentence(world, monkeypatch, tmp_path):
    def step(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    device = toy(10**9)
    compiled = device.compile(device.make({}))._replace(program=step)
    made = build.build_training
    build_too = lambda *a, **k: made(*a, **k)._replace(device=device, compiled=compiled)  # noqa: E731
    monkeypatch.setattr(build, "build_training", build_too)
    with pytest.raises(UserError, match="allocating 123 bytes.*--config.model.remat=blocks"):
        train.fit(config_of(), tmp_path)


def test_other_errors_of_the_runtime_pass_unchanged():
    device, error = toy(10**9), jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), device.explaining(None):
        raise error
