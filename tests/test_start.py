"""Public weights as a run's start: what is loaded, resized, new and ignored is said, and what does not fit is refused."""

import json
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file
from test_albef import GOLDEN, ROOT, albef_config
from test_towers import GOLDENS, IMAGES, TEXT, WORDS

from codebook_jax import build, evaluate, export, sharding, train
from codebook_jax.checkpoint import Checkpoints, read_arrays
from codebook_jax.checks import check
from codebook_jax.data import text
from codebook_jax.data.text import Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.pretrained import start
from codebook_jax.pretrained.fill import fitted_positions
from codebook_jax.tasks import pretrain

pytestmark = pytest.mark.usefixtures("programs_that_compile_fast")
VOCABULARY = Vocabulary(WORDS, 0, 2, 3, 4, (0, 1, 2, 3, 4))


def towers_config(image="vit", **changes):
    """The sizes of the goldens' towers, with config.init naming them."""
    config = albef_config(sizes())
    with config.unlocked():
        config.model.image.update(IMAGES[image])
        config.model.text.update(TEXT)
        config.init = f"image:{GOLDENS / image},text:{GOLDENS / 'bert'}"
        config.update_from_flattened_dict(changes)
    return config


def sizes():
    with np.load(GOLDEN) as stored:
        return json.loads(stored["config_json"].tobytes())


def one_mesh(devices=1):
    kinds = (AxisType.Auto,) * 3
    shape = (devices // 2 or 1, min(devices, 2), 1)
    return Mesh(np.array(jax.devices()[:devices]).reshape(shape), sharding.AXES, axis_types=kinds)


def started(config, vocabulary=VOCABULARY):
    """The config as a run would have it, and what it would start with."""
    read = start.read_start(config)
    config = start.adopted(config, read, None)
    task = pretrain.create(config, vocabulary, one_mesh())
    return config, start.initial(read, config, task.abstract_state())


def refusal(config, vocabulary=VOCABULARY):
    with pytest.raises(UserError) as caught:
        started(config, vocabulary)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


# -- what config.init can say


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("random", {}),
        ("image:a/b,text:c@main", {"image": "a/b", "text": "c@main"}),
        ("image:random, text:c", {"text": "c"}),
        ("model:runs/first", {"model": "runs/first"}),
    ],
)
def test_init_names_parts(init, expected):
    assert start.specs(init) == expected


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ("", "config.init is empty"),
        ("image:a", "names no text tower: add text:SPEC, or text:random"),
        ("text:a", "names no image tower"),
        ("bert-base-uncased", "cannot be read at 'bert-base-uncased'"),
        ("image:a,image:b", "cannot be read at 'image:b'"),
        ("image:,text:a", "cannot be read at 'image:'"),
        ("model:a,text:b", "names a whole model and a tower besides"),
    ],
)
def test_an_init_that_says_nothing_clear_is_refused_before_anything_is_built(init, told):
    config = towers_config(init=init)
    with pytest.raises(UserError, match=told):
        check(config)


def test_the_papers_recipe_starts_from_a_deit_and_a_bert_unless_it_is_told_random():
    module = runpy.run_path(str(Path(__file__).parent.parent / "configs" / "pretrain_4m.py"))
    config = module["get_config"]()
    assert set(start.specs(config.init)) == {"image", "text"}
    with pytest.raises(UserError, match="--config.init=random starts from nothing"):
        start.read_start(config)  # there is no hub here
    config.init = "random"
    assert start.read_start(config) is None
    assert (config.train.steps, config.data.global_batch, config.model.image.size_px) == (298_828, 512, 256)
    with pytest.raises(ValueError, match="not 'tiny'"):
        module["get_config"]("tiny")


# -- two towers


def test_the_table_says_what_was_loaded_resized_new_and_ignored():
    config = towers_config(**{"model.image.size_px": 49})
    config, first = started(config)
    rows = {line[:17].strip(): line[18:] for line in first.report.splitlines()}
    assert rows["resized"].split() == "1 1,500 image/positions 4x4 to 7x7 patches, bicubic".split()
    new = rows["newly initialised"]
    for part in ("cross", "image_projection", "text_projection", "matching", "codebook", "temperature"):
        assert part in new
    assert "image/blocks" in rows["loaded"] and "masked_words" in rows["loaded"]
    assert "pooler (4: image pooler.dense.bias, ...), next-sentence head (2: text cls.seq_" in rows["ignored"]
    assert "a copy of the student" in first.report
    assert len(first.report.splitlines()) < 10  # never a wall of keys
    shapes = {name: leaf.shape for name, leaf in sharding.named(pretrain.create(config, VOCABULARY, one_mesh()).abstract_state())}
    counts = [int(rows[kind].split()[0]) for kind in ("loaded", "resized", "newly initialised")]
    assert sum(counts) == sum(name.startswith("student/") for name in shapes)


