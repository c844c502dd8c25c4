"""JAX's settings change nothing in a run: not its draws, types, checkpoints or exports, nor what an
export computes.
"""

import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import ROOT, config_of
from test_resume import assert_same_run, copy_of, states_of, went_on

import codebook_jax
from codebook_jax import build
from codebook_jax.data.text import Vocabulary
from codebook_jax.method.numerics import key_of
from codebook_jax.parallel import sharding
from codebook_jax.parallel.memory import equations
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.tasks import pretrain
from codebook_jax.tools import export

OTHERS = {  # together, each as far from its default as it goes
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_debug_nans": True,
    "jax_default_matmul_precision": "tensorfloat32",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
}
VOCABULARY = Vocabulary(200, 0, 1, 2, 3, (0, 1, 2, 3))


@pytest.fixture
def set_to():
    """A function that changes JAX's settings; they are restored after the test."""
    before = {name: getattr(jax.config, name) for name in OTHERS}

    def change(settings):
        for name, value in settings.items():
            jax.config.update(name, value)

    yield change
    change(before)


def types_in(jaxpr):
    """The types of everything that a program computes."""
    outputs = (value.aval for equation in equations(jaxpr) for value in equation.outvars)
    return {str(value.dtype) for value in outputs if hasattr(value, "dtype")}


def kinds(tree):
    return {name: np.dtype(leaf.dtype) for name, leaf in sharding.named(tree)}


def test_a_run_that_goes_on_under_other_settings_is_the_straight_run(
    straight, one_device_environment, one_device, tmp_path
):
    workdir = copy_of(straight, tmp_path / "run", newest=10)
    environment = {name.upper(): str(value) for name, value in OTHERS.items()}
    said = went_on(workdir, one_device_environment | environment)
    assert "resuming at step 10 " in said
    assert_same_run(workdir, straight.workdir)
    assert kinds(states_of(workdir)) == kinds(states_of(straight.workdir))


def test_a_run_begins_alike_under_other_settings(set_to):
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
    config, vocabulary = config_of(**{"itm.groups": 1}), VOCABULARY
    plain = pretrain.Pretraining(config, vocabulary, mesh).init_state(3)
    set_to(OTHERS)
    other = pretrain.Pretraining(config, vocabulary, mesh).init_state(3)
    assert kinds(other) == kinds(plain)
    for (name, ours), (_, theirs) in zip(sharding.named(other), sharding.named(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**40 + 3, -1])
def test_a_seed_means_what_it_means_to_jax_under_its_defaults(seed, set_to):
    expected = jax.random.key_data(jax.random.key(seed))
    set_to(OTHERS)
    np.testing.assert_array_equal(jax.random.key_data(key_of(seed)), expected)


@pytest.mark.parametrize(
    ("file", "size", "changes"),
    [
        ("pretrain_4m.py", "base", {}),
        ("albef.py", "base", {}),
        ("paper.py", "tiny", {"codebook.solver": "ipot", "codebook.queue_samples": 64}),
        ("base.py", "tiny", {}),
        ("base.py", "small", {"optimizer.accumulation": 2, "teacher.momentum_ramp": True}),
    ],
)
def test_no_step_computes_in_64_bits(file, size, changes, set_to):
    config = runpy.run_path(str(Path(ROOT) / "configs" / file))["get_config"](size)
    with config.unlocked():
        config.update_from_flattened_dict({"itm.groups": 16, "mesh.fsdp": 1, **changes})
        config.teacher.alpha_steps = 100

    def traced():
        task = build.task_maker(config, VOCABULARY)({})
        program = task.step.trace(task.abstract_state(), task.abstract_batch())
        return kinds(task.abstract_state()), types_in(program.jaxpr.jaxpr)

    types, computed = traced()
    set_to(OTHERS)
    other_types, other_computed = traced()
    assert other_types == types and max(kind.itemsize for kind in types.values()) == 4
    # Places in JAX's masks, and a key of ott's that nothing is drawn with.
    assert other_computed - computed <= {"int64", "key<rbg>"}


def test_an_export_is_the_same_under_other_settings_and_computes_the_same(
    straight, one_device, tmp_path, set_to
):
    def exported(name):
        workdir = shutil.copytree(straight.workdir, tmp_path / name)
        export.export(None, workdir)
        return workdir / "export"

    def computed(folder):
        model = codebook_jax.load(folder)
        pictures = list(np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3)).astype(np.uint8))
        texts = ["a red circle", "a green ring", "a blue star above a moon"]
        features = model.encode_image(pictures), model.encode_text(texts)
        return *features, model.match(pictures, texts), *model.codes(texts=texts, top_k=3)

    plain = exported("plain")
    expected = computed(plain)
    set_to(OTHERS)
    for found, ours in zip(computed(plain), expected, strict=True):
        np.testing.assert_array_equal(found, ours, strict=True)
    arrays, theirs = read_arrays(exported("other") / "student"), read_arrays(plain / "student")
    assert arrays.keys() == theirs.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)
