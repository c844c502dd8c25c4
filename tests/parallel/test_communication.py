"""What the training step sends between devices, against a bound in closed form: an unintended
gather fails here.

The real step is compiled on three meshes; parallel/collectives.py (tested in test_collectives.py)
reads what it sends.
"""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_run import SMALL

from codebook_jax import build
from codebook_jax.data.text import Vocabulary
from codebook_jax.method.assignment import make_plan, sinkhorn
from codebook_jax.method.numerics import unit
from codebook_jax.models import layers
from codebook_jax.models.bert import gather_in_groups
from codebook_jax.parallel import sharding
from codebook_jax.parallel.collectives import axes_of, collectives
from codebook_jax.parallel.memory import QUICK, Memory, held
from codebook_jax.tasks.draws import Pair
from configs import base

DEVICES, WORDS, ROWS, TOKENS, PATCHES = 8, 211, 24, 26, 25
TEXT, WIDTH, DIM, CODES, QUEUE = 23, 32, 16, 56, 112
ITERATIONS = 7
CHANGES = {
    "data.global_batch": ROWS,
    "model.image.size_px": 40,
    "model.text.max_tokens": TEXT,
    "model.remat": "blocks",
    "codebook.size": CODES,
    "codebook.iterations": ITERATIONS,
    "queue.size": QUEUE,
}


def sent_on(data, fsdp, tensor, changes=None):
    """What the step sends on a mesh, with the shapes of the parameters."""
    config = base.paper("tiny")
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    config.update_from_flattened_dict(SMALL | CHANGES | sizes | (changes or {}))
    make = build.task_maker(config, Vocabulary(WORDS, 0, 1, 2, 3, (0, 1, 2, 3)))
    task, program, need, _ = Memory(make, math.inf, planned=True).compile(make({}))
    state = task.abstract_state()
    return SimpleNamespace(
        mesh=dict(task.mesh.shape),
        found=collectives(program.as_text()),
        student=state.student,
        state=held(state),
        need=need,
    )


@pytest.fixture(scope="module")
def by_data():
    return sent_on(8, 1, 1)


@pytest.fixture(scope="module")
def by_fsdp():
    return sent_on(1, 8, 1)


@pytest.fixture(scope="module")
def by_all():
    return sent_on(2, 2, 2)


PARTS = ("by_data", "by_fsdp", "by_all")
ROWS_SPLIT = P(("data", "fsdp"))
# Of what is gathered or shared out, a device sends this share; of what is summed, twice.
RING = (DEVICES - 1) / DEVICES


def bytes_of(leaf):
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def parameter_bytes(sent, *, only=lambda name, leaf: True):
    return sum(bytes_of(leaf) for name, leaf in sharding.named(sent.student) if only(name, leaf))


def is_split(name, leaf):
    return "fsdp" in leaf.sharding.spec


def rows_carried(sent):
    """Collectives between data shards that carry states of tokens, by the length of two axes."""
    counts = (TOKENS, PATCHES, TEXT)

    def states(shape):
        of_tokens = [size for size in shape if size and any(size % count == 0 for count in counts)]
        others = list(shape)
        for size in of_tokens:
            others.remove(size)
        more_than_a_row = math.prod(shape) > TOKENS * WIDTH  # which position embeddings are
        return bool(of_tokens) and more_than_a_row and any(size % DIM == 0 for size in others)

    between = [c for c in sent.found if {"data", "fsdp"} & set(axes_of(c.devices, sent.mesh))]
    return [c for c in between if any(map(states, c.shapes))]


def total(found):
    return sum(c.sent * c.times for c in found)


def of_part(sent, name):
    return [c for c in sent.found if f"({name})" in c.where or f"/{name}/" in c.where]


def compiled(function, mesh, *arguments):
    """What a function sends whose arrays have their rows (first axis) split over data shards."""
    text = jax.jit(function).lower(*arguments).compile(compiler_options=QUICK).as_text()
    return SimpleNamespace(mesh=dict(mesh.shape), found=collectives(text), student={})


def rows_of(mesh, *shape, spec=ROWS_SPLIT):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize("mesh", PARTS)
def test_memory_counts_the_state_and_two_batches_exactly(mesh, request):
    sent = request.getfixturevalue(mesh)
    assert sent.state <= sent.need.state < 1.02 * sent.state  # the metrics
    row = 2 * 40 * 40 * 3 + 1 + 4 * (TEXT + 4)
    shards = sent.mesh["data"] * sent.mesh["fsdp"]
    assert sent.need.batches == 2 * row * ROWS / shards  # the next one is on the device too


