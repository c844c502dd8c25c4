"""Makes alignments.npz: plans between short sequences as POT (Python Optimal Transport) finds them.

    python -m pip install -e .[parity]
    python tests/goldens/make_alignments.py

The costs are the order-preserving ones of Su & Hua (CVPR 2017), by loops over the steps that are
there; POT solves each pair of sequences without the others, and its plans are put back in place.
"""

from pathlib import Path

import numpy as np
import ot

LOCALITY, SPREAD, WIDTH, SLACK = 0.5, 0.1, 1.3, 0.7
FORBIDDEN = 1e6  # the cost of matching the two dummies


def order_costs(cost: np.ndarray) -> np.ndarray:
    n, m = cost.shape
    found = cost.copy()
    for i in range(n):
        for j in range(m):
            r = (i + 1) / n - (j + 1) / m
            prior = r**2 / (2 * WIDTH**2 * (1 / n**2 + 1 / m**2))
            found[i, j] += SPREAD * prior - LOCALITY / (r**2 + 1)
    return found


def sinkhorn(rows: np.ndarray, columns: np.ndarray, cost: np.ndarray) -> np.ndarray:
    return ot.sinkhorn(
        rows, columns, cost, SPREAD, method="sinkhorn_log", numItermax=100_000, stopThr=1e-14
    )


def plans(cost: np.ndarray) -> dict[str, np.ndarray]:
    """Plans of one pair of sequences, none of whose steps is masked."""
    ordered = order_costs(cost)
    rows, columns = (np.full(size, 1 / size) for size in cost.shape)
    with_dummies = np.pad(ordered, ((0, 1), (0, 1)))
    with_dummies[-1, -1] = FORBIDDEN
    dummy_rows, dummy_columns = (np.append(side, 1 - SLACK) for side in (rows, columns))
    return {
        "costs": ordered,
        "ordered": sinkhorn(rows, columns, ordered),
        "bag": sinkhorn(rows, columns, cost),
        "dummies": sinkhorn(dummy_rows, dummy_columns, with_dummies)[:-1, :-1],
        "partial": ot.partial.entropic_partial_wasserstein(
            rows, columns, ordered, SPREAD, m=SLACK, method="sinkhorn_log", numItermax=10_000
        ),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    cost = 1 - rng.uniform(-1, 1, (5, 9, 7))
    valid_n = np.arange(9) < np.array([9, 4, 1, 6, 8])[:, None]
    valid_m = np.arange(7) < np.array([7, 6, 5, 1, 3])[:, None]
    valid_n[4, [0, 3]] = valid_m[1, 2] = False  # gaps
    found = {"cost": cost, "valid_n": valid_n, "valid_m": valid_m}
    for sample in range(len(cost)):
        place = np.ix_(valid_n[sample], valid_m[sample])
        for name, plan in plans(cost[sample][place]).items():
            found.setdefault(name, np.zeros_like(cost))[sample][place] = plan
    path = Path(__file__).parent / "alignments.npz"
    order = np.array([LOCALITY, SPREAD, WIDTH, SLACK])
    np.savez_compressed(path, order=order, **found)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
