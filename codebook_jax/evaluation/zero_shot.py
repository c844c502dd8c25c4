"""What a model of pre-training can do beside retrieval, without training for it: tell labels by
prompts, and find in a picture what an expression names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8

from codebook_jax.data.examples import label_number
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.evaluation import classes, grounding
from codebook_jax.evaluation.encoding import encode_texts, rows_over_shards, run_towers
from codebook_jax.evaluation.predicting import predict
from codebook_jax.evaluation.stage import IN_MEMORY, Progress
from codebook_jax.method.numerics import own_settings
from codebook_jax.models.codis import Model
from codebook_jax.models.explaining import explain_pairs

Figures = dict[str, float]


def label_features(
    encode: Callable[[list[str]], Float[np.ndarray, "texts dim"]],
    labels: Sequence[str],
    prompts: Sequence[str],
) -> Float[np.ndarray, "labels dim"]:
    """A unit feature for each label: the mean of those of its prompts, in which "{}" stands for it
    (Radford et al. 2021, 3.1.4). Raises UserError if there is no prompt or one without "{}".
    """
    if not prompts or any("{}" not in prompt for prompt in prompts):
        raise UserError(
            f"prompts={tuple(prompts)!r} cannot be used: give some, each with {{}} for the label "
            "(a run's are config.evaluation.prompts)"
        )
    texts = [prompt.replace("{}", label) for label in labels for prompt in prompts]
    features = encode(texts).reshape(len(labels), len(prompts), -1).mean(axis=1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def tell_labels(
    model: Model,
    towers: PyTree,
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    images: int,
    progress: Progress | None = None,
) -> tuple[Figures, str]:
    """Accuracy of naming each image by the nearest prompt, and its table."""
    labels = sorted({label for at in range(len(source)) for label in source.captions(at)[-1:]})
    rows = rows_over_shards(config.evaluation.batch, model.mesh)

    def encode(texts: list[str]) -> np.ndarray:
        tokens, lengths, _ = tokenizer.encode(texts, config.model.text.max_tokens)
        run = functools.partial(run_towers, model.encode_texts, ())
        given = run, {"student": towers}, (tokens, lengths), model.mesh, rows, IN_MEMORY
        return encode_texts(*given)["student"]

    def features(images: Array, tokens: Array, lengths: Array) -> Array:
        return model.encode_images(towers, images[:, 0])[0]

    prompts = label_features(encode, labels, config.evaluation.prompts)
    given = features, source, tokenizer, config, model.mesh
    found = predict(*given, images=images, progress=progress)
    scores = found.outputs @ prompts.T
    right = np.array([label_number(example, labels) for example in found.examples])
    names = [labels[at] for at in scores.argmax(axis=1)]
    judged = classes.classify(names, [labels[at] for at in right], labels)
    figures = judged.figures() | classes.top_k_accuracy(scores, right)
    return figures, classes.format_table(judged)


def find_expressions(
    model: Model,
    student: PyTree,
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    images: int,
    progress: Progress | None = None,
) -> tuple[Figures, str]:
    """Accuracy of choosing a box by the relevance of the expression's tokens, and of pointing, and
    its table (Li et al. 2021, 4.5). Raises UserError if no expression has a true box.
    """
    if not config.model.text.fusion_depth:
        raise UserError("this model has no fusion encoder, whose attention finds expressions")

    @jax.jit
    @own_settings
    def program(
        student: PyTree,
        images: UInt8[Array, "rows 1 side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> Float[Array, "rows patches"]:
        return explain_pairs(model, student, images[:, 0], tokens, lengths).maps.sum(axis=1)

    given = functools.partial(program, student), source, tokenizer, config, model.mesh
    found = predict(*given, images=images, progress=progress)
    side = round(found.outputs.shape[1] ** 0.5)
    grounded = [
        grounding.ground(
            example.key, patches.reshape(side, side), *size, example.box, example.proposals
        )
        for example, patches, size in zip(found.examples, found.outputs, found.sizes, strict=True)
        if example.box is not None
    ]
    figures = grounding.evaluate(grounded)
    return figures, grounding.format_table(figures)