@pytest.mark.parametrize("mesh", PARTS)
def test_no_states_of_tokens_leave_their_data_shard(mesh, request):
    assert rows_carried(request.getfixturevalue(mesh)) == []


def test_states_of_tokens_that_leave_their_data_shard_are_seen():
    mesh = sharding.make_mesh(8, 1, 1)
    states = rows_of(mesh, ROWS, TOKENS, WIDTH)
    at = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=NamedSharding(mesh, P("data")))
    own = compiled(lambda x, at: gather_in_groups(x, at, DEVICES), mesh, states, at)
    across = compiled(lambda x, at: gather_in_groups(x, at, 1), mesh, states, at)
    assert rows_carried(own) == [] and rows_carried(across)


def test_copies_of_the_parameters_are_never_gathered(by_data):
    shapes = {leaf.shape for _, leaf in sharding.named(by_data.student) if len(leaf.shape) > 1}
    gathers = [c for c in by_data.found if c.kind != "all-reduce"]
    assert [c for c in gathers if shapes & set(c.shapes)] == []


def gradient_bytes(sent):
    """Each parameter once, but twice if used twice: word embeddings, and the cross-attention to own
    and other images.
    """
    looked = lambda name, leaf: "cross/query" in name or "cross/out" in name  # noqa: E731
    looks = parameter_bytes(sent, only=looked)
    return parameter_bytes(sent) + looks + WORDS * WIDTH * 4


def vector_bytes():
    """Sums of the metrics, at most one number per codeword; and of the losses, some per pair, at
    most its features.
    """
    return 4 * (2 * DIM + 4 * CODES + 128) + 4 * ROWS * (2 * 2 * DIM + 20)


def test_data_shards_sum_their_gradients_and_little_else(by_data):
    found = total(c for c in by_data.found if c.kind == "all-reduce")
    assert found <= 2 * RING * (gradient_bytes(by_data) + vector_bytes())
    assert found >= 2 * RING * parameter_bytes(by_data)


def test_data_shards_gather_features_and_draws_for_the_queue_and_the_words_to_hide(by_data):
    others = [
        c for c in by_data.found if c.kind != "all-reduce" and c not in of_part(by_data, "compare")
    ]
    slots = TEXT // 4
    assert total(others) <= RING * 4 * ROWS * (2 * DIM + TEXT + 3 * slots + 6)


@pytest.mark.parametrize("mesh", PARTS[:2])
def test_the_losses_of_features_gather_features_alone(mesh, request):
    sent = request.getfixturevalue(mesh)
    features = 2 * 4 * ROWS * DIM
    mask = 2 * 2 * ROWS * (ROWS + QUEUE) / DEVICES  # candidates of each, put in order twice
    assert total(c for c in of_part(sent, "compare") if c.kind != "all-reduce") <= features + mask


def test_parameters_split_over_fsdp_are_gathered_for_teacher_student_and_recompute_once_each(
    by_fsdp,
):
    split = parameter_bytes(by_fsdp, only=is_split)
    in_blocks = parameter_bytes(by_fsdp, only=lambda *at: is_split(*at) and "blocks/" in at[0])
    shapes = {leaf.shape for name, leaf in sharding.named(by_fsdp.student) if is_split(name, leaf)}
    gathers = [c for c in by_fsdp.found if c.kind == "all-gather" and c.shapes[0] in shapes]
    assert total(gathers) == pytest.approx(RING * (2 * split + in_blocks), rel=0.02)


def test_fsdp_sums_each_gradient_once(by_fsdp):
    sums = total(c for c in by_fsdp.found if c.kind in ("all-reduce", "reduce-scatter"))
    assert sums <= 2 * RING * (gradient_bytes(by_fsdp) + vector_bytes())


@pytest.mark.parametrize("mesh", PARTS)
def test_each_device_solves_a_small_transport_without_the_others(mesh, request):
    sent = request.getfixturevalue(mesh)
    assert [c for c in of_part(sent, "assign") if c.times > 1] == []
    assert sum(c.times for c in of_part(sent, "assign")) <= 4  # features, codewords


