"""`--mode=plan`: what a step computes, against closed forms, and whole plans by the command."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small_run import SMALL

from codebook_jax import build
from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.tools import chips, plan
from codebook_jax.tools.chips import PlanOptions, environment
from configs import base

ROOT = Path(__file__).parents[2]
QUICK = {"losses.matching": 0.0, "losses.masked_lm": 0.0}  # half as long to compile
FIELDS = SMALL | QUICK | {"data.train": "", "data.eval": "", "data.global_batch": 32}
PLANNED = 16

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e .[tpu]",
)


def config_of(changes=None):
    config = base.paper("tiny")
    config.update_from_flattened_dict(FIELDS | (changes or {}))
    return config


def products(function, *arguments):
    return plan.products(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_in_loops_branches_and_gradients_are_counted_as_often_as_they_run():
    x, w = jnp.zeros((7, 11)), jnp.zeros((11, 11))
    own = 2 * 7 * 11 * 11
    loop = lambda x, w: jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, length=5)[0]  # noqa: E731
    again = jax.checkpoint(loop)
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)  # noqa: E731
    assert products(loop, x, w) == 5 * own
    assert products(jax.grad(lambda w: loop(x, w).sum()), w) == 3 * 5 * own
    assert products(jax.grad(lambda w: again(x, w).sum()), w) == 4 * 5 * own
    assert products(branch, x, w) == 2 * own
    image, kernel = jnp.zeros((2, 3, 9, 9)), jnp.zeros((5, 3, 2, 2))
    convolved = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    assert products(convolved, image, kernel) == 2 * (2 * 5 * 8 * 8) * (3 * 2 * 2)


def traced(changes):
    """The step of a config on one device."""
    config = config_of({"mesh.fsdp": 1, "data.train": "scenes", "data.eval": "scenes"} | changes)
    vocabulary = Vocabulary(200, 0, 1, 2, 3, (0, 1, 2, 3))
    task = build.task_maker(config, vocabulary, devices=jax.devices()[:1])({})
    return config, task.step.trace(task.abstract_state(), task.abstract_batch())


def encoder(width, depth, tokens):
    """The operations of a transformer's blocks for one row, forward: 2 for each weight and token,
    and the scores and sums of attention.
    """
    return depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def test_operations_of_the_step_are_those_of_its_encoders():
    changes = {f"model.image.{name}": size for name, size in (("width", 256), ("depth", 3))}
    changes |= {f"model.text.{name}": size for name, size in (("width", 256), ("depth", 3))}
    config, found = traced(changes | {"codebook.iterations": 1, "model.scan_unroll": 1})
    image, text, rows = config.model.image, config.model.text, config.data.global_batch
    patches = (image.size_px // image.patch_px) ** 2
    forward = encoder(256, 3, patches + 1) + encoder(256, 3, text.max_tokens)
    forward += 2 * patches * 3 * image.patch_px**2 * 256  # the patches' own product
    whole = rows * forward * (1 + 3)  # the teacher; the student forward and, twice, backward
    assert plan.products(found.jaxpr.jaxpr) == pytest.approx(whole, rel=0.03)


def test_operations_are_most_of_what_xla_counts_in_a_step_without_loops():
    changes = {f"model.{tower}.width": 256 for tower in ("image", "text")}
    changes |= {"model.image.depth": 3, "model.scan_unroll": 3, "codebook.iterations": 1}
    _, found = traced(changes | {"losses.matching": 1.0, "losses.masked_lm": 1.0})
    by_xla = found.lower().cost_analysis()["flops"]
    assert 0.85 * by_xla < plan.products(found.jaxpr.jaxpr) < by_xla


# -- a whole plan


def planned(out, environment, fields, *flags):
    """The command in its own process, without any data."""
    command = [sys.executable, "-m", "codebook_jax.main", "--mode=plan"]
    command += ["--config=configs/base.py:tiny", f"--plan.json={out}", *flags]
    command += [f"--config.{name}={value}" for name, value in (FIELDS | fields).items()]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def figures(tmp_path_factory, one_device_environment):
    """The figures and output of a plan for more devices than this process has."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    flags = "--plan.chip=h100", f"--plan.devices={PLANNED}", "--plan.slices=2"
    done = planned(out, one_device_environment, {}, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout


def test_the_command_plans_for_more_devices_than_there_are(figures):
    found, printed = figures
    assert found["mesh"] == {"data": PLANNED, "fsdp": 1, "tensor": 1}
    assert f"plan for {PLANNED} x h100 in 2 slices" in printed
    assert "80.0 GB a chip: fits" in printed and "chip-hours" in printed


def test_a_plan_sums_every_gradient_and_nothing_of_a_small_transport(figures):
    found, _ = figures
    sums = next(row for row in found["sent"] if row["kind"] == "all-reduce")
    assert sums["axes"] == "data"
    assert sums["count"] < 2 * SMALL["codebook.iterations"]  # a large one's columns
    parameters = found["memory"]["state"] / 4  # the student among teacher and two moments
    assert 0.4 * parameters < sums["bytes"] / (2 * (1 - 1 / PLANNED)) < 1.2 * parameters


def test_a_plan_adds_up(figures):
    found, _ = figures
    need = found["memory"]
    assert need["state"] + need["batches"] + need["step"] == need["total"] < need["has"]
    seconds = found["operations"] / (PLANNED * 0.4 * chips.CHIPS["h100"].peak)
    assert found["step_s"] == pytest.approx(seconds)
    hours = found["train_steps"] * seconds / 3600
    assert found["chip_hours"] == pytest.approx(hours * PLANNED)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, PlanOptions(devices=4), "--plan.devices=4 .* 8"),
        ({}, PlanOptions(json=f"{__file__}/p.json"), "test_plan.py cannot be written"),
        ({"mesh.fsdp": 3}, PlanOptions(), "does not fit 8 devices"),
        ({"data.global_batch": 20}, PlanOptions(), "=20 does not split over 8 data shards .*: 16"),
        ({"task": "none"}, PlanOptions(), "config.task='none'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(changes, options, words):
    with pytest.raises(UserError, match=words) as refusal:
        plan.plan(config_of(changes).lock(), options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PlanOptions(chip="v5"), "--plan.chip=v5 is not one of .* did you mean v5"),
        (PlanOptions(devices=0), "--plan.devices=0"),
        (PlanOptions(slices=3), "--plan.slices=3 does not split --plan.devices=8"),
        (PlanOptions(compiler="gpu"), "--plan.compiler=gpu is not one of cpu, tpu"),
        (PlanOptions(compiler="tpu"), "--plan.compiler=tpu .*--plan.chip=h200"),
        (PlanOptions("v5e", slices=2, compiler="tpu"), "--plan.compiler=tpu .*--plan.slices=2"),
        (PlanOptions("v5e", compiler="tpu"), r"libtpu \(pip install -e .\[tpu\]"),
    ],
)
def test_a_machine_that_cannot_be_planned_for_is_refused_before_jax_starts(
    options, words, monkeypatch
):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        environment(options)


