"""Against PyTorch itself, if installed (extra `parity`): it loads what we write and computes the
same.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

import transformers
from flax import traverse_util
from small_run import config_of

from codebook_jax import build
from codebook_jax.data.text import Vocabulary
from codebook_jax.models import codis
from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from codebook_jax.tools import export
from codebook_jax.weights import start
from configs import base


@pytest.fixture
def exported(straight, tmp_path, one_device):
    """The parts of a trained run, its student, and its export for Hugging Face's models."""
    workdir = shutil.copytree(straight.workdir, tmp_path / "run")
    export.export(config_of(**{"export.format": "huggingface"}), workdir)
    parts = build.build_trained(None, workdir)
    student = build.restore_trained(parts, workdir, ("student",)).state.student
    return parts, student, workdir / "export_huggingface"


def close(found, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, rtol=0, atol=2e-5)


def test_transformers_loads_our_export_whole_and_computes_our_states(exported):
    parts, student, folder = exported
    towers = parts.task.model.towers(student["towers"])
    loaded = dict(add_pooling_layer=False, output_loading_info=True)
    vit, about_vit = transformers.ViTModel.from_pretrained(folder / "image", **loaded)
    bert, about_bert = transformers.BertModel.from_pretrained(folder / "text", **loaded)
    for about in (about_vit, about_bert):
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        assert not any(about[kind] for kind in kinds)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    processor = transformers.ViTImageProcessor.from_pretrained(folder / "image")
    pixels = processor(list(pictures), return_tensors="pt")
    with torch.no_grad():
        expected = vit(**pixels).last_hidden_state.numpy()
    _, tokens = jax.jit(towers.embed_images)(parts.task.model.pixels(pictures))
    close(tokens, expected)
    texts = ["a red circle", "a green star above a large blue square"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text")
    words = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = bert(**words).last_hidden_state.numpy()
    ids, lengths, _ = parts.tokenizer.encode(texts, 24)
    np.testing.assert_array_equal(ids[:, : expected.shape[1]], words["input_ids"].numpy())
    _, states = jax.jit(towers.embed_texts)(ids, lengths)
    close(states[0, : lengths[0]], expected[0, : lengths[0]])
    close(states[1, : lengths[1]], expected[1, : lengths[1]])


def written(model, folder, half):
    """The model's folder: a .bin of torch, or safetensors in half precision, rounded alike."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    if half:
        model.half()
        arrays = {key: value.numpy() for key, value in model.state_dict().items()}
        save_file(arrays, folder / "model.safetensors")
        model.float()
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_bert_base_and_vit_base_of_transformers_are_ours(tmp_path):
    config = base.get_config("base")
    config.model.dtype = "float32"
    config.model.image.update(size_px=224, layer_norm_eps=1e-12)
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    vit = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False).eval()
    image = written(vit, tmp_path / "vit", half=True)
    text = written(bert, tmp_path / "bert", half=False)
    # a BertModel has no head for masked words
    config.update(init=f"image:{image},text:{text}", init_allow_partial=True)
    words = Vocabulary(30_522, 0, 101, 102, 103, (0, 100, 101, 102, 103))
    task = pretrain.Pretraining(config, words, sharding.make_mesh(-1, 1, 1))
    first = start.initial(start.read_start(config), config, task.abstract_state()).arrays
    named = sharding.named(task.abstract_state().student["towers"])
    flat = {
        name: jnp.asarray(first.get(f"student/towers/{name}", np.zeros(leaf.shape, leaf.dtype)))
        for name, leaf in named
    }
    towers = traverse_util.unflatten_dict(flat, sep="/")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = vit(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    close(jax.jit(codis.Model(config, 30_522).towers(towers).image)(images), expected)
    # The upper layers without their cross-attention, after the lower ones.
    upper = {n: leaf for n, leaf in towers["fusion"]["blocks"].items() if not n.startswith("cross")}
    blocks = jax.tree.map(lambda *parts: jnp.concatenate(parts), towers["text"]["blocks"], upper)
    config.model.text.depth = 12
    towers |= {"text": towers["text"] | {"blocks": blocks}}
    ours = codis.Model(config, 30_522).towers(towers)
    tokens = rng.integers(0, 30_522, (2, 30)).astype(np.int32)
    lengths = np.array([30, 12], np.int32)
    mask = (np.arange(30) < lengths[:, None]).astype(np.int64)
    with torch.no_grad():
        expected = bert(torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(mask))
    found = jax.jit(ours.text)(tokens, lengths)
    for row, length in enumerate(lengths):
        close(found[row, :length], expected.last_hidden_state.numpy()[row, :length])
