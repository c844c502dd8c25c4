"""The two alignment losses for any model: named modalities in, a loss and what it was made of out.

Pure functions under the caller's own jit, vmap, grad and sharding; float32 inside whatever comes in
(float64 stays). A row that is not finite drops out alone and is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from codebook_jax.method import alignment, codebook, ordering
from codebook_jax.method.assignment import (
    Assign,
    codeword_costs,
    column_error,
    make_plan,
    row_error,
    sinkhorn,
)
from codebook_jax.method.numerics import require, unit
from codebook_jax.method.queue import Queue

Features = Mapping[str, Float[Array, "batch *steps dim"]]
Masks = Mapping[str, Bool[Array, " batch *steps"]]


def _anywhere(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss`, whose arrays may also be split over the explicit axes of a mesh."""

    @functools.wraps(loss)
    def split(*arguments: Any, **options: Any) -> Any:
        mesh, kind = jax.sharding.get_abstract_mesh(), jax.sharding.AxisType.Explicit
        axes = [n for n, own in zip(mesh.axis_names, mesh.axis_types, strict=True) if own == kind]
        if not axes:
            return loss(*arguments, **options)
        call = lambda args, arrays: loss(*args, **options | arrays)  # noqa: E731
        arrays = {name: value for name, value in options.items() if _has_arrays(value)}
        whole = jax.sharding.PartitionSpec()
        return jax.sharding.auto_axes(call, axes=tuple(axes), out_sharding=whole)(arguments, arrays)

    return split


def _has_arrays(value: object) -> bool:
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))


@flax.struct.dataclass
class CodebookAux:
    """What `codebook_alignment` computed on its way, by modality or by pair "a to b"."""

    per_sample: Float[Array, " batch"]  # their mean is the loss if nothing was left out
    transport: dict[str, Float[Array, ""]]  # codewords towards the features they were given
    predicted: dict[str, Float[Array, ""]]  # "a to b": a's student predicts b's codes
    assignments: dict[str, Float[Array, "batch *steps codes"]]  # soft codes; rows sum to 1
    alignments: dict[str, Float[Array, "batch steps others"]]  # of sequences, "a to b" with a < b
    perplexity: dict[str, Float[Array, ""]]  # exp(entropy) of the batch's winning codewords
    unused_share: dict[str, Float[Array, ""]]  # of codewords that won nothing in this batch
    row_error: dict[str, Float[Array, ""]]  # total L1 distance of the plan's marginals
    column_error: dict[str, Float[Array, ""]]
    dropped: dict[str, Int[Array, ""]]  # rows or steps that were not finite


