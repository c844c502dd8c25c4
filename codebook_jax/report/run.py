"""The page of a run: how training went, what the model finds, what the codewords stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Float

from codebook_jax import build
from codebook_jax.config import changed_fields, flat
from codebook_jax.console import say
from codebook_jax.data.images import decode
from codebook_jax.data.sources import Record, Source, source_of
from codebook_jax.errors import UserError, reason
from codebook_jax.evaluation import retrieval, stories
from codebook_jax.evaluation.encoding import Gallery, encode_source
from codebook_jax.evaluation.recall import recall_at_k
from codebook_jax.files import check_outputs, parse_json
from codebook_jax.method.numerics import unit
from codebook_jax.report.curves import Row, columns_of, curves
from codebook_jax.report.explained import SHOWN, can_explain, explained_pairs
from codebook_jax.report.gallery import PICTURES, examples, explore_codebook
from codebook_jax.report.page import FILE, Pictures, write_page
from codebook_jax.report.reference import Comparison, choose, compare
from codebook_jax.report.stories import aligned_stories
from codebook_jax.run import metrics
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import Checkpoints
from codebook_jax.tasks.grounding import pairs_of

MOST_IMAGES = 1000  # of the test data


def write_report(
    config: ml_collections.ConfigDict | None,
    workdir: Path | str,
    flags: Container[str] | None = None,
    reference: str | None = None,
) -> None:
    """Writes `report.html`: the curves over the bands of a `reference` (a file; None: the one that
    is shipped for the run's recipe), the run's settings compared with `config` and, if there is a
    checkpoint, what it finds in test data. Raises UserError for a folder that holds no run.
    """
    workdir = Path(workdir).absolute()
    check_outputs(workdir, (FILE,))
    parts = build.build_trained(config, workdir, flags)
    record = records.read_record(workdir)
    healthy, sentence = choose(record, reference)
    pictures = Pictures()
    seen = _see_test_data(parts, workdir, pictures)
    unsaved = seen is None and hasattr(parts.task, "model")
    if jax.process_index() != 0:
        return
    rows = metrics.read_rows(workdir / metrics.FILE)
    compared = compare(healthy, rows) if healthy else Comparison({}, [], [])
    for said in (sentence, *compared.sentences):
        say(said)
    write_page(
        workdir / FILE,
        "run.html",
        pictures,
        title=workdir.name,
        facts=facts(rows, build.trained_parameters(parts.task)),
        result=result(workdir / metrics.RESULTS, rows),
        charts=curves(rows, compared.bands, compared.left, scores=_scores(workdir)),
        reference=sentence,
        verdicts=compared.sentences,
        seen=seen,
        sees=unsaved,
        record=record,
        settings=flat(record["config"]),
        differs=changed_fields(config.to_dict(), record["config"]) if config else {},
        compared=config is not None,
    )
    if unsaved:
        say("there is no checkpoint yet: the page shows only the curves")
    say(f"report: {workdir / FILE}")


def _scores(workdir: Path) -> dict[int, float]:
    """Those of every validated step; none before the first."""
    with Checkpoints(workdir, (), keep=1, create=False) as checkpoints:
        return dict(checkpoints.scores)


def facts(rows: Sequence[Row], parameters: int) -> dict[str, Any]:
    """Figures of the training for the first paragraph, beyond those in the run's record."""
    training = [row for row in rows if not metrics.is_evaluation(row)]
    columns = columns_of(training)
    steps = np.append(0, columns.get("step", ()))
    pace = columns.get("time/step_s")
    return {
        "parameters": parameters,
        "step": max((row["step"] for row in rows), default=0),
        "seconds": None if pace is None else float(np.nansum(pace * np.diff(steps))),
        "pace": None if pace is None else float(np.nanmedian(pace)),
        "not_finite": sum(row.get("loss") is None for row in training),
        "logged": len(training),
    }


def result(path: Path, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The `protocols` of eval.json or of the last validation (then with its `step`), if any, the
    `first` of them, and whether they are of retrieval or of stories, in `recalls`.
    """
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    step, protocols = None, {}
    if path.exists():
        try:
            protocols = parse_json(path.read_bytes())
        except (OSError, ValueError) as failure:
            why = f"{path} was not written by --mode=eval ({reason(failure)})"
            raise UserError(f"{why}: run it again, or delete it") from failure
    elif evaluations:
        step = evaluations[-1]["step"]
        row = evaluations[-1].items()
        values = {name.removeprefix("eval/"): x for name, x in row if name.startswith("eval/")}
        stories_too = "eval/stories" in evaluations[-1]
        for protocol, prefix in (stories.PREFIXES if stories_too else retrieval.PREFIXES).items():
            own = {name[len(prefix) :]: values[name] for name in values if name.startswith(prefix)}
            protocols |= {protocol: values | own} if own else {}
        if "img_chance_r1" not in values:
            protocols = {"student": values}
    first = next(iter(protocols.values()), {})
    names = list(dict.fromkeys(name for values in protocols.values() for name in values))
    if not names:
        return None
    found = {"step": step, "protocols": protocols, "first": first}
    return found | {"names": names, "recalls": "img_chance_r1" in first}


def what_is_seen(
    gallery: Gallery,
    source: Source,
    codewords: Float[np.ndarray, "codes dim"] | None,
    config: ml_collections.ConfigDict,
    pictures: Pictures,
    explain: Callable[[list[tuple[Record, str]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Examples of retrieval, some of them explained (None: none), and the codebook, if there are
    codewords; adds the pictures that they show, the most important first: of the explanations, of
    the queries, then of every codeword.
    """
    codebook = explained = None
    features = gallery.features["student"]
    similarity = features.image @ features.text.T
    queries = examples(gallery, similarity, seed=config.seed)
    images = []
    for query in queries["captions"]:
        images += [query["right"], *(answer["at"] for answer in query["answers"])]
    images += [query["query"] for query in queries["pictures"]]
    if explain is not None:
        shown = queries["captions"][:SHOWN]
        records = [source[int(gallery.positions[query["right"]])] for query in shown]
        captions = [gallery.captions[query["query"]] for query in shown]
        explained = explain(list(zip(records, captions, strict=True)))
    if codewords is not None:
        codebook = explore_codebook(gallery, codewords, temperature=config.codebook.temperature)
        for place in range(PICTURES):
            for code in codebook["codewords"]:
                images += code["pictures"][place : place + 1]
    for image in dict.fromkeys(images):
        record = source[int(gallery.positions[image])]
        pictures.add(str(image), decode(record.image), record.captions[0])
    return {
        "listed": len(source),
        "images": len(gallery.image_ids),
        "captions": gallery.captions,
        "seed": config.seed,
        "recall": recall_at_k(similarity, gallery.image_ids, gallery.text_image_ids),
        "examples": queries,
        "explained": explained,
        "codebook": codebook,
    }


def _see_test_data(parts: build.Parts, workdir: Path, pictures: Pictures) -> dict[str, Any] | None:
    """What the checkpoint best in validation sees in the test data, or in those of validation if
    they are labels; nothing if these are too. None before the first checkpoint, and for a task
    without towers.
    """
    config, model = parts.config, getattr(parts.task, "model", None)
    with Checkpoints(workdir, (), keep=1, create=False) as checkpoints:
        if model is None or checkpoints.step_to_use() is None:
            return None
    kinds = {"kind": parts.task.reads, "also": parts.task.evaluates}
    for spec in filter(None, (config.data.test, config.data.eval)):
        source = source_of(config, spec, "test", **kinds)
        if source.kind != "labels":
            break
        say(f"{spec} lists labels: their accuracy is in the table of --mode=eval alone")
    else:
        return {}
    restored = build.restore_trained(parts, workdir, ("student",))
    student = restored.state.student
    source = pairs_of(source) if source.kind == "expressions" else source
    seen = {"step": restored.step, "data": spec}
    seen |= {"stories": None, "explained": None, "codebook": None}
    if parts.task.reads == "stories":
        return seen | {"stories": aligned_stories(parts, student["towers"], source, pictures)}
    images = min(build.validation_images(config) or len(source), len(source), MOST_IMAGES)
    say(f"test data {spec}: {images:,} of {len(source):,} images")
    towers = {"student": student["towers"]}
    gallery = encode_source(model, towers, source, parts.tokenizer, config, images=images)
    codewords = None
    if config.losses.codebook:
        everywhere = jax.sharding.NamedSharding(parts.mesh, jax.sharding.PartitionSpec())
        codes = jax.jit(unit, out_shardings=everywhere)(student["codebook"]["codes"])
        codewords = np.asarray(codes)
    explain = None
    if can_explain(parts):
        explain = functools.partial(explained_pairs, parts, student, pictures=pictures)
    return seen | what_is_seen(gallery, source, codewords, config, pictures, explain)
