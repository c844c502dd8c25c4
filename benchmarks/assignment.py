"""Is transport needed? The assignments to codewords on the same data, seeds and steps: `python
benchmarks/assignment.py`.

Every run is the ordinary command at size `tiny` (recalls.py) without matching and masked words, so
that two towers learn from alignment and codebook alone; the first row has no codebook. Codebook
figures are those of the last logged step. `--time` instead takes the time of one assignment of the
features of both modalities.
"""

from __future__ import annotations

import json
import sys
import time

from recalls import ROOT, Variant, compare, parser

sys.path.insert(0, str(ROOT))

from codebook_jax.tasks.limits import ASSIGNMENTS

TWO_TOWERS = ("losses.matching=0", "losses.masked_lm=0")
COLUMNS = {
    "codebook/perplexity": ".0f",
    "codebook/unused_share": ".1%",
    "codebook/agreement": ".2f",
    "transport/column_error": ".3f",
}
BATCHES = (64, 512, 4096)
CODES = (512, 4000, 16_000)
TIMES = ROOT / "benchmarks" / "results" / "assignment_time.json"


def main() -> None:
    options = parser(__doc__, name="assignment", steps=240)
    options.add_argument("--time", action="store_true", help="time assignments instead")
    options.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    given = options.parse_args()
    if given.time:
        write_times(given.batches)
        return
    variants = {"none": Variant(fields=("losses.codebook=0", *TWO_TOWERS))}
    for solver in ASSIGNMENTS:
        variants[solver] = Variant(fields=(f"codebook.solver={solver}", *TWO_TOWERS))
    compare(variants, given, COLUMNS)


def write_times(batches: list[int]) -> None:
    """Prints and keeps the milliseconds of one assignment: wall, and (summed over the cores)."""
    found = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    heads = ["features x codewords", *ASSIGNMENTS]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for batch in batches:
        for codes in CODES:
            row = {name: milliseconds(name, batch, codes) for name in ASSIGNMENTS}
            found[f"{batch} x {codes}"] = row
            cells = [f"{one['wall']:,.1f} ({one['cores']:,.1f})" for one in row.values()]
            print(f"| {batch:,} x {codes:,} | {' | '.join(cells)} |", flush=True)
            TIMES.write_text(json.dumps(found, indent=1) + "\n")


def milliseconds(solver: str, batch: int, codes: int, *, most_s: float = 3.0) -> dict[str, float]:
    """The medians of up to nine runs begun within `most_s` seconds: wall, and of all cores.

    What a step does: the plan of both modalities and, without transport, the update of codewords or
    centre (tasks/running.py).
    """
    import jax
    import numpy as np

    from codebook_jax.method import assignment, codebook
    from codebook_jax.method.numerics import unit
    from codebook_jax.tasks import running
    from configs import base

    config = base.paper("tiny")
    config.codebook.solver = solver
    keys = jax.random.split(jax.random.key(0))
    features = unit(jax.random.normal(keys[0], (2, batch, config.model.dim)))
    words = unit(jax.random.normal(keys[1], (codes, config.model.dim)))
    costs = assignment.codeword_costs(features, words)
    memory = running.first(config.codebook, words)

    @jax.jit
    def step(memory, features, costs):
        moved = running.centred(memory, costs)
        plan = assignment.make_plan(moved, ASSIGNMENTS[solver](config.codebook))
        if memory is None:
            return plan
        rows, flat = features.reshape(2 * batch, -1), costs.reshape(2 * batch, -1)
        soft = codebook.soft_codes(plan, batch).reshape(flat.shape)
        return plan, running.advance(config.codebook, memory, rows, flat, soft)

    compiled = step.lower(memory, features, costs).compile()
    if batch * codes < 1e7:  # else a run takes so long that its first is like any other
        jax.block_until_ready(compiled(memory, features, costs))
    times: list[tuple[float, float]] = []  # wall, cores
    while len(times) < 9 and sum(wall for wall, _ in times) < most_s:
        wall, cores = time.perf_counter(), time.process_time()
        jax.block_until_ready(compiled(memory, features, costs))
        times.append((time.perf_counter() - wall, time.process_time() - cores))
    wall, cores = np.median(times, axis=0)
    return {"wall": 1000 * float(wall), "cores": 1000 * float(cores), "runs": len(times)}


if __name__ == "__main__":
    main()
