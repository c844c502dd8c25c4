"""Reference curves from finished runs of one recipe with several seeds, for `--mode=report`:
`python benchmarks/reference_curves.py RUN RUN RUN --out=codebook_jax/report/references/NAME.json`.

The band at a step is the 98 % prediction interval of one more run: around the mean of the runs,
Student's t times their standard deviation times sqrt(1 + 1 / runs), and two standard deviations of
the noise between neighbouring steps, in quadrature. A run's curve is smoothed first, by a parabola
through five logged steps; both deviations are those of 19, and every fifth of these counts as a
degree of freedom of t. The validations are too few for that: their deviation is that of all, and
their noise the binomial one of so many queries.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import scipy.signal
import scipy.stats
from jaxtyping import Float

from codebook_jax.errors import UserError
from codebook_jax.report.curves import columns_of
from codebook_jax.report.reference import GALLERY, METRICS, recipe_of
from codebook_jax.run import metrics
from codebook_jax.run.record import read_record

CURVE, DEVIATION = 5, 19  # logged steps that are taken together
INSIDE = 0.98
Runs = Float[np.ndarray, "runs points"]


def make(workdirs: list[Path]) -> dict:
    """The content of a file of reference curves; raises UserError for runs that make none."""
    if len(workdirs) < 2:
        raise UserError(f"a band needs two runs or more: {workdirs[0]} is one")
    records = [read_record(workdir) for workdir in workdirs]
    for workdir, record in zip(workdirs, records, strict=True):
        if record is None or record["changes"] or recipe_of(record) != recipe_of(records[0]):
            raise UserError(f"{workdir} is no uninterrupted run of the recipe of {workdirs[0]}")
    seeds = [record["config"]["seed"] for record in records]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the seeds of the runs are {seeds}: give runs of different seeds")
    rows = [metrics.read_rows(workdir / metrics.FILE) for workdir in workdirs]
    training = [[row for row in own if not metrics.is_evaluation(row)] for own in rows]
    validation = [[row for row in own if metrics.is_evaluation(row)] for own in rows]
    if min(map(len, training)) < DEVIATION or not all(validation):
        raise UserError(f"a run has less than {DEVIATION} logged steps, or no validation")
    columns = [columns_of(own) for own in training]
    recalls = [columns_of(own) for own in validation]
    gallery = {name: int(recalls[0][name][-1]) for name in GALLERY}
    queries = {"eval/txt": gallery[GALLERY[0]], "eval/img": gallery[GALLERY[1]]}
    found = {"training": {}, "validation": {}}
    for name, values in stacked(columns).items():
        smooth, noise = scipy.signal.savgol_filter(values, CURVE, 2), noise_of(values)
        deviation = np.sqrt(windowed(smooth.var(axis=0, ddof=1), DEVIATION))
        found["training"][name] = band(name, smooth, deviation, noise, DEVIATION // CURVE)
    for name, values in stacked(recalls).items():
        share = values.mean(axis=0) / 100
        noise = 100 * np.sqrt(share * (1 - share) / queries[name.split("_r")[0]])
        deviation = np.sqrt(values.var(axis=0, ddof=1).mean())
        found["validation"][name] = band(name, values, deviation, noise, len(share))
    steps = [{"step": own[0]["step"].astype(int).tolist()} for own in (columns, recalls)]
    rates = {"learning_rate": rounded(columns[0]["learning_rate"])}
    return {
        "recipe": recipe_of(records[0]),
        "seeds": seeds,
        "train_steps": records[0]["config"]["train"]["steps"],
        "versions": records[0]["versions"],
        "gallery": gallery,
        "training": steps[0] | rates | {"bands": found["training"]},
        "validation": steps[1] | {"bands": found["validation"]},
    }


def stacked(columns: list[dict[str, np.ndarray]]) -> dict[str, Runs]:
    """{metric: values of every run}; raises UserError unless all runs logged the same steps."""
    steps = [own["step"].tolist() for own in columns]
    if any(own != steps[0] for own in steps):
        raise UserError("the runs have not logged the same steps: give finished runs of one length")
    names = [name for name in columns[0] if METRICS.fullmatch(name)]
    found = {name: np.stack([own[name] for own in columns]) for name in names}
    if broken := [name for name, values in found.items() if not np.isfinite(values).all()]:
        raise UserError(f"{broken[0]} was not finite in a run, which is no reference")
    return found


def band(
    name: str, values: Runs, deviation: np.ndarray, noise: np.ndarray, points: int
) -> list[list[float]]:
    """[lows, highs], inside the metric's own limits; `deviation` is that of so many `points`."""
    runs, mean = len(values), values.mean(axis=0)
    t = scipy.stats.t.ppf((1 + INSIDE) / 2, points * (runs - 1)) * np.sqrt(1 + 1 / runs)
    half = np.hypot(t * deviation, 2 * noise)
    most = 100 if name.startswith("eval/") else 1 if name.endswith("_share") else np.inf
    return [rounded(np.clip(edge, 0, most)) for edge in (mean - half, mean + half)]


def noise_of(values: Runs) -> Float[np.ndarray, " points"]:
    """The standard deviation of the noise, from second differences, in which no trend is left."""
    squares = np.pad(np.diff(values, 2) ** 2 / 6, ((0, 0), (1, 1)), "edge")
    return np.sqrt(windowed(squares.mean(axis=0), DEVIATION))


def windowed(values: Float[np.ndarray, "*runs points"], width: int) -> np.ndarray:
    """The mean of `width` neighbours, of fewer at the ends."""
    ones = np.ones(width)
    counts = np.convolve(np.ones(values.shape[-1]), ones, "same")
    return np.apply_along_axis(np.convolve, -1, values, ones, "same") / counts


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", nargs="+", type=Path)
    options.add_argument("--out", required=True, type=Path)
    given = options.parse_args()
    try:
        content = json.dumps(make(given.runs), allow_nan=False)
        given.out.write_text(f"{content}\n")  # thousands of numbers: not a line for each
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