def test_epsilons_are_those_of_the_weights():
    config, _ = started(towers_config("deit", **{"model.image.layer_norm_eps": 1e-6}))
    assert config.model.image.layer_norm_eps == 1e-12 and config.model.text.layer_norm_eps == 1e-12


def test_a_state_is_placed_on_eight_devices_and_its_teacher_is_a_copy():
    config, first = started(towers_config())
    task = pretrain.create(config, VOCABULARY, one_mesh(8))
    state = task.init_state(0)
    fresh = dict(sharding.named(jax.device_get(state)))
    placed = start.placed(state, first.arrays)
    jax.tree.map(lambda new, old: new.sharding == old.sharding or pytest.fail(), placed, state)
    found = dict(sharding.named(jax.device_get(placed)))
    words = load_file(GOLDENS / "bert" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(found["student/towers/text/words"], words)
    for name, value in found.items():
        if name in first.arrays:
            np.testing.assert_array_equal(value, first.arrays[name], err_msg=name)
        else:
            np.testing.assert_array_equal(value, fresh[name], err_msg=name)
        if name.startswith("teacher/"):  # what is new too
            np.testing.assert_array_equal(value, found[f"student/towers/{name[8:]}"], err_msg=name)


# -- what does not fit


def test_one_tensor_missing_is_named_and_may_be_started_anew(changed):
    key = "bert.encoder.layer.3.output.dense.bias"
    folder = changed("bert", lambda arrays: arrays.pop(key))
    config = towers_config(init=f"image:{GOLDENS / 'vit'},text:{folder}")
    sentence = refusal(config)
    assert f"lacks {key} (1 of 90 tensors)" in sentence and "--config.init_allow_partial=true" in sentence
    config.init_allow_partial = True
    _, first = started(config)
    assert "student/towers/fusion/blocks/mlp/down/bias" not in first.arrays  # its layer 1 of three
    assert "student/towers/fusion/blocks/mlp/down/kernel" in first.arrays
    assert "fusion/blocks/mlp/down/bias" in first.report


def test_one_tensor_too_many_outside_the_tower_is_named_as_ignored(changed):
    folder = changed("vit", lambda arrays: arrays.update({"decoder.weight": np.ones(3, np.float32)}))
    _, first = started(towers_config(init=f"image:{folder},text:{GOLDENS / 'bert'}"))
    assert "not of this model (image decoder.weight)" in first.report


def test_one_tensor_too_many_inside_the_tower_is_another_architecture(changed):
    key = "encoder.layer.1.layer_scale.lambda1"
    folder = changed("vit", lambda arrays: arrays.update({key: np.ones(30, np.float32)}))
    config = towers_config(init=f"image:{folder},text:{GOLDENS / 'bert'}")
    assert f"has {key}, which a ViT in the Hugging Face layout has not: it is another architecture" in refusal(config)


def test_a_transposed_tensor_is_refused_with_both_shapes(changed):
    key = "bert.encoder.layer.0.intermediate.dense.weight"
    folder = changed("bert", lambda arrays: arrays.update({key: np.ascontiguousarray(arrays[key].T)}))
    sentence = refusal(towers_config(init=f"image:{GOLDENS / 'vit'},text:{folder}"))
    assert f"{key} is [36, 70], and config.model asks for [70, 36]" in sentence and "transposed?" in sentence


def test_one_word_too_many_is_refused_with_both_sizes():
    sentence = refusal(towers_config(), VOCABULARY._replace(size=WORDS - 1))
    assert f"has a vocabulary of {WORDS} " in sentence and f"the tokenizer one of {WORDS - 1}:" in sentence


def test_384_pixels_from_224_are_resized_and_other_patches_refused():
    positions = np.random.default_rng(0).normal(size=(1, 197, 5)).astype(np.float32)
    resized, note = fitted_positions(positions, (1, 577, 5), "pos_embed", "image:x")
    assert resized.shape == (1, 577, 5) and note == "14x14 to 24x24 patches, bicubic"
    config = towers_config(**{"model.image.patch_px": 14, "model.image.size_px": 28})
    assert "is [30, 3, 7, 7], and config.model asks for [30, 3, 14, 14]" in refusal(config)


def test_a_truncated_file_and_a_pickle_that_runs_code_are_one_sentence(changed, tmp_path):
    folder = changed("vit", lambda arrays: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    text_part = f"text:{GOLDENS / 'bert'}"
    assert "is damaged or cut short" in refusal(towers_config(init=f"image:{folder},{text_part}"))

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = tmp_path / "evil.pth"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"model": Payload()}, protocol=2))
    sentence = refusal(towers_config(init=f"image:{evil},{text_part}"))
    assert f"asks for {os.mkdir.__module__}.mkdir" in sentence and "so the file is refused" in sentence
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("model.text.heads", 2, "text:.* has 3 heads, and config.model.text.heads=2"),
        ("model.image.heads", 3, "image:.* has 5 heads, and config.model.image.heads=3"),
        ("model.text.fusion_depth", 2, "has 5 layers, and config.model.text.depth=2 . config.model.text.fusion_depth=2 asks for 4"),
        ("model.image.depth", 4, "has 3 layers, and config.model.image.depth=4 asks for 4"),
        ("model.image.width", 40, r"is \[30\], and config.model asks for \[40\]"),
        ("model.text.max_positions", 30, r"is \[24, 36\], and config.model asks for \[30, 36\]"),
    ],
)
def test_sizes_that_differ_are_named_on_both_sides(field, value, told):
    with pytest.raises(UserError, match=told):
        started(towers_config(**{field: value}))


