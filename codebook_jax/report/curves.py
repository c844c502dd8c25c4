"""The curves of a run, from the rows of its metrics.jsonl."""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.evaluation.recall import RANKS
from codebook_jax.report.charts import Band, lines
from codebook_jax.run.metrics import is_evaluation

Row = Mapping[str, Any]


class _Plot(NamedTuple):
    """One chart: its title, the unit of its y axis, its curves ({name in metrics.jsonl: label})."""

    title: str
    unit: str
    curves: dict[str, str]
    note: str = ""
    log: bool = False
    dashed: tuple[str, ...] = ()  # labels


_CORRECT = {
    "accuracy": "accuracy",
    "matching/accuracy": "matching",
    "masked_lm/accuracy": "masked words",
}
_PERPLEXITY = {
    "codebook/perplexity": "mean of both",
    "codebook/perplexity_image": "images",
    "codebook/perplexity_text": "captions",
}
_USE = {
    "codebook/unused_share": "unused codewords",
    "codebook/unused_share_uniform": "unused if used uniformly",
    "codebook/agreement": "agreement",
}
_ENTROPY = {"codebook/assignment_entropy": "entropy"}
_ERRORS = {
    "transport/row_error": "rows (features)",
    "transport/column_error": "columns (codewords)",
}
_IN_USE = "How many codewords are in use, counted as if all were used equally often."
_DEAD = (
    "Only a share of unused codewords above that of uniform use means dead ones. Agreement: the "
    "share of pairs whose picture and caption are assigned to the same codeword."
)
_SINGLE = "0: each feature is assigned to a single codeword."
_MARGINALS = "How far the plan's marginals are from uniform."
_COMPILES = "The first step after every start includes compilation."
_WAITING = {"time/data_wait_share": "waiting for data"}
_SHADED = "Shaded: the band of the reference."
_FIND = "R@k: the share of queries with a right answer among the first k."
_SECTIONS = {  # after the losses
    "Codebook": (
        _Plot("Perplexity of the codebook", "codewords", _PERPLEXITY, _IN_USE),
        _Plot("Unused codewords, agreement", "share", _USE, _DEAD),
        _Plot("Entropy of an assignment", "nats", _ENTROPY, _SINGLE),
        _Plot("Transport error", "share of the mass", _ERRORS, _MARGINALS, log=True),
    ),
    "Optimisation and time": (
        _Plot("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
        _Plot("Temperature of the alignment", "temperature", {"temperature": "temperature"}),
        _Plot("Gradient norm", "norm", {"gradient_norm": "gradient norm"}, log=True),
        _Plot("Time per step", "seconds", {"time/step_s": "time per step"}, _COMPILES, log=True),
        _Plot("Waiting for data", "share of the time", _WAITING),
    ),
}
_IN_TABLES = re.compile(r"^step$|_r\d+$|/(images|texts|left_out|truncated|rerank_top_k)$")


def curves(
    rows: Sequence[Row],
    bands: Mapping[str, Band] = types.MappingProxyType({}),
    left: Sequence[str] = (),
    scores: Mapping[int, float] = types.MappingProxyType({}),
) -> dict[str, list[dict[str, Any]]]:
    """{section: charts} of the rows of a metrics.jsonl: every number except the counts of eval/.
    `bands` of a reference, by name, are behind their curves; those `left` in training come first.
    `scores` of validated steps are the ends of the curve between the first and the last weights.
    """
    training = columns_of([row for row in rows if not is_evaluation(row)])
    evaluations = columns_of([r for r in rows if is_evaluation(r) and "between/share" not in r])
    sections = {"Loss and accuracy": _losses(training), **_SECTIONS}
    accuracy = _accuracy(evaluations)
    plots = [*accuracy, *itertools.chain(*sections.values())]
    drawn = {"step", *(name for plot in plots for name in plot.curves)}
    rest = {name: training for name in training if name not in drawn}
    rest |= {name: evaluations for name in evaluations if not _IN_TABLES.search(name)}
    alone = lambda name: _Plot(name, "", {name: name})  # noqa: E731
    more = (_charts([alone(name)], columns, bands) for name, columns in rest.items())
    charts = {
        "Outside the reference band": _charts(map(alone, left), training, bands),
        "Recall in validation": _charts(_recalls(), evaluations, bands),
        "Accuracy in validation": _charts(accuracy, evaluations, bands) + _between(rows, scores),
        **{section: _charts(plots, training, bands) for section, plots in sections.items()},
        "Everything else that was logged": list(itertools.chain(*more)),
    }
    return {section: found for section, found in charts.items() if found}


def columns_of(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """{name: values [rows]} of everything with a number in some row; NaN where a row has none."""
    rows = [{name: x for name, x in row.items() if not isinstance(x, str)} for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([row.get(name) for row in rows], float) for name in names}
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


def _losses(names: Iterable[str]) -> list[_Plot]:
    """The total loss with its parts, then the parts of each: loss/NAME_X is part of loss/NAME."""
    labels = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    parts = {whole: [part for part in labels if part.startswith(f"{whole}_")] for whole in labels}
    inner = set(itertools.chain(*parts.values()))
    outer = {f"loss/{label}": label for label in labels if label not in inner}
    plots = [_Plot("Losses", "nats", {"loss": "weighted sum"} | outer)]
    for whole, found in parts.items():
        curves = {f"loss/{part}": part.removeprefix(f"{whole}_") for part in found}
        plots.append(_Plot(f"Parts of the {whole} loss", "nats", curves))
    return [*plots, _Plot("Accuracy in training", "share correct", _CORRECT)]


def _recalls() -> list[_Plot]:
    plots = []
    titles = {"img": "A caption finds its picture", "txt": "A picture finds its caption"}
    for prefix, title in titles.items():
        student = {f"eval/{prefix}_r{k}": f"R@{k}" for k in RANKS}
        others = {f"eval/teacher_{prefix}_r{k}": f"R@{k} teacher" for k in RANKS}
        others[f"eval/{prefix}_chance_r{RANKS[-1]}"] = f"R@{RANKS[-1]} chance"
        dashed = tuple(others.values())
        plots.append(_Plot(title, "recall, %", student | others, _FIND, dashed=dashed))
    return plots


def _accuracy(names: Collection[str]) -> list[_Plot]:
    """In percent, with what chance gives."""
    shown = ["eval/accuracy", *(name for name in names if name.startswith("eval/chance"))]
    curves = {name: name.removeprefix("eval/") for name in shown}
    return [_Plot("Accuracy", "%", curves)] if "eval/accuracy" in names else []


def _between(rows: Sequence[Row], scores: Mapping[int, float]) -> list[dict[str, Any]]:
    """The score of weights between the first and the last ones, if they were tried."""
    found = {row["between/share"]: row["between/score"] for row in rows if "between/share" in row}
    if not found:
        return []
    last = max(row["step"] for row in rows)
    ends = {0.0: scores.get(0), 1.0: scores.get(last)}
    found |= {share: score for share, score in ends.items() if score is not None}
    shares = sorted(found)
    return [
        lines(
            100 * np.array(shares),
            {"score": np.array([found[share] for share in shares], float)},
            title="Weights between start and end",
            x="share of the way, %",
            y="score in validation",
            note="Export a point of it with --config.export.between.",
        )
    ]


def _charts(
    plots: Iterable[_Plot], columns: Mapping[str, np.ndarray], bands: Mapping[str, Band]
) -> list[dict[str, Any]]:
    """The charts of the plots that have at least one curve among the columns."""
    charts = []
    for title, unit, curves, note, log, dashed in plots:
        names = {name: label.replace("_", " ") for name, label in curves.items() if name in columns}
        if names:
            shown = {label: columns[name] for name, label in names.items()}
            behind = {label: bands[name] for name, label in names.items() if name in bands}
            note = f"{note} {_SHADED}".strip() if behind else note
            labels = {"title": title, "x": "step", "y": unit, "note": note}
            drawn = lines(columns["step"], shown, log=log, dashed=dashed, bands=behind, **labels)
            charts.append(drawn)
    return charts
