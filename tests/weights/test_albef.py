"""The step against that of ALBEF's own PyTorch model: the same weights, inputs, negatives and masks
(tests/goldens/).
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import ALBEF, ALPHA_STEPS, albef_config, one_mesh

from codebook_jax.data.batch import Batch
from codebook_jax.data.text import Vocabulary
from codebook_jax.method import teacher
from codebook_jax.method.masking import MaskedText
from codebook_jax.method.matching import draw_negatives
from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from codebook_jax.tasks.draws import Inputs, Pair
from codebook_jax.weights import layouts, start
from codebook_jax.weights.fill import fill
from codebook_jax.weights.write import to_albef


def filled(arrays, named, depth):
    shapes = {name: leaf.shape for name, leaf in named.items()}
    options = dict(text_depth=depth, what="model:it", allow_partial=False)
    return fill(layouts.ALBEF, arrays, shapes, **options).arrays


@pytest.fixture(scope="module")
def golden():
    with np.load(ALBEF) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def weights(golden):
    """ALBEF's state dict."""
    return {name[6:]: value for name, value in golden.items() if name.startswith("state/")}


@pytest.fixture(scope="module")
def task(golden):
    sizes = json.loads(golden["config_json"].tobytes())
    words = Vocabulary(sizes["vocab"], 0, 2, 3, 4, (0, 1, 2, 3, 4))
    made = pretrain.Pretraining(albef_config(), words, one_mesh())
    made.model.pixels = lambda images: images  # the golden's are normalised
    return made


@pytest.fixture(scope="module")
def state(task, weights):
    """The train state filled from the checkpoint; what ALBEF lacks is fresh."""
    fresh = task.init_state(0)
    found = filled(weights, dict(sharding.named(fresh)), task.config.model.text.depth)
    left = {name for name, _ in sharding.named(fresh)} - found.keys()
    counters = {"step", "usage/winners", "usage/cursor", "bad_in_row", "bad_total"}
    assert {name for name in left if not name.startswith("moments")} == (
        {"student/codebook/codes"} | counters
    )
    return jax.device_get(start.placed(fresh, found))


@pytest.fixture(scope="module")
def averaged(state, golden):
    """The state as ALBEF's forward sees it: it averages the teacher first."""
    towers = teacher.momentum_average(state.teacher, state.student["towers"], golden["in/momentum"])
    return state.replace(teacher=towers, step=jnp.int32(ALPHA_STEPS))


@pytest.fixture(scope="module")
def inputs(golden):
    tokens, lengths = golden["in/input_ids"].astype(np.int32), golden["in/attention_mask"].sum(1)
    hidden = golden["in/mlm_labels"] != -100
    slots = hidden.sum(1).max()
    positions = np.argsort(~hidden, axis=1, kind="stable")[:, :slots]
    used = np.take_along_axis(hidden, positions, 1)
    positions = np.where(used, positions, 0)
    words = np.where(used, np.take_along_axis(golden["in/mlm_labels"], positions, 1), 0)
    masked = MaskedText(golden["in/mlm_input_ids"].astype(np.int32), positions, words, used)
    decided = [
        1e6 * np.eye(5)[golden[f"in/{name}"]]
        for name in ("negative_text_of_image", "negative_image_of_text")
    ]
    image = golden["in/image"].transpose(0, 2, 3, 1)
    allowed = ~np.eye(5, dtype=bool)
    weight = np.full((5, 3), 1 / 15, np.float32)
    lengths, share = lengths.astype(np.int32), used / used.sum()
    drawn = Inputs(image, image, tokens, lengths, masked, share, Pair(*decided), allowed, weight)
    return jax.tree.map(jnp.asarray, drawn)


@pytest.fixture(scope="module")
def stepped(task, averaged, inputs):
    """One step of the task, with its gradient in place of the moments."""
    before = averaged.replace(moments=averaged.student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "draw_inputs", lambda *_: inputs)
        patch.setattr(task, "learn", lambda state, gradients: state.replace(moments=gradients))
        ids = np.arange(5, dtype=np.int32)
        images = (inputs.image, inputs.image, ids > 9)
        batch = Batch(*images, inputs.tokens, inputs.text_length, ids, ids, 0 * ids)
        after, scalars = jax.device_get(jax.jit(task.update)(before, batch))
    return SimpleNamespace(gradients=after.moments, queue=after.queue, scalars=scalars)


