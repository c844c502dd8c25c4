"""Towers as a run's start: the report of loaded, resized, new and ignored parameters, and
refusals.
"""

import json
import runpy
import shutil

import jax
import numpy as np
import pytest
from golden_weights import (
    GOLDENS,
    ROOT,
    VOCABULARY,
    WORDS,
    one_mesh,
    refusal,
    started,
    towers_config,
)
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from weight_file import assert_same

from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from codebook_jax.weights import start
from codebook_jax.weights.fill import fitted_positions


@pytest.fixture
def changed(tmp_path):
    """A copy of a golden's folder with its tensors changed; the folder."""

    def change(name, edit):
        folder = tmp_path / name
        shutil.copytree(GOLDENS / name, folder)
        arrays = load_file(folder / "model.safetensors")
        edit(arrays)
        save_file(arrays, folder / "model.safetensors")
        return folder

    return change


# -- forms of config.init


def test_init_names_parts():
    assert start.specs("random") == {}
    assert start.specs("image:a/b,text:c@main") == {"image": "a/b", "text": "c@main"}
    assert start.specs("image:random, text:c") == {"text": "c"}
    assert start.specs("model:runs/first") == {"model": "runs/first"}


@pytest.mark.parametrize(
    "init",
    [
        "",
        "image:a",
        "bert-base-uncased",
        "image:a,image:b",
        "image:a,text:b,text:c",
        "image:,text:a",
        "model:a,text:b",
    ],
)
def test_an_init_that_says_nothing_clear_is_refused(init):
    with pytest.raises(UserError, match=f"config.init='{init}' .*model:SPEC, .*image:SPEC"):
        start.specs(init)