@_anywhere
def codebook_alignment(
    student: Features,
    codes: Float[Array, "codes dim"],
    *,
    teacher: Features | None = None,
    valid: Masks | None = None,
    assign: Assign | None = None,
    order: ordering.Order | None = None,
    temperature: float = 0.1,
) -> tuple[Float[Array, ""], CodebookAux]:
    """Modalities meet in a codebook: the teacher's features of each choose codewords, and the
    students of the others predict them.

    With z and z' the features, c the codewords, q the teacher's soft codes (`assign`) and p =
    softmax(z . c / temperature), of M modalities:

        loss = 2/M sum_a mean q_a . (1 - z'_a . c) - 2/(M (M - 1)) sum_{a != b} mean q_b . log p_a

    Args:
        student: two or more named modalities, [batch, dim] each, or sequences [batch, steps, dim].
            Scaled to length one inside.
        codes: codewords; scaled to length one inside.
        teacher: features like the student's; they get no gradient. None: the student's own.
        valid: which rows or steps are there; None, or a name left out: all.
        assign: `sinkhorn()` by default; also `swav`, `ipot`, `unbalanced`, `nearest`, `softmax`.
        order: of sequences, how their steps are aligned; None aligns them as a bag.
        temperature: of p.

    Returns:
        The loss and `CodebookAux`. The loss is NaN if a codeword is not finite.

    Raises:
        ValueError: names or shapes do not fit together.

    Source: Duan et al. 2022, 3.1; temperature as SwAV's (Caron et al. 2020).

    >>> z = {"audio": jnp.eye(4), "text": jnp.eye(4)}
    >>> loss, aux = codebook_alignment(z, jnp.eye(4))
    >>> print(f"{loss:.4f}", aux.perplexity["text"])
    0.0003 4.0
    """
    _check(student, teacher, valid)
    _check_codes(student, codes)
    names, sequences = sorted(student), next(iter(student.values())).ndim == 3
    require(sequences or order is None, "order is for sequences, but features are [batch, dim]")
    _positive("temperature", temperature)
    student, teacher, here, dropped = _usable(student, teacher, valid)
    finite = jnp.all(jnp.isfinite(codes))
    codes = unit(codes)
    plans = {name: _plan(teacher[name], codes, assign or sinkhorn(), here[name]) for name in names}
    assignment = {
        name: codebook.soft_codes(plan, len(plan)).reshape(*here[name].shape, -1)
        for name, plan in plans.items()
    }
    targets, alignments = None, {}
    if sequences:
        targets, alignments = _carried(teacher, assignment, here, order)
    losses = codebook.code_losses(
        student, teacher, codes, assignment, temperature=temperature, targets=targets
    )
    rows = {pair: here[pair[0]] & (here[pair[1]] if targets is None else targets[pair].any(-1))
            for pair in losses.predicted}  # fmt: skip
    transport = {name: _by_sample(losses.transport[name], here[name]) for name in names}
    predicted = {p: _by_sample(each, rows[p]) for p, each in losses.predicted.items()}
    scale_one, scale_two = 2 / len(names), 2 / len(losses.predicted)
    per_sample = scale_one * sum(each for each, _ in transport.values())
    per_sample += scale_two * sum(each for each, _ in predicted.values())
    transport = {name: _mean(*each) for name, each in transport.items()}
    predicted = {" to ".join(pair): _mean(*each) for pair, each in predicted.items()}
    loss = scale_one * sum(transport.values()) + scale_two * sum(predicted.values())
    used = {name: _usage(assignment[name], here[name]) for name in names}
    return jnp.where(finite, loss, jnp.nan), CodebookAux(
        per_sample=per_sample,
        transport=transport,
        predicted=predicted,
        assignments=assignment,
        alignments=alignments,
        perplexity={name: found for name, (found, _) in used.items()},
        unused_share={name: found for name, (_, found) in used.items()},
        row_error={name: row_error(plans[name], here[name].ravel()) for name in names},
        column_error={name: column_error(plans[name]) for name in names},
        dropped=dropped,
    )


@flax.struct.dataclass
class InstanceAux:
    """What `instance_alignment` computed on its way."""

    per_sample: Float[Array, " batch"]  # their mean is the loss if nothing was left out
    directions: dict[str, Float[Array, ""]]  # "a to b": a's students find teachers of b
    dropped: dict[str, Int[Array, ""]]  # rows that were not finite


