"""The two alignment losses for any model: named modalities in, a loss and what it was made of out.

Pure functions under the caller's own jit, vmap, grad and sharding; float32 inside whatever comes in
(float64 stays). A row that is not finite drops out alone and is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebook_jax.method import alignment, codebook, ordering
from codebook_jax.method.assignment import (
    Assign,
    codeword_costs,
    column_error,
    make_plan,
    row_error,
    sinkhorn,
)
from codebook_jax.method.checks import (
    Features,
    Masks,
    check_candidates,
    check_codes,
    check_features,
    check_positive,
)
from codebook_jax.method.numerics import require, unit_of_any
from codebook_jax.method.queue import Queue


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


class _Usable(NamedTuple):
    """Features of length one, zeros in place of rows that do not count."""

    student: dict[str, Float[Array, "batch *steps dim"]]
    teacher: dict[str, Float[Array, "batch *steps dim"]]
    here: dict[str, Bool[Array, " batch *steps"]]  # which rows count
    dropped: dict[str, Int[Array, ""]]  # how many that are there do not, since they are not finite


@flax.struct.dataclass
class CodebookAux:
    """What `codebook_alignment` computed on its way, by modality or by pair "a to b".

    `loss, aux = codebook_alignment(...)`; under `jax.grad`, pass `has_aux=True`.
    """

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

        loss = 2/M sum_a mean q_a . (1 - z'_a . c)
             - 2/(M (M - 1)) sum_{a != b} mean q_b . log p_a

    Of sequences, step i of a predicts sum_j A_ij q_b,j, scaled to sum 1, with A of `align_steps`.

    Args:
        student: two or more named modalities, [batch, dim] each, or sequences [batch, steps, dim].
            Scaled to length one inside.
        codes: codewords; scaled to length one inside.
        teacher: features like the student's; they get no gradient. None: the student's own.
        valid: which rows or steps are there; None, or a name left out: all.
        assign: `sinkhorn()` by default; also `swav`, `ipot`, `unbalanced`, `nearest`, `softmax`.
        order: of sequences, how their steps are aligned; None aligns them as a bag.
        temperature: of p; above 0.

    Returns:
        The loss and `CodebookAux`. The loss is NaN if a codeword is not finite.

    Raises:
        ValueError: names or shapes do not fit together, or a number is out of range.

    Source: Duan et al. 2022, 3.1; temperature as SwAV's (Caron et al. 2020, 3.1); `order`: ours.

    >>> z = {"audio": jnp.eye(4), "text": jnp.eye(4)}
    >>> loss, aux = codebook_alignment(z, jnp.eye(4))
    >>> print(f"{loss:.4f}", aux.perplexity["text"])
    0.0003 4.0
    """
    check_features(student, teacher, valid)
    check_codes(student, codes)
    sequences = next(iter(student.values())).ndim == 3
    require(sequences or order is None, "order is for sequences, but features are [batch, dim]")
    check_positive("temperature", temperature)
    usable = _usable(student, teacher, valid)
    loss, aux = _codebook_alignment(
        usable, unit_of_any(codes), assign or sinkhorn(), order, temperature
    )
    return jnp.where(jnp.all(jnp.isfinite(codes)), loss, jnp.nan), aux


