"""Charts as data for page.js.

A chart is {"title", "note", "kind": "lines" or "bars", "x", "y" (axis labels), "log", "xs",
"series": [{"label", "values", "dash", "band": [lows, highs] or null}]}, for bars also their width
"step" and the "mark"; missing values are null.
"""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

MOST_POINTS = 1000  # of a curve; two per bucket, its lowest and its highest value
_BARS = 40
_SHOWN = 0.999  # share of a histogram's values before the last bar


class Band(NamedTuple):
    """Where a curve should lie at these steps."""

    steps: Int[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]


def lines(
    xs: Shaped[np.ndarray, " rows"],
    curves: Mapping[str, Float[np.ndarray, " rows"]],
    *,
    log: bool = False,
    dashed: Collection[str] = (),
    bands: Mapping[str, Band] = types.MappingProxyType({}),
    **labels: str,
) -> dict[str, Any]:
    """Curves {label: values}, thinned; a logarithmic axis leaves out values that are not positive.
    Bands lie between their steps too. `labels` are the chart's title, x, y and note.
    """
    values = np.stack(list(curves.values()), axis=1)
    xs, values = thinned(xs, np.where(values > 0, values, np.nan) if log else values)
    series = []
    for label, column in zip(curves, values.T, strict=True):
        band = None
        if label in bands:
            steps, *edges = bands[label]
            outside = {"left": math.nan, "right": math.nan}
            band = [_rounded(np.interp(xs, steps, edge, **outside)) for edge in edges]
        series.append(
            {"label": label, "values": _rounded(column), "dash": label in dashed, "band": band}
        )
    places = {"xs": xs.astype(int).tolist(), "series": series}
    return {"note": "", **labels, "kind": "lines", "log": log, **places}


def histogram(
    counts: Int[np.ndarray, " values"], *, mark: int | None = None, **labels: str
) -> dict[str, Any]:
    """Bars of equal width; `counts` is how often each value occurs, `mark` the last value before a
    line. The last bar collects the few large values that would make the others narrow.
    """
    reached = np.cumsum(counts) >= _SHOWN * counts.sum()
    end = 0 if mark is None else mark + 1
    top = max(int(np.argmax(reached)), end, 1) + 1  # some place after the mark
    step = -(-top // _BARS)
    start = -(-end % step)  # so that a bar ends at the mark
    bars = -(-(top - start) // step)
    which = np.minimum((np.arange(len(counts)) - start) // step, bars - 1)
    held = np.bincount(which, counts, bars).astype(int).tolist()
    series = [{"label": labels["y"], "values": held, "dash": False, "band": None}]
    places = {"xs": (start + np.arange(bars) * step).tolist(), "step": step, "mark": mark}
    return {"note": "", **labels, "kind": "bars", "log": False, **places, "series": series}


def thinned(
    steps: Shaped[np.ndarray, " rows"], values: Float[np.ndarray, "rows curves"]
) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of the rows: each curve's lowest and highest value in each bucket of
    rows, the higher first where the curve falls; a bucket that is all NaN gives NaN.
    """
    rows = len(steps)
    if rows <= MOST_POINTS:
        return steps, values
    size = -(-rows // (MOST_POINTS // 2))
    starts = np.arange(0, rows, size)
    lowest, highest = (extreme.reduceat(values, starts) for extreme in (np.fmin, np.fmax))
    falls = values[starts] > values[np.minimum(starts + size, rows) - 1]
    pairs = [np.where(falls, highest, lowest), np.where(falls, lowest, highest)]
    places = np.stack([starts, np.minimum(starts + size // 2, rows - 1)], axis=1)
    return steps[places.ravel()], np.stack(pairs, axis=1).reshape(-1, values.shape[1])


def _rounded(values: Float[np.ndarray, " rows"]) -> list[float | None]:
    return [None if math.isnan(y) else float(f"{y:.5g}") for y in values.tolist()]