@pytest.fixture(scope="module")
def embedded(task, averaged, inputs):
    """The outputs of student and teacher for the batch before and in fusion."""

    def run(towers):
        towers = task.model.towers(towers)
        image_feature, image = towers.embed_images(inputs.image)
        text_feature, text = towers.embed_texts(inputs.tokens, inputs.text_length)
        _, masked = towers.embed_texts(inputs.masked.tokens, inputs.text_length)

        def fuse(states, lengths, image):
            return towers.fusion(states[:, None], lengths[:, None], image)[:, 0]

        length = inputs.text_length
        image_of, text_of = (
            jnp.argmax(noise, axis=1) for noise in (inputs.noise.text, inputs.noise.image)
        )
        return dict(
            image_feat=image_feature,
            text_feat=text_feature,
            image_embeds=image,
            text_embeds=text,
            fusion_positive=fuse(text, length, image),
            fusion_negative=jnp.concatenate(
                [fuse(text, length, image[image_of]), fuse(text[text_of], length[text_of], image)]
            ),
            fusion_masked=fuse(masked, length, image),
        )

    run = jax.jit(run)
    student = run(averaged.student["towers"])
    fused = jnp.concatenate([student["fusion_positive"], student["fusion_negative"]])[:, 0]
    student["itm_logits"] = task.model.match_logits(averaged.student["matching"], fused)
    found = run(averaged.teacher)
    return jax.device_get(student | {f"{name}_teacher": value for name, value in found.items()})


def test_features_hidden_states_and_matching_logits_are_albefs(embedded, golden):
    both = ("image_feat", "text_feat", "image_embeds", "text_embeds", "fusion_masked")
    names = [*both, *(f"{name}_teacher" for name in both), "fusion_positive", "fusion_negative"]
    for name in names:
        expected = golden[f"out/{name}"]
        bound = 1e-5 if "feat" in name else 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(embedded[name], expected, rtol=0, atol=bound, err_msg=name)
    np.testing.assert_allclose(embedded["itm_logits"], golden["out/itm_logits"], rtol=0, atol=1e-4)


def test_each_loss_of_the_step_is_albefs(stepped, golden):
    for ours, theirs in (("alignment", "ita"), ("matching", "itm"), ("masked_lm", "mlm")):
        found, expected = stepped.scalars[f"loss/{ours}"], golden[f"out/loss_{theirs}"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=ours)
    assert "loss/codebook" not in stepped.scalars and stepped.scalars["alpha"] == golden["in/alpha"]


def test_every_gradient_has_the_norm_of_albefs(task, stepped, golden):
    gradients = {f"student/{name}": value for name, value in sharding.named(stepped.gradients)}
    found = layouts.to_theirs(layouts.ALBEF, gradients, task.config.model.text.depth)
    expected = {name[10:]: value for name, value in golden.items() if name.startswith("grad_norm/")}
    tied = {name for name in expected if "decoder" in name}
    assert set(found) == set(expected) - tied
    for name, array in found.items():
        norm = np.linalg.norm(np.asarray(array, np.float64))
        # A bias of keys changes no attention: its gradient is only rounding.
        np.testing.assert_allclose(norm, expected[name], rtol=1e-4, atol=1e-7, err_msg=name)
    for name in (name[5:] for name in golden if name.startswith("grad/")):
        whole = golden[f"grad/{name}"]
        np.testing.assert_allclose(
            found[name], whole, rtol=0, atol=1e-4 * np.abs(whole).max(), err_msg=name
        )


def test_the_queue_after_the_step_is_albefs(stepped, golden):
    for name in ("image", "text"):
        found = stepped.queue.features[name].T
        np.testing.assert_allclose(found, golden[f"out/{name}_queue_after"], rtol=0, atol=1e-5)
    assert stepped.queue.cursor == golden["out/queue_ptr_after"][0]
    assert not np.allclose(stepped.queue.features["image"].T, golden["state/image_queue"])


@pytest.mark.parametrize(
    ("query", "candidate", "of"),
    [("text", "image", "text_to_image"), ("image", "text", "image_to_text")],
)
def test_negatives_are_drawn_with_albefs_probabilities(query, candidate, of, golden, averaged):
    draws = 20_000
    noise = jax.random.gumbel(jax.random.key(0), (draws, 5, 5))
    allowed = ~np.eye(5, dtype=bool)

    def draw(noise):
        features = golden[f"out/{query}_feat"], golden[f"out/{candidate}_feat_teacher"]
        return draw_negatives(
            *features, allowed, noise, 1, temperature=averaged.student["temperature"]
        )

    drawn = np.asarray(jax.jit(jax.vmap(draw))(noise))
    weights = golden[f"out/weights_{of}"] / golden[f"out/weights_{of}"].sum(1, keepdims=True)
    for row in range(5):
        share = np.bincount(drawn[:, row], minlength=5) / draws
        deviation = np.sqrt(weights[row] * (1 - weights[row]) / draws)
        assert (np.abs(share - weights[row]) <= 4.5 * deviation + 1e-6).all(), (row, share)


def test_entries_that_a_queue_does_not_have_yet_are_zeros_in_albefs_layout(state, weights, task):
    named = dict(sharding.named(state))
    depth = task.config.model.text.depth
    young = to_albef(named | {"queue/cursor": np.int32(10), "queue/filled": np.int32(10)}, depth)
    assert young["queue_ptr"] == [10]  # unfilled entries are zero
    np.testing.assert_array_equal(young["text_queue"][:, :10], weights["text_queue"][:, :10])
    assert (young["text_queue"][:, 10:] == 0).all()
    again = filled(young, named, depth)
    assert again["queue/cursor"] == again["queue/filled"] == 10
