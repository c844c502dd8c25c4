"""The page of a run: how training went, what the model finds, what the codewords stand for, with
which settings.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from codebook_jax import build
from codebook_jax.config import changed_fields, flat
from codebook_jax.console import say
from codebook_jax.data.images import decode
from codebook_jax.data.sources import Source, source_of
from codebook_jax.errors import UserError
from codebook_jax.evaluation.encoding import Gallery, Reading, encode_source
from codebook_jax.evaluation.recall import recall_at_k
from codebook_jax.files import check_outputs, parse_json
from codebook_jax.models.codis import unit
from codebook_jax.report.codebook import PICTURES, explore
from codebook_jax.report.curves import Row, curves, number
from codebook_jax.report.examples import examples
from codebook_jax.report.page import FILE, Pictures, write_page
from codebook_jax.run import metrics
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import Checkpoints

MOST_IMAGES = 1000  # of the test data


class Encoded(NamedTuple):
    """The test data encoded by a checkpoint."""

    step: int
    spec: str
    source: Source
    gallery: Gallery
    codewords: np.ndarray | None  # float [codes, dim]; None: trained without the codebook loss


def write_report(
    config: ml_collections.ConfigDict | None, workdir: Path, flags: Container[str] | None = None
) -> None:
    """Writes `report.html`: the curves and, if there is a checkpoint, what the best one in
    validation finds in test data.

    The run's settings are compared with `config` if one is given. Raises UserError for a folder
    that holds no run.
    """
    check_outputs(workdir, (FILE,))
    parts = build.build_trained(config, workdir, flags)
    record = records.read_record(workdir)
    encoded = _encoded(parts, workdir)
    if jax.process_index() != 0:
        return
    path = workdir / metrics.FILE
    rows = metrics.read_rows(path) if path.exists() else []
    pictures = Pictures()
    seen = None if encoded is None else what_is_seen(encoded, parts.config, pictures)
    differs = {} if config is None else changed_fields(config.to_dict(), record["config"])
    write_page(
        workdir / FILE,
        "run.html",
        title=workdir.name,
        facts=facts(rows, build.trained_parameters(parts.task)),
        result=result(workdir / "eval.json", rows),
        charts=curves(rows),
        seen=seen,
        pictures=pictures,
        record=record,
        settings=flat(record["config"]),
        differs=differs,
        compared=config is not None,
    )
    if encoded is None:
        say("there is no checkpoint yet: the page shows only the curves")
    say(f"report: {workdir / FILE}")


def facts(rows: Sequence[Row], parameters: int) -> dict[str, Any]:
    """Figures of the training for the first paragraph, beyond those in the run's record."""
    training = [row for row in rows if not metrics.is_evaluation(row)]
    steps = np.array([0, *(row["step"] for row in training)])
    pace = np.array([number(row.get("time/step_s")) for row in training])
    return {
        "parameters": parameters,
        "step": int(steps[-1]),
        "seconds": float(np.nansum(pace * np.diff(steps))),
        "pace": float(np.nanmedian(pace)) if np.isfinite(pace).any() else None,
        "not_finite": sum(row.get("loss") is None for row in training),
        "logged": len(training),
    }


def result(path: Path, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The recalls by protocol and their origin: eval.json, else the last validation; None if there
    is neither.
    """
    evaluations = [row for row in rows if metrics.is_evaluation(row)]
    if path.exists():
        found = {"step": None, "protocols": _read_json(path)}
    elif evaluations:
        found = {"step": evaluations[-1]["step"], "protocols": _protocols(evaluations[-1])}
    else:
        return None
    whole = "img_chance_r1" in found["protocols"].get("student/dual", ())
    return found if whole else None  # another task's, or an earlier version's


def what_is_seen(
    encoded: Encoded, config: ml_collections.ConfigDict, pictures: Pictures
) -> dict[str, Any]:
    """Examples of retrieval and the codebook, for the template; adds the pictures that they
    show.
    """
    gallery = encoded.gallery
    features = gallery.features["student"]
    similarity = features.image @ features.text.T
    shown = {
        "step": encoded.step,
        "data": encoded.spec,
        "listed": len(encoded.source),
        "images": len(gallery.image_ids),
        "captions": gallery.captions,
        "seed": config.seed,
        "recall": recall_at_k(similarity, gallery.image_ids, gallery.text_image_ids),
        "examples": examples(gallery, similarity, seed=config.seed),
        "codebook": None,
    }
    if encoded.codewords is not None:
        temperature = config.codebook.temperature
        shown["codebook"] = explore(gallery, encoded.codewords, temperature=temperature)
    first_text = {
        image_id: text for text, image_id in reversed([*enumerate(gallery.text_image_ids.tolist())])
    }
    for image in dict.fromkeys(_images(shown)):
        record = encoded.source[int(gallery.positions[image])]
        alt = gallery.captions[first_text[int(gallery.image_ids[image])]]
        pictures.add(str(image), decode(record.image), alt)
    return shown


def _images(shown: Mapping[str, Any]) -> list[int]:
    """The pictures that are shown, the most important first: those of the examples, then a few of
    every codeword.
    """
    found = []
    for query in shown["examples"]["captions"]:
        found += [query["right"], *(answer["at"] for answer in query["answers"])]
    found += [query["query"] for query in shown["examples"]["pictures"]]
    codewords = shown["codebook"]["codewords"] if shown["codebook"] else []
    for place in range(PICTURES):
        found += [code["pictures"][place] for code in codewords if place < len(code["pictures"])]
    return found


def _encoded(parts: build.Parts, workdir: Path) -> Encoded | None:
    """The test data encoded by the checkpoint best in validation; None before the first
    checkpoint.
    """
    config = parts.config
    with Checkpoints(
        workdir, parts.task.checkpoint_items().alone, keep=config.checkpoint.keep, create=False
    ) as checkpoints:
        if checkpoints.step_to_use() is None:
            return None
    restored = build.restore_trained(parts, workdir, ("student",))
    spec = config.data.test or config.data.eval
    source = source_of(config, spec, "test")
    images = min(build.validation_images(config) or len(source), len(source), MOST_IMAGES)
    say(f"test data {spec}: {images:,} of {len(source):,} images")
    student = restored.state.student
    gallery = encode_source(
        parts.task.programs,
        {"student": student["towers"]},
        source,
        parts.tokenizer,
        Reading.of(config, parts.mesh, images),
    )
    codewords = None
    if config.losses.codebook:
        everywhere = jax.sharding.NamedSharding(parts.mesh, jax.sharding.PartitionSpec())
        codewords = np.asarray(
            jax.jit(unit, out_shardings=everywhere)(student["codebook"]["codes"])
        )
    return Encoded(restored.step, spec, source, gallery, codewords)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_bytes()))
    except (IsADirectoryError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} was not written by --mode=eval ({error}): run --mode=eval again, or delete it"
        ) from error


def _protocols(row: Row) -> dict[str, dict[str, float]]:
    """The recalls of a validation row by protocol, as in eval.json."""
    values = {name.removeprefix("eval/"): value for name, value in row.items()}
    found = {"student/dual": values}
    for protocol, prefix in (("teacher/dual", "teacher_"), ("student/reranked", "reranked_")):
        recalls = {
            name.removeprefix(prefix): value
            for name, value in values.items()
            if name.startswith(prefix)
        }
        if recalls:
            found[protocol] = values | recalls
    return found