@pytest.mark.parametrize(
    ("name", "field", "value", "told"),
    [
        ("bert", "hidden_act", "relu", "hidden_act='relu'"),
        ("bert", "model_type", "roberta", "is a roberta by its config.json: give a bert"),
        ("bert", "position_embedding_type", "relative_key", "position_embedding_type='relative_key'"),
        ("vit", "model_type", "beit", "is a beit by its config.json"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_config(name, field, value, told, changed):
    folder = changed(name, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    part = {"bert": "text", "vit": "image"}
    names = {part[name]: folder, part["vit" if name == "bert" else "bert"]: "random"}
    assert told in refusal(towers_config(init=",".join(f"{part}:{spec}" for part, spec in names.items())))


def test_towers_in_each_others_place_are_refused():
    sentence = refusal(towers_config(init=f"image:{GOLDENS / 'bert'},text:random"))
    assert "holds no ViT" in sentence
    sentence = refusal(towers_config(init=f"image:random,text:{GOLDENS / 'vit'}"))
    assert "holds no BERT" in sentence
    sentence = refusal(towers_config(init=f"model:{GOLDENS / 'bert'}"))
    assert "is neither an ALBEF model" in sentence


def test_an_output_layer_that_is_not_tied_is_refused(changed):
    def untie(arrays):
        words = arrays["bert.embeddings.word_embeddings.weight"]
        arrays["cls.predictions.decoder.weight"] = words + 1

    folder = changed("bert", untie)
    assert "cls.predictions.decoder.weight differs" in refusal(towers_config(init=f"image:random,text:{folder}"))


def test_weights_that_are_not_finite_are_refused(changed):
    def spoil(arrays):
        arrays["layernorm.weight"][3] = np.nan

    folder = changed("vit", spoil)
    assert "layernorm.weight holds values that are not finite" in refusal(towers_config(init=f"image:{folder},text:random"))


def test_norms_with_tensorflows_names_are_norms(changed):
    def rename(arrays):
        for key in [key for key in arrays if ".LayerNorm." in key]:
            new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            arrays[new] = arrays.pop(key)

    folder = changed("bert", rename)
    _, first = started(towers_config(init=f"image:random,text:{folder}"))
    _, plain = started(towers_config(init=f"image:random,text:{GOLDENS / 'bert'}"))
    assert first.arrays.keys() == plain.arrays.keys()
    for name, value in plain.arrays.items():
        np.testing.assert_array_equal(first.arrays[name], value)


# -- a whole model, from its file to what a run does with it


@pytest.fixture(scope="module")
def albef(tmp_path_factory):
    """The golden ALBEF as a file, and a folder with a tokenizer of as many words."""
    folder = tmp_path_factory.mktemp("albef")
    with np.load(GOLDEN) as stored:
        weights = {name[6:]: stored[name] for name in stored.files if name.startswith("state/")}
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, folder / "albef.safetensors")
    captions = [" ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")]
    text._in_transformers(text.train_vocabulary(captions, 101)).save_pretrained(folder / "words")
    return SimpleNamespace(file=folder / "albef.safetensors", tokenizer=folder / "words", weights=weights)


def run_config(albef, **changes):
    config = albef_config(sizes())
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "init": f"model:{albef.file}",
                "data.tokenizer": str(albef.tokenizer),
                "data.scenes_examples": 16,
                "data.threads": 1,
                "data.prefetch": 1,
                "evaluation.images": 5,
                "evaluation.batch": 5,
                "evaluation.rerank_top_k": 2,
                "evaluation.every_steps": 0,
                "train.steps": 2,
                "log_every_steps": 1,
            }
            | changes
        )
    return config.lock()