def _codebook_alignment(
    usable: _Usable,
    codes: Float[Array, "codes dim"],
    assign: Assign,
    order: ordering.Order | None,
    temperature: float,
) -> tuple[Float[Array, ""], CodebookAux]:
    student, teacher, here, dropped = usable
    names, sequences = sorted(student), next(iter(student.values())).ndim == 3
    plans = {name: _plan(teacher[name], codes, assign, here[name]) for name in names}
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
    return loss, CodebookAux(
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
    """What `instance_alignment` computed on its way, for `jax.grad` with `has_aux=True`."""

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

    With z and z' the features, A_b the z'_b of batch and queue, w_ab = 1 and w_aa = `intra_weight`:

        loss = - sum_ab w_ab mean y_ab . log softmax(z_a . A_b / temperature)
               / sum_ab w_ab
        y_ab = (1 - alpha) onehot(own) + alpha softmax(z'_a . A_b / temperature)

    Args:
        student: two or more named modalities, [batch, dim] each; scaled to length one inside.
        teacher: features like the student's; they get no gradient. None: the student's own, which
            learn as candidates too; then `intra_weight` must be 0, since a feature finds itself.
        queue: earlier teacher features, more candidates.
        ids: rows with one id match each other; None: all differ.
        temperature: above 0; may be learned.
        alpha: from 0 to 1, the share of the teacher's own softmax in the target; no gradient.
        intra_weight: of the directions within a modality; 0: CLIP's and ALBEF's.
        same: "ignore" leaves out other rows with the query's id, also of a queue with ids;
            "negative" keeps them (ALBEF's pre-training), "positive" shares the target among them
            and the row (ALBEF's fine-tuning).

    Returns:
        The loss and `InstanceAux`.

    Raises:
        ValueError: names or shapes do not fit together, or an option is out of range.

    Source: Duan et al. 2022, 3.2; Li et al. 2021, 3.2 and 3.3.

    >>> z = {"audio": jnp.eye(4), "text": jnp.eye(4)}
    >>> loss, _ = instance_alignment(z, z, temperature=0.1)
    >>> print(f"{loss:.4f}")
    0.0001
    """
    check_features(student, teacher, None)
    check_candidates(student, teacher, queue, ids, intra_weight)
    check_positive("temperature", temperature)
    if queue is not None:
        kept = {name: unit_of_any(each) for name, each in queue.features.items()}
        queue = dataclasses.replace(queue, features=kept)
    usable = _usable(student, teacher, None)
    taught = None if teacher is None else usable.teacher
    if ids is None:
        ids = jnp.arange(len(next(iter(student.values()))), dtype=jnp.int32)
    options = dict(temperature=temperature, alpha=alpha, same=same, valid=usable.here)
    found = alignment.cross_entropies(usable.student, taught, queue, ids, **options)
    loss, per_sample, directions = _mean_of_directions(found, usable.here, intra_weight)
    return loss, InstanceAux(per_sample, directions, usable.dropped)


def _mean_of_directions(
    found: Float[Array, "modalities batch modalities"], here: Masks, intra_weight: float
) -> tuple[Float[Array, ""], Float[Array, " batch"], dict[str, Float[Array, ""]]]:
    """The weighted mean of cross-entropies of usable rows, of each sample, of each direction."""
    names = sorted(here)
    rows = jnp.stack([here[name] for name in names], axis=1)  # [batch, modalities]
    both = rows.T[:, :, None] & rows[None]
    found = jnp.where(both, found, 0)
    by_direction = found.sum(axis=1) / jnp.maximum(both.sum(axis=1), 1)
    directions = {
        f"{a} to {b}": by_direction[i, j] for i, a in enumerate(names) for j, b in enumerate(names)
    }
    mean = functools.partial(alignment.mean_of_directions, intra_weight=intra_weight)
    return mean(by_direction), jax.vmap(mean, in_axes=1)(found), directions


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
        cost = 1 - ordering.cosines(teacher[a], teacher[b])
        plan = ordering.align_steps(cost, order, here[a], here[b])
        alignments[f"{a} to {b}"] = plan
        targets[b, a] = ordering.carry(plan, assignment[a])
        targets[a, b] = ordering.carry(jnp.swapaxes(plan, 1, 2), assignment[b])
        if order is not None and order.slack < 1:  # steps count by how much of them is matched
            targets[b, a] *= ordering.matched(plan, 1)[:, :, None]
            targets[a, b] *= ordering.matched(plan, 2)[:, :, None]
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


def _usable(student: Features, teacher: Features | None, valid: Masks | None) -> _Usable:
    given = dict(student) if teacher is None else teacher
    learned, fixed, here, dropped = {}, {}, {}, {}
    for name, features in student.items():
        there = (valid or {}).get(name, jnp.ones(features.shape[:-1], bool))
        finite = jnp.isfinite(features).all(-1) & jnp.isfinite(given[name]).all(-1)
        there = jnp.asarray(there).astype(bool)
        here[name], dropped[name] = there & finite, jnp.sum(there & ~finite)
        learned[name], fixed[name] = (
            unit_of_any(jnp.where(here[name][..., None], x, 0)) for x in (features, given[name])
        )
    return _Usable(learned, jax.lax.stop_gradient(fixed), here, dropped)