def test_an_iteration_of_both_large_transports_is_two_sums_over_the_shards(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    inside = [c for c in of_part(sent_on(8, 1, 1), "assign") if c.times > 1]
    assert [(c.kind, c.times) for c in inside] == [("all-reduce", ITERATIONS)] * 2
    assert {shape for c in inside for shape in c.shapes} == {(2, CODES)}


def test_the_plan_of_each_device_alone_is_that_of_all_together(monkeypatch):
    config = base.paper("tiny")
    config.update_from_flattened_dict(SMALL | CHANGES | {"mesh.data": 8})
    task = build.task_maker(config, Vocabulary(WORDS, 0, 1, 2, 3, (0, 1, 2, 3)))({})
    draw = np.random.default_rng(0)
    of = lambda *shape: np.asarray(draw.normal(size=shape), np.float32)  # noqa: E731
    features = jax.device_put(
        Pair(of(ROWS, DIM), of(ROWS, DIM)), sharding.batch_sharding(task.mesh)
    )
    features = jax.tree.map(unit, features)
    state = SimpleNamespace(student={"codebook": {"codes": of(CODES, DIM)}}, running=None)
    plans = []
    for size in (sharding.SMALL_BYTES, 0):
        monkeypatch.setattr(sharding, "SMALL_BYTES", size)
        plans.append(jax.jit(lambda features: task.assign(features, state))(features))
    alone, together = plans
    assert alone.sharding.is_fully_replicated and not together.sharding.is_fully_replicated
    np.testing.assert_allclose(alone, together, rtol=1e-4)


def test_two_transports_together_send_as_often_as_one():
    mesh = sharding.make_mesh(8, 1, 1)
    assign = sinkhorn(epsilon=0.05, iterations=ITERATIONS)
    solve = lambda cost: make_plan(cost, assign)  # noqa: E731
    count = lambda sent: sum(c.times for c in sent.found if c.times > 1)  # noqa: E731
    both = rows_of(mesh, 2, ROWS, CODES, spec=P(None, ("data", "fsdp")))
    one = rows_of(mesh, ROWS, CODES)
    assert count(compiled(solve, mesh, both)) == count(compiled(solve, mesh, one)) == 2 * ITERATIONS
    apart = compiled(lambda a, b: (solve(a), solve(b)), mesh, one, one)
    assert count(apart) == 4 * ITERATIONS


def attention_over(tensor):
    """The gradient of an attention with 4 heads of 8, compiled for a `tensor` axis of that size."""
    mesh = sharding.make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    spec = SimpleNamespace(width=WIDTH, heads=4, init_std=0.02)
    compute = layers.Compute(jnp.dtype("float32"), "none", 1, "xla", mesh)
    make = lambda: layers.SelfAttention(spec, compute, nnx.Rngs(0), value_std=0.02)  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(lambda: layers.stack(lambda _: make(), 1, nnx.Rngs(0))))
    state = {"blocks": {"attention": nnx.to_pure_dict(state)}}
    places = sharding.state_shardings(state, mesh)
    kinds = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    state = jax.tree.map(kinds, state, places)

    def loss(state, x):
        own = jax.tree.map(lambda leaf: leaf[0], state["blocks"]["attention"])
        return jnp.sum(jnp.sin(nnx.merge(graph, nnx.State(own))(x, None)))

    x = rows_of(mesh, ROWS, TOKENS, WIDTH)
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(places, x.sharding))
    return gradient.lower(state, x).compile(compiler_options=QUICK)


def test_attention_splits_its_work_over_tensor_and_never_holds_queries_keys_and_values_in_one():
    whole, half = attention_over(1), attention_over(2)
    assert half.cost_analysis()["flops"] < 0.52 * whole.cost_analysis()["flops"]
    assert (
        half.memory_analysis().temp_size_in_bytes
        < 0.65 * whole.memory_analysis().temp_size_in_bytes
    )
    assert {c.kind for c in collectives(half.as_text())} == {"all-reduce"}
    arrays = re.findall(r"\w+\[([\d,]+)\]", whole.as_text())
    sizes = {math.prod(map(int, shape.split(","))) for shape in arrays}
    assert ROWS * TOKENS * WIDTH in sizes and 3 * ROWS * TOKENS * WIDTH not in sizes
