"""Zero-shot retrieval: the dual encoder's recall, and the recall after re-ranking its best
candidates by matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, Int

from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation.encoding import Gallery, Progress, encode_source, rows_over_shards
from codebook_jax.evaluation.recall import (
    RANKS,
    chance_at_k,
    named_recalls,
    recall_at_k,
    recall_of_queries,
)
from codebook_jax.files import write_json
from codebook_jax.parallel import sharding

TEXTS_A_ROW = (
    16  # texts that share one projection of an image to keys and values in the fusion encoder
)


def evaluate(
    task: Any,
    state: Any,
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    images: int,
    rerank: bool,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Recalls in percent by protocol: `student/dual`, `teacher/dual` and, with `rerank`,
    `student/reranked`.

    The first `images` images (0: all) and their captions are the gallery. Besides the recalls each
    protocol has its chance levels, `images`, `images_listed` (of the source), `texts`, `left_out`
    (unreadable images), `truncated` (captions) and `rerank_top_k` (0: not re-ranked). Raises
    UserError if no image can be read.
    """
    top_k = config.evaluation.rerank_top_k if rerank else 0
    images = min(images or len(source), len(source))
    gallery = encode_source(
        task,
        {"student": state.student["towers"], "teacher": state.teacher},
        source,
        tokenizer,
        images=images,
        rows=rows_over_shards(min(config.evaluation.batch, images), task.mesh),
        size_px=config.model.image.size_px,
        max_tokens=config.model.text.max_tokens,
        threads=config.data.threads,
        with_tokens=frozenset({"student"} if top_k else ()),
        progress=progress,
    )
    ids = gallery.image_ids, gallery.text_image_ids
    shared = chance_at_k(*ids) | {
        "images": len(gallery.image_ids),
        "images_listed": len(source),
        "texts": len(gallery.text_image_ids),
        "left_out": gallery.left_out,
        "truncated": gallery.truncated,
    }
    similarity = {
        name: features.image @ features.text.T for name, features in gallery.features.items()
    }
    results = {}
    for name, scores in similarity.items():
        results[f"{name}/dual"] = recall_at_k(scores, *ids) | shared | {"rerank_top_k": 0}
    if top_k:
        reranked = rerank_gallery(
            task,
            state.student,
            gallery,
            similarity["student"],
            top_k=top_k,
            add_dual=config.evaluation.rerank_add_dual,
            batch=config.evaluation.batch,
            progress=progress,
        )
        results["student/reranked"] = reranked | shared | {"rerank_top_k": top_k}
    return results


def images_to_evaluate(config: ml_collections.ConfigDict) -> int:
    """How many images to validate on during training (0: all): `evaluation.images`.

    -1 means 1,000, but 32 for a model above `tiny` on a CPU, where more would take an hour.
    """
    if config.evaluation.images >= 0:
        return config.evaluation.images
    return 32 if jax.default_backend() == "cpu" and config.size != "tiny" else 1000


