"""The memory a device needs: against XLA's own count, what changes it, and what the user reads."""

import re

import jax
import jax.numpy as jnp
import pytest
from one_weight import OneWeight, config_of

from codebook_jax import build, train
from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.parallel import liveness, memory, sharding
from codebook_jax.parallel.memory import Estimate
from codebook_jax.tasks import pretrain
from codebook_jax.tools.plan import foresight
from configs import base

WORDS = 211
SMALL = {
    "model.image.size_px": 40,
    "model.attention": "xla",
    "model.text.dropout": 0.1,
    "data.global_batch": 64,
    "codebook.size": 61,
    "codebook.iterations": 5,
    "queue.size": 128,
}
GB = 10**9


def planner_of(changes=None, **options):
    config = base.get_config("tiny")
    config.update_from_flattened_dict(SMALL | (changes or {}))
    return memory.Planner(config, pretrain.Pretraining, WORDS, **options)


@pytest.fixture(scope="module")
def need():
    """Of the small config on eight devices."""
    return planner_of().estimate()


def assigned_by_xla(changes=None):
    """Memory of the compiled step on a device: its arguments and results, and its temporaries."""
    config, mesh = planner_of(changes).with_changes({})
    task = pretrain.Pretraining(config, Vocabulary(WORDS, 0, 1, 2, 3, (0, 1, 2, 3)), mesh)
    lowered = task.step.trace(task.abstract_state(), memory.abstract_batch(config)).lower()
    return foresight.assigned_by_xla(lowered.compile(compiler_options=foresight.QUICK))


def test_estimate_is_near_what_xla_assigns(one_device):
    assigned = sum(assigned_by_xla())
    assert (
        0.85 * assigned < planner_of().estimate().total < 1.35 * assigned
    )  # rather too much than too little


def test_xla_recomputes_what_remat_says_and_gathers_weights_but_no_rows_for_fsdp():
    changes = {"data.global_batch": 256}
    plain = assigned_by_xla(changes)[1]
    recomputed = assigned_by_xla(changes | {"model.remat": "blocks"})[1]
    split = assigned_by_xla(changes | {"model.remat": "blocks", "mesh.fsdp": 4})[1]
    assert recomputed < 0.6 * plain
    assert split < 1.05 * recomputed


def test_state_is_counted_exactly(need):
    state = planner_of().on_one_device(planner_of().with_changes({})[0], 8).abstract_state()
    count = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert need.parameters == count(state.student)
    assert need.moments == count(state.moments)
    assert (
        need.queues == 2 * 128 * 64 * 4 + 2 * 16_384 * 4 + 3 * 4
    )  # features, winners, cursors and a count


def test_what_the_table_at_the_start_prints_is_what_is_counted():
    planner = planner_of({"mesh.fsdp": 2, "mesh.tensor": 2})
    config, mesh = planner.with_changes({})
    state = pretrain.Pretraining(
        config, Vocabulary(WORDS, 0, 1, 2, 3, (0, 1, 2, 3)), mesh
    ).abstract_state()
    rows = sharding.table(state, mesh)
    need = planner.estimate()
    others = [row for row in rows if row.group.startswith("queue")]
    assert sum(row.own for row in rows if row not in others) == need.parameters
    assert sum(row.copies for row in rows) == need.teacher + need.moments
    counts = 3 * 4  # the step, bad steps in a row and in all
    assert sum(row.own for row in others) == need.queues + counts


def test_estimates_that_differ_in_the_mesh_alone_trace_one_step(monkeypatch):
    planner, traced = planner_of(), []
    create = planner.create
    planner.create = lambda *given: traced.append(given) or create(*given)
    found = [planner.estimate({"mesh.fsdp": n}) for n in (1, 4, 1)]
    assert len(traced) == 1 and found[0] == found[2] == planner_of({"mesh.fsdp": 1}).estimate()
    assert found[1] == planner_of({"mesh.fsdp": 4}).estimate()


def test_remat_and_passes_lower_the_activations_and_nothing_else(need):
    for changes in ({"model.remat": "blocks"}, {"optimizer.accumulation": 2}):
        estimate = planner_of(changes).estimate()
        assert estimate.activations < 0.8 * need.activations
        assert estimate[:-1] == need[:-1]


def test_fsdp_splits_parameters_teacher_and_moments(need):
    estimate = planner_of({"mesh.fsdp": 8}).estimate()
    for name in ("parameters", "teacher", "moments", "gradients"):
        assert getattr(estimate, name) < 0.3 * getattr(need, name), name
    assert estimate.total < need.total


def test_a_half_wide_type_lowers_the_activations_where_the_device_computes_in_it(need, monkeypatch):
    narrow = {"model.dtype": "bfloat16"}
    # A CPU computes in float32; GELU keeps its input alone in bfloat16, so a sixth less all the
    # same.
    assert planner_of(narrow).estimate().activations > 0.8 * need.activations
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert planner_of(narrow).estimate().activations < 0.75 * need.activations


