"""AdamW: the learning rate over the steps, where weight decay applies, and an update."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, PyTree

from codebook_jax.method.numerics import default_types

# Decided by name, since stacked biases have two or more axes (ALBEF and timm decide by the number
# of axes).
NO_DECAY = re.compile(r"(^|/)(bias|scale|positions|temperature|codebook)(/|$)")


def from_config(
    config: ml_collections.ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate over the steps, and AdamW after clipping the global norm of the gradient.

    The rate is linear from its ends to its peak over the warm-up, then a cosine back to its ends at
    the last step (ALBEF's). A `clip_norm` of 0 clips nothing.
    """
    o, steps = config.optimizer, config.train.steps
    peak, ends, warmup = o.learning_rate, o.learning_rate_ends, min(o.warmup_steps, steps - 1)
    cosine = optax.warmup_cosine_decay_schedule(ends, peak, warmup, steps, ends)
    rate = lambda count: cosine(jnp.asarray(count, jnp.float32))  # noqa: E731
    clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm > 0 else []
    adamw = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed)
    chain = optax.chain(*clip, adamw)

    def update(updates: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any]:
        with default_types():  # optax corrects its moments in JAX's default float
            return chain.update(updates, state, params)

    return rate, optax.GradientTransformation(chain.init, update)


def updated(
    config: ml_collections.ConfigDict,
    optimizer: optax.GradientTransformation,
    gradients: dict[str, PyTree],
    student: dict[str, PyTree],
    moments: PyTree,
    *,
    frozen: Bool[Array, ""] | bool,
) -> tuple[dict[str, PyTree], PyTree]:
    """Student and moments after an update: the codebook, if there is one, gets no gradient while
    `frozen`, and the temperature stays in the range of `config.alignment`.
    """
    if "codebook" in gradients:
        of_codes = jax.tree.map(lambda x: jnp.where(frozen, 0, x), gradients["codebook"])
        gradients = {**gradients, "codebook": of_codes}
    updates, moments = optimizer.update(gradients, moments, student)
    student = optax.apply_updates(student, updates)
    low, high = (config.alignment[f"temperature_{end}"] for end in ("min", "max"))
    return {**student, "temperature": jnp.clip(student["temperature"], low, high)}, moments


def decayed(parameters: PyTree) -> PyTree:
    """Which parameters decay: not biases, layer norms, positions, temperature and codebook."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NO_DECAY.search(name(path)) is None, parameters
    )
