"""What a model makes of a gallery: answers to queries, and what each codeword stands for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from codebook_jax.data.text import clean
from codebook_jax.evaluation.encoding import Gallery
from codebook_jax.report.charts import lines
from codebook_jax.weights.load import code_probabilities

QUERIES = 5  # of each kind, drawn at random
ANSWERS = 5  # shown per query
PICTURES, CAPTIONS, WORDS = 10, 4, 6  # shown per codeword
LEAST_LIFT = 1.5  # a word is shown if it is this much more frequent in the codeword's captions


def examples(
    gallery: Gallery, similarity: Float[np.ndarray, "images texts"], *, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Random `captions` as queries for pictures, `pictures` for captions, with their answers."""
    ids, text_ids = gallery.image_ids, gallery.text_image_ids
    rng = np.random.default_rng(seed)
    texts, images = (rng.permutation(len(of))[:QUERIES].tolist() for of in (text_ids, ids))
    by_text = [{"query": t} | answers_of(similarity[:, t], ids == text_ids[t]) for t in texts]
    by_image = [{"query": i} | answers_of(similarity[i], text_ids == ids[i]) for i in images]
    return {"captions": by_text, "pictures": by_image}


def answers_of(
    scores: Float[np.ndarray, " candidates"], own: Bool[np.ndarray, " candidates"]
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


def explore_codebook(
    gallery: Gallery, codewords: Float[np.ndarray, "codes dim"], *, temperature: float
) -> dict[str, Any]:
    """`totals`, a `chart` of the codebook's use, the `captions` shown, and the `codewords` in use,
    first those that many pictures and captions share: how many `images` and `captions` choose it,
    the surest of them, and how many captions are `agreeing` with their picture, of the `pairs` with
    either.
    """
    tables = [
        code_probabilities(part, codewords, temperature=temperature)
        for part in gallery.features["student"][:2]
    ]
    winners = [table.argmax(axis=1) for table in tables]
    counts = np.stack([np.bincount(best, minlength=len(codewords)) for best in winners], axis=1)
    used = int((counts.sum(axis=1) > 0).sum())
    order = np.lexsort((-counts.sum(axis=1), -counts.min(axis=1)))[:used]
    own_image = (gallery.text_image_ids[:, None] == gallery.image_ids).argmax(axis=1)
    everywhere = _words_in(gallery.captions)
    entries = []
    for code in order.tolist():
        images, texts = (
            sorted(np.flatnonzero(best == code).tolist(), key=lambda row: -table[row, code])
            for table, best in zip(tables, winners, strict=True)
        )
        here, there = winners[0][own_image] == code, winners[1] == code
        captions = [gallery.captions[text] for text in texts]
        words = words_of(captions, everywhere, len(gallery.captions))[:WORDS]
        entry = {"code": code, "images": len(images), "captions": len(texts)}
        entry |= {"agreeing": int((here & there).sum()), "pairs": int((here | there).sum())}
        entry["words"] = [[word, round(share, 3)] for word, share in words]
        entries.append(entry | {"pictures": images[:PICTURES], "texts": texts[:CAPTIONS]})
    total = np.array([len(gallery.image_ids), len(gallery.captions)])
    shares = 100 * -np.sort(-counts[order], axis=0) / total
    chart = lines(
        np.arange(1, used + 1),
        {"of the pictures": shares[:, 0], "of the captions": shares[:, 1]},
        title="Use of the codewords",
        x="rank of the codeword, the most used first",
        y="share that uses it, %",
        note="The steeper the start, the fewer codewords do most of the work.",
    )
    totals = {
        "size": len(codewords),
        "used": used,
        "shared": int((counts.min(axis=1) > 0).sum()),
        "agreement": float((winners[0][own_image] == winners[1]).mean()),
        "images": len(gallery.image_ids),
        "captions": len(gallery.captions),
    }
    shown = {text: gallery.captions[text] for entry in entries for text in entry["texts"]}
    return {"totals": totals, "chart": chart, "codewords": entries, "captions": shown}


def words_of(
    captions: Sequence[str], everywhere: Counter[str], total: int
) -> list[tuple[str, float]]:
    """(word, share of these captions) of the words that set them apart from all, the best first."""
    gains = []
    for word, count in _words_in(captions).items():
        share, usual = count / len(captions), everywhere[word] / total
        if share >= LEAST_LIFT * usual and (count > 1 or len(captions) == 1):
            gains.append((-share * math.log(share / usual), word, share))
    return [(word, share) for _, word, share in sorted(gains)]


def _words_in(captions: Sequence[str]) -> Counter[str]:
    """In how many captions each word is."""
    return Counter(word for caption in captions for word in set(clean(caption).split()))
