"""What a compiled program sends, read from its text, against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from codebook_jax.parallel import sharding
from codebook_jax.parallel.collectives import axes_of, collectives


def program(instructions, others=""):
    lines = "\n".join(f"  %{line}" for line in instructions)
    main = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{lines}\n}}\n"
    return f"HloModule jit_f, num_partitions=8\n\n{others}\n{main}"


def one(line):
    (found,) = collectives(program(["p = f32[6,10]{1,0} parameter(0)", line]))
    return found


@pytest.mark.parametrize(
    ("named", "devices"),
    [
        ("replica_groups={{0,1},{2,3}}", (0, 1)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}", (0, 4, 1, 5)),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(named, devices):
    line = f"r = f32[6,10]{{1,0}} all-reduce(%p), channel_id=1, {named}, to_apply=%add"
    assert one(line).devices == devices


@pytest.mark.parametrize(
    ("types", "kind", "groups", "sent"),
    [
        ("f32[24,10]", "all-gather", "[2,4]<=[8]", 960 * 3 / 4),
        ("bf16[24,10]", "all-gather", "[2,4]<=[8]", 480 * 3 / 4),
        ("f32[6,10]", "all-reduce", "[1,8]<=[8]", 2 * 240 * 7 / 8),
        ("(f32[6,10], f32[6,10])", "all-reduce", "[4,2]<=[8]", 480),
        ("f32[3,10]", "reduce-scatter", "[4,2]<=[8]", 120),
        ("(f32[6,10], /*index=1*/f32[6,10])", "all-to-all", "{{0,1},{2,3}}", 240),
        ("f32[6,10]", "collective-permute", "{{0,1},{1,2}}", 240),
        ("f32[6,10]", "all-reduce", "[8,1]<=[8]", 0),
    ],
)
def test_a_device_sends_what_a_ring_sends(types, kind, groups, sent):
    name = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    types = types.replace("]", "]{1,0}")
    assert one(f"r = {types} {kind}(%p), {name}={groups}, to_apply=%add").sent == sent


def test_what_is_started_and_awaited_counts_once():
    lines = [
        "p = f32[6,10]{1,0} parameter(0)",
        "s = (f32[6,10]{1,0}, f32[24,10]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], "
        "dimensions={0}",
        "d = f32[24,10]{1,0} all-gather-done(%s)",
        "a = f32[6,10]{1,0} all-reduce-start(%p), replica_groups=[2,4]<=[8], to_apply=%add",
        "b = f32[6,10]{1,0} all-reduce-done(%a)",
    ]
    found = collectives(program(lines))
    assert [(c.kind, c.shapes, c.times) for c in found] == [
        ("all-gather", ((24, 10),), 1),
        ("all-reduce", ((6, 10),), 1),
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
    assert [c.times for c in collectives(program([loop], LOOP))] == [5]
    assert [c.times for c in collectives(program([known], LOOP))] == [7]
    assert [c.times for c in collectives(program([branch], LOOP))] == [1]
    assert collectives(program(["c = f32[6,10]{1,0} call(%p), to_apply=%quiet"], LOOP)) == []
    with pytest.raises(ValueError, match="how often"):
        collectives(program([loop.replace("%cond", "%quiet")], LOOP))


def test_traffic_of_compiled_products_is_what_is_known_of_it():
    mesh = sharding.make_mesh(2, 2, 2)
    place = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731

    def step(x, w, v):
        hidden = x @ w  # w split over what is summed over: a sum over tensor
        whole = jax.lax.with_sharding_constraint(v, place(None, None))  # a gather over fsdp
        turn = lambda c, _: (jnp.cos(c) @ whole, None)  # noqa: E731
        loop, _ = jax.lax.scan(turn, hidden, length=5)
        add = lambda c, _: (jnp.sin(c + jnp.sum(loop * c)), None)  # noqa: E731
        return loop, jax.lax.scan(add, 1.0, length=3)[0]  # a number a turn

    shapes = (64, 32), (32, 48), (48, 48)
    splits = (("data", "fsdp"), "tensor"), ("tensor", None), ("fsdp", None)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(*axes))
        for shape, axes in zip(shapes, splits, strict=True)
    ]
    found = collectives(jax.jit(step).lower(*arguments).compile().as_text())
    mesh_sizes = dict(mesh.shape)
    sums = {(c.kind, *axes_of(c.devices, mesh_sizes)): 0.0 for c in found}
    for c in found:
        sums[c.kind, *axes_of(c.devices, mesh_sizes)] += c.times * c.sent
    assert sums == {
        ("all-reduce", "tensor"): 2 * (16 * 48 * 4) / 2,
        ("all-gather", "fsdp"): 48 * 48 * 4 / 2,
        ("all-reduce", "data", "fsdp"): 3 * 2 * 4 * 3 / 4,
    }


CHANNEL = "channel_id=7, replica_groups={{0,1,2,3}}"

# As libtpu 0.0.50 writes them: a gather that goes on beside two fusions, and a sum of which each
# device keeps a part.
PROGRAM = f"""HloModule jit_f, num_partitions=4

%start (a: f32[16,64]) -> (f32[16,64], f32[64,64]) {{
  %a = f32[16,64]{{1,0}} parameter(0)
  %all-gather.1 = f32[64,64]{{1,0:T(8,128)}} all-gather(%a), {CHANNEL}, dimensions={{0}}
  ROOT %c = (f32[16,64]{{1,0}}, f32[64,64]{{1,0}}) custom-call(%all-gather.1)
}}

%async_collective_fusion.1 (b: f32[16,64]) -> f32[64,64] {{
  %b = f32[16,64]{{1,0}} parameter(0)
  ROOT %all-gather.2 = f32[64,64]{{1,0:T(8,128)S(1)}} all-gather(%b), {CHANNEL}, dimensions={{0}}
}}

%all-reduce-scatter.3 (d: f32[128,32]) -> f32[32,32] {{
  %d = f32[128,32]{{1,0}} parameter(0)
  %all-reduce.4 = f32[128,32]{{1,0}} all-reduce(%d), channel_id=9, replica_groups={{{{0,1,2,3}}}}
  ROOT %e = f32[32,32]{{1,0}} dynamic-slice(%all-reduce.4, %n, %m), dynamic_slice_sizes={{32,32}}
}}

ENTRY %main (p: f32[16,64], q: f32[128,32]) -> f32[64,64] {{
  %p = f32[16,64]{{1,0}} parameter(0)
  %q = f32[128,32]{{1,0}} parameter(1)
  %s = (f32[16,64]{{1,0}}, f32[64,64]{{1,0}}) fusion(%p), kind=kCustom, calls=%start
  %f = f32[64,64]{{1,0}} fusion(%s), kind=kOutput, calls=%async_collective_fusion.1
  %g = f32[64,64]{{1,0}} fusion(%f), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %h = f32[32,32]{{1,0}} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3
}}
"""


def test_what_goes_on_beside_several_fusions_is_sent_once():
    assert [(c.kind, c.times, c.sent) for c in collectives(PROGRAM)] == [
        ("all-gather", 1, 64 * 64 * 4 * 3 / 4),
        ("reduce-scatter", 1, 128 * 32 * 4 * 3 / 4),
    ]