def test_the_environment_of_a_plan_replaces_a_number_of_devices_and_keeps_other_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_other=1")
    flags = environment(PlanOptions(devices=64))["XLA_FLAGS"].split()
    assert sorted(flags) == ["--xla_force_host_platform_device_count=64", "--xla_other=1"]


@pytest.mark.parametrize(
    ("count", "axes", "sizes"),
    [
        (256, 3, (8, 8, 4)),
        (64, 3, (4, 4, 4)),
        (256, 2, (16, 16)),
        (6, 2, (3, 2)),
        (4, 3, (2, 2, 1)),
    ],
)
def test_a_torus_is_as_even_as_its_size_allows(count, axes, sizes):
    assert plan.torus(count, axes) == sizes


@needs_libtpu
def test_libtpu_compiles_the_step(tmp_path, one_device_environment):
    flags = "--plan.compiler=tpu", "--plan.chip=v5e", "--plan.devices=8"
    done = planned(tmp_path / "p.json", one_device_environment, {"mesh.fsdp": 2}, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr.strip()
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    counts = {(row["kind"], row["axes"]): row["count"] for row in found["sent"]}
    assert 0 < counts["all-reduce", "data, fsdp"] < 2 * SMALL["codebook.iterations"]
    assert counts["all-gather", "fsdp"] > 0  # of parameters
    assert "libtpu" in done.stdout


@needs_libtpu
@pytest.mark.parametrize(
    ("fields", "devices", "words"),
    [
        (
            {"data.global_batch": 65_536, "queue.size": 65_536, "itm.groups": 64},
            1,
            "compiler for v5e .*--config",
        ),
        ({}, 9, "slice v5e:3x3"),
    ],
)
def test_what_libtpu_refuses_is_a_sentence(
    fields, devices, words, tmp_path, one_device_environment
):
    flags = "--plan.compiler=tpu", "--plan.chip=v5e", f"--plan.devices={devices}"
    done = planned(tmp_path / "p.json", one_device_environment, fields, *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert re.search(words, done.stderr)
    assert not (tmp_path / "p.json").exists()


def test_the_tables_of_the_page_are_those_of_the_figures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_table

    page = plan_table.PAGE.read_text()
    found = json.loads(plan_table.RESULTS.read_text())
    assert plan_table.with_tables(page, found) == page
    next(iter(found.values()))["batch"] += 1
    assert plan_table.with_tables(page, found) != page
