"""The towers with PyTorch's own weights: BERT, ViT and DeiT of odd small sizes, state by state
(tests/goldens/).
"""

import jax
import numpy as np
import pytest
from flax import nnx
from golden_weights import GOLDENS, IMAGES, TEXT, WORDS

from codebook_jax.models import codis
from codebook_jax.models.vit import cut_patches
from codebook_jax.weights import layouts
from codebook_jax.weights.files import read_weights
from codebook_jax.weights.fill import fill, fitted_positions
from configs import base


def config_of(image="vit", **text):
    config = base.paper("tiny")
    config.model.image.update(IMAGES[image])
    config.model.text.update(TEXT | text)
    return config


def outputs_of(name):
    with np.load(GOLDENS / name / "outputs.npz") as stored:
        return {key: stored[key] for key in stored.files}


def filled(config, name, part):
    """Our towers' parameters from the golden's folder, zeros if missing, and the printed report."""
    layout, arrays = layouts.recognise(part, read_weights(str(GOLDENS / name), name).arrays, name)
    abstract = jax.eval_shape(lambda: codis.init_student(config, WORDS, jax.random.key(0)))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract["towers"])
    shapes = shapes_of(fresh)
    found = fill(
        layout, arrays, shapes, text_depth=config.model.text.depth, what=name, allow_partial=False
    )
    names = iter(shapes)
    return jax.tree.map(lambda leaf: found.arrays.get(next(names), leaf), fresh), found