def test_the_papers_recipe_starts_from_a_deit_and_a_bert_unless_it_is_told_random(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    get_config = runpy.run_path(str(ROOT / "configs" / "pretrain_4m.py"))["get_config"]
    config = get_config()
    assert set(start.specs(config.init)) == {"image", "text"}
    with pytest.raises(UserError, match="--config.init=random"):
        start.read_start(config)  # there is no hub here
    config.init = "random"
    assert start.read_start(config) == ()
    assert (config.train.steps, config.data.global_batch) == (298_828, 512)
    with pytest.raises(ValueError, match="not 'tiny'"):
        get_config("tiny")


# -- two towers


def test_the_table_says_what_was_loaded_resized_new_and_ignored():
    config = towers_config(**{"model.image.size_px": 49})
    config, first = started(config)
    rows = {line[:17].strip(): line[18:] for line in first.report.splitlines()}
    assert rows["resized"].split() == "1 1,500 image/positions 4x4 to 7x7 patches, bicubic".split()
    new = rows["newly initialised"]
    for part in ("cross", "image_projection", "text_projection", "matching", "codebook"):
        assert part in new
    assert "image/blocks" in rows["loaded"] and "masked_words" in rows["loaded"]
    assert "pooler (4: image pooler.dense.bias, ...), next-sentence head (2: " in rows["ignored"]
    assert "a copy of the student" in first.report
    assert len(first.report.splitlines()) < 10  # never a wall of keys
    student = pretrain.Pretraining(config, VOCABULARY, one_mesh()).abstract_state().student
    counts = [int(rows[kind].split()[0]) for kind in ("loaded", "resized", "newly initialised")]
    assert sum(counts) == len(jax.tree.leaves(student))


def test_epsilons_are_those_of_the_weights_also_when_a_run_goes_on_without_the_files():
    config, _ = started(towers_config("deit", **{"model.image.layer_norm_eps": 1e-6}))
    assert config.model.image.layer_norm_eps == 1e-12 and config.model.text.layer_norm_eps == 1e-12
    config, _ = started(towers_config())
    assert config.model.image.layer_norm_eps == 1e-5
    again = towers_config(**{"model.image.layer_norm_eps": 1e-6})
    record = {"config": config.to_dict()}
    assert start.adopted(again, (), record).model.image.layer_norm_eps == 1e-5
    again.init = "random"  # using a run does not need its config.init
    assert start.adopted(again, (), record).model.image.layer_norm_eps == 1e-5
    del record["config"]["init"]  # a run older than config.init
    assert start.adopted(again, (), record).model.image.layer_norm_eps == 1e-6


def test_a_state_is_placed_on_eight_devices_and_its_teacher_is_a_copy():
    config, first = started(towers_config())
    task = pretrain.Pretraining(config, VOCABULARY, one_mesh(8))
    state = task.init_state(0)
    fresh = dict(sharding.named(jax.device_get(state)))
    placed = start.placed(state, first.arrays)
    jax.tree.map(lambda new, old: new.sharding == old.sharding or pytest.fail(), placed, state)
    found = dict(sharding.named(jax.device_get(placed)))
    weights = load_file(GOLDENS / "bert" / "model.safetensors")
    words = weights["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(found["student/towers/text/words"], words)
    for name, value in found.items():
        expected = first.arrays.get(name, fresh[name])
        np.testing.assert_array_equal(value, expected, err_msg=name)
        if name.startswith("teacher/"):  # what is new too
            np.testing.assert_array_equal(value, found[f"student/towers/{name[8:]}"], err_msg=name)


# -- what does not fit


def test_one_tensor_missing_is_named_and_may_be_started_anew(changed):
    key = "bert.encoder.layer.3.output.dense.bias"
    folder = changed("bert", lambda arrays: arrays.pop(key))
    config = towers_config(init=f"image:{GOLDENS / 'vit'},text:{folder}")
    sentence = refusal(config)
    assert f"lacks {key} (1 of 90 tensors)" in sentence
    assert "--config.init_allow_partial=true" in sentence
    config.init_allow_partial = True
    _, first = started(config)
    assert "student/towers/fusion/blocks/mlp/down/bias" not in first.arrays  # its layer 1 of three
    assert "student/towers/fusion/blocks/mlp/down/kernel" in first.arrays
    assert "fusion/blocks/mlp/down/bias" in first.report
    left = "text bert.encoder.layer.2.output.dense.bias"
    assert f"part of an incomplete parameter (2: {left}, ...)" in first.report


def test_one_tensor_too_many_outside_the_tower_is_named_as_ignored(changed):
    extra = {"decoder.weight": np.ones(3, np.float32)}
    folder = changed("vit", lambda arrays: arrays.update(extra))
    _, first = started(towers_config(init=f"image:{folder},text:{GOLDENS / 'bert'}"))
    assert "not of this model (image decoder.weight)" in first.report


def alone(name, folder):
    return f"text:{folder},image:random" if name == "bert" else f"image:{folder},text:random"


STRANGE = "encoder.layer.1.layer_scale.lambda1"
TURNED = "bert.encoder.layer.0.intermediate.dense.weight"
TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("name", "key", "edit", "told"),
    [
        ("vit", STRANGE, lambda none: np.ones(30, np.float32), "has {key}, which this model does"),
        ("bert", TURNED, lambda array: array.T.copy(), "{key} has shape [36, 70], .* [70, 36] "),
        (
            "bert",
            TABLE,
            lambda array: np.resize(array, (99, 36)),
            "{key} has shape [99, 36], but the tokenizer",
        ),
        ("vit", "layernorm.weight", lambda array: array * np.nan, "{key} holds values that are"),
        ("vit", "layernorm.bias", lambda array: array.astype(int), "{key} holds int64, not "),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_both_sides(changed, name, key, edit, told):
    folder = changed(name, lambda arrays: arrays.update({key: edit(arrays.get(key))}))
    sentence = refusal(towers_config(init=alone(name, folder)))
    assert all(part in sentence for part in told.format(key=key, WORDS=WORDS).split(".*"))


def test_384_pixels_from_224_are_resized_and_other_patches_refused():
    positions = np.random.default_rng(0).normal(size=(1, 197, 5)).astype(np.float32)
    resized, note = fitted_positions(positions, (1, 577, 5))
    assert resized.shape == (1, 577, 5) and note == "14x14 to 24x24 patches, bicubic"
    config = towers_config(**{"model.image.patch_px": 14, "model.image.size_px": 28})
    sentence = refusal(config)
    assert "[30, 3, 7, 7], " in sentence and " [30, 3, 14, 14] " in sentence


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("model.text.heads", 2, "text:.* 3 heads, .*config.model.text.heads=2"),
        ("model.image.heads", 3, "image:.* 5 heads, .*config.model.image.heads=3"),
        ("model.text.fusion_depth", 2, "5 layers, .*text.depth . fusion_depth asks for 4"),
        ("model.image.depth", 4, "3 layers, .*config.model.image.depth asks for 4"),
        ("model.image.width", 40, r"\[30\], .*config.model .*\[40\]"),
        ("model.text.max_positions", 30, r"\[24, 36\], .*config.model .*\[30, 36\]"),
    ],
)
def test_sizes_that_differ_are_named_on_both_sides(field, value, told):
    with pytest.raises(UserError, match=told):
        started(towers_config(**{field: value}))


def test_a_file_with_more_layers_than_the_model_is_refused_whatever_may_be_missing():
    config = towers_config(**{"model.image.depth": 2, "init_allow_partial": True})
    sentence = refusal(config)
    assert "3 layers, " in sentence and "config.model.image.depth asks for 2" in sentence
    config.model.image.depth = 4  # fewer layers are allowed: all blocks are initialised
    _, first = started(config)
    assert not any(name.startswith("student/towers/image/blocks") for name in first.arrays)
    assert "part of an incomplete parameter (" in first.report


def test_a_lone_file_has_the_tokenizer_beside_it(tmp_path):
    shutil.copy(GOLDENS / "bert" / "model.safetensors", tmp_path / "bert.safetensors")
    config = towers_config(init=f"image:random,text:{tmp_path / 'bert.safetensors'}")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # no words in them
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer beside it"):
        start.tokenizer_of(config, start.read_start(config))
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    assert start.tokenizer_of(config, start.read_start(config)) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("bert", "hidden_act", "relu"),
        ("bert", "model_type", "roberta"),
        ("bert", "position_embedding_type", "relative_key"),
        ("vit", "model_type", "beit"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_config(name, field, value, changed):
    folder = changed(name, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    assert f"{field}={value!r}" in refusal(towers_config(init=alone(name, folder)))


def test_towers_in_each_others_place_are_refused():
    for init, known in (
        (f"image:{GOLDENS / 'bert'},text:random", ("ViT", "Hugging Face", "timm")),
        (f"image:random,text:{GOLDENS / 'vit'}", ("BERT", "attention.self.query")),
        (f"model:{GOLDENS / 'bert'}", ("ALBEF", "visual_encoder", "a run or export")),
    ):
        sentence = refusal(towers_config(init=init))
        assert f"{GOLDENS}" in sentence and all(name in sentence for name in known), sentence


def test_norms_with_tensorflows_names_are_norms(changed):
    def rename(arrays):
        for key in [key for key in arrays if ".LayerNorm." in key]:
            new = key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            arrays[new] = arrays.pop(key)

    folder = changed("bert", rename)
    _, first = started(towers_config(init=f"image:random,text:{folder}"))
    _, plain = started(towers_config(init=f"image:random,text:{GOLDENS / 'bert'}"))
    assert_same(first.arrays, plain.arrays)
