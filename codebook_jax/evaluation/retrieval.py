"""Zero-shot retrieval: recall of the dual encoder, and after re-ranking its best candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation.encoding import encode_source
from codebook_jax.evaluation.recall import RANKS, chance_at_k, recall_at_k
from codebook_jax.evaluation.rerank import Scoring, rerank_gallery
from codebook_jax.evaluation.stage import IN_MEMORY, Bookkeeping
from codebook_jax.models.codis import Model

# of the recalls of each protocol in metrics.jsonl
PREFIXES = {"student/dual": "", "teacher/dual": "teacher_", "student/reranked": "reranked_"}
Recalls = dict[str, float]  # of one protocol, in percent, with chance levels and counts


def evaluate(
    model: Model,
    towers: Mapping[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    images: int,
    scoring: Scoring | None,
    books: Bookkeeping = IN_MEMORY,
) -> dict[str, Recalls]:
    """Recalls by protocol: `NAME/dual` of each of the `towers`; with `scoring`, student/reranked;
    each with its chance levels, `images`, `images_listed` (of the source), `texts`, `left_out`
    (unreadable images), `truncated` (captions) and `rerank_top_k` (0: not re-ranked). The gallery,
    and what is raised, are those of `encode_source`.
    """
    encoded = encode_source(
        model,
        towers,
        source,
        tokenizer,
        config,
        images=images,
        with_tokens=("student",) if scoring else (),
        books=books,
    )
    ids = encoded.image_ids, encoded.text_image_ids
    shared = chance_at_k(*ids) | {
        "images": len(encoded.image_ids),
        "images_listed": len(source),
        "texts": len(encoded.text_image_ids),
        "left_out": encoded.left_out,
        "truncated": encoded.truncated,
    }
    results = {
        f"{name}/dual": recall_at_k(of.cosines(), *ids) | shared | {"rerank_top_k": 0}
        for name, of in encoded.features.items()
    }
    if scoring is not None:
        similarity = encoded.features["student"].cosines()
        reranked = rerank_gallery(
            scoring, model.mesh, encoded, similarity, config.evaluation, books
        )
        shared["rerank_top_k"] = config.evaluation.rerank_top_k
        results["student/reranked"] = reranked | shared
    return results


def recalls_of(values: Recalls) -> Recalls:
    """The recalls of a protocol, without its chance levels and counts."""
    return {name: value for name, value in values.items() if name.startswith(("txt_r", "img_r"))}


def flat(results: Mapping[str, Recalls]) -> dict[str, float]:
    """`eval/txt_r1`, ... of student/dual with chance and counts; recalls of the other protocols."""
    row = {f"eval/{name}": value for name, value in results["student/dual"].items()}
    for protocol, prefix in PREFIXES.items():
        for name, value in recalls_of(results.get(protocol, {})).items():
            row[f"eval/{prefix}{name}"] = value
    return row


def counted(values: Recalls) -> str:
    """How many images were evaluated, and out of how many if limited: "1,000 of 5,000 images"."""
    listed = values["images_listed"]
    cut = values["images"] + values["left_out"] < listed
    return f"{values['images']:,}" + f" of {listed:,}" * cut + " images"


def format_table(results: Mapping[str, Recalls]) -> str:
    """A table for a terminal: how much was evaluated, each protocol's recalls, and chance; names
    the protocols that are no better.
    """
    first = next(iter(results.values()))
    top_k = max(values["rerank_top_k"] for values in results.values())
    head = f"{counted(first)}, {first['texts']:,} texts"
    head += f"; re-ranked: the top {top_k} of each query" if top_k else ""
    if first["left_out"]:
        head += f"; {first['left_out']:,} unreadable images left out"
    if first["truncated"]:
        head += f"; {first['truncated']:,} captions cut to the model's length"
    lines = recall_table(results, head, ("image to text", "text to image"))
    lines += [f"{name} is no better than chance" for name in results if at_chance(results[name])]
    return "\n".join(lines)


def recall_table(results: Mapping[str, Recalls], head: str, sides: tuple[str, str]) -> list[str]:
    """The lines of a table: a head, then each protocol's recalls and chance, in both directions."""
    first = next(iter(results.values()))
    names = [f"{prefix}{k}" for prefix in ("txt_r", "img_r") for k in RANKS]
    chances = [name.replace("_r", "_chance_r") for name in names]
    rows = {"recall, %": [f"R@{k}" for k in RANKS] * 2}
    rows |= {title: [f"{values[name]:.2f}" for name in names] for title, values in results.items()}
    rows["chance"] = [f"{first[name]:.2f}" for name in chances]
    width, half = max(map(len, rows)), 8 * len(RANKS)
    lines = [head, f"{'':{width}} {sides[0]:>{half}}   {sides[1]:>{half}}"]
    for title, cells in rows.items():
        line = "".join(f"{cell:>8}" for cell in cells)
        lines.append(f"{title:{width}} {line[:half]}   {line[half:]}")
    return lines


def at_chance(values: Recalls) -> bool:
    """Whether no recall of a protocol is more than three standard errors above chance."""
    for prefix, queries in (("txt", values["images"]), ("img", values["texts"])):
        for k in RANKS:
            expected = values[f"{prefix}_chance_r{k}"] / 100
            error = np.sqrt(expected * (1 - expected) / queries)
            if values[f"{prefix}_r{k}"] > 100 * (expected + 3 * error):
                return False
    return True
