"""Fine-tuning against ALBEF's own PyTorch models: the same weights, pictures and texts give the
same logits, loss, gradients and ranking. The numbers lie beside the checkout, or nothing runs.
"""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import ROOT, one_mesh

from codebook_jax.data.batch import Answers
from codebook_jax.data.text import Vocabulary
from codebook_jax.method import momentum_average
from codebook_jax.models import answers
from codebook_jax.parallel import sharding
from codebook_jax.tasks import entailment, nlvr2, vqa
from codebook_jax.tasks.finetune import Rows
from codebook_jax.weights import layouts

GOLDENS = ROOT.parent / "shared" / "goldens"
TASKS = {"entailment": entailment.Entailment, "nlvr2": nlvr2.Comparing, "vqa": vqa.Answering}
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs ALBEF's numbers")

_BERT = {name: theirs.replace("bert.", "") for name, theirs in layouts.BERT.names.items()}
_BLOCK = layouts._BERT_BLOCK | layouts._CROSS


def names_of(which, copy):
    """Our modules below student/ or teacher/, and ALBEF's, as in `layouts`."""
    names = layouts.prefixed("towers/", f"visual_encoder{copy}.", layouts.VIT_TIMM.names)
    text = {name: theirs for name, theirs in _BERT.items() if name.startswith("text/")}
    names |= layouts.prefixed("towers/", f"text_encoder{copy}.", text)
    fusion = layouts.prefixed("", f"text_encoder{copy}.encoder.layer.{{}}.", _BLOCK)
    if which == "nlvr2":
        for part in ("first", "second"):
            names |= layouts.prefixed(f"towers/fusion/blocks/{part}/", "", fusion)
    else:
        names |= layouts.prefixed("towers/fusion/blocks/", "", fusion)
    if which == "vqa":
        decoder = f"text_decoder{copy}."
        names |= {
            f"decoder/{name.removeprefix('text/')}": f"{decoder}bert.{theirs}"
            for name, theirs in text.items()
            if "/blocks/" not in name
        }
        names |= layouts.prefixed("decoder/blocks/", f"{decoder}bert.encoder.layer.{{}}.", _BLOCK)
        head = {n: t for n, t in layouts.BERT.names.items() if n.startswith("masked_words/")}
        names |= {
            f"decoder/output/{name.removeprefix('masked_words/')}": decoder + theirs
            for name, theirs in head.items()
        }
    else:
        names |= {"head/hidden": f"cls_head{copy}.0", "head/classes": f"cls_head{copy}.2"}
    return names


def keys_of(which, named, copy=""):
    """{our name: its keys}, layer by layer; `named` are parameters of the student or the teacher"""
    layout = layouts.Layout("", names_of(which, copy), own="")
    found = {}
    for name, leaf in named:
        keys = layouts.keys_of(layout, {name: leaf.shape}, 6)[name]
        if (part := name.split("/")[3:4]) and part[0] in ("first", "second"):
            layer = [int(key.split(".layer.")[1].split(".")[0]) for key in keys]
            keys = [
                key.replace(f".layer.{at}.", f".layer.{2 * at - 6 + (part[0] == 'second')}.")
                for key, at in zip(keys, layer, strict=True)
            ]
        found[name] = keys
    return found


