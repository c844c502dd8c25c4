"""Example queries of a gallery in both directions, with what the model finds."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from codebook_jax.evaluation.encoding import Gallery

QUERIES = 5  # of each kind, drawn at random
ANSWERS = 5  # shown per query


def examples(
    gallery: Gallery, similarity: Float[np.ndarray, "images texts"], *, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Random `captions` as queries for pictures, and random `pictures` as queries for captions,
    with their answers.
    """
    ids, text_ids = gallery.image_ids, gallery.text_image_ids
    rng = np.random.default_rng(seed)
    texts = rng.permutation(len(text_ids))[:QUERIES].tolist()
    images = rng.permutation(len(ids))[:QUERIES].tolist()
    return {
        "captions": [
            {"query": t} | answers_of(similarity[:, t], ids == text_ids[t]) for t in texts
        ],
        "pictures": [{"query": i} | answers_of(similarity[i], text_ids == ids[i]) for i in images],
    }


def answers_of(
    scores: Float[np.ndarray, "candidates"], own: Bool[np.ndarray, "candidates"]
) -> dict[str, Any]:
    """The best `answers`, the first `right` one, and its rank (from 1) if it is `further` down."""
    order = np.argsort(-scores, kind="stable")
    place = int(np.argmax(own[order]))
    best = order[:ANSWERS].tolist()
    return {
        "answers": [{"at": at, "score": float(scores[at]), "right": bool(own[at])} for at in best],
        "right": int(order[place]),
        "further": place + 1 if place >= len(best) else None,
    }
