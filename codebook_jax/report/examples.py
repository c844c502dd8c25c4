"""Queries of a gallery with what the model finds for them, both ways."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from codebook_jax.evaluation.encoding import Gallery

QUERIES = 5  # of each kind, drawn at random
ANSWERS = 5  # shown of each query


class Answers(NamedTuple):
    """What one query found: its best answers, and where the first right one stands."""

    query: int
    found: Int[np.ndarray, "answers"]
    scores: Float[np.ndarray, "answers"]
    right: Int[np.ndarray, "answers"]  # 1 where the answer is the query's own
    rank: int  # of the first right one, from 1
    first_right: int


def answers_of(
    scores: Float[np.ndarray, "candidates"],
    query: int,
    own: Int[np.ndarray, "candidates"],
) -> Answers:
    """The best answers to a query; `own` is 1 at the candidates that are right."""
    order = np.argsort(-scores, kind="stable")
    place = int(np.argmax(own[order]))
    found = order[:ANSWERS]
    return Answers(query, found, scores[found], own[found], place + 1, int(order[place]))


def examples(
    gallery: Gallery, similarity: Float[np.ndarray, "images texts"], *, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """`captions` that look for their picture and `pictures` that look for their caption, drawn at random."""
    ids, text_ids = gallery.image_ids, gallery.text_image_ids
    rng = np.random.default_rng(seed)
    texts = rng.permutation(len(text_ids))[:QUERIES]
    images = rng.permutation(len(ids))[:QUERIES]
    by_text = [answers_of(similarity[:, t], int(t), (ids == text_ids[t]).astype(int)) for t in texts]
    by_image = [answers_of(similarity[i], int(i), (text_ids == ids[i]).astype(int)) for i in images]
    return {"captions": [_shown(one) for one in by_text], "pictures": [_shown(one) for one in by_image]}


def _shown(answers: Answers) -> dict[str, Any]:
    """The answers in the order to show them; after the best, the right one where it is further down."""
    listed = zip(answers.found.tolist(), answers.scores.tolist(), answers.right.tolist(), strict=True)
    shown = [
        {"at": at, "score": score, "right": bool(right), "rank": rank}
        for rank, (at, score, right) in enumerate(listed, 1)
    ]
    further = answers.rank if answers.rank > len(shown) else None
    return {"query": answers.query, "answers": shown, "further": further, "right": answers.first_right}
