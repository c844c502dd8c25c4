"""What a fine-tuning starts with: which weights become which, and those that are refused."""

import shutil

import jax
import numpy as np
import pytest
from golden_weights import one_mesh
from orbax.checkpoint import StandardCheckpointer
from small_finetune import config_of
from weight_file import assert_same

import codebook_jax
from codebook_jax import build
from codebook_jax.data import text
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, write_json
from codebook_jax.parallel import sharding
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.weights import start
from codebook_jax.weights.fill import fitted_positions

TWO = ("first", "second")


def begun(task, folder, **changes):
    """(the config with what it adopts, its task, its first parameters by name, the table)"""
    config = config_of(task, init=f"model:{folder}", **changes)
    kind = build.task_class(config)
    parts = start.read_start(config, kind.adopts)
    config = start.adopted(config, parts, None, kind.adopts)
    tokenizer, _ = text.open_tokenizer("", folder, None, 0)
    made = kind(config, tokenizer.vocabulary, one_mesh())
    first = start.initial(parts, config, made.abstract_state(), made.pretrained)
    return config, made, first.arrays, first.report


def refused(task, folder, **changes):
    with pytest.raises(UserError) as caught:
        begun(task, folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def before(pretrained):
    """The arrays of the export: {"student/...", "teacher/..."}"""
    return {
        f"{item}/{name}": array
        for item in ("student", "teacher")
        for name, array in read_arrays(pretrained / item).items()
    }


def as_export_of(task, folder, pretrained):
    """The export, said to be of another task."""
    shutil.copytree(pretrained, folder)
    manifest = parse_json((folder / "export.json").read_bytes())
    record = parse_json((folder / "config.json").read_bytes())
    write_json(folder / "export.json", manifest | {"task": task})
    write_json(folder / "config.json", record | {"config": record["config"] | {"task": task}})
    return folder


def test_encoders_and_their_teacher_start_as_those_of_the_export(pretrained, before):
    _, made, arrays, report = begun("entailment", pretrained)
    names = [name for name, _ in sharding.named(made.abstract_state())]
    of_student = {n: a for n, a in arrays.items() if n.startswith("student/")}
    assert_same(of_student, {name: before[name] for name in of_student})
    for name in names:
        if name.startswith("teacher/towers/"):
            theirs = before["teacher/" + name.removeprefix("teacher/towers/")]
            np.testing.assert_array_equal(arrays[name], theirs, err_msg=name)
    parted = "towers/text/blocks/mlp/up/kernel"
    assert np.abs(arrays[f"student/{parted}"] - arrays[f"teacher/{parted}"]).max() > 0
    assert not [name for name in arrays if "/head/" in name]
    assert "teacher: loaded" in report and "head" in report.split("newly initialised")[1]


def test_without_a_teacher_in_the_export_it_is_a_copy_of_the_student(pretrained, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(pretrained, folder)
    shutil.rmtree(folder / "teacher")
    *_, arrays, report = begun("entailment", folder)
    names = [n.removeprefix("student/") for n in arrays if n.startswith("student/")]
    assert names and "teacher: a copy of the student" in report
    for name in names:
        np.testing.assert_array_equal(arrays[f"teacher/{name}"], arrays[f"student/{name}"])


def test_both_blocks_of_two_pictures_and_the_decoder_start_as_the_fusion_encoder(
    pretrained, before
):
    *_, arrays, report = begun("nlvr2", pretrained)
    assert "warning: nlvr2 usually starts from a run of --config.task=text_assignment" in report
    found = 0
    for name, array in before.items():
        if "student/towers/fusion/blocks/" in name:
            for block in TWO:
                ours = name.replace("fusion/blocks/", f"fusion/blocks/{block}/")
                if ours in arrays:
                    np.testing.assert_array_equal(arrays[ours], array, err_msg=ours)
                    found += 1
    assert found > 30
    _, made, arrays, _ = begun("vqa", pretrained)
    decoder = [n for n, _ in sharding.named(made.abstract_state()) if "student/decoder/" in n]
    parts = {"blocks": "fusion/blocks", "output": "masked_words"}
    for name in decoder:
        part, _, rest = name.removeprefix("student/decoder/").partition("/")
        theirs = f"{parts[part]}/{rest}" if part in parts else f"text/{part}/{rest}".rstrip("/")
        np.testing.assert_array_equal(arrays[name], before[f"student/towers/{theirs}"], name)
        teacher = name.replace("student/", "teacher/")
        np.testing.assert_array_equal(arrays[teacher], before[f"teacher/{theirs}"], teacher)
    assert len(decoder) > 20


def test_stem_pool_patches_and_dim_are_those_of_the_export(pretrained):
    config, *_ = begun("entailment", pretrained)
    recipe = config_of("entailment")
    assert (recipe.model.image.stem, recipe.model.pool) == ("conv", "mean")  # else nothing is shown
    model = config.model
    assert (model.image.stem, model.pool, model.image.patch_px, model.dim) == (
        "patch",
        "cls",
        8,
        16,
    )


def test_larger_pictures_get_resized_positions(pretrained, before):
    _, made, arrays, report = begun("entailment", pretrained, **{"model.image.size_px": 48})
    name = "student/towers/image/positions"
    shape = dict(sharding.named(made.abstract_state()))[name].shape
    assert before[name].shape[1] == 1 + 4**2 and shape[1] == 1 + 6**2
    expected, note = fitted_positions(before[name], shape)
    np.testing.assert_array_equal(arrays[name], expected)
    # a smooth map stays one: its mean changes little, and [CLS] not at all
    np.testing.assert_array_equal(arrays[name][0, 0], before[name][0, 0])
    assert note == "4x4 to 6x6 patches, bicubic" and note in report


def test_another_size_or_the_export_of_another_task_is_refused_in_one_sentence(
    pretrained, tmp_path
):
    said = refused("entailment", pretrained, size="small")
    assert "is of size tiny, but this config of small" in said and "configs/FILE.py:tiny" in said
    folder = as_export_of("vqa", tmp_path / "vqa", pretrained)
    said = refused("entailment", folder)
    assert "is of config.task='vqa', but 'entailment' starts from pre-trained weights" in said


def test_loading_the_stage_before_comparisons_says_what_it_is_for(pretrained, tmp_path):
    folder = as_export_of("text_assignment", tmp_path / "stage", pretrained)
    with pytest.raises(UserError) as caught:
        codebook_jax.load(folder)
    said = str(caught.value)
    assert "the stage before NLVR2" in said and f"--config.init=model:{folder}" in said
    assert "install" not in said


def test_comparisons_go_on_with_what_text_assignment_has_learned_but_for_its_head(
    pretrained, tmp_path
):
    _, stage, *_ = begun("text_assignment", pretrained)
    folder = as_export_of("text_assignment", tmp_path / "stage", pretrained)
    parameters = stage.init_parameters(7)
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "teacher")
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "student", parameters)
    *_, arrays, report = begun("nlvr2", folder)
    assert "warning" not in report
    learned = {f"student/{name}": np.asarray(x) for name, x in sharding.named(parameters)}
    found = {name: arrays[name] for name in arrays if name.startswith("student/")}
    towers = {name: x for name, x in learned.items() if "/towers/" in name}
    assert towers.keys() <= found.keys()
    assert_same({name: found[name] for name in towers}, towers)
    assert "student/head/classes/kernel" not in found  # three labels there, two here
    two = [jax.tree.leaves(parameters["towers"]["fusion"]["blocks"][block]) for block in TWO]
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*two, strict=True))
