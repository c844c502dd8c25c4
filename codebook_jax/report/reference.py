"""Reference curves: bands in which healthy runs of a recipe stay, and where a run leaves them.

benchmarks/reference_curves.py makes a file of them from runs of several seeds. A run is compared at
the steps that both logged, as long as the learning rates agree: a run of another length is at the
same place of neither its steps nor its schedule, so past that no comparison would be fair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from codebook_jax.config import FIELDS, FREE, flat, restart_of
from codebook_jax.errors import UserError, first_few, reason
from codebook_jax.files import parse_json
from codebook_jax.report.charts import Band
from codebook_jax.report.curves import Row, columns_of
from codebook_jax.run.metrics import is_evaluation
from codebook_jax.run.record import recorded_config

SHIPPED = Path(__file__).parent / "references"
METRICS = re.compile(r"loss(/\w+)?|codebook/(perplexity|unused_share)|eval/(txt|img)_r\d+")
GALLERY = ("eval/images", "eval/texts")  # recalls among other numbers do not compare
_VARIES = ("seed", "train.steps")
_OTHER_RATE = 0.1  # share by which learning rates may differ
# Most of so many neighbouring points outside, on one side, are a departure; validations are few.
_NEIGHBOURS, _VALIDATIONS = 5, 3


class Reference(NamedTuple):
    """The curves of a file."""

    name: str
    recipe: dict[str, Any]  # see recipe_of
    seeds: list[int]
    train_steps: int
    gallery: dict[str, int]
    rates: tuple[np.ndarray, np.ndarray]  # steps, learning rates
    bands: dict[str, Band]  # by metric


class Comparison(NamedTuple):
    """How a run compares with a reference."""

    bands: dict[str, Band]  # by metric, at the steps where they can be compared
    left: list[str]  # the metrics that leave their band
    sentences: list[str]


def recipe_of(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run's record, by dotted name, that decide what its curves should be; data
    that is not built in counts by its fingerprint, wherever it lies.
    """
    values = flat(json.loads(json.dumps(recorded_config(record).to_dict())))
    recipe = {
        name: value
        for name, value in values.items()
        # initial weights are free only to a restart
        if (restart_of(name) != FREE or name.endswith("_std")) and name not in _VARIES
    }
    if not recipe["data.train"].startswith("scenes"):
        recipe["data.train"] = record["data"]["fingerprint"]
    return recipe


