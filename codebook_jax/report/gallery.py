"""What a model makes of a gallery: answers to queries, and what each codeword stands for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

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


def explore_codebook(
    gallery: Gallery, codewords: Float[np.ndarray, "codes dim"], *, temperature: float
) -> dict[str, Any]:
    """`totals`, a `chart` of the codebook's use, the `codewords`, the `captions` that they name."""
    image, text = (
        code_probabilities(part, codewords, temperature=temperature)
        for part in gallery.features["student"][:2]
    )
    own_image = (gallery.text_image_ids[:, None] == gallery.image_ids).argmax(axis=1)
    everywhere, total = _words_in(gallery.captions), len(gallery.captions)
    entries = []
    for code in codewords_of(image, text, own_image):
        images, texts = code["images"], code["texts"]
        words = words_of([gallery.captions[text] for text in texts], everywhere, total)[:WORDS]
        entries.append(
            code
            | {"images": len(images), "captions": len(texts)}
            | {"words": [[word, round(share, 3)] for word, share in words]}
            | {"pictures": images[:PICTURES], "texts": texts[:CAPTIONS]}
        )
    counts = np.array([[entry["images"], entry["captions"]] for entry in entries], float)
    shares = -100 * np.sort(-counts, axis=0) / (len(gallery.image_ids), total)
    chart = lines(
        np.arange(1, len(entries) + 1),
        {"of the pictures": shares[:, 0], "of the captions": shares[:, 1]},
        title="Use of the codewords",
        x="rank of the codeword, the most used first",
        y="share that uses it, %",
        note="The steeper the start, the fewer codewords do most of the work.",
    )
    totals = {
        "size": len(codewords),
        "used": len(entries),
        "shared": int((counts.min(axis=1) > 0).sum()),
        "agreement": sum(entry["agreeing"] for entry in entries) / total,
        "images": len(gallery.image_ids),
        "captions": total,
    }
    shown = {text: gallery.captions[text] for entry in entries for text in entry["texts"]}
    return {"totals": totals, "chart": chart, "codewords": entries, "captions": shown}


def codewords_of(
    image_probabilities: Float[np.ndarray, "images codes"],
    text_probabilities: Float[np.ndarray, "texts codes"],
    own_image: Int[np.ndarray, "texts"],
) -> list[dict[str, Any]]:
    """Every codeword that some image or caption uses, first those that many of both use.

    `code`, the `images` and `texts` whose likeliest codeword it is (the most certain first), how
    many captions are `agreeing` with their image, of the `pairs` with either. `own_image` is the
    row of each caption's image.
    """
    tables = image_probabilities, text_probabilities
    winners = [table.argmax(axis=1) for table in tables]
    counts = np.stack([np.bincount(best, minlength=tables[0].shape[1]) for best in winners])
    used = counts.sum(axis=0)
    found = []
    for code in np.lexsort((-used, -counts.min(axis=0)))[: np.count_nonzero(used)].tolist():
        images, texts = (
            sorted(np.flatnonzero(best == code).tolist(), key=lambda row: -table[row, code])
            for table, best in zip(tables, winners, strict=True)
        )
        here, there = winners[0][own_image] == code, winners[1] == code
        agreeing, pairs = int((here & there).sum()), int((here | there).sum())
        found.append(
            {"code": code, "images": images, "texts": texts, "agreeing": agreeing, "pairs": pairs}
        )
    return found


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