def rerank_gallery(
    task: Any,
    student: Any,
    gallery: Gallery,
    similarity: Float[np.ndarray, "images texts"],
    *,
    top_k: int,
    add_dual: bool,
    batch: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Recalls in percent after sorting the `top_k` candidates of every query by their matching
    logits.

    Pairs that are candidates in both directions are scored once (ALBEF scores them twice).
    """
    texts_of_images = top_candidates(similarity, top_k)
    images_of_texts = top_candidates(similarity.T, top_k)
    image_count, text_count = similarity.shape
    image_keys = np.arange(image_count)[:, None] * text_count + texts_of_images
    text_keys = images_of_texts * text_count + np.arange(text_count)[:, None]
    keys = np.unique(np.concatenate([image_keys.ravel(), text_keys.ravel()]))
    pair_images, pair_texts = np.divmod(keys, text_count)
    logits = match_pairs(
        task, student, gallery, pair_images, pair_texts, batch=batch, progress=progress
    )
    if add_dual:
        logits = logits + similarity[pair_images, pair_texts]
    ids = gallery.image_ids, gallery.text_image_ids
    text_order = promoted(similarity, texts_of_images, logits[np.searchsorted(keys, image_keys)])
    text_recall = recall_of_queries(text_order, *ids)
    del text_order  # as large as the similarities
    image_order = promoted(similarity.T, images_of_texts, logits[np.searchsorted(keys, text_keys)])
    image_recall = recall_of_queries(image_order, *reversed(ids))
    return named_recalls("txt_r", text_recall) | named_recalls("img_r", image_recall)


def match_pairs(
    task: Any,
    student: Any,
    gallery: Gallery,
    pair_images: Int[np.ndarray, "pairs"],
    pair_texts: Int[np.ndarray, "pairs"],
    *,
    batch: int,
    progress: Progress | None = None,
) -> Float[np.ndarray, "pairs"]:
    """Matching logit of each (image, text) pair of a gallery; `pair_images` ascends.

    Pairs of one image form rows of TEXTS_A_ROW texts, so that its keys and values are projected
    once per row; every call has the same shape, with about as many text tokens as `batch` images
    have patches.
    """
    features = gallery.features["student"]
    row_images, row_texts, places = pair_rows(pair_images, pair_texts, TEXTS_A_ROW)
    tokens_a_row = TEXTS_A_ROW * features.text_states.shape[1]
    rows = max(1, batch * features.image_tokens.shape[1] // tokens_a_row)
    rows = rows_over_shards(min(rows, len(row_images)), task.mesh)
    logits = np.empty((len(row_images), TEXTS_A_ROW), np.float32)
    pending = None
    for start in range(0, len(row_images), rows):
        chosen = np.arange(start, start + rows).clip(max=len(row_images) - 1)
        texts = row_texts[chosen]
        placed = [
            sharding.to_device(part, task.mesh)
            for part in (
                features.image_tokens[row_images[chosen]],
                features.text_states[texts],
                gallery.text_lengths[texts],
            )
        ]
        running = start, task.match(student, *placed)
        _fetch(pending, logits)  # one call late: the device works while the host gathers
        pending = running
        if progress is not None:
            progress(
                "pairs",
                min(start + rows, len(row_images)) * TEXTS_A_ROW,
                len(row_images) * TEXTS_A_ROW,
            )
    _fetch(pending, logits)
    return logits.ravel()[places]


def pair_rows(
    pair_images: Int[np.ndarray, "pairs"], pair_texts: Int[np.ndarray, "pairs"], width: int
) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows width"], Int[np.ndarray, "pairs"]]:
    """Rows of one image and `width` of its texts each, and every pair's place in the flattened
    rows.

    `pair_images` ascends; places that no pair fills repeat text 0.
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
    count = scores.shape[1]
    if top_k >= count:
        return np.tile(np.arange(count), (len(scores), 1))
    return np.stack([np.argpartition(row, count - top_k)[count - top_k :] for row in scores])


def promoted(
    scores: Float[np.ndarray, "queries candidates"],
    chosen: Int[np.ndarray, "queries top_k"],
    values: Float[np.ndarray, "queries top_k"],
) -> Float[np.ndarray, "queries candidates"]:
    """Scores in which the chosen candidates come before all others, in the order of their values,
    with ties kept.

    The ranks of the values are added, not the values, so that nothing is rounded.
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


def counted(values: Mapping[str, float]) -> str:
    """How many images were evaluated, and out of how many if limited: "1,000 of 5,000 images"."""
    listed = values["images_listed"]
    cut = values["images"] + values["left_out"] < listed
    return f"{values['images']:,}" + f" of {listed:,}" * cut + " images"


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table for a terminal: how much was evaluated, the recalls of every protocol, and chance
    below them.

    Names the protocols that are no better than chance.
    """
    any_result = next(iter(results.values()))
    names = [f"{prefix}{k}" for prefix in ("txt_r", "img_r") for k in RANKS]
    chance = {name: any_result[name.replace("_r", "_chance_r")] for name in names}
    width = max(16, *(len(protocol) for protocol in results))
    block = 8 * len(RANKS)
    lines = [f"{counted(any_result)}, {any_result['texts']:,} texts" + _remarks(results)]
    lines.append(f"{'':{width}} {'image to text':>{block}}   {'text to image':>{block}}")
    lines.append(
        f"{'recall, %':{width}}" + _cells({name: f"R@{name.split('_r')[1]}" for name in names})
    )
    for protocol, values in results.items():
        lines.append(
            f"{protocol:{width}}" + _cells({name: f"{values[name]:.2f}" for name in names})
        )
    lines.append(
        f"{'chance':{width}}" + _cells({name: f"{value:.2f}" for name, value in chance.items()})
    )
    lines += [
        f"{protocol} is no better than chance"
        for protocol, values in results.items()
        if at_chance(values)
    ]
    return "\n".join(lines)


def at_chance(values: Mapping[str, float]) -> bool:
    """Whether no recall of a protocol is more than three standard errors above chance."""
    for prefix, queries in (("txt", values["images"]), ("img", values["texts"])):
        for k in RANKS:
            expected = values[f"{prefix}_chance_r{k}"] / 100
            error = np.sqrt(expected * (1 - expected) / queries)
            if values[f"{prefix}_r{k}"] > 100 * (expected + 3 * error):
                return False
    return True


def write_eval_json(path: Path | str, results: Mapping[str, Mapping[str, float]]) -> None:
    """Writes `eval.json`, {protocol: {name: percent}}: a reader sees the old file or the new one,
    never a part.
    """
    write_json(path, {protocol: dict(values) for protocol, values in results.items()})


def _fetch(pending: tuple[int, Any] | None, logits: Float[np.ndarray, "rows texts"]) -> None:
    if pending is not None:
        start, values = pending
        logits[start : start + values.shape[0]] = sharding.to_host(values)[: len(logits) - start]


def _cells(values: Mapping[str, str]) -> str:
    texts = list(values.values())
    half = len(texts) // 2
    return (
        " "
        + "".join(f"{text:>8}" for text in texts[:half])
        + "   "
        + "".join(f"{text:>8}" for text in texts[half:])
    )


def _remarks(results: Mapping[str, Mapping[str, float]]) -> str:
    any_result = next(iter(results.values()))
    top_k = max(values["rerank_top_k"] for values in results.values())
    remarks = f"; re-ranked: the top {top_k} of each query" if top_k else ""
    if any_result["left_out"]:
        remarks += f"; {any_result['left_out']:,} unreadable images left out"
    if any_result["truncated"]:
        remarks += f"; {any_result['truncated']:,} captions cut to the model's length"
    return remarks