class Golden:
    """A golden with the task of its sizes, its state and its rows."""

    def __init__(self, which):
        self.which = which
        with np.load(GOLDENS / f"albef_{which}.npz") as stored:
            self.arrays = {name: stored[name] for name in stored.files}
        self.sizes = json.loads(self.arrays["config_json"].tobytes())
        words = Vocabulary(self.sizes["bert"]["vocab_size"], 0, 1, 3, 4, (0, 1, 2, 3, 4))
        self.task = TASKS[which](self.config(), words, one_mesh())
        self.task.pixels = lambda images: images  # the golden's are normalised
        fresh = self.task.init_state(0)
        student = self.filled(fresh.student, "")
        teacher = momentum_average(
            self.filled(fresh.teacher, "_m"), student, jnp.float32(self.arrays["in/momentum"])
        )  # ALBEF averages first
        self.state = fresh.replace(student=student, teacher=teacher, step=jnp.int32(1))

    def config(self):
        sizes, bert = self.sizes, self.sizes["bert"]
        file = ROOT / "configs" / f"finetune_{self.which}.py"
        config = runpy.run_path(str(file))["get_config"]("tiny")
        rows = len(self.arrays["in/labels" if "in/labels" in self.arrays else "in/image"])
        with config.unlocked():
            config.update_from_flattened_dict(
                {
                    "model.image.size_px": sizes["res"],
                    "model.image.patch_px": sizes["patch"],
                    "model.image.width": bert["encoder_width"],
                    "model.image.depth": sizes["vit_depth"],
                    "model.image.heads": sizes["heads"],
                    "model.image.stem": "patch",
                    "teacher.use": True,
                    "model.text.width": bert["hidden_size"],
                    "model.text.depth": bert["fusion_layer"],
                    "model.text.fusion_depth": 6,
                    "model.text.heads": bert["num_attention_heads"],
                    "model.text.mlp_width": bert["intermediate_size"],
                    "model.text.max_positions": bert["max_position_embeddings"],
                    "data.global_batch": rows,
                    "teacher.alpha": float(self.arrays["in/alpha"]),
                    "teacher.alpha_steps": 0,
                }
            )
            if self.which == "vqa":
                config.vqa.decoder_depth = 6
        return config.lock()

    def filled(self, fresh, copy):
        tree = jax.tree.structure(fresh)
        named = [(name, np.empty(leaf.shape, np.float32)) for name, leaf in sharding.named(fresh)]
        for name, keys in keys_of(self.which, named, copy).items():
            array = dict(named)[name]
            for key, ours in layouts.tensors(name, array, keys):
                ours[...] = self.arrays[f"state/{key}"].reshape(ours.shape)
        return jax.tree.unflatten(tree, [jnp.asarray(array) for _, array in named])

    def rows(self):
        arrays = self.arrays
        names = ("in/image0", "in/image1") if self.which == "nlvr2" else ("in/image",)
        images = np.stack([arrays[name] for name in names], axis=1).transpose(0, 1, 3, 4, 2)
        text = "question" if self.which == "vqa" else "text"
        target = self.answers() if self.which == "vqa" else arrays["in/labels"].astype(np.int32)
        tokens, mask = arrays[f"in/{text}_ids"], arrays[f"in/{text}_mask"]
        return Rows(images, tokens.astype(np.int32), mask.sum(axis=1).astype(np.int32), target)

    def answers(self):
        counts, ids = self.arrays["in/answers_per_question"], self.arrays["in/answer_ids"]
        tokens = np.zeros((len(counts), counts.max(), ids.shape[1]), np.int32)
        weight = np.zeros(tokens.shape[:2], np.float32)
        here = np.arange(counts.max()) < counts[:, None]
        tokens[here], weight[here] = ids, self.arrays["in/answer_weights"]
        return Answers(tokens, weight)


@pytest.fixture(scope="module", params=TASKS)
def golden(request):
    return Golden(request.param)


def test_loss_and_gradients_are_albefs(golden):
    task, state, rows = golden.task, golden.state, golden.rows()

    def loss(student):
        taught = task.taught(state.teacher, rows)
        return task.compare(state, student, None, rows, taught, None)[0]

    found, gradients = jax.jit(jax.value_and_grad(loss))(state.student)
    np.testing.assert_allclose(found, golden.arrays["out/loss"], rtol=1e-4)
    named = list(sharding.named(jax.tree.map(np.asarray, gradients)))
    largest, checked = 0.0, 0
    for name, keys in keys_of(golden.which, named).items():
        for key, ours in layouts.tensors(name, dict(named)[name], keys):
            theirs = golden.arrays.get(f"grad_norm/{key}")
            if theirs is None or theirs < 1e-6:
                continue
            checked += 1
            largest = max(largest, abs(np.linalg.norm(ours) / theirs - 1))
    assert largest <= 1e-4 and checked > 100


def test_predictions_are_albefs(golden):
    task, rows, student = golden.task, golden.rows(), golden.state.student
    given = rows.images, rows.tokens, rows.text_length
    if golden.which != "vqa":
        logits = jax.jit(lambda student: task.logits(task.network(student), rows))(student)
        np.testing.assert_allclose(logits, golden.arrays["out/logits"], atol=1e-4)
        return
    network = task.network(student)
    ids, probabilities = jax.jit(
        lambda *given: answers.rank_answers(
            network.decoder,
            network.ask(*given),
            golden.arrays["in/candidate_ids"].astype(np.int32),
            shortlist=int(golden.arrays["in/k"]),
            pad_id=0,
        )
    )(*given)
    np.testing.assert_array_equal(ids, golden.arrays["out/rank_ids"])
    np.testing.assert_allclose(probabilities, golden.arrays["out/rank_probs"], atol=1e-4)
