"""The evaluation of trained towers: retrieval by their features, and by matching."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ml_collections
import numpy as np
from jaxtyping import PyTree

from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation import retrieval
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.models.codis import Model
from codebook_jax.tasks.task import Evaluation


def evaluate_towers(
    model: Model,
    config: ml_collections.ConfigDict,
    towers: Mapping[str, PyTree],
    student: PyTree | None,
    source: Source,
    tokenizer: Tokenizer,
    *,
    images: int,
    progress: Progress | None = None,
) -> Evaluation:
    """Retrieval of the first `images` (0: all) of a source by each of the `towers`.

    With `student`, the parameters that match, it is re-ranked too if the config asks for it.
    """
    rerank = student is not None and config.evaluation.rerank_top_k > 0
    results = retrieval.evaluate(
        model,
        towers,
        source,
        tokenizer,
        config,
        images=images,
        match=functools.partial(model.match, student) if rerank else None,
        progress=progress,
    )
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
