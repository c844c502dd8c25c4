"""`--mode=plan`: what a compiled program sends, what a step computes and how long that takes,
against closed forms.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_run import SMALL

from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.parallel import memory, sharding
from codebook_jax.tasks import pretrain
from codebook_jax.tools.plan import chips, hlo, operations, plan, timing
from codebook_jax.tools.plan.hlo import Array, Collective
from codebook_jax.tools.plan.options import PlanOptions, environment
from configs import base

ROOT = Path(__file__).parents[2]
# A step of which a CPU's memory is a chip's: float32, and large enough that activations count.
FIELDS = {
    **SMALL,
    "model.image.size_px": 40,
    "model.image.width": 64,
    "model.image.depth": 3,
    "model.text.width": 64,
    "model.remat": "blocks",
    "data.global_batch": 64,
    "queue.size": 128,
}
PLANNED = 16
V5P, H200 = chips.CHIPS["v5p"], chips.CHIPS["h200"]


def config_of(changes=None):
    config = base.get_config("tiny")
    config.update_from_flattened_dict(FIELDS | (changes or {}))
    return config


# -- what is sent


def program(instructions, others=""):
    lines = "\n".join(f"  %{line}" for line in instructions)
    return f"HloModule jit_f, num_partitions=8\n\n{others}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{lines}\n}}\n"


def one(line):
    (found,) = hlo.collectives(program(["p = f32[6,10]{1,0} parameter(0)", line]))
    return found


@pytest.mark.parametrize(
    ("named", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups={}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}",
            ((0, 4, 1, 5), (2, 6, 3, 7)),
        ),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(named, groups):
    line = f"r = f32[6,10]{{1,0}} all-reduce(%p), channel_id=1, {named}, use_global_device_ids=true, to_apply=%add"
    assert one(line).groups == groups


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        (
            "g = f32[24,10]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}",
            960 * 3 / 4,
        ),
        (
            "g = bf16[24,10]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}",
            480 * 3 / 4,
        ),
        (
            "r = f32[6,10]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add",
            2 * 240 * 7 / 8,
        ),
        (
            "r = (f32[6,10]{1,0}, f32[6,10]{1,0}) all-reduce(%p, %p), replica_groups=[4,2]<=[8], "
            "to_apply=%add",
            480,
        ),
        (
            "s = f32[3,10]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}, "
            "to_apply=%add",
            120,
        ),
        (
            "t = (f32[6,10]{1,0}, /*index=1*/f32[6,10]{1,0}) all-to-all(%p, %p), "
            "replica_groups={{0,1},{2,3}}",
            240,
        ),
        ("c = f32[6,10]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,2}}", 240),
        ("n = f32[6,10]{1,0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add", 0),
    ],
)
def test_a_device_sends_what_a_ring_sends(line, sent):
    assert one(line).sent == sent


def test_what_is_started_and_awaited_counts_once():
    lines = [
        "p = f32[6,10]{1,0} parameter(0)",
        "s = (f32[6,10]{1,0}, f32[24,10]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], "
        "dimensions={0}",
        "d = f32[24,10]{1,0} all-gather-done(%s)",
        "a = f32[6,10]{1,0} all-reduce-start(%p), replica_groups=[2,4]<=[8], to_apply=%add",
        "b = f32[6,10]{1,0} all-reduce-done(%a)",
    ]
    found = hlo.collectives(program(lines))
    assert [(c.kind, c.results, c.times) for c in found] == [
        ("all-gather", (Array("f32", (24, 10)),), 1),
        ("all-reduce", (Array("f32", (6, 10)),), 1),
    ]


LOOP = """
%body (b: (s32[], f32[6,10])) -> (s32[], f32[6,10]) {
  %b = (s32[], f32[6,10]{1,0}) parameter(0)
  %x = f32[6,10]{1,0} get-tuple-element(%b), index=1
  %r = f32[6,10]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}

