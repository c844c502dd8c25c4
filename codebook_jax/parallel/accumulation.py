"""One step's gradient, in one pass over the batch or in several that fit into memory.

The features of the whole batch meet in one loss, so its gradient is not a sum over passes. Several
passes therefore first embed everything without a gradient, take the gradient with respect to the
features, and then give each pass its share as the cotangent of its features (GradCache; Gao et al.
2021). Losses of pairs inside a pass are added there.

So all four losses give the result of one pass, up to rounding, with two exceptions. Dropout draws
its masks per pass. And matching draws its negatives inside groups that must lie in one pass
(`itm.groups`), since it needs image tokens and
text states, which are not kept: with the same number of groups the result is equal too; with the
default, data shards x passes, a pair's candidates are those of its shard in its pass, so more
passes leave fewer. Alignment and codebook always compare with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from codebook_jax.parallel import sharding

Scalars = dict[str, Array]
DIRECT = (
    "codebook",
    "temperature",
)  # the student's parts that `compare` reads besides the features


class Passes(NamedTuple):
    """How the rows of a batch are split into passes."""

    count: int
    mesh: jax.sharding.Mesh

    def over(self, apply: Callable[[Any], Any], rows: Any) -> Any:
        """Calls `apply` on each pass's rows and joins the results in the order of the batch."""
        if self.count == 1:
            return apply(rows)
        return self._join(jax.lax.map(apply, self._split(rows)))

    def gradients(
        self,
        student: Mapping[str, Any],
        inputs: Any,
        taught: Any,
        key: Key[Array, ""],
        *,
        embed: Callable[..., Any],
        compare: Callable[..., tuple[Array, Scalars]],
        pair: Callable[..., tuple[Array, Scalars]],
    ) -> tuple[tuple[Array, Scalars], Any]:
        """((loss, scalars), gradient with respect to the student) of compare + the sum of pair over
        the passes.

        Args:
          embed: (student, inputs, key) to its outputs, with `.features`.
          compare: (features, {the student's DIRECT parts}) of the whole batch to (loss, scalars).
          pair: (student, learned, inputs, taught, key) of a pass to its (share of the loss, shares
          of the scalars).
        """
        if self.count == 1:
            return _one_pass(student, inputs, taught, key, embed, compare, pair)
        keys = jax.random.split(key, self.count)
        inputs, taught = self._split(inputs), self._split(taught)
        features = jax.lax.map(lambda at: embed(student, *at).features, (inputs, keys))
        direct = {name: student[name] for name in DIRECT}
        (shared, scalars), (pull, direct) = jax.value_and_grad(
            compare, argnums=(0, 1), has_aux=True
        )(self._join(features), direct)

        def share(total: Any, rows: Any) -> tuple[Any, tuple[Array, Scalars]]:
            inputs, taught, pull, key = rows

            def objective(student: Any) -> tuple[Array, tuple[Array, Scalars]]:
                learned = embed(student, inputs, key)
                pulled = sum(jnp.sum(a * b) for a, b in zip(learned.features, pull, strict=True))
                paired, more = pair(student, learned, inputs, taught, key)
                return pulled + paired, (paired, more)

            gradient, found = jax.grad(objective, has_aux=True)(student)
            return jax.tree.map(jnp.add, total, gradient), found

        nothing = jax.tree.map(jnp.zeros_like, student)
        gradient, found = jax.lax.scan(share, nothing, (inputs, taught, self._split(pull), keys))
        paired, more = jax.tree.map(lambda shares: shares.sum(axis=0), found)
        gradient |= jax.tree.map(jnp.add, {name: gradient[name] for name in DIRECT}, direct)
        return (shared + paired, scalars | more), gradient

    def _split(self, rows: Any) -> Any:
        return jax.tree.map(lambda x: sharding.split_rows(x, self.count, self.mesh), rows)

    def _join(self, parts: Any) -> Any:
        return jax.tree.map(lambda x: sharding.join_rows(x, self.mesh), parts)


def _one_pass(student, inputs, taught, key, embed, compare, pair) -> Any:
    def objective(student: Any) -> tuple[Array, Scalars]:
        learned = embed(student, inputs, key)
        shared, scalars = compare(learned.features, student)
        paired, more = pair(student, learned, inputs, taught, key)
        return shared + paired, scalars | more

    return jax.value_and_grad(objective, has_aux=True)(student)