def leaves_of(tree):
    """{name: array} of the towers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes_of(tree):
    return {name: leaf.shape for name, leaf in leaves_of(tree).items()}


def states_of(blocks, apply, states):
    """The states after each of the stacked blocks."""
    graph, stacked = nnx.split(blocks)
    parameters = nnx.to_pure_dict(stacked)
    found = []
    for place in range(jax.tree.leaves(parameters)[0].shape[0]):
        own = jax.tree.map(lambda leaf, at=place: leaf[at], parameters)
        block = nnx.merge(graph, nnx.State(own))
        states = apply(block, states)
        found.append(states)
    return found


def assert_states(found, golden):
    for place, states in enumerate(found):
        expected = golden[f"states_{place}"]
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(states, expected, rtol=0, atol=atol, err_msg=f"layer {place}")


@pytest.mark.parametrize("name", IMAGES)
def test_every_state_of_the_image_encoder_is_pytorchs(name):
    config, golden = config_of(name), outputs_of(name)
    towers, found = filled(config, name, "image")
    assert {n for n in shapes_of(towers) if n.startswith("image/")} == set(found.arrays)
    vision = codis.Model(config, WORDS).towers(towers).image
    images = golden["images"].transpose(0, 2, 3, 1)
    patches = vision.patches(cut_patches(images, vision.patch_px))
    cls = np.broadcast_to(towers["image"]["cls"], (len(images), 1, patches.shape[2]))
    embedded = np.concatenate([cls, patches], axis=1) + towers["image"]["positions"]
    states = states_of(vision.blocks, lambda block, x: block(x), embedded)
    assert len(states) == config.model.image.depth
    assert_states([embedded, *states], golden)
    assert_states([vision(images)], {"states_0": golden["normed"]})


def test_every_state_of_the_text_encoder_and_every_logit_of_a_word_is_pytorchs():
    golden = outputs_of("bert")
    halves, found = filled(config_of(), "bert", "text")
    fresh = {n for n in shapes_of(halves) if n not in found.arrays and not n.startswith("image")}
    assert {n.split("/")[0] for n in fresh} == {"fusion", "text_projection"}
    assert all("cross" in n for n in fresh if n.startswith("fusion"))
    # BERT has no cross-attention: its upper layers, as they were put into the fusion encoder,
    # follow the lower ones.
    upper = {n: v for n, v in halves["fusion"]["blocks"].items() if not n.startswith("cross")}
    blocks = jax.tree.map(lambda *parts: np.concatenate(parts), halves["text"]["blocks"], upper)
    towers = halves | {"text": halves["text"] | {"blocks": blocks}}
    model = codis.Model(config_of(depth=5), WORDS).towers(towers)
    tokens, lengths = golden["tokens"].astype(np.int32), golden["lengths"].astype(np.int32)
    p = towers["text"]
    embedded = model.text.norm(
        p["words"][tokens] + p["positions"][: tokens.shape[1]] + p["segment"][0]
    )
    states = states_of(model.text.blocks, lambda block, x: block(x, lengths, None), embedded)
    assert len(states) == 5
    assert_states([embedded, *states], golden)
    assert_states([model.text(tokens, lengths)], {"states_0": golden["states_5"]})
    np.testing.assert_allclose(model.word_logits(states[-1]), golden["logits"], rtol=0, atol=1e-4)


def test_the_names_that_transformers_5_has_in_memory_are_known_too():
    renamed = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    arrays = {}
    for key, value in read_weights(str(GOLDENS / "vit"), "vit").arrays.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        arrays[key] = value
    layout, arrays = layouts.recognise("image", arrays, "vit")
    assert layout is layouts.VIT_HF5
    expected, _ = filled(config_of(), "vit", "image")
    shapes = shapes_of({"image": expected["image"]})
    found = fill(layout, arrays, shapes, text_depth=2, what="vit", allow_partial=False)
    assert found.arrays.keys() == shapes.keys()
    for name, leaf in leaves_of({"image": expected["image"]}).items():
        np.testing.assert_array_equal(found.arrays[name], leaf, err_msg=name)


def test_heads_poolers_and_distillation_are_named_as_ignored():
    kinds = {}
    for name in ("vit", "deit", "timm"):
        _, found = filled(config_of(name), name, "image")
        kinds[name] = {key: kind for key, (_, kind) in found.ignored.items()}
    assert kinds["vit"] == {"pooler.dense.weight": "pooler", "pooler.dense.bias": "pooler"}
    assert kinds["deit"]["embeddings.distillation_token"] == "distillation token"
    assert kinds["deit"]["cls_classifier.weight"] == kinds["timm"]["head.weight"] == "head"
    _, found = filled(config_of(), "bert", "text")
    assert {kind for _, kind in found.ignored.values()} == {"pooler", "next-sentence head"}


@pytest.mark.parametrize("side", [3, 7])
def test_positions_are_resized_as_pytorch_resizes(side):
    positions = read_weights(str(GOLDENS / "vit"), "vit").arrays["embeddings.position_embeddings"]
    resized, _ = fitted_positions(positions, (1, side * side + 1, 30))
    expected = outputs_of("vit")[f"positions_{side}"]
    np.testing.assert_array_equal(resized[:, 0], positions[:, 0])
    np.testing.assert_allclose(resized[:, 1:].reshape(expected.shape), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "name", "layout"),
    [
        ("image", "vit", layouts.VIT_HF),
        ("image", "deit", layouts.VIT_HF),
        ("image", "timm", layouts.VIT_TIMM),
        ("text", "bert", layouts.BERT),
    ],
)
def test_a_tower_written_back_is_the_file_bit_for_bit(part, name, layout):
    config = config_of(name) if part == "image" else config_of()
    towers, _ = filled(config, name, part)
    if part == "image":
        towers = {"image": towers["image"]}
    _, arrays = layouts.recognise(part, read_weights(str(GOLDENS / name), name).arrays, name)
    written = layouts.to_theirs(layout, leaves_of(towers), TEXT["depth"])
    left_out = "pooler", "classifier", "head", "distillation", "position_emb", "seq_relationship"
    left_out = [each for each in left_out if part == "image" or not each.startswith("position")]
    kept = {key for key in arrays if not any(each in key for each in left_out)}
    assert kept <= set(written) and len(kept) > 30
    for key in kept:
        np.testing.assert_array_equal(written[key], arrays[key], err_msg=key)