%cond (c: (s32[], f32[6,10])) -> pred[] {
  %c = (s32[], f32[6,10]{1,0}) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%quiet (q: f32[6,10]) -> f32[6,10] {
  ROOT %q = f32[6,10]{1,0} parameter(0)
}
"""


def test_a_loop_counts_as_often_as_it_turns_and_of_branches_the_dearest_counts():
    loop = "w = (s32[], f32[6,10]{1,0}) while(%t), condition=%cond, body=%body"
    known = loop + ', backend_config={"known_trip_count":{"n":"7"}}'
    branch = "c = f32[6,10]{1,0} conditional(%i, %p, %t), branch_computations={%quiet, %body}"
    assert [c.times for c in hlo.collectives(program([loop], LOOP))] == [5]
    assert [c.times for c in hlo.collectives(program([known], LOOP))] == [7]
    assert [c.times for c in hlo.collectives(program([branch], LOOP))] == [1]
    assert hlo.collectives(program(["c = f32[6,10]{1,0} call(%p), to_apply=%quiet"], LOOP)) == []


def test_a_loop_of_unknown_length_is_not_guessed_at():
    loop = "w = (s32[], f32[6,10]{1,0}) while(%t), condition=%quiet, body=%body"
    with pytest.raises(ValueError, match="how often"):
        hlo.collectives(program([loop], LOOP))


def test_traffic_of_compiled_products_is_what_is_known_of_it():
    mesh = sharding.make_mesh(2, 2, 2)
    place = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731

    def step(x, w, v):
        hidden = x @ w  # w split over what is summed over: a sum over tensor
        whole = jax.lax.with_sharding_constraint(v, place(None, None))  # a gather over fsdp
        turn = lambda c, _: (jnp.cos(c) @ whole, None)  # noqa: E731
        loop = jax.lax.scan(turn, hidden, length=5)[0]
        summed = jax.lax.scan(lambda c, _: (jnp.sin(c + jnp.sum(loop * c)), None), 1.0, length=3)[
            0
        ]  # a number a turn
        return loop, summed

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(*axes))
        for shape, axes in [
            ((64, 32), (("data", "fsdp"), "tensor")),
            ((32, 48), ("tensor", None)),
            ((48, 48), ("fsdp", None)),
        ]
    ]
    found = hlo.collectives(jax.jit(step).lower(*arguments).compile().as_text())
    mesh_sizes = dict(mesh.shape)
    sums = {(c.kind, *timing.spanned(c.groups, mesh_sizes)): 0.0 for c in found}
    for c in found:
        sums[c.kind, *timing.spanned(c.groups, mesh_sizes)] += c.times * c.sent
    assert sums == {
        ("all-reduce", "tensor"): 2 * (16 * 48 * 4) / 2,
        ("all-gather", "fsdp"): 48 * 48 * 4 / 2,
        ("all-reduce", "data", "fsdp"): 3 * 2 * 4 * 3 / 4,
    }


# -- how long it takes


def alone(kind, devices, size, *, chip=V5P, count=None, slices=1, domain=None):
    """Seconds of one collective of `size` bytes over all devices."""
    count = count or devices
    slice_size = count // slices
    domain = domain or min(chip.domain or slice_size, slice_size)
    array = (Array("u8", (size,)),)
    collective = Collective(kind, array, array, (tuple(range(devices)),), 1, "")
    joined = timing.Joined(chip, slice_size, tuple(device // domain for device in range(count)))
    (sent,) = timing.sent_by_axes([collective], {"data": count, "fsdp": 1, "tensor": 1}, joined)
    return sent


def test_a_large_sum_takes_the_bytes_of_a_ring_over_the_rate_of_the_links():
    size = 10**12
    assert alone("all-reduce", 8, size, chip=H200).seconds == pytest.approx(
        2 * 7 / 8 * size / 450e9, rel=1e-3
    )
    assert alone("all-gather", 8, size, chip=H200).seconds == pytest.approx(
        7 / 8 * size / 450e9, rel=1e-3
    )
    across = alone("all-reduce", 32, size, chip=H200)  # eight network ports a node
    assert (
        across.seconds == pytest.approx(2 * 31 / 32 * size / 400e9, rel=1e-3)
        and "network" in across.axes
    )
    assert alone("all-reduce", 256, size).seconds == pytest.approx(
        2 * 255 / 256 * size / 600e9, rel=1e-3
    )


def test_a_small_sum_takes_the_hops_there_and_back():
    assert alone("all-reduce", 256, 4).seconds == pytest.approx(
        2 * (4 + 4 + 2) * 1e-6, rel=1e-3
    )  # 8 x 8 x 4, joined
    assert alone("all-reduce", 8, 4).seconds == pytest.approx(
        2 * (1 + 1 + 1) * 1e-6, rel=1e-3
    )  # 2 x 2 x 2, lines
    assert alone("all-reduce", 64, 4, chip=H200).seconds == pytest.approx(
        2 * (3 * 3e-6 + 3 * 5e-6), rel=1e-3
    )


def test_slices_are_joined_by_the_network_alone():
    size = 10**12
    inside, across = (
        alone("all-reduce", 64, size, count=64),
        alone("all-reduce", 64, size, count=64, slices=2),
    )
    assert across.seconds / inside.seconds == pytest.approx(600 / (32 * 6.25), rel=1e-3)
    pair = Collective(
        "collective-permute", (Array("u8", (size,)),), (Array("u8", (size,)),), ((0, 1),), 1, ""
    )
    joined = timing.Joined(V5P, 1, (0, 1))
    (sent,) = timing.sent_by_axes([pair], {"data": 2, "fsdp": 1, "tensor": 1}, joined)
    assert sent.seconds == pytest.approx(size / 6.25e9, rel=1e-3)


@pytest.mark.parametrize(
    ("count", "axes", "sizes"),
    [(256, 3, (8, 8, 4)), (64, 3, (4, 4, 4)), (256, 2, (16, 16)), (6, 2, (3, 2))],
)
def test_a_torus_is_as_even_as_its_size_allows(count, axes, sizes):
    assert chips.torus(count, axes) == sizes


def test_a_step_takes_its_longest_part_where_all_is_hidden_and_the_sum_where_nothing_is():
    own = operations.Operations(products=459e12 * 0.4, exact=0, moved=2.765e12 / 2)
    part = timing.Sent("all-reduce", "data", 1, 1.0, 0.25, 0.2)
    times = timing.times(V5P, own, [part])
    assert (times.compute_at_peak, times.compute, times.memory) == pytest.approx((0.4, 1.0, 0.5))
    assert (times.overlapped, times.serial, times.bound_by) == (1.0, 1.25, "matrix products")
    assert timing.times(V5P, own, [part._replace(seconds=3.0)]).bound_by == "bandwidth of links"
    assert (
        timing.times(V5P, own, [part._replace(seconds=3.0, latency=2.0)]).bound_by
        == "latency of collectives"
    )


# -- what is computed


def counted(function, *arguments):
    return operations.count(
        jax.make_jaxpr(function)(*arguments).jaxpr, lambda aval: aval.size * aval.dtype.itemsize
    )


def test_products_in_loops_and_branches_are_counted_as_often_as_they_run():
    x = jnp.zeros((7, 11))
    w = jnp.zeros((11, 11))
    own = 2 * 7 * 11 * 11
    loop = lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0]  # noqa: E731
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)  # noqa: E731
    assert operations.total(counted(loop, x, w)).products == 5 * own
    assert operations.total(counted(branch, x, w)).products == 2 * own
    image, kernel = jnp.zeros((2, 3, 9, 9)), jnp.zeros((5, 3, 2, 2))
    convolved = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    assert operations.total(counted(convolved, image, kernel)).products == 2 * (2 * 5 * 8 * 8) * (
        3 * 2 * 2
    )


def test_a_gradient_is_two_more_products_and_remat_one_that_is_told_apart():
    x, w = jnp.zeros((7, 11)), jnp.zeros((3, 11, 11))

    @jax.named_scope("embed")
    def loss(w, policy):
        layer = lambda c, w: (jnp.sin(c @ w), None)  # noqa: E731
        return jax.lax.scan(policy(layer), x, w)[0].sum()

    own = 3 * 2 * 7 * 11 * 11
    plain = counted(jax.grad(lambda w: loss(w, lambda f: f)), w)
    again = counted(jax.grad(lambda w: loss(w, jax.checkpoint)), w)
    part = "projections"
    assert {key: of.products for key, of in plain.items() if of.products} == {
        (part, "forward"): own,
        (part, "backward"): 2 * own,
    }
    assert again[part, "recomputed"].products == own and again[part, "backward"].products == 2 * own


def test_products_with_every_bit_are_told_from_others():
    x = jnp.zeros((5, 5))
    exact = counted(lambda x: jnp.dot(x, x, precision="highest") + x @ x, x)
    assert operations.total(exact).products == 2 * operations.total(exact).exact == 2 * 250


@pytest.fixture(scope="module")
def written_out():
    """The products of a step without a loop over layers, and operations as XLA counts them in
    it.
    """
    config = config_of(
        {"model.remat": "none", "model.scan_unroll": 3, "itm.groups": 1, "codebook.iterations": 1}
    )
    for tower in ("image", "text"):
        config.model[tower].width = 256
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axes, devices=jax.devices()[:1])
    task = pretrain.Pretraining(config, Vocabulary(200, 0, 1, 2, 3, (0, 1, 2, 3)), mesh)
    traced = task.step.trace(task.abstract_state(), memory.abstract_batch(config))
    found = operations.count(traced.jaxpr.jaxpr, lambda aval: 0)
    return config, found, traced.lower().cost_analysis()["flops"]


def test_products_of_the_real_step_are_most_of_what_xla_counts(written_out):
    _, found, by_xla = written_out
    assert 0.85 * by_xla < operations.total(found).products < by_xla


def test_products_of_the_image_tower_are_those_of_a_vision_transformer(written_out):
    config, found, _ = written_out
    of, rows = config.model.image, config.data.global_batch
    patches = (of.size_px // of.patch_px) ** 2
    tokens = patches + 1
    layer = 2 * tokens * 12 * of.width**2 + 4 * tokens**2 * of.width
    forward = rows * (of.depth * layer + 2 * patches * (3 * of.patch_px**2) * of.width)
    assert found["image tower", "forward"].products == forward
    assert found["teacher, image tower", "forward"].products == forward
    assert found["image tower", "backward"].products == 2 * forward


# -- a whole plan


@pytest.fixture(scope="module")
def planned(tmp_path_factory, one_device_environment):
    """The figures and output of the command for more devices than this process has, without any
    data.
    """
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    quick = {"losses.matching": 0.0, "losses.masked_lm": 0.0}  # half as long to compile
    fields = FIELDS | quick | {"data.train": "", "data.eval": ""}
    command = [
        sys.executable,
        "-m",
        "codebook_jax.main",
        "--mode=plan",
        "--config=configs/base.py:tiny",
    ]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    command += [
        "--plan.chip=h100",
        f"--plan.devices={PLANNED}",
        "--plan.slices=2",
        f"--plan.json={out}",
    ]
    done = subprocess.run(
        command, env=one_device_environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout


def test_the_command_plans_for_more_devices_than_there_are_and_without_data(planned):
    figures, said = planned
    assert figures["mesh"] == {"data": PLANNED, "fsdp": 1, "tensor": 1}
    sums = [part for part in figures["sent"] if part["kind"] == "all-reduce"]
    far = sum(part["bytes"] for part in sums if "network" in part["axes"])
    assert 0.999 * sum(part["bytes"] for part in sums) < far
    assert f"plan for {PLANNED} x h100 in 2 slices" in said
    assert "80.0 GB: fits" in said and "chip-hours" in said


def test_a_plan_counts_two_sums_for_each_iteration_of_the_transport(planned):
    figures, _ = planned
    sums = next(part for part in figures["sent"] if part["kind"] == "all-reduce")
    assert sums["axes"] == "data + network"
    assert 2 * SMALL["codebook.iterations"] < sums["count"] < 2 * SMALL["codebook.iterations"] + 30
    trained = 4 * figures["parameters"]  # with what only the losses left out train
    assert 0.6 * trained < sums["bytes"] / (2 * (1 - 1 / PLANNED)) < 1.2 * trained


def test_memory_of_a_plan_is_near_what_xla_assigns(planned):
    memory_of = planned[0]["memory"]
    assigned = sum(memory_of["assigned_by_xla"].values())
    assert 0.7 * assigned < memory_of["need"]["total"] < 1.4 * assigned
    assert memory_of["by_fsdp"]["1"] == memory_of["need"]["total"] > memory_of["by_fsdp"]["8"]


def test_a_plan_adds_up(planned):
    figures, _ = planned
    seconds = figures["seconds"]
    assert seconds["serial"] == pytest.approx(
        max(seconds["compute"], seconds["memory"])
        + sum(part["seconds"] for part in figures["sent"])
    )
    whole = sum(sum(passes.values()) for passes in figures["operations"].values())
    assert whole == figures["operations_total"]
    days = figures["train_steps"] * seconds["serial"] / 86_400
    assert figures["days"]["serial"] == pytest.approx(days)
    assert figures["chip_hours"]["serial"] == pytest.approx(days * 24 * PLANNED)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, PlanOptions(chip="v5"), "--plan.chip=v5 is not one of .* did you mean v5"),
        ({}, PlanOptions(devices=4), "--plan.devices=4 .* 8"),
        (
            {},
            PlanOptions(json="no/such/plan.json"),
            "--plan.json=no/such/plan.json: there is no folder no/such",
        ),
        ({}, PlanOptions(slices=3), "--plan.slices=3 does not split --plan.devices=8"),
        (
            {},
            PlanOptions(chip="v5e", slices=2, compiler="tpu"),
            "--plan.compiler=tpu .*--plan.slices=2",
        ),
        ({"mesh.fsdp": 3}, PlanOptions(), "does not fit 8 devices"),
        (
            {"data.global_batch": 60},
            PlanOptions(),
            "global_batch=60 does not split over 8 data shards .*: 64 would",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(changes, options, words):
    with pytest.raises(UserError, match=words) as refusal:
        plan(config_of(changes).lock(), options)
    assert "\n" not in str(refusal.value)


def test_the_environment_of_a_plan_replaces_a_number_of_devices_and_keeps_other_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_other=1")
    flags = environment(PlanOptions(devices=64))["XLA_FLAGS"].split()
    assert sorted(flags) == ["--xla_force_host_platform_device_count=64", "--xla_other=1"]
    with pytest.raises(UserError, match="devices=0"):
        environment(PlanOptions(devices=0))


def test_the_tables_of_the_page_are_those_of_the_figures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_table

    page = plan_table.PAGE.read_text()
    figures = json.loads(plan_table.RESULTS.read_text())
    assert plan_table.with_tables(page, figures) == page
    figures["base, 8 h200"]["batch"]["global"] += 1
    assert plan_table.with_tables(page, figures) != page