@_anywhere
def instance_alignment(
    student: Features,
    teacher: Features | None = None,
    *,
    queue: Queue | None = None,
    ids: Int[Array, " batch"] | None = None,
    temperature: Float[Array, ""] | float = 0.07,
    alpha: Float[Array, ""] | float = 0.0,
    intra_weight: float = 1.0,
    same: str = "ignore",
) -> tuple[Float[Array, ""], InstanceAux]:
    """Every sample finds itself among the teacher features of the batch and the queue.

    The mean of cross-entropies over all directions between M modalities, and within each of them
    with `intra_weight` (0: between them alone, as CLIP's and ALBEF's).

    Args:
        student: two or more named modalities, [batch, dim] each; scaled to length one inside.
        teacher: features like the student's; they get no gradient. None: the student's own, and
            then `intra_weight` must be 0, since a feature finds itself.
        queue: earlier teacher features, more candidates.
        ids: rows with one id match each other; None: all differ.
        temperature: of the softmax; may be learned.
        alpha: share of the teacher's own softmax in the target.
        intra_weight: of the directions within a modality.
        same: "ignore" leaves other rows with the query's id out; "negative" keeps them (ALBEF).

    Returns:
        The loss and `InstanceAux`.

    Raises:
        ValueError: names or shapes do not fit together.

    Source: Duan et al. 2022, 3.2; Li et al. 2021, 3.2 and 3.3.

    >>> z = {"audio": jnp.eye(4), "text": jnp.eye(4)}
    >>> loss, _ = instance_alignment(z, z, temperature=0.1)
    >>> print(f"{loss:.4f}")
    0.0001
    """
    _check(student, teacher, None)
    shape = next(iter(student.values())).shape
    require(len(shape) == 2, f"features of shape {shape} cannot be compared: give [batch, dim]")
    _positive("temperature", temperature)
    require(
        teacher is not None or intra_weight == 0,
        f"intra_weight={intra_weight} needs a teacher: without one, a feature finds itself; give 0",
    )
    require(
        ids is None or ids.shape == shape[:1],
        f"ids are {getattr(ids, 'shape', ())}, not {shape[:1]}",
    )
    if queue is not None:
        kept = {name: each.shape for name, each in queue.features.items()}
        fits = sorted(kept) == sorted(student) and all(s[1:] == shape[1:] for s in kept.values())
        require(fits, f"a queue of {kept} does not go with features of {_shapes(student)}")
        kept = {name: unit(each) for name, each in queue.features.items()}
        queue = dataclasses.replace(queue, features=kept)
    student, teacher, here, dropped = _usable(student, teacher, None)
    found = alignment.cross_entropies(
        student,
        teacher,
        queue,
        jnp.arange(shape[0]) if ids is None else ids,
        temperature=temperature,
        alpha=alpha,
        same=same,
        valid=here,
    )
    names = sorted(student)
    rows = jnp.stack([here[name] for name in names], axis=1)  # [batch, modalities]
    both = rows.T[:, :, None] & rows[None]
    found = jnp.where(both, found, 0)
    weights = alignment.direction_weights(len(names), intra_weight, found.dtype)
    by_direction = found.sum(axis=1) / jnp.maximum(both.sum(axis=1), 1)
    directions = {
        f"{a} to {b}": by_direction[i, j] for i, a in enumerate(names) for j, b in enumerate(names)
    }
    per_sample = jnp.einsum("abm,am->b", found, weights) / weights.sum()
    loss = jnp.sum(by_direction * weights) / weights.sum()
    return loss, InstanceAux(per_sample, directions, dropped)


def _plan(
    features: Float[Array, "batch *steps dim"],
    codes: Float[Array, "codes dim"],
    assign: Assign,
    here: Bool[Array, " batch *steps"],
) -> Float[Array, "rows codes"]:
    """The plan of all rows or steps of the batch together."""
    rows = features.reshape(-1, features.shape[-1])
    return make_plan(codeword_costs(rows, codes), assign, valid=here.ravel())


def _carried(
    teacher: Features, assignment: Features, here: Masks, order: ordering.Order | None
) -> tuple[dict[tuple[str, str], Array], dict[str, Array]]:
    """What each modality's steps predict of another's, carried over their alignment; and that."""
    targets, alignments = {}, {}
    for a, b in itertools.combinations(sorted(teacher), 2):
        cost = 1 - jnp.einsum("bnd,bmd->bnm", teacher[a], teacher[b], precision="highest")
        plan = ordering.align_steps(cost, order, here[a], here[b])
        alignments[f"{a} to {b}"] = plan
        targets[b, a] = ordering.carry(plan, assignment[a])
        targets[a, b] = ordering.carry(jnp.swapaxes(plan, 1, 2), assignment[b])
    return targets, alignments


