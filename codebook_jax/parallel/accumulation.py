"""One step's gradient, in one pass over the batch or in several that fit into memory.

The features of the whole batch meet in one loss, so its gradient is not a sum over passes. Several
passes therefore first embed everything without a gradient, take the gradient with respect to the
features, and then give each pass its share as the cotangent of its features (GradCache; Gao et al.
2021). Losses of pairs inside a pass are added there. The result is that of one pass up to rounding,
except for what is drawn per pass: see docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from codebook_jax.parallel import sharding

Scalars = dict[str, Array]


class Objective(NamedTuple):
    """A loss of the whole batch's features and a sum of losses of each pass."""

    embed: Callable[..., Any]  # (student, inputs, key) to its outputs, with `.features`
    # (features, {the student's `direct` parts}) of the whole batch to (loss, scalars)
    batch_loss: Callable[..., tuple[Array, Scalars]]
    # (student, outputs, inputs, taught, key) of a pass to its shares of (loss, scalars)
    pass_loss: Callable[..., tuple[Array, Scalars]]
    direct: tuple[str, ...]  # parts of the student that `batch_loss` reads besides the features


class Passes(NamedTuple):
    """How the rows of a batch are split into passes."""

    count: int
    mesh: jax.sharding.Mesh

    def over(self, apply: Callable[[Any], Any], rows: PyTree) -> PyTree:
        """Calls `apply` on each pass's rows and joins the results in the order of the batch."""
        if self.count == 1:
            return apply(rows)
        done = jax.lax.map(apply, sharding.split_rows(rows, self.count, self.mesh))
        return sharding.join_rows(done, self.mesh)

    def gradients(
        self,
        objective: Objective,
        student: Mapping[str, PyTree],
        inputs: PyTree,
        taught: PyTree,
        key: Key[Array, ""],
    ) -> tuple[tuple[Array, Scalars], PyTree]:
        """((loss, scalars), gradient with respect to the student) of an objective."""
        embed, batch_loss, pass_loss, direct = objective

        def one_pass(student: PyTree) -> tuple[Array, Scalars]:
            outputs = embed(student, inputs, key)
            shared, scalars = batch_loss(outputs.features, student)
            loss, more = pass_loss(student, outputs, inputs, taught, key)
            return shared + loss, scalars | more

        def share(total: PyTree, rows: PyTree) -> tuple[PyTree, tuple[Array, Scalars]]:
            inputs, taught, pull, key = rows

            def of_pass(student: PyTree) -> tuple[Array, tuple[Array, Scalars]]:
                outputs = embed(student, inputs, key)
                pulled = sum(jnp.sum(a * b) for a, b in zip(outputs.features, pull, strict=True))
                loss, more = pass_loss(student, outputs, inputs, taught, key)
                return pulled + loss, (loss, more)

            gradient, found = jax.grad(of_pass, has_aux=True)(student)
            return jax.tree.map(jnp.add, total, gradient), found

        if self.count == 1:
            return jax.value_and_grad(one_pass, has_aux=True)(student)
        keys = jax.random.split(key, self.count)
        rows = sharding.split_rows((inputs, taught), self.count, self.mesh)
        features = jax.lax.map(lambda at: embed(student, *at).features, (rows[0], keys))
        (shared, scalars), (pull, own) = jax.value_and_grad(
            batch_loss, argnums=(0, 1), has_aux=True
        )(sharding.join_rows(features, self.mesh), {name: student[name] for name in direct})
        pull = sharding.split_rows(pull, self.count, self.mesh)
        nothing = jax.tree.map(jnp.zeros_like, student)
        gradient, found = jax.lax.scan(share, nothing, (*rows, pull, keys))
        loss, more = jax.tree.map(lambda shares: shares.sum(axis=0), found)
        gradient |= jax.tree.map(jnp.add, {name: gradient[name] for name in direct}, own)
        return (shared + loss, scalars | more), gradient
