"""Transport plans by POT, in float64: `python tests/goldens/make_plans.py` writes plans.npz."""

from pathlib import Path

import numpy as np
import ot

EPSILON, TAU = 0.05, 0.8


def main() -> None:
    rng = np.random.default_rng(0)
    rows, codes = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in
                   (rng.normal(size=(24, 6)), rng.normal(size=(10, 6))))  # fmt: skip
    cost = 1 - rows @ codes.T
    u, w = np.full(24, 1 / 24), np.full(10, 1 / 10)
    many = dict(numItermax=100_000, stopThr=1e-13)
    rho = EPSILON * TAU / (1 - TAU)
    np.savez(
        Path(__file__).with_name("plans.npz"),
        cost=cost,
        epsilon=EPSILON,
        tau=TAU,
        sinkhorn=ot.sinkhorn(u, w, cost, EPSILON, method="sinkhorn_log", **many),
        unbalanced=ot.unbalanced.sinkhorn_unbalanced(
            u, w, cost, EPSILON, (np.inf, rho), method="sinkhorn_stabilized", **many
        ),
        emd2=ot.emd2(u, w, cost),
    )


if __name__ == "__main__":
    main()
