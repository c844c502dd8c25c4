"""An export computes the same as its checkpoint, anywhere, and refuses input it cannot read."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.special
from PIL import Image
from small_data import tokenizer_for_run
from small_run import ROOT, SMALL

import codebook_jax
from codebook_jax import build
from codebook_jax.data.images import resize_square
from codebook_jax.errors import UserError
from codebook_jax.tools import export

TEXTS = ["a red circle above a blue star", "a green ring", "a large moon left of a small cross"]

LOAD = """
import sys
import codebook_jax
assert "jax" not in sys.modules
import numpy as np
folder, inputs, outputs = sys.argv[1:]
given = np.load(inputs)
pictures, texts = list(given["pictures"]), list(map(str, given["texts"]))
model, teacher = codebook_jax.load(folder), codebook_jax.load(folder, teacher=True)
np.savez(
    outputs,
    image=model.encode_image(pictures),
    text=model.encode_text(texts),
    match=model.match(pictures, texts),
    teacher_image=teacher.encode_image(pictures),
    teacher_text=teacher.encode_text(texts),
    image_codes=model.codes(images=pictures).indices,
    text_codes=model.codes(texts=texts).indices,
    step=model.step,
)
"""


def output_of(command, environment, folder):
    command = list(map(str, command))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(straight, one_device_environment, tmp_path_factory):
    """The export of a copy of the straight run, by the command, with its output; the run is renamed
    afterwards.
    """
    workdir = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(straight.workdir, workdir)
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "codebook_jax.main", f"--config={ROOT}/configs/paper.py:tiny"]
    command += [f"--workdir={workdir}", "--mode=export", *fields, "--config.export.teacher=true"]
    said = output_of(command, one_device_environment, ROOT)
    folder = workdir.parent / "elsewhere"
    (workdir / "export").rename(folder)
    moved = workdir.rename(workdir.parent / "moved")
    return SimpleNamespace(folder=folder, run=moved, said=said, workdir=workdir)


@pytest.fixture(scope="module")
def model(exported):
    return codebook_jax.load(exported.folder)


@pytest.fixture(scope="module")
def pictures():
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    return list(coarse.repeat(10, axis=1).repeat(10, axis=2))


def test_an_export_alone_in_a_fresh_process_computes_what_the_checkpoint_computes(
    exported, pictures, one_device, tmp_path
):
    parts = build.build_trained(None, exported.run)
    restored = build.restore_trained(parts, exported.run, ("student", "teacher"))
    state, task = restored.state, parts.task
    pixels = np.stack([resize_square(image, SMALL["model.image.size_px"]) for image in pictures])
    tokens, lengths, _ = parts.tokenizer.encode(TEXTS, 24)
    image, image_tokens = task.model.encode_images(state.student["towers"], pixels)
    text, states = task.model.encode_texts(state.student["towers"], tokens, lengths)
    towers = task.model.towers(state.student["towers"])
    fused = towers.fusion(states[:, None], lengths[:, None], image_tokens)
    logits = np.asarray(task.model.match_logits(state.student["matching"], fused[:, :, 0]))[:, 0]
    one_logit = task.model.match(state.student, image_tokens, states[:, None], lengths[:, None])
    np.testing.assert_allclose(one_logit[:, 0], logits[:, 1], atol=1e-5)
    codes = np.asarray(state.student["codebook"]["codes"])
    directions = codes / np.linalg.norm(codes, axis=1, keepdims=True)

    np.savez(tmp_path / "in.npz", pictures=np.stack(pictures), texts=TEXTS)
    command = [sys.executable, "-c", LOAD, exported.folder, tmp_path / "in.npz"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output_of([*command, tmp_path / "out.npz"], environment, tmp_path)
    found = np.load(tmp_path / "out.npz")
    best = json.loads((exported.run / "best.json").read_text())["step"]
    assert found["step"] == restored.step == best
    expected = {
        "image": image,
        "text": text,
        "match": scipy.special.softmax(logits.astype(np.float64), axis=-1)[:, 1],
        "teacher_image": task.model.encode_images(state.teacher, pixels)[0],
        "teacher_text": task.model.encode_texts(state.teacher, tokens, lengths)[0],
    }
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    assert np.ptp(found["image"], axis=0).max() > 1e-2  # otherwise nothing would be compared
    assert np.abs(found["image"] - found["teacher_image"]).max() > 1e-4
    np.testing.assert_array_equal(found["image_codes"][:, 0], (image @ directions.T).argmax(1))
    np.testing.assert_array_equal(found["text_codes"][:, 0], (text @ directions.T).argmax(1))


def test_an_export_says_what_is_in_it_and_how_to_load_it(exported):
    assert f"codebook_jax.load('{exported.workdir / 'export'}')" in exported.said
    names = {path.name for path in exported.folder.iterdir()}
    assert names == {"export.json", "config.json", "tokenizer", "student", "teacher"}
    manifest = json.loads((exported.folder / "export.json").read_text())
    assert manifest["format"] == 1 and manifest["items"] == ["student", "teacher"]
    assert manifest["versions"]["jax"] == jax.__version__
    assert not [path for path in exported.run.iterdir() if path.name.startswith(".")]


def test_the_python_of_the_readme_runs(exported, pictures, tmp_path, monkeypatch):
    for name, pixels in zip(("a.png", "b.png"), pictures, strict=False):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(exported.folder)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    code, made = page.partition("```python\n")[2].partition("```")[0], {}
    exec(code, made)
    assert made["images"].shape == (2, made["model"].dim)
    assert made["similarity"].shape == (2, 2) and made["match"].shape == (2,)
    assert made["codes"].shape == made["probabilities"].shape == (1, 3)


def test_one_image_meets_many_texts_and_many_images_one_text(model, pictures):
    texts = [*TEXTS, "a blue square", "two stars"]
    each = np.concatenate([model.match(pictures[0], text) for text in texts])
    np.testing.assert_allclose(model.match(pictures[0], texts), each, atol=1e-6)
    each = np.concatenate([model.match(image, TEXTS[0]) for image in pictures])
    np.testing.assert_allclose(model.match(pictures, TEXTS[0]), each, atol=1e-6)
    paired = [model.match(*pair)[0] for pair in zip(pictures, TEXTS, strict=True)]
    np.testing.assert_allclose(model.match(pictures, TEXTS), paired, atol=1e-6)
    assert len(set(np.round(each, 7))) == 3
    assert model.match([], []).shape == model.match(pictures[0], []).shape == (0,)


def test_more_rows_than_the_largest_bucket_are_computed_as_alone(model, pictures):
    features = model.encode_text([*TEXTS * 22])
    assert features.shape == (66, 16)
    np.testing.assert_allclose(features, np.tile(model.encode_text(TEXTS), (22, 1)), atol=1e-6)
    scores = model.match(pictures * 22, TEXTS[0])
    np.testing.assert_allclose(scores, np.tile(model.match(pictures, TEXTS[0]), 22), atol=1e-6)


def test_counts_in_one_bucket_share_a_program(exported):
    fresh = codebook_jax.load(exported.folder)
    for count in (2, 3, 4):
        assert fresh.encode_text(["a star"] * count).shape == (count, 16)
    assert fresh._model.encode_texts._cache_size() == 1
    assert fresh.encode_text([]).shape == fresh.encode_image([]).shape == (0, 16)


def test_paths_bytes_pillow_images_and_arrays_of_one_picture_are_the_same(
    model, pictures, tmp_path
):
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    given = [path, str(path), path.read_bytes(), Image.open(path), pictures[0]]
    features = model.encode_image(given)
    for row in features:
        np.testing.assert_array_equal(row, features[0])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    batch = model.encode_image(np.stack(pictures))
    np.testing.assert_allclose(batch, model.encode_image(pictures), atol=1e-6)
    grey = pictures[0][:, :, 0]
    both = model.encode_image([grey, np.stack([grey] * 3, axis=2)])
    np.testing.assert_array_equal(both[0], both[1])


def test_codes_are_a_softmax_over_all_codewords(model, pictures):
    features = model.encode_image(pictures).astype(np.float64)
    expected = scipy.special.softmax(features @ model.codewords.T / 0.1, axis=1)
    everything = model.codes(images=pictures, top_k=16)
    assert everything.indices.dtype == np.int32
    likely = np.take_along_axis(expected, everything.indices, axis=1)
    np.testing.assert_allclose(likely, everything.probabilities, atol=1e-5)
    np.testing.assert_allclose(everything.probabilities.sum(axis=1), 1, atol=1e-6)
    assert (np.diff(everything.probabilities, axis=1) <= 0).all()
    few = model.codes(images=pictures, top_k=2)
    np.testing.assert_array_equal(few.indices, everything.indices[:, :2])


def test_a_text_that_is_cut_is_reported(model):
    long = " ".join(["circle"] * 40)
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 24 tokens") as caught:
        model.encode_text(["a star", long])
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        model.match(zeros(4, 4, 3), long)


def test_words_that_no_caption_had_have_features_of_their_own(model, recwarn):
    features = model.encode_text(["xylophone", "红", "🙂", "फूल", "फल"])
    alike = features @ features.T - np.eye(5)
    assert alike.max() < 1 - 1e-5 and not recwarn.list


def test_words_that_a_tokenizer_does_not_know_are_named(exported, tmp_path):
    fresh = codebook_jax.load(exported.folder)
    given = tmp_path / "given"
    given.mkdir()
    (given / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nstar")
    (given / "config.json").write_text('{"model_type": "bert"}')
    fresh._tokenizer = tokenizer_for_run(str(given), tmp_path / "run", None, 0)
    with pytest.warns(UserWarning, match="'xylophone', '红'") as caught:
        features = fresh.encode_text(["xylophone", "star", "红"])
    assert len(caught) == 1 and caught[0].filename == __file__
    np.testing.assert_allclose(features[0], features[2], atol=1e-6)


def zeros(*shape):
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: m.encode_image(np.zeros((8, 8, 3))), "image 0: .* float64 .* uint8"),
        (lambda m: m.encode_image(zeros(3, 8, 8)), r"image 0: .* \(3, 8, 8\) "),
        (lambda m: m.encode_image(["no/such.png"]), "image 0: no/such.png: .*file"),
        (lambda m: m.encode_image([zeros(8, 8), b"x"]), "image 1: 1 bytes: not a picture"),
        (lambda m: m.encode_image([3]), "image 0 is a int: give"),
        (lambda m: m.encode_image(3), "images=3 cannot be read"),
        (lambda m: m.encode_text(["a", None]), "text 1 is a NoneType"),
        (lambda m: m.encode_text(None), "texts=None cannot be read"),
        (lambda m: m.encode_text(["a star", "?!"]), "text 1, '\\?!', has no words"),
        (lambda m: m.encode_text(["a star", "…。"]), "text 1, '…。', has no words"),
        (lambda m: m.match([b""] * 2, ["a"] * 3), "2 images and 3 texts "),
        (lambda m: m.codes(), "either images=... or texts=..."),
        (lambda m: m.codes(texts="a", top_k=None), "top_k=None is not"),
        (lambda m: m.codes(texts="a", top_k=2.0), "top_k=2.0 is not"),
        (lambda m: m.codes(texts="a", top_k=17), "top_k=17 is not .* 1 and the 16 codewords"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_place(model, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(model)


def test_what_is_no_export_is_refused(exported, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, sentence in (
        ("~/nothing", f"{tmp_path}/nothing is not a folder with an export.json"),
        (straight.workdir / "config.json", "config.json is not a folder with an export.json"),
        (tmp_path, "is not a folder with an export.json"),
        (5, r"load\(5\): give the path of an export"),
        (exported.run, f"--workdir={exported.run} --mode=export"),
    ):
        with pytest.raises(UserError, match=sentence):
            codebook_jax.load(path)


def test_a_damaged_export_is_refused(exported, tmp_path):
    def truncated(folder):
        files = [path for path in (folder / "student").rglob("*") if path.is_file()]
        os.truncate(max(files, key=lambda path: path.stat().st_size), 100)

    def edited(name, change):
        def edit(folder):
            content = json.loads((folder / name).read_text())
            change(content)
            (folder / name).write_text(json.dumps(content))

        return edit

    def config(change):
        return edited("config.json", lambda content: change(content["config"]))

    damages = {
        "student cannot be read": truncated,
        "config.json cannot be read .*missing": lambda f: (f / "config.json").unlink(),
        "config.json cannot be read .*tuple": edited("config.json", lambda c: c.update(config=[])),
        "config.json cannot be read .*model": config(lambda c: c.pop("model")),
        "config.json cannot be read .*zero": config(lambda c: c["model"]["image"].update(heads=0)),
        "tokenizer is missing": lambda f: shutil.rmtree(f / "tokenizer"),
        "export.json cannot be read": lambda f: (f / "export.json").write_text("{"),
        "format 3 .* formats 1 and 2": edited("export.json", lambda c: c.update(format=3)),
        "task='probe'.* pretrain, .*vqa": edited("export.json", lambda c: c.update(task="probe")),
        r"codebook/codes .*\[16, 16\], .*\[17, 16\]": config(
            lambda c: c["codebook"].update(size=17)
        ),
    }
    for number, (sentence, damage) in enumerate(damages.items()):
        folder = tmp_path / str(number)
        shutil.copytree(exported.folder, folder)
        damage(folder)
        with pytest.raises(UserError, match=sentence):
            codebook_jax.load(folder)


def test_an_export_that_fails_leaves_the_one_before(
    straight, one_device, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(straight.workdir, workdir)
    export.export(None, workdir)

    def exported():
        return sorted((path, path.stat().st_mtime_ns) for path in (workdir / "export").rglob("*"))

    before = exported()

    def full(*_):
        raise OSError(28, "No space left on device")

    def broken(*_):
        raise ValueError("tensorstore: writing failed: No space left on device [at kvstore]")

    with monkeypatch.context() as patch:
        patch.setattr(export.shutil, "copytree", full)
        with pytest.raises(OSError, match="No space left"):
            export.export(None, workdir)
    with monkeypatch.context() as patch:
        patch.setattr(export.ocp.StandardCheckpointer, "save", broken)
        with pytest.raises(UserError, match="could not be written to .*No space left on device"):
            export.export(None, workdir)
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]
    assert exported() == before
    with pytest.raises(UserError, match="has no teacher: .*--config.export.teacher"):
        codebook_jax.load(workdir, teacher=True)

    capsys.readouterr()
    export.export(None, workdir)
    assert "replacing the previous export" in capsys.readouterr().out
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]
    assert codebook_jax.load(workdir).encode_text("a star").shape == (1, 16)


def test_an_export_that_ends_between_its_two_renames_leaves_the_previous_one(tmp_path):
    folder, draft, replaced = (tmp_path / name for name in ("export", "draft", "replaced"))
    replaced.mkdir()
    (replaced / "previous").touch()  # left by a killed export
    with export._alone(folder, draft, replaced):
        assert (folder / "previous").exists()
        folder.rename(replaced)
    assert (folder / "previous").exists() and not (draft.exists() or replaced.exists())