@pytest.fixture(scope="module")
def imported(albef, one_device_environment, tmp_path_factory):
    """A run made of the golden ALBEF by --mode=import; what was said."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: one_mesh())
        for module in (train, build):
            patch.setattr(module, "say", said.append)
        train.import_weights(run_config(albef), workdir)
    return SimpleNamespace(workdir=workdir, said="\n".join(said))


@pytest.fixture
def run(imported, tmp_path, one_device):
    """A copy of the imported run."""
    return Path(shutil.copytree(imported.workdir, tmp_path / "run"))


def test_an_imported_albef_is_a_run_whose_table_was_printed(imported):
    assert "model:" in imported.said and "(ALBEF; it does not say how many heads" in imported.said
    assert "teacher: read too; queues: read too" in imported.said
    lines = imported.said.splitlines()
    (new,) = [line for line in lines if line.startswith("newly initialised")]
    assert new.split()[-1] == "codebook"
    with Checkpoints(imported.workdir, keep=1, create=False) as checkpoints:
        assert checkpoints.steps() == [0]


def test_an_imported_albef_exported_again_is_the_file_bit_for_bit(run, albef):
    export.export(run_config(albef, **{"export.format": "albef"}), run)
    written = load_file(run / "export_albef" / "model.safetensors")
    assert set(written) == set(albef.weights)
    for key, value in albef.weights.items():
        assert written[key].dtype == value.dtype and written[key].shape == value.shape
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    described = json.loads((run / "export_albef" / "config.json").read_text())
    assert described["vision"]["num_attention_heads"] == 3 and described["text"]["fusion_layer"] == 2
    again = start.read_start(run_config(albef, init=f"model:{run / 'export_albef'}", **{"data.tokenizer": ""}))
    assert start.tokenizer_of(run_config(albef, **{"data.tokenizer": ""}), again) == str(run / "export_albef")
    with pytest.raises(UserError, match=r"has 3 heads, and config.model.image.heads=6"):
        start.read_start(run_config(albef, init=f"model:{run / 'export_albef'}", **{"model.image.heads": 6}))


def test_an_imported_albef_is_evaluated_and_trained_on(run, albef, capsys):
    evaluate.evaluate(None, run)
    results = json.loads((run / "eval.json").read_text())
    assert {"student/dual", "teacher/dual", "student/reranked"} <= results.keys()
    with pytest.raises(UserError, match="holds a run already"):
        train.import_weights(run_config(albef), run)
    before = read_arrays(run / "checkpoints" / "0" / "student")
    Path(albef.file).rename(albef.file.with_suffix(".away"))  # a run that goes on does not need it
    try:
        train.fit(run_config(albef), run)
    finally:
        albef.file.with_suffix(".away").rename(albef.file)
    after = read_arrays(run / "checkpoints" / "2" / "student")
    assert "resuming at step 0" in capsys.readouterr().out
    moved = np.abs(after["towers/image/patches/kernel"] - before["towers/image/patches/kernel"]).max()
    assert 0 < moved < 0.01


def test_a_run_is_the_start_of_another_at_another_resolution(run, albef):
    config = run_config(albef, init=f"model:{run}", **{"model.image.size_px": 64, "data.tokenizer": ""})
    read = start.read_start(config)
    assert start.tokenizer_of(config, read) == str(run / "tokenizer")
    task = pretrain.create(config, VOCABULARY._replace(size=101), one_mesh())
    first = start.initial(read, config, task.abstract_state())
    assert "image/positions 3x3 to 4x4 patches, bicubic" in first.report and "step 0" in first.report
    stored = read_arrays(run / "checkpoints" / "0" / "teacher")
    np.testing.assert_array_equal(first.arrays["teacher/text/words"], stored["text/words"])
    assert first.arrays["teacher/image/positions"].shape == (1, 17, 72)
    sentences = {
        "codebook.size": (9, r"student/codebook/codes is \[7, 24\], and config asks for \[9, 24\]"),
        "model.image.heads": (4, "has 3 heads, and config.model.image.heads=4"),
    }
    for field, (value, told) in sentences.items():
        config = run_config(albef, init=f"model:{run}", **{field: value})
        with pytest.raises(UserError, match=told):
            started(config, VOCABULARY._replace(size=101))


def test_an_export_is_the_start_of_another_run_without_its_teacher(run, albef):
    export.export(None, run)
    config = run_config(albef, init=f"model:{run / 'export'}")
    _, first = started(config, VOCABULARY._replace(size=101))
    assert "an export" in first.report and "teacher: a copy of the student" in first.report
    stored = read_arrays(run / "export" / "student")
    for name, value in stored.items():
        np.testing.assert_array_equal(first.arrays[f"student/{name}"], value)


TWO = """
import sys
from types import SimpleNamespace
import jax
tests, port, process, weights, tokenizer, workdir = sys.argv[1:]
sys.path.insert(0, tests)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from test_start import run_config
from codebook_jax import export, train
albef = SimpleNamespace(file=weights, tokenizer=tokenizer)
config = run_config(albef, **{"mesh.fsdp": 2, "data.global_batch": 8, "export.format": "albef"})
train.import_weights(config, workdir)
export.export(config, workdir)
"""


def test_two_processes_that_split_the_weights_import_and_export_them_bit_for_bit(albef, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    arguments = [str(path) for path in (albef.file, albef.tokenizer, tmp_path / "run")]
    command = [sys.executable, "-c", TWO, str(Path(__file__).parent), port]
    both = [
        subprocess.Popen([*command, process, *arguments], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for process in "01"
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    written = load_file(tmp_path / "run" / "export_albef" / "model.safetensors")
    assert set(written) == set(albef.weights)
    for key, value in albef.weights.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_the_towers_exported_for_hugging_face_are_read_again_bit_for_bit(run, albef):
    config = run_config(albef, **{"export.format": "huggingface"})
    export.export(config, run)
    folder = run / "export_huggingface"
    assert json.loads((folder / "text" / "config.json").read_text())["num_hidden_layers"] == 2
    with config.unlocked():
        config.init, config.init_allow_partial = f"image:{folder / 'image'},text:{folder / 'text'}", True
    assert start.tokenizer_of(config, start.read_start(config)) == str(albef.tokenizer)
    _, first = started(config, VOCABULARY._replace(size=101))
    stored = read_arrays(run / "checkpoints" / "0" / "student")
    found = [name for name in stored if f"student/{name}" in first.arrays]
    assert len(found) == sum(name.startswith(("towers/image/", "towers/text/")) for name in stored)
    for name in found:
        np.testing.assert_array_equal(first.arrays[f"student/{name}"], stored[name], err_msg=name)


def test_an_albef_fine_tuned_for_retrieval_is_loaded_but_for_its_head(albef, tmp_path):
    """Its text encoder is a BertModel: other names, no head for masked words, queues of indices besides."""
    weights = {
        key.replace("text_encoder.bert.", "text_encoder.").replace("text_encoder_m.bert.", "text_encoder_m."): value
        for key, value in albef.weights.items()
        if ".cls." not in key
    }
    weights["idx_queue"] = np.zeros((1, 35), np.int64)
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, tmp_path / "tuned.safetensors")
    config = run_config(albef, init=f"model:{tmp_path / 'tuned.safetensors'}")
    words = VOCABULARY._replace(size=101)
    assert "lacks text_encoder.cls.predictions.bias" in refusal(config, words)
    with config.unlocked():
        config.init_allow_partial = True
    _, first = started(config, words)
    assert "not of this model (idx_queue)" in first.report and "queues: read too" in first.report
    missing = [line for line in first.report.splitlines() if line.startswith("newly initialised")]
    assert missing[0].split()[-2:] == ["codebook,", "masked_words"]


def test_words_without_a_tokenizer_are_refused_and_nothing_is_written(albef, tmp_path, one_device):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="has no tokenizer beside it"):
        train.import_weights(run_config(albef, **{"data.tokenizer": ""}), workdir)
    other = run_config(albef, **{"model.text.width": 30})
    with pytest.raises(UserError, match="config.model asks for"):
        train.import_weights(other, workdir)
    assert not (workdir / "config.json").exists() and not (workdir / "tokenizer").exists()
    with pytest.raises(UserError, match="config.init=random names no weights to import"):
        train.import_weights(run_config(albef, init="random"), workdir)