def read_reference(path: Path) -> Reference:
    """The reference curves in a file; raises UserError if it holds none."""
    try:
        content = parse_json(path.read_bytes())
        training = content["training"]
        bands = {}
        for part in (training, content["validation"]):
            steps = np.array(part["step"], int)
            for name, (low, high) in part["bands"].items():
                bands[name] = Band(steps, np.array(low, float), np.array(high, float))
        rates = np.array(training["step"], int), np.array(training["learning_rate"], float)
        for steps, *values in (rates, *bands.values()):
            if any(steps.shape != column.shape for column in values) or steps.ndim != 1:
                raise ValueError("a curve has not one value per step")
            if not np.isfinite(values).all() or (np.diff(steps) <= 0).any():
                raise ValueError("a value is not finite, or steps do not increase")
        recipe = dict(content["recipe"])
        _kind(recipe)
        gallery = {name: int(content["gallery"][name]) for name in GALLERY}
        lasted, seeds = int(content["train_steps"]), list(content["seeds"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as failure:
        raise UserError(
            f"{path} is no file of reference curves ({reason(failure)}): make one with "
            "benchmarks/reference_curves.py, or leave out --report.reference"
        ) from failure
    return Reference(path.stem, recipe, seeds, lasted, gallery, rates, bands)


def choose(record: dict[str, Any], named: str | None) -> tuple[Reference | None, str]:
    """The reference of a run's recipe, and a sentence on it or on why there is none: of the file
    `named`, otherwise of those shipped. Raises UserError if that file is damaged or of another kind
    of run.
    """
    recipe = recipe_of(record)
    kind = _kind(recipe)
    if named:
        references = [read_reference(Path(named).expanduser())]
        if (given := _kind(references[0].recipe)) != kind:
            raise UserError(
                f"--report.reference={named} is of {given} and this run of {kind}: give curves of "
                "the same kind, or leave it out"
            )
    else:
        shipped = map(read_reference, sorted(SHIPPED.glob("*.json")))
        references = [one for one in shipped if _kind(one.recipe) == kind]
    if not references:
        return None, f"there are no reference curves of {kind}"
    changed = {name for change in record["changes"] for name in change["fields"]} - {"data.train"}
    differing = [_differing(one, recipe, changed) for one in references]
    differs, reference = min(zip(differing, references, strict=True), key=lambda at: len(at[0]))
    if differs:
        return None, (
            f"not compared with the reference {reference.name}, whose recipe is another: "
            f"{first_few(differs, 6)}"
        )
    seeds = first_few(reference.seeds, 9)
    return reference, (
        f"compared with the reference {reference.name}: {len(reference.seeds)} runs of "
        f"{reference.train_steps:,} steps (seeds {seeds})"
    )


def compare(reference: Reference, rows: Sequence[Row]) -> Comparison:
    """Where a run with these rows can be compared, and where it leaves its bands."""
    training = columns_of([row for row in rows if not is_evaluation(row)])
    evaluations = [row for row in rows if is_evaluation(row)]
    alike = [r for r in evaluations if {name: r.get(name) for name in GALLERY} == reference.gallery]
    bands, sentences, left, apart = {}, [], [], False
    for name, band in reference.bands.items():
        validated = name.startswith("eval/")
        columns = columns_of(alike) if validated else training
        if name not in columns or "learning_rate" not in training:
            continue
        steps, own, other = np.intersect1d(columns["step"], band.steps, return_indices=True)
        same = _same_rate(steps, training, reference)
        apart |= not same.all()
        if not same.any():
            continue
        bands[name] = Band(*(column[other][same] for column in band))
        neighbours = _VALIDATIONS if validated else _NEIGHBOURS
        found = list(_departures(columns[name][own][same], bands[name], neighbours))
        sentences += [f"{name} {sentence}" for sentence in found]
        left += [name] if found else []
    inside = len(bands) - len(left)
    if inside:
        sentences.append(f"{inside} {'other ' * bool(left)}curves are inside the reference band")
    elif not bands:
        sentences.append("no logged step can be compared yet")
    if evaluations and not alike:
        pictures = (evaluations[-1].get(GALLERY[0], 0), reference.gallery[GALLERY[0]])
        sentences.append("recall is not compared: among {:,} pictures, not {:,}".format(*pictures))
    if apart:
        last = max((band.steps[-1] for band in bands.values()), default=0)
        sentences.append(
            f"compared up to step {last:,}: after it, the learning rates differ by more than "
            f"{_OTHER_RATE:.0%}, since the reference has {reference.train_steps:,} steps"
        )
    return Comparison(bands, left, sentences)


def _kind(recipe: Mapping[str, Any]) -> str:
    return "size {size}, task {task}".format(**recipe)


def _differing(reference: Reference, recipe: Mapping[str, Any], changed: set[str]) -> list[str]:
    """The fields of a run that are not the reference's, or that a restart changed; a field that the
    reference is too old to have is compared with what runs without it did.
    """
    older = {name: field.older for name, field in FIELDS.items()}
    known = older | reference.recipe
    names = recipe.keys() | reference.recipe.keys()
    return sorted(name for name in names if known.get(name) != recipe.get(name) or name in changed)


def _same_rate(
    steps: Int[np.ndarray, " points"], training: Mapping[str, np.ndarray], reference: Reference
) -> np.ndarray:
    """Whether the run's learning rate at these steps is the reference's, nearly."""
    ours = np.interp(steps, training["step"], training["learning_rate"])
    theirs = np.interp(steps, *reference.rates)
    return np.abs(ours - theirs) <= _OTHER_RATE * np.maximum(ours, theirs)


def _departures(values: Float[np.ndarray, " points"], band: Band, neighbours: int) -> Iterator[str]:
    """A sentence for each stretch where most of the `neighbours` around a point are outside."""
    reach = neighbours // 2
    for side, beyond in (("above", values > band.high), ("below", values < band.low)):
        around = np.convolve(np.pad(beyond, reach).astype(int), np.ones(neighbours, int), "valid")
        out = np.flatnonzero(around > reach)
        for stretch in np.split(out, np.flatnonzero(np.diff(out) > 1) + 1) if len(out) else ():
            first, last = stretch[0], stretch[-1]
            when = f"from step {band.steps[first]:,} to {band.steps[last]:,}"
            if lasts := last >= len(values) - 1 - reach:
                when, last = f"since step {band.steps[first]:,}", -1
            yield (
                f"{'is' if lasts else 'was'} {side} the reference band {when} (at step "
                f"{band.steps[last]:,}: {values[last]:.3g}, band {band.low[last]:.3g} to "
                f"{band.high[last]:.3g})"
            )
