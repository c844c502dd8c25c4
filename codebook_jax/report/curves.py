"""The curves of a run, from the rows of its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.evaluation.recall import RANKS
from codebook_jax.metrics import is_evaluation
from codebook_jax.report.charts import lines

Row = Mapping[str, Any]


class _Plot(NamedTuple):
    """One chart: its title, the unit of its y axis, its curves ({name in metrics.jsonl: label})."""

    title: str
    unit: str
    curves: dict[str, str]
    note: str = ""
    log: bool = False
    dashed: tuple[str, ...] = ()  # labels


_CODEBOOK = (
    _Plot(
        "Perplexity of the codebook",
        "codewords",
        {"codebook/perplexity": "mean of both", "codebook/perplexity_image": "images", "codebook/perplexity_text": "captions"},
        "How many codewords are in use, counted as if all were used equally often.",
    ),
    _Plot(
        "Unused codewords, agreement",
        "share",
        {"codebook/unused_share": "unused codewords", "codebook/agreement": "pairs with one codeword for both"},
        "Agreement: the picture and its caption are assigned to the same codeword.",
    ),
    _Plot(
        "Entropy of an assignment",
        "nats",
        {"codebook/assignment_entropy": "entropy"},
        "0: each feature has one codeword for itself.",
    ),
    _Plot(
        "Transport error",
        "share of the mass",
        {"transport/row_error": "rows (features)", "transport/column_error": "columns (codewords)"},
        "How far the plan's marginals are from even.",
        log=True,
    ),
)
_OPTIMISATION = (
    _Plot("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
    _Plot("Temperature of the alignment", "temperature", {"temperature": "temperature"}),
    _Plot("Gradient norm", "norm", {"gradient_norm": "gradient norm"}, log=True),
    _Plot("Time a step", "seconds", {"time/step_s": "a step"}, "The first step of every start compiles.", log=True),
    _Plot("Waiting for data", "share of the time", {"time/data_wait_share": "waiting for data"}),
)
_ACCURACY = _Plot(
    "Accuracy in training",
    "share right",
    {"matching/accuracy": "matching", "masked_lm/accuracy": "masked words"},
)
_KNOWN_EVALUATION = ("_r1", "_r5", "_r10", "/images", "/texts", "/left_out", "/truncated", "/rerank_top_k")


def curves(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """{section: charts} of the rows of a metrics.jsonl; every number in them is in some chart but eval's counts."""
    training = [row for row in rows if not is_evaluation(row)]
    evaluations = [row for row in rows if is_evaluation(row)]
    names = list(dict.fromkeys(name for row in training for name in row if _is_curve(training, name)))
    plots = {
        "Loss and accuracy": [*_losses(names), _ACCURACY],
        "Codebook": list(_CODEBOOK),
        "Optimisation and time": list(_OPTIMISATION),
    }
    drawn = {name for group in plots.values() for plot in group for name in plot.curves}
    plots["Everything else that was logged"] = [_Plot(name, "", {name: name}) for name in names if name not in drawn]
    charts = {section: _charts(group, training) for section, group in plots.items()}
    other = dict.fromkeys(name for row in evaluations for name in row if _is_curve(evaluations, name))
    more = [_Plot(name, "", {name: name}) for name in other if not name.endswith(_KNOWN_EVALUATION)]
    charts["Everything else that was logged"] += _charts(more, evaluations)
    recall = _charts(_recalls(), evaluations)
    charts = {"Recall in validation": recall} | charts
    return {section: found for section, found in charts.items() if found}


def _losses(names: Sequence[str]) -> list[_Plot]:
    """The sum with its parts, then the parts of each part: loss/NAME_X is one of loss/NAME."""
    parts = [name for name in names if name.startswith("loss/")]
    owner = {name: next((whole for whole in parts if name.startswith(f"{whole}_")), "") for name in parts}
    whole = [name for name in parts if not owner[name]]
    labels = {name: name.removeprefix("loss/").replace("_", " ") for name in parts}
    plots = [_Plot("Losses", "nats", {"loss": "loss (weighted sum)"} | {name: labels[name] for name in whole})]
    for name in whole:
        own = {part: labels[part].removeprefix(f"{labels[name]} ") for part in parts if owner[part] == name}
        if own:
            plots.append(_Plot(f"Parts of the {labels[name]} loss", "nats", own))
    return plots


def _recalls() -> list[_Plot]:
    plots = []
    for prefix, title in (("img", "A caption finds its picture"), ("txt", "A picture finds its caption")):
        student = {f"eval/{prefix}_r{k}": f"R@{k}" for k in RANKS}
        teacher = {f"eval/teacher_{prefix}_r{k}": f"R@{k} teacher" for k in RANKS}
        chance = {f"eval/{prefix}_chance_r{RANKS[-1]}": f"R@{RANKS[-1]} chance"}
        dashed = (*teacher.values(), *chance.values())
        note = "R@k: the share of queries that have a right answer among their first k."
        plots.append(_Plot(title, "recall, %", student | teacher | chance, note, dashed=dashed))
    return plots


def _charts(plots: Sequence[_Plot], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The charts of those plots that have a curve in the rows."""
    steps = np.array([row["step"] for row in rows])
    charts = []
    for plot in plots:
        found = {
            label: np.array([_number(row.get(name)) for row in rows])
            for name, label in plot.curves.items()
            if _is_curve(rows, name)
        }
        if found:
            look = {"note": plot.note, "log": plot.log, "dashed": plot.dashed}
            charts.append(lines(plot.title, steps, found, x="step", y=plot.unit, **look))
    return charts


def _is_curve(rows: Sequence[Row], name: str) -> bool:
    return name != "step" and any(not math.isnan(_number(row.get(name))) for row in rows)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
