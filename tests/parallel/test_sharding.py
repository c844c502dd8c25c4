"""The mesh, the rows of the batch, and the table from name to axes on the real parameters."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.parallel import memory, sharding
from codebook_jax.tasks import limits, pretrain
from configs import base

BERT = Vocabulary(30_522, 0, 101, 102, 103, (0, 100, 101, 102, 103))
# All of them once a run, and each below 2 MB in float32.
WHOLE = {
    "image/positions": 257 * 768,
    "text/positions": 512 * 768,
    "masked_words/bias": 30_522,
    "usage/winners": 2 * 16_384,
    "queue/ids": 65_536,
}


@pytest.fixture(scope="module")
def abstract():
    """The train state of `base` on two data shards, fsdp 2 and tensor 2, as shapes."""
    config = base.get_config("base")
    config.itm.groups = 4
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2)
    return pretrain.Pretraining(config, BERT, mesh).abstract_state()


def test_every_array_of_more_than_ten_thousand_numbers_is_split_or_named_here(abstract):
    split, whole = 0, set()
    for name, leaf in sharding.named(abstract):
        axes = {axis for axis in leaf.sharding.spec if axis is not None}
        if leaf.size <= 10_000:
            continue
        if axes:
            split += 1
            continue
        (known,) = [known for known in WHOLE if name.endswith(known)] or [None]
        assert known is not None, f"{name} {leaf.shape} is whole on every device"
        assert leaf.size == WHOLE[known]
        whole.add(known)
    assert split > 80 and whole == WHOLE.keys()


def test_matrices_of_blocks_are_split_four_ways_alike_in_student_teacher_and_moments(abstract):
    leaves = dict(sharding.named(abstract))
    matrices = [name for name in leaves if "blocks/" in name and name.endswith("/kernel")]
    assert len(matrices) == 15 * 4  # student, teacher, two moments
    for name in matrices:
        spec = leaves[name].sharding.spec
        assert {*spec} == {"fsdp", "tensor", None}, (name, spec)
        assert spec[0] is None, "the first axis counts the layers"
        tower, own = name.split("/blocks/")
        tower = tower.rsplit("/", 1)[-1]
        twins = [other for other in leaves if other.endswith(f"{tower}/blocks/{own}")]
        assert len(twins) == 4 and len({leaves[twin].sharding.spec for twin in twins}) == 1


def test_a_device_holds_about_a_quarter_of_the_state(abstract):
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    # more than a quarter: what is whole, or split over one axis alone
    assert total / 4 < memory.held(abstract) < 1.2 * total / 4


def test_the_table_printed_at_the_start_counts_every_byte_and_names_what_is_split_how(abstract):
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    _, *rows, total = sharding.describe(abstract, mesh).splitlines()
    megabytes = lambda row: float(re.search(r"\d+ +([\d.,]+\.\d\d)", row)[1].replace(",", ""))  # noqa: E731
    assert abs(megabytes(total) - memory.held(abstract) / 1e6) < 0.02
    assert abs(sum(map(megabytes, rows)) - megabytes(total)) < 0.1 and len(rows) < 14
    (words,) = [row for row in rows if row.startswith("- x fsdp   ")]
    assert words.endswith("text/words 30522 x 768")
    student_teacher_and_moments = 4 * 30_522 * 768 * 4 / 2 / 1e6
    assert abs(megabytes(words) - student_teacher_and_moments) < 0.01
    _, whole, _ = sharding.describe(abstract, sharding.make_mesh(-1, 1, 1)).splitlines()
    assert whole.startswith("whole on every device")


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.spec_of("student/codebook/codes", (17, 8), mesh) == P(None, None)
    assert sharding.spec_of("student/codebook/codes", (18, 8), mesh) == P("tensor", None)
    up = "teacher/text/blocks/mlp/up/kernel"
    assert sharding.spec_of(up, (3, 31, 8), mesh) == P(None, None, "tensor")


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 2, 2), (2, 2, 2)),
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 0, 2), (4, 1, 2)),  # an fsdp that nobody chose is one, or what the others leave
        ((2, 0, 1), (2, 4, 1)),
        ((8, 0, -1), (8, 1, 1)),
    ],
)
def test_one_mesh_size_may_be_what_the_others_leave(sizes, shape):
    assert tuple(sharding.make_mesh(*sizes).shape.values()) == shape


def test_a_mesh_is_made_of_the_devices_that_are_given():
    mesh = sharding.make_mesh(-1, 2, 1, devices=jax.devices()[4:])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 1, 1), "config.mesh.data=3, config.mesh.fsdp=1, config.mesh.tensor=1 does not fit 8"),
        ((-1, 3, 1), "config.mesh.fsdp=3, config.mesh.tensor=1 does not fit 8 devices"),
        ((-1, 16, 1), "does not fit 8 devices"),
        ((-1, -1, 1), "config.mesh.data=-1, config.mesh.fsdp=-1"),
        ((0, 1, 8), "config.mesh.data=0"),
        ((-1, 0, -1), "config.mesh.fsdp=0, config.mesh.tensor=-1 .*only fsdp may be 0"),
        ((3, 0, 1), "config.mesh.data=3, config.mesh.fsdp=0, config.mesh.tensor=1 does not fit 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_its_numbers(sizes, words):
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(*sizes)


@pytest.mark.parametrize(
    ("batch", "accumulation", "groups", "words"),
    [
        (15, 1, 3, "global_batch=15 does not split over 8 data shards .*: 16 would"),
        (
            24,
            2,
            8,
            "global_batch=24 does not split over 8 data shards .*accumulation=2: (16|32) would",
        ),
        (32, 2, 8, "accumulation=2 on 8 data shards needs config.itm.groups .* 16, .* 8:"),
        (16, 1, 16, "itm.groups=16 does not split config.data.global_batch=16"),
        (3, 1, 1, "global_batch=3 does not split"),
    ],
)
def test_a_batch_that_does_not_split_is_refused_with_its_numbers(
    batch, accumulation, groups, words
):
    mesh = sharding.make_mesh(8, 1, 1)
    with pytest.raises(UserError, match=words):
        sharding.check_batch(mesh, batch, accumulation)
        limits.check_groups(batch, accumulation, sharding.data_shards(mesh), groups)


def test_batches_that_split_are_accepted():
    mesh = sharding.make_mesh(2, 2, 2)
    for batch, accumulation, groups in [(16, 1, 1), (16, 1, 8), (16, 2, 8), (48, 3, 12)]:
        sharding.check_batch(mesh, batch, accumulation)
        limits.check_groups(batch, accumulation, sharding.data_shards(mesh), groups)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_reads_every_row_once_in_order(sizes):
    rows = sharding.process_rows(sharding.make_mesh(*sizes), 16)
    np.testing.assert_array_equal(rows, np.arange(16))


def test_a_put_batch_is_the_host_rows_in_order_split_over_the_data_axes():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    put = sharding.put_batch({"rows": rows}, mesh)["rows"]
    np.testing.assert_array_equal(put, rows)
    assert {shard.data.shape for shard in put.addressable_shards} == {(4, 3)}


@pytest.mark.parametrize(("sizes", "parts"), [((8, 1, 1), 2), ((2, 2, 2), 3), ((1, 1, 1), 4)])
def test_passes_take_equally_many_rows_of_every_shard_and_join_again_in_order(sizes, parts):
    count = int(np.prod(sizes))
    devices = np.array(jax.devices()[:count]).reshape(sizes)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    shards = sharding.data_shards(mesh)
    rows = np.arange(shards * parts * 2 * 5).reshape(-1, 1, 5)
    put = jax.device_put(rows, sharding.batch_sharding(mesh))
    split = jax.jit(lambda x: sharding.split_rows(x, parts, mesh))
    compiled = split.lower(put).compile()
    passes = compiled(put)
    assert passes.shape == (parts, shards * 2, 1, 5)
    size = len(rows) // shards
    of_shard = np.asarray(passes)[:, :, 0, 0] // 5 // size  # which shard each row came from
    np.testing.assert_array_equal(of_shard, np.tile(np.repeat(np.arange(shards), 2), (parts, 1)))
    join = jax.jit(lambda x: sharding.join_rows(x, mesh))
    np.testing.assert_array_equal(join(passes), rows)
    assert join(passes).sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
    for program in (compiled, join.lower(passes).compile()):
        text = program.as_text()
        for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
            assert f"{word}(" not in text and f"{word}-start(" not in text


def test_a_layer_uses_its_parameters_whole_over_fsdp_and_split_over_tensor():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    block = {
        "attention": {"out": {"kernel": np.zeros((4, 8, 16))}},
        "mlp": {"up": {"kernel": np.zeros((16, 64))}},
    }
    used = jax.jit(lambda tree: sharding.gathered(tree, mesh, in_blocks=True))(block)
    assert used["attention"]["out"]["kernel"].sharding.spec == P("tensor")
    assert used["mlp"]["up"]["kernel"].sharding.spec == P(None, "tensor")
    towers = {"text": {"words": np.zeros((32, 16)), "blocks": block}}
    places = sharding.state_shardings(towers, mesh)
    used = jax.jit(
        lambda tree: sharding.gathered(tree, mesh), in_shardings=(places,), out_shardings=None
    )(towers)
    assert used["text"]["words"].sharding.is_fully_replicated
    kept = used["text"]["blocks"]["mlp"]["up"]["kernel"].sharding
    assert kept.is_equivalent_to(places["text"]["blocks"]["mlp"]["up"]["kernel"], 2)
    assert sharding.gathered(towers, None) is towers


@pytest.mark.parametrize(
    ("groups", "changes", "words"),
    [
        (8, {}, []),
        (
            16,
            {},
            ["itm.groups=16", "global_batch=64", "groups of 4 pairs", "one of 3 others", "128"],
        ),
        (16, {"losses.matching": 0.0}, []),
    ],
)
def test_small_groups_of_negatives_are_warned_of_with_their_numbers(groups, changes, words):
    config = base.paper("tiny")
    config.update_from_flattened_dict({"data.global_batch": 64, "itm.groups": groups} | changes)
    found = " ".join(limits.cautions(config))
    assert bool(found) == bool(words) and all(word in found for word in words)


def test_a_warmup_of_most_steps_is_warned_of():
    config = base.paper("tiny")
    negatives = {"data.global_batch": 64, "itm.groups": 8}
    steps = {"optimizer.warmup_steps": 50, "train.steps": 100}
    config.update_from_flattened_dict(negatives | steps)
    assert limits.cautions(config) == [] == limits.long_warmup(config)
    config.train.steps = 99
    (said,) = limits.long_warmup(config)
    assert limits.cautions(config) == [said] and "warmup_steps=50" in said and "99 steps" in said
