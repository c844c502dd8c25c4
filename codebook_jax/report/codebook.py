"""What each codeword stands for: the pictures and captions that use it, and the words that set them
apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from codebook_jax.data.text import clean
from codebook_jax.evaluation.encoding import Gallery
from codebook_jax.report.charts import lines
from codebook_jax.weights.load import code_probabilities

PICTURES, CAPTIONS, WORDS = 10, 4, 6  # shown per codeword
LEAST_LIFT = (
    1.5  # a word is shown if it is this much more frequent in the codeword's captions than in all
)


class Codeword(NamedTuple):
    """The images and captions whose likeliest codeword this is, the most certain first."""

    index: int
    images: Int[np.ndarray, "images"]
    texts: Int[np.ndarray, "texts"]
    agreeing: int  # captions that use it and whose image does too
    pairs: int  # pairs of a caption and its image, at least one of which uses it


def codewords_of(
    image_probabilities: Float[np.ndarray, "images codes"],
    text_probabilities: Float[np.ndarray, "texts codes"],
    own_image: Int[np.ndarray, "texts"],
) -> list[Codeword]:
    """Every codeword that some image or caption uses; first those that many of both use.

    `own_image` is the row of each caption's image.
    """
    winners = image_probabilities.argmax(axis=1), text_probabilities.argmax(axis=1)
    counts = np.stack([np.bincount(of, minlength=image_probabilities.shape[1]) for of in winners])
    fewer, all_users = counts.min(axis=0), counts.sum(axis=0)
    of_images = winners[0][own_image]
    users = []
    for code in np.lexsort((-all_users, -fewer))[: np.count_nonzero(all_users)]:
        surest = [
            mine[np.argsort(-table[mine, code], kind="stable")]
            for table, of in zip((image_probabilities, text_probabilities), winners, strict=True)
            for mine in (np.flatnonzero(of == code),)
        ]
        here, there = of_images == code, winners[1] == code
        users.append(
            Codeword(int(code), *surest, int((here & there).sum()), int((here | there).sum()))
        )
    return users


def words_of(
    captions: Sequence[str], everywhere: Counter[str], total: int
) -> list[tuple[str, float]]:
    """Words that set these captions apart from all `total`, the most distinctive first, with their
    share of these.
    """
    here = Counter(word for caption in captions for word in set(clean(caption).split()))
    gains = []
    for word, count in here.items():
        share, usual = count / len(captions), everywhere[word] / total
        if share >= LEAST_LIFT * usual and (count > 1 or len(captions) == 1):
            gains.append((share * math.log(share / usual), word, share))
    return [(word, share) for _, word, share in sorted(gains, key=lambda gain: (-gain[0], gain[1]))]


def explore(
    gallery: Gallery, codewords: Float[np.ndarray, "codes dim"], *, temperature: float
) -> dict[str, Any]:
    """What the page shows of the codebook: `totals`, a `chart` of its use, the `codewords`, the
    `captions` they name.
    """
    features = gallery.features["student"]
    probabilities = [
        code_probabilities(part, codewords, temperature=temperature)
        for part in (features.image, features.text)
    ]
    place = {image_id: at for at, image_id in enumerate(gallery.image_ids.tolist())}
    own_image = np.array([place[image_id] for image_id in gallery.text_image_ids.tolist()])
    used = codewords_of(*probabilities, own_image)
    everywhere = Counter(
        word for caption in gallery.captions for word in set(clean(caption).split())
    )
    total = len(gallery.captions)
    entries = []
    for code in used:
        captions = [gallery.captions[text] for text in code.texts]
        entries.append(
            {
                "code": code.index,
                "images": len(code.images),
                "captions": len(captions),
                "agreeing": code.agreeing,
                "pairs": code.pairs,
                "words": [
                    [word, round(share, 3)]
                    for word, share in words_of(captions, everywhere, total)[:WORDS]
                ],
                "pictures": code.images[:PICTURES].tolist(),
                "texts": code.texts[:CAPTIONS].tolist(),
            }
        )
    counts = np.array([[entry["images"], entry["captions"]] for entry in entries], float)
    counts = -np.sort(-counts, axis=0) / (len(gallery.image_ids), total)
    chart = lines(
        "Use of the codewords",
        np.arange(1, len(used) + 1),
        {"of the pictures": 100 * counts[:, 0], "of the captions": 100 * counts[:, 1]},
        x="rank of the codeword, the most used first",
        y="share that uses it, %",
        note="The steeper the start, the fewer codewords do most of the work.",
    )
    totals = {
        "size": len(codewords),
        "used": len(used),
        "shared": sum(entry["images"] > 0 and entry["captions"] > 0 for entry in entries),
        "agreement": sum(entry["agreeing"] for entry in entries) / total,
        "images": len(gallery.image_ids),
        "captions": total,
    }
    shown = {text: gallery.captions[text] for entry in entries for text in entry["texts"]}
    return {"totals": totals, "chart": chart, "codewords": entries, "captions": shown}
