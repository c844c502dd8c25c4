"""config.codebook.solver: how features are assigned to codewords."""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from codebook_jax.method import codebook

# By name, from the section `config.codebook`. A new assignment is one function and one line here.
ASSIGNMENTS: dict[str, Callable[[ml_collections.ConfigDict], codebook.Assign]] = {
    "sinkhorn": lambda c: codebook.sinkhorn(epsilon=c.epsilon, iterations=c.iterations),
    "ipot": lambda c: codebook.ipot(beta=c.ipot_beta, iterations=c.iterations),
}