def test_peak_counts_what_is_alive_together_and_no_more():
    def chain(x):
        for _ in range(5):
            x = x @ x  # two are alive at any time, the argument aside
        return x

    def kept(x):
        products = [x @ (x + n) for n in range(5)]
        return sum(p @ p for p in products)

    size = lambda aval: aval.size * aval.dtype.itemsize  # noqa: E731
    x = jax.ShapeDtypeStruct((100, 100), jnp.float32)
    assert liveness.peak(jax.make_jaxpr(chain)(x).jaxpr, size) == 2 * 40_000
    assert 5 * 40_000 <= liveness.peak(jax.make_jaxpr(kept)(x).jaxpr, size) <= 9 * 40_000


def test_peak_of_a_loop_has_one_turn_of_its_body_and_all_it_stacks():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, jnp.sin(c) @ c), x, length=7)

    size = lambda aval: aval.size * aval.dtype.itemsize  # noqa: E731
    found = liveness.peak(
        jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((100, 100), jnp.float32)).jaxpr, size
    )
    assert 8 * 40_000 < found <= 12 * 40_000


class Formula(memory.Planner):
    """A planner whose activations are 80 GB of one device at 512 pairs, without remat in
    float32.
    """

    def estimate(self, changes=None):
        config, mesh = self.with_changes(changes or {})
        activations = 80 * GB * config.data.global_batch / 512 / config.optimizer.accumulation
        activations *= 0.5 if config.model.remat == "blocks" else 1
        activations *= 0.5 if config.model.dtype == "bfloat16" else 1
        parameters = 16 * GB // mesh.shape["fsdp"]
        return Estimate(parameters, 0, 0, 0, 0, int(activations))


def formula(**options):
    large = {"data.global_batch": 512, "queue.size": 512}
    config = base.get_config("tiny")
    config.update_from_flattened_dict(large | options.pop("changes", {}))
    return Formula(config, pretrain.Pretraining, WORDS, **options)


def settings_below(limit, **options):
    planner = formula(**options)
    found = memory.fitting_settings(planner, planner.estimate(), limit)
    assert all(estimate.total <= limit and estimate == planner.estimate(c) for c, estimate in found)
    return [changes for changes, _ in found]


def test_each_setting_that_fits_alone_is_named():
    assert settings_below(57 * GB) == [
        {"model.remat": "blocks"},
        {"model.dtype": "bfloat16"},
        {"optimizer.accumulation": 2},
        {"data.global_batch": 256},
    ]


def test_the_fewest_passes_and_the_largest_batch_that_fit_are_named():
    assert settings_below(30 * GB) == [{"optimizer.accumulation": 8}, {"data.global_batch": 64}]


def test_settings_are_combined_where_none_is_enough_alone():
    together = {"model.remat": "blocks", "model.dtype": "bfloat16"}
    (changes,) = settings_below(9 * GB)
    assert changes.items() > together.items() and changes["mesh.fsdp"] > 1


def test_nothing_is_named_where_nothing_fits():
    assert settings_below(1 * GB) == []
    assert "smaller model" in memory.advice(formula(), formula().estimate(), 1 * GB)


def test_a_run_with_checkpoints_is_told_only_what_it_may_change():
    record = {"config": {"itm": {"groups": 64}}}
    changes = settings_below(57 * GB, record=record, has_checkpoint=True)
    assert changes == [
        {"model.remat": "blocks"},
        {"optimizer.accumulation": 2},
    ]  # no dtype, no batch


def test_what_does_not_fit_is_refused_with_flags_that_do(monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_memory", lambda: 60 * GB)
    with pytest.raises(UserError, match=r"96\.0 GB .* has 60\.0 GB") as refusal:
        memory.check(formula())
    assert "--config.optimizer.accumulation=2 (56.0 GB)" in str(refusal.value)
    assert "--config.train.memory_check=False" in str(refusal.value)
    memory.check(formula(changes={"train.memory_check": False}))
    assert "96.0 GB of 60.0 GB" in capsys.readouterr().out


def test_an_unknown_memory_refuses_nothing(monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_memory", lambda: None)
    memory.check(formula())
    assert "not known" in capsys.readouterr().out


def test_virtual_devices_share_the_memory_of_their_host():
    (total,) = re.findall(r"MemTotal:\s+(\d+)", open("/proc/meminfo").read())
    assert 0 < memory.device_memory() <= 1024 * int(total) / jax.local_device_count()


def test_a_device_that_runs_out_of_memory_in_the_loop_is_a_sentence(world, monkeypatch, tmp_path):
    def step(self, state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(OneWeight, "step", step)
    parts = build.build_training
    monkeypatch.setattr(
        build, "build_training", lambda *a, **k: parts(*a, **k)._replace(planner=formula())
    )
    with pytest.raises(UserError, match="allocating 123 bytes.*--config.optimizer.accumulation=2"):
        train.fit(config_of(), tmp_path)


def test_other_errors_of_the_runtime_pass_unchanged():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explaining(formula()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
