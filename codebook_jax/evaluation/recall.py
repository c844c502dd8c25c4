"""Recall at k of image-to-text and text-to-image retrieval, and the recall that chance gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

RANKS = (1, 5, 10)
CELLS_AT_ONCE = 2**24  # of the score matrix compared in one pass: some 150 MB

# Scores of some queries [some, candidates], and which queries, to those that rank the candidates.
Revise = Callable[[np.ndarray, slice], np.ndarray]


def recall_at_k(
    scores: Float[np.ndarray, "images texts"],
    image_ids: Int[np.ndarray, " images"],
    text_image_ids: Int[np.ndarray, " texts"],
) -> dict[str, float]:
    """R@k of both directions in percent: `txt_r1` (an image finds any text with its id), ...,
    `img_r1`, ... Equal scores are counted as if shuffled, so uninformative scores give chance.
    Raises ValueError for NaN scores and for a query without a match.
    """
    text_recall = recall_of_queries(scores, image_ids, text_image_ids)
    image_recall = recall_of_queries(scores.T, text_image_ids, image_ids)
    return named_recalls("txt_r", text_recall) | named_recalls("img_r", image_recall)


def recall_of_queries(
    scores: Float[np.ndarray, "queries candidates"],
    query_ids: Int[np.ndarray, " queries"],
    candidate_ids: Int[np.ndarray, " candidates"],
    revise: Revise = lambda scores, queries: scores,
) -> Float[np.ndarray, " ranks"]:
    """Percent of queries with a candidate of their own id among the k highest, for each rank k."""
    hits = np.zeros(len(RANKS))
    rows = max(1, CELLS_AT_ONCE // max(1, len(candidate_ids)))
    for start in range(0, len(query_ids), rows):
        queries = slice(start, start + rows)
        part = revise(scores[queries], queries)
        if bad := int(np.isnan(part).any(axis=1).sum()):
            raise ValueError(f"scores of {bad} of {len(part)} queries hold NaN: no rank is known")
        matches = query_ids[queries, None] == candidate_ids[None, :]
        best = np.where(matches, part, -np.inf).max(axis=1, keepdims=True)
        tied = part == best
        hits += _hit_probability(
            (part > best).sum(axis=1), tied.sum(axis=1), (tied & matches).sum(axis=1)
        ).sum(axis=0)
    return 100 * hits / max(1, len(query_ids))


def chance_at_k(
    image_ids: Int[np.ndarray, " images"], text_image_ids: Int[np.ndarray, " texts"]
) -> dict[str, float]:
    """Exact R@k of a random order, in percent: `txt_chance_r1`, ..., their means `chance_r1`."""
    text_chance = _chance_of_queries(image_ids, text_image_ids)
    image_chance = _chance_of_queries(text_image_ids, image_ids)
    return (
        named_recalls("chance_r", (text_chance + image_chance) / 2)
        | named_recalls("txt_chance_r", text_chance)
        | named_recalls("img_chance_r", image_chance)
    )


def named_recalls(prefix: str, recalls: Float[np.ndarray, " ranks"]) -> dict[str, float]:
    """{"txt_r1": ..., "txt_r5": ...} for the prefix "txt_r"."""
    return {f"{prefix}{k}": float(recall) for k, recall in zip(RANKS, recalls, strict=True)}


def _chance_of_queries(
    query_ids: Int[np.ndarray, " queries"], candidate_ids: Int[np.ndarray, " candidates"]
) -> Float[np.ndarray, " ranks"]:
    counts = Counter(candidate_ids.tolist())
    matching = np.array([counts[query] for query in query_ids.tolist()])
    everything = np.full(len(query_ids), len(candidate_ids))
    return 100 * _hit_probability(np.zeros_like(everything), everything, matching).mean(axis=0)


def _hit_probability(
    above: Int[np.ndarray, " queries"],
    tied: Int[np.ndarray, " queries"],
    matching: Int[np.ndarray, " queries"],
) -> Float[np.ndarray, "queries ranks"]:
    """1 - C(tied - matching, m) / C(tied, m): a hit among m = k - above draws of the tied."""
    if lonely := int((matching == 0).sum()):
        raise ValueError(f"{lonely} queries have no matching candidate: leave them out")
    probability = np.empty((len(above), len(RANKS)))
    for column, k in enumerate(RANKS):
        miss = np.ones(len(above))
        for drawn in range(k):
            ratio = np.maximum(tied - matching - drawn, 0) / np.maximum(tied - drawn, 1)
            miss *= np.where(drawn < k - above, ratio, 1.0)
        probability[:, column] = 1 - miss
    return probability
