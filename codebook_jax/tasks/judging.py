"""What the evaluations of a model of pre-training found, as a task returns it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ml_collections
import numpy as np
from jaxtyping import PyTree

from codebook_jax.evaluation import retrieval
from codebook_jax.evaluation.rerank import Scoring
from codebook_jax.models.codis import Model
from codebook_jax.tasks.task import Evaluation

Found = tuple[dict[str, float], str]  # figures and their table


def scoring(model: Model, student: PyTree, config: ml_collections.ConfigDict) -> Scoring | None:
    """What candidates are re-ranked by, as `config.evaluation` says; None: they are not."""
    asked = config.evaluation
    if not asked.rerank_top_k:
        return None
    match = model.match_odds if asked.rerank_score == "log_odds" else model.match
    cosine_weight = asked.rerank_dual_weight / float(student["temperature"])
    return Scoring(functools.partial(match, student), cosine_weight)


def recalls(results: Mapping[str, dict[str, float]]) -> Evaluation:
    """Of retrieval."""
    dual = results["student/dual"]
    found = f"R@1 image to text {dual['txt_r1']:.1f} %, text to image {dual['img_r1']:.1f} %"
    return Evaluation(
        results,
        retrieval.flat(results),
        score=float(np.mean(list(retrieval.recalls_of(dual).values()))),
        metric="mean of the recalls of student/dual in validation",
        summary=f"{found} (chance {dual['chance_r1']:.1f} %) on {retrieval.counted(dual)}",
        table=retrieval.format_table(results),
    )


def labels(found: Found) -> Evaluation:
    """Of labels told by prompts."""
    figures, table = found
    summary = f"accuracy {figures['accuracy']:.2f} % (chance {figures['chance_uniform']:.2f} %)"
    return _single(figures, table, summary, "zero_shot")


def expressions(found: Found) -> Evaluation:
    """Of expressions found in their pictures."""
    figures, table = found
    names = ("accuracy", "chance") if "accuracy" in figures else ("pointing", "pointing_chance")
    accuracy, chance = (figures[name] for name in names)
    summary = f"accuracy {accuracy:.2f} % (chance {chance:.2f} %)"
    return _single(figures | {"accuracy": accuracy}, table, summary, "grounding")


def _single(figures: dict[str, float], table: str, summary: str, protocol: str) -> Evaluation:
    scalars = {f"eval/{name}": value for name, value in figures.items()}
    metric = "accuracy in validation"
    return Evaluation({protocol: figures}, scalars, figures["accuracy"], metric, summary, table)
