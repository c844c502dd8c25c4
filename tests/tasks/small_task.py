"""A small pre-training task, its batches and runs of a few steps, for the tests of this folder."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import reference
from jax.sharding import AxisType, Mesh

from codebook_jax.data.batch import Batch
from codebook_jax.data.text import Vocabulary
from codebook_jax.parallel import sharding
from codebook_jax.run.checkpoint import Checkpoints
from codebook_jax.tasks import pretrain
from codebook_jax.tasks.draws import draw_inputs
from configs import base

BATCH, SIDE, TOKENS, IMAGE_TOKENS, WORDS = (
    16,
    24,
    7,
    10,
    40,
)  # 10 is the size of nothing but image tokens


CONFIG = {
    "model.image.size_px": SIDE,
    "model.image.patch_px": 8,
    "model.image.width": 16,
    "model.image.depth": 1,
    "model.image.heads": 2,
    "model.text.width": 16,
    "model.text.depth": 1,
    "model.text.fusion_depth": 1,
    "model.text.heads": 2,
    "model.text.max_tokens": TOKENS,
    "model.text.max_positions": 8,
    "model.dim": 8,
    "losses.matching": 0.5,
    "codebook.size": 12,
    "codebook.iterations": 20,
    "codebook.window_samples": 64,
    "queue.size": 40,  # no multiple of the batch
    "data.global_batch": BATCH,
    "itm.groups": 8,  # pairs of two: each one's negative is the other
    "mlm.probability": 0.5,
    "teacher.alpha_steps": 3,
    "optimizer.warmup_steps": 2,
    # Adam divides by the gradient's size: with less, what is only rounding becomes a step as large
    # as any.
    "optimizer.eps": 1e-3,
    "train.steps": 10,
}


VOCABULARY = Vocabulary(WORDS, 0, 2, 3, 4, (0, 1, 2, 3, 4))


def task_on(*sizes, **changes):
    config = base.paper("tiny")
    config.update_from_flattened_dict(CONFIG | changes)
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    return pretrain.Pretraining(config, VOCABULARY, mesh)


def batch_of(seed, **changes):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, TOKENS + 1, BATCH).astype(np.int32)
    tokens = rng.integers(5, WORDS, (BATCH, TOKENS)).astype(np.int32)
    place = np.arange(TOKENS)[None, :]
    tokens = np.where(place == lengths[:, None] - 1, VOCABULARY.sep_id, tokens)
    tokens = np.where(place >= lengths[:, None], VOCABULARY.pad_id, tokens)
    tokens[:, 0] = VOCABULARY.cls_id
    images = rng.integers(0, 256, (2, BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    ids = np.arange(BATCH, dtype=np.int32)
    batch = Batch(
        images[0], images[1], np.zeros(BATCH, bool), tokens, lengths, ids, ids, np.zeros_like(ids)
    )
    return batch._replace(**changes)


@functools.cache
def compiled_on(*sizes):
    """The task on these devices and its step, compiled once for all tests."""
    task = task_on(*sizes)
    batch = sharding.put_batch(batch_of(0), task.mesh)
    return task, task.step.lower(task.abstract_state(), batch).compile()


def run(task, state, batches, step=None):
    """The states after each batch, on the host, and the scalars."""
    step = step or task.step
    state = jax.device_put(state, task.shardings)
    states, scalars = [], []
    for batch in batches:
        state, found = step(state, sharding.put_batch(batch, task.mesh))
        states.append(jax.device_get(state))
        scalars.append(jax.device_get(found))
    return states, scalars


def read_back(task, state, folder):
    """The state after it was saved as a checkpoint and restored."""
    with Checkpoints(folder, task.checkpoint_items().alone, keep=3) as checkpoints:
        checkpoints.save(2, jax.device_put(state, task.shardings), {})
        checkpoints.wait()
        return checkpoints.restore_newest(task.abstract_state()).state


def walk(task, first, batches):
    states, scalars = run(task, first, batches)
    return SimpleNamespace(task=task, batches=batches, states=[first, *states], scalars=scalars)


def named(tree):
    return dict(sharding.named(tree))


def assert_close(found, expected, *, rtol):
    """Every array to a share of its largest entry."""
    expected = named(expected)
    for name, array in named(found).items():
        scale = np.abs(expected[name]).max() or 1.0
        np.testing.assert_allclose(
            array / scale, expected[name] / scale, rtol=0, atol=rtol, err_msg=name
        )


def drawing(task):
    """A program for what a step draws of a batch."""

    @jax.jit
    def draw(step, batch):
        key = jax.random.fold_in(jax.random.key(task.config.seed), step)
        return draw_inputs(batch, jax.random.split(key)[0], task.config, task.vocabulary)

    return draw


def saying(task):
    """A program for the towers' outputs for a batch, with every pair of image and text in a
    separate row.
    """

    @jax.jit
    def say(student, teacher, batch, masked):
        features, words = [], []
        for parameters, images in (
            (student["towers"], batch.image),
            (teacher, batch.teacher_image),
        ):
            towers = task.model.towers(parameters)
            image, image_tokens = towers.embed_images(task.model.pixels(images))
            text, states = towers.embed_texts(batch.tokens, batch.text_length)
            features.append((image, text))
            _, hidden = towers.embed_texts(masked.tokens, batch.text_length)
            fused = towers.fusion(hidden[:, None], batch.text_length[:, None], image_tokens)
            words.append(towers.word_logits(fused[:, 0]))
            if parameters is not teacher:
                images, texts = np.divmod(np.arange(BATCH**2), BATCH)
                lengths = batch.text_length[texts][:, None]
                pairs = towers.fusion(states[texts][:, None], lengths, image_tokens[images])
                match = task.model.match_logits(student["matching"], pairs[:, 0, 0])
        return reference.Said(*features, match.reshape(BATCH, BATCH, 2), *words)

    return say