def _by_sample(
    values: Float[Array, " batch *steps"], here: Bool[Array, " batch *steps"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """The mean over the steps of each sample, 0 without any; which samples have some."""
    values = jnp.where(here, values, 0)
    if values.ndim == 1:
        return values, here
    return values.sum(axis=1) / jnp.maximum(here.sum(axis=1), 1), here.any(axis=1)


def _mean(values: Float[Array, " batch"], here: Bool[Array, " batch"]) -> Float[Array, ""]:
    return values.sum() / jnp.maximum(here.sum(), 1)


def _usage(
    assignment: Float[Array, "batch *steps codes"], here: Bool[Array, " batch *steps"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    winners = jnp.where(here, jnp.argmax(assignment, axis=-1), -1).reshape(1, -1)
    perplexity, unused = codebook.perplexity_and_unused(winners, assignment.shape[-1])
    return perplexity[0], unused[0]


def _usable(
    student: Features, teacher: Features | None, valid: Masks | None
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Unit features with zeros in place of rows that are not finite; which rows count; how many
    that are there do not.
    """
    given = dict(student) if teacher is None else teacher
    learned, fixed, here, dropped = {}, {}, {}, {}
    for name, features in student.items():
        there = (valid or {}).get(name, jnp.ones(features.shape[:-1], bool))
        finite = jnp.isfinite(features).all(-1) & jnp.isfinite(given[name]).all(-1)
        here[name], dropped[name] = there & finite, jnp.sum(there & ~finite)
        learned[name], fixed[name] = (
            unit(jnp.where(here[name][..., None], x, 0)) for x in (features, given[name])
        )
    return learned, jax.lax.stop_gradient(fixed), here, dropped


def _check(student: Features, teacher: Features | None, valid: Masks | None) -> None:
    """Raises ValueError, with both shapes or names, if these do not belong together."""
    for what, given in (("student", student), ("teacher", teacher), ("valid", valid)):
        require(
            given is None or isinstance(given, Mapping),
            f"{what} must map names of modalities to arrays, but is a {type(given).__name__}",
        )
    require(
        len(student) >= 2, f"student has the modalities {sorted(student)}: two or more are needed"
    )
    for name, features in student.items():
        require(
            features.ndim in (2, 3) and 0 not in features.shape,
            f"student[{name!r}] is {features.shape}: [batch, dim] or [batch, steps, dim], at least "
            "one of each, is needed",
        )
    first, *others = student
    for name in others:
        one, other = student[first].shape, student[name].shape
        require(
            (one[0], one[-1], len(one)) == (other[0], other[-1], len(other)),
            f"student[{first!r}] is {one} but student[{name!r}] is {other}: batch, dim and number "
            "of axes must be equal",
        )
    if teacher is not None:
        require(
            _shapes(teacher) == _shapes(student),
            f"teacher is {_shapes(teacher)} but student {_shapes(student)}: they must be equal",
        )
    for name, mask in (valid or {}).items():
        require(
            name in student, f"valid[{name!r}] is of no modality of the student: {sorted(student)}"
        )
        shape = student[name].shape[:-1]
        require(
            mask.shape == shape,
            f"valid[{name!r}] is {mask.shape}, not {shape} as student[{name!r}]",
        )


def _check_codes(student: Features, codes: Float[Array, "codes dim"]) -> None:
    name, features = next(iter(student.items()))
    require(
        codes.ndim == 2 and codes.shape[1] == features.shape[-1] and len(codes) >= 1,
        f"codes are {codes.shape} but student[{name!r}] is {features.shape}: [codes, dim] with the "
        "same dim is needed",
    )


def _shapes(features: Mapping[str, Shaped[Array, "..."]]) -> dict[str, tuple[int, ...]]:
    return {name: features[name].shape for name in sorted(features)}


def _positive(name: str, value: Float[Array, ""] | float) -> None:
    if not isinstance(value, jax.core.Tracer):
        require(float(value) > 0, f"{name}={value} must be above 0")
