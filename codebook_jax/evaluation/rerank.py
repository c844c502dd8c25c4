"""Re-ranking: the best candidates of the dual encoder, sorted by what the matching head says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int

from codebook_jax.evaluation.encoding import Gallery, rows_over_shards
from codebook_jax.evaluation.recall import Revise, named_recalls, recall_of_queries
from codebook_jax.evaluation.stage import IN_MEMORY, Bookkeeping, Shares, Stage, digest
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers

TEXTS_A_ROW = 16  # texts that share one projection of an image to the fusion's keys and values

# Image tokens [rows, patches, width], states [rows, texts, tokens, width] and lengths of texts
# [rows, texts] to scores [rows, texts], the higher the better they match.
Match = Callable[[Array, Array, Array], Array]


class Scoring(NamedTuple):
    """What candidates are sorted by: the score of `match` and so much of the cosine."""

    match: Match
    cosine_weight: float = 0.0


def rerank_gallery(
    scoring: Scoring,
    mesh: jax.sharding.Mesh,
    gallery: Gallery,
    similarity: Float[np.ndarray, "images texts"],
    settings: ml_collections.ConfigDict,  # config.evaluation
    books: Bookkeeping = IN_MEMORY,
) -> dict[str, float]:
    """Recalls in percent after sorting every query's best candidates by their scores; pairs that
    are candidates in both directions are scored once (ALBEF scores them twice).
    """
    texts_of_images = top_candidates(similarity, settings.rerank_top_k)
    images_of_texts = top_candidates(similarity.T, settings.rerank_top_k)
    image_count, text_count = similarity.shape
    image_keys = np.arange(image_count)[:, None] * text_count + texts_of_images
    text_keys = images_of_texts * text_count + np.arange(text_count)[:, None]
    keys = np.unique(np.concatenate([image_keys.ravel(), text_keys.ravel()]))
    pairs = np.divmod(keys, text_count)
    scores = match_pairs(scoring.match, mesh, gallery, *pairs, batch=settings.batch, books=books)
    scores = scores + scoring.cosine_weight * similarity[pairs]
    ids = gallery.image_ids, gallery.text_image_ids

    def reranked(chosen: np.ndarray, own: np.ndarray) -> Revise:
        values = scores[np.searchsorted(keys, own)]
        return lambda part, queries: promoted(part, chosen[queries], values[queries])

    text_recall = recall_of_queries(similarity, *ids, reranked(texts_of_images, image_keys))
    image_order = reranked(images_of_texts, text_keys)
    image_recall = recall_of_queries(similarity.T, *reversed(ids), image_order)
    return named_recalls("txt_r", text_recall) | named_recalls("img_r", image_recall)


def match_pairs(
    match: Match,
    mesh: jax.sharding.Mesh,
    gallery: Gallery,
    pair_images: Int[np.ndarray, " pairs"],
    pair_texts: Int[np.ndarray, " pairs"],
    *,
    batch: int,
    books: Bookkeeping = IN_MEMORY,
) -> Float[np.ndarray, " pairs"]:
    """Score of each (image, text) pair of a gallery; `pair_images` ascends. In rows of
    TEXTS_A_ROW texts, so that an image's keys and values are projected once per row; every call has
    the same shape, with about as many text tokens as `batch` images have patches.
    """
    tokens, states = gallery.features["student"][2:]
    row_images, row_texts, places = pair_rows(pair_images, pair_texts, TEXTS_A_ROW)
    count, positions = len(row_images), gallery.positions[row_images]
    rows = max(1, batch * tokens.shape[1] // (TEXTS_A_ROW * states.shape[1]))
    shares = Shares.over(mesh, rows_over_shards(min(rows, count), mesh))
    owners = shares.owners(positions, tokens.shape[0])  # of the image's tokens

    def inputs(at: Int[np.ndarray, " rows"]) -> tuple[np.ndarray, ...]:
        texts = row_texts[at]
        return tokens[positions[at]], states[texts], gallery.text_lengths[texts]

    def finish() -> None:
        at, scores = running.pop(0)
        is_row = at >= 0
        stage.write(at[is_row], {"scores": sharding.own_rows(scores, mesh)[is_row]})

    made_of = digest([row_images, row_texts])
    # chosen by each for itself, and one who chose others would be waited for
    peers.connected().compare("pairs", {"pairs": made_of}, "give all hosts the same processors")
    like = {"scores": jax.eval_shape(match, *inputs(np.zeros(1, int)))}
    stage = Stage(books, "pairs", made_of, count, like, each=TEXTS_A_ROW)
    running = []
    for at in stage.calls(shares, owners):
        running.append((at, match(*sharding.put_batch(inputs(at.clip(min=0)), mesh))))
        if len(running) > 1:  # one call late: the device works while the host gathers
            finish()
    while running:
        finish()
    own = np.flatnonzero(shares.is_own(owners))
    scores = np.empty((count, TEXTS_A_ROW), like["scores"].dtype)
    for at, values in peers.connected().exchange("scores", (own, stage.arrays["scores"][own])):
        scores[at] = values
    return scores.ravel()[places]


def pair_rows(
    pair_images: Int[np.ndarray, " pairs"], pair_texts: Int[np.ndarray, " pairs"], width: int
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, "rows width"], Int[np.ndarray, " pairs"]]:
    """Rows of one image and `width` of its texts, and each pair's place in the flattened rows;
    `pair_images` ascends, and places that no pair fills repeat text 0.
    """
    _, first, counts = np.unique(pair_images, return_index=True, return_counts=True)
    rows_of_image = -(-counts // width)
    first_row = np.cumsum(rows_of_image) - rows_of_image
    within = np.arange(len(pair_images)) - np.repeat(first, counts)
    places = np.repeat(first_row * width, counts) + within
    texts = np.zeros(int(rows_of_image.sum()) * width, pair_texts.dtype)
    texts[places] = pair_texts
    return np.repeat(pair_images[first], rows_of_image), texts.reshape(-1, width), places


def top_candidates(
    scores: Float[np.ndarray, "queries candidates"], top_k: int
) -> Int[np.ndarray, "queries top_k"]:
    """The `top_k` highest candidates of each query (all, if there are fewer), in no order."""
    first = max(0, scores.shape[1] - top_k)
    chosen = np.empty((len(scores), scores.shape[1] - first), np.int64)
    for row, best in zip(scores, chosen, strict=True):
        best[:] = np.argpartition(row, first)[first:]  # a view would keep its whole row
    return chosen


def promoted(
    scores: Float[np.ndarray, "queries candidates"],
    chosen: Int[np.ndarray, "queries top_k"],
    values: Float[np.ndarray, "queries top_k"],
) -> Float[np.ndarray, "queries candidates"]:
    """Scores in which the chosen candidates come first, in the order of their values, ties kept:
    the ranks of the values are added, not the values, so that nothing is rounded.
    """
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    steps = np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0
    places = np.empty(values.shape, scores.dtype)
    np.put_along_axis(places, order, np.cumsum(steps, axis=1).astype(scores.dtype), axis=1)
    places[np.isnan(values)] = np.nan  # so that recall raises an error
    result = np.array(scores)
    np.put_along_axis(result, chosen, scores.max(axis=1, keepdims=True) + 1 + places, axis=1)
    return result
