"""AdamW or Muon: the learning rate over the steps, where weight decay applies, and an update."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, PyTree
from optax import contrib
from optax.contrib import MuonDimensionNumbers

from codebook_jax.errors import UserError, first_few
from codebook_jax.method.numerics import default_types

# Decided by name, since stacked biases have two or more axes (ALBEF and timm decide by the number
# of axes).
NO_DECAY = re.compile(r"(^|/)(bias|scale|positions|temperature|codebook)(/|$)")
# Kernels that take AdamW's steps: of the layer that reads pixels, and of the classes of matching.
FIRST_OR_LAST = re.compile(r"/(patches|conv0|classes)/kernel$")
# The axes of what layers with heads read and give; of all others, the last two.
HEADS = {
    "/qkv/": ((-4,), (-2, -1)),
    "/key_value/": ((-4,), (-2, -1)),
    "/query/": ((-3,), (-2, -1)),
    "/out/": ((-3, -2), (-1,)),
}


def from_config(
    config: ml_collections.ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """AdamW's learning rate over the steps, and the optimizer after clipping the gradient's norm.

    The rate is linear from its ends to its peak over the warm-up, then a cosine back to its ends at
    the last step (ALBEF's). A `clip_norm` of 0 clips nothing. With `name` "muon", the matrices
    inside the network take orthogonal steps at a rate of their own, which follows the same curve to
    the peak `muon_learning_rate`, and lose as much to weight decay as under AdamW. Parameters that
    `freeze` names keep their values and have no moments; with a `layer_decay` below 1, lower layers
    take smaller steps (Clark et al. 2020, 3.1).
    """
    o, steps = config.optimizer, config.train.steps
    peak, ends, warmup = o.learning_rate, o.learning_rate_ends, min(o.warmup_steps, steps - 1)
    cosine = optax.warmup_cosine_decay_schedule(ends, peak, warmup, steps, ends)
    rate = lambda count: cosine(jnp.asarray(count, jnp.float32))  # noqa: E731
    clip = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm > 0 else []
    steps_of = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed)
    if o.name == "muon":
        ratio = o.muon_learning_rate / peak
        muon = contrib.muon(
            lambda count: ratio * rate(count),
            weight_decay=o.weight_decay / ratio,
            muon_weight_dimension_numbers=matrices,
        )
        kinds = functools.partial(_each, lambda name: "muon" if _axes(name) else "adamw")
        steps_of = optax.partition({"muon": muon, "adamw": steps_of}, kinds)
    slower = [_slower_below(config)] if o.layer_decay < 1 else []
    chain = optax.chain(*clip, steps_of, *slower)
    if o.freeze:
        kinds = {"trained": chain, "frozen": optax.set_to_zero()}
        chain = optax.partition(kinds, functools.partial(_kinds_of, o.freeze))

    def init(params: PyTree) -> Any:
        with default_types():  # Muon's coefficients
            return chain.init(params)

    def update(updates: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any]:
        with default_types():  # optax corrects its moments in JAX's default float
            return chain.update(updates, state, params)

    return rate, optax.GradientTransformation(init, update)


def updated(
    config: ml_collections.ConfigDict,
    optimizer: optax.GradientTransformation,
    gradients: dict[str, PyTree],
    student: dict[str, PyTree],
    moments: PyTree,
    *,
    frozen: Bool[Array, ""] | bool = False,
) -> tuple[dict[str, PyTree], PyTree]:
    """Student and moments after an update: the codebook, if there is one, gets no gradient while
    `frozen`, and the temperature stays in the range of `config.alignment`.
    """
    if "codebook" in gradients:
        of_codes = jax.tree.map(lambda x: jnp.where(frozen, 0, x), gradients["codebook"])
        gradients = {**gradients, "codebook": of_codes}
    updates, moments = optimizer.update(gradients, moments, student)
    student = optax.apply_updates(student, updates)
    if "temperature" not in student:
        return student, moments
    low, high = (config.alignment[f"temperature_{end}"] for end in ("min", "max"))
    return {**student, "temperature": jnp.clip(student["temperature"], low, high)}, moments


def trained(config: ml_collections.ConfigDict, gradients: PyTree) -> PyTree:
    """The gradients with zeros for what `config.optimizer.freeze` names, so that nothing of those
    is computed.
    """
    if not config.optimizer.freeze:
        return gradients
    kinds = _kinds_of(config.optimizer.freeze, gradients)
    return jax.tree.map(
        lambda kind, x: jnp.zeros_like(x) if kind == "frozen" else x, kinds, gradients
    )


def _kinds_of(pattern: str, parameters: PyTree) -> PyTree:
    """ "frozen" or "trained" for each parameter; raises UserError if all or none are frozen."""
    kinds = _each(lambda name: "frozen" if re.search(pattern, name) else "trained", parameters)
    if len(found := set(jax.tree.leaves(kinds))) == 1:
        names: list[str] = []
        _each(names.append, parameters)
        which = "every parameter" if "frozen" in found else "no parameter"
        raise UserError(
            f"config.optimizer.freeze={pattern!r} matches {which}: give a regular expression for "
            f"the names of some, which are {first_few(names[:: max(1, len(names) // 6)], 6)}"
        )
    return kinds


def _slower_below(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Multiplies each update by `layer_decay` once for every layer above its own. Embeddings are
    below the first layer, heads and what has no layer above the last; the fusion encoder continues
    the text encoder.
    """
    model, decay = config.model, config.optimizer.layer_decay
    depths = {"image": model.image.depth, "text": model.text.depth + model.text.fusion_depth}

    def factor(name: str, update: Array) -> Array:
        found = re.search(r"(^|/)(image|text|fusion)/", name)
        if found is None:
            return update
        tower = "text" if found[2] == "fusion" else found[2]
        if "/blocks/" in name:
            first = model.text.depth if found[2] == "fusion" else 0
            above = depths[tower] - first - jnp.arange(len(update))
            above = above.reshape(-1, *(1,) * (update.ndim - 1))
        else:
            above = 0 if re.search(r"/image/norm/", name) else depths[tower] + 1
        return update * jnp.asarray(decay**above, update.dtype)

    def scaled(updates: PyTree, state: Any, parameters: PyTree = None) -> tuple[PyTree, Any]:
        return _named_map(factor, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), scaled)


def decayed(parameters: PyTree) -> PyTree:
    """Which parameters decay: not biases, layer norms, positions, temperature and codebook."""
    return _each(lambda name: NO_DECAY.search(name) is None, parameters)


def matrices(parameters: PyTree) -> PyTree:
    """The axes of each parameter's matrix, of which Muon makes the steps orthogonal (Jordan 2024):
    queries, keys and values of all heads are one each. None for what is no matrix inside the
    network: embeddings, the first layer of pixels, the classes of matching.
    """
    return _each(_axes, parameters)


def _axes(name: str) -> MuonDimensionNumbers | None:
    if not name.endswith("/kernel") or FIRST_OR_LAST.search(name):
        return None
    inputs, outputs = next((axes for layer, axes in HEADS.items() if layer in name), ((-2,), (-1,)))
    return MuonDimensionNumbers(inputs, outputs)


def _each(of: Callable[[str], object], tree: PyTree) -> PyTree:
    """`of` each leaf's name."""
    return _named_map(lambda name, _: of(name), tree)


def _named_map(of: Callable[[str, Array], object], tree: PyTree) -> PyTree:
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, leaf: of(name(path), leaf), tree)
