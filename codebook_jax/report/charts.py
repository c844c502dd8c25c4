"""Charts as data for page.js.

A chart is {"title", "note", "kind": "lines" or "bars", "x", "y" (axis labels), "log", "xs",
"series": [{"label", "values", "dash"}]}, for bars also their width "step" and the "mark"; missing
values are null.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

MOST_POINTS = 1000  # of a curve; two per bucket, its lowest and its highest value
_BARS = 40
_SHOWN = 0.999  # share of a histogram's values before the last bar


def lines(
    xs: Shaped[np.ndarray, "rows"],
    curves: Mapping[str, Float[np.ndarray, "rows"]],
    *,
    log: bool = False,
    dashed: Collection[str] = (),
    **labels: str,
) -> dict[str, Any]:
    """Curves {label: values}, thinned; a logarithmic axis leaves out values that are not positive.

    `labels` are the chart's title, x, y and note.
    """
    values = np.stack(list(curves.values()), axis=1)
    xs, values = thinned(xs, np.where(values > 0, values, np.nan) if log else values)
    series = [
        {
            "label": label,
            "values": [None if math.isnan(y) else float(f"{y:.5g}") for y in column.tolist()],
            "dash": label in dashed,
        }
        for label, column in zip(curves, values.T, strict=True)
    ]
    chart = {"note": "", **labels, "kind": "lines", "log": log}
    return chart | {"xs": xs.astype(int).tolist(), "series": series}


def histogram(
    counts: Int[np.ndarray, "values"], *, mark: int | None = None, **labels: str
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
    series = [{"label": labels["y"], "values": held, "dash": False}]
    chart = {"note": "", **labels, "kind": "bars", "log": False, "series": series}
    xs = (start + np.arange(bars) * step).tolist()
    return chart | {"xs": xs, "step": step, "mark": mark}


def thinned(
    steps: Shaped[np.ndarray, "rows"], values: Float[np.ndarray, "rows curves"]
) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of the rows: each curve's lowest and highest value in each bucket of
    rows, in their order; a bucket that is all NaN gives NaN.
    """
    rows = len(steps)
    if rows <= MOST_POINTS:
        return steps, values
    size = -(-rows // (MOST_POINTS // 2))
    buckets = -(-rows // size)
    padded = np.full((buckets * size, values.shape[1]), np.nan)
    padded[:rows] = values
    padded = padded.reshape(buckets, size, -1)
    lowest = np.where(np.isnan(padded), np.inf, padded).argmin(axis=1)
    highest = np.where(np.isnan(padded), -np.inf, padded).argmax(axis=1)
    places = np.sort(np.stack([lowest, highest], axis=1), axis=1)
    extremes = np.take_along_axis(padded, places, axis=1).reshape(2 * buckets, -1)
    starts = np.arange(buckets)[:, None] * size + np.array([0, size // 2])
    return steps[starts.ravel().clip(max=rows - 1)], extremes
