"""AdamW: the learning rate over the steps, and where weight decay applies."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from codebook_jax.method.numerics import default_types

# Decided by name, since stacked biases have two or more axes (ALBEF and timm decide by the number
# of axes).
NO_DECAY = re.compile(r"(^|/)(bias|scale|positions|temperature|codebook)(/|$)")


def from_config(
    config: ml_collections.ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate over the steps and the optimizer that `config.optimizer` describes."""
    o = config.optimizer
    rate = schedule(
        peak=o.learning_rate,
        ends=o.learning_rate_ends,
        warmup_steps=o.warmup_steps,
        steps=config.train.steps,
    )
    return rate, adamw(
        rate, weight_decay=o.weight_decay, b1=o.b1, b2=o.b2, eps=o.eps, clip_norm=o.clip_norm
    )


def schedule(*, peak: float, ends: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear from `ends` to `peak` over the warm-up, then a cosine back to `ends` at the last step
    (ALBEF's).
    """
    warmup_steps = min(warmup_steps, steps - 1)
    rate = optax.warmup_cosine_decay_schedule(ends, peak, warmup_steps, max(steps, 1), ends)
    return lambda count: rate(jnp.asarray(count, jnp.float32))


def adamw(
    rate: optax.Schedule, *, weight_decay: float, b1: float, b2: float, eps: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW over the student's parameters, after clipping the global gradient norm if `clip_norm` >
    0.
    """
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    steps.append(optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed))
    chain = optax.chain(*steps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with default_types():  # optax corrects its moments in JAX's default float
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def decayed(parameters: Any) -> Any:
    """Which parameters decay: not biases, layer norms, positions, the temperature or the
    codebook.
    """
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NO_DECAY.search(name(path)) is None, parameters
    )
