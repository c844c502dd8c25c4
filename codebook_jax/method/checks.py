"""What features, masks, codewords and queues must have in common: one sentence if they do not."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from codebook_jax.method.numerics import require
from codebook_jax.method.queue import Queue, require_ids

Features = Mapping[str, Float[Array, "batch *steps dim"]]
Masks = Mapping[str, Bool[Array, " batch *steps"]]


def check_candidates(
    student: Features,
    teacher: Features | None,
    queue: Queue | None,
    ids: Int[Array, " batch"] | None,
    intra_weight: float,
) -> None:
    """Raises ValueError if samples cannot be compared with these candidates."""
    shape = next(iter(student.values())).shape
    require(len(shape) == 2, f"features of shape {shape} cannot be compared: give [batch, dim]")
    require(
        teacher is not None or intra_weight == 0,
        f"intra_weight={intra_weight} needs a teacher: without one, a feature finds itself; give 0",
    )
    given = getattr(ids, "shape", ())
    require(ids is None or given == shape[:1], f"ids are {given}, not {shape[:1]}")
    if queue is not None:
        require_ids(queue, ids)
        kept = {name: each.shape for name, each in queue.features.items()}
        fits = sorted(kept) == sorted(student) and all(s[1:] == shape[1:] for s in kept.values())
        require(fits, f"a queue of {kept} does not go with features of {_shapes(student)}")


def check_features(student: Features, teacher: Features | None, valid: Masks | None) -> None:
    """Raises ValueError, with both shapes or names, if these do not belong together."""
    for what, given in (("student", student), ("teacher", teacher), ("valid", valid)):
        require(
            given is None or isinstance(given, Mapping),
            f"{what} must map names of modalities to arrays, but is a {type(given).__name__}",
        )
        for name, array in (given or {}).items():
            check_array(f"{what}[{name!r}]", array)
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


def check_codes(student: Features, codes: Float[Array, "codes dim"]) -> None:
    check_array("codes", codes)
    name, features = next(iter(student.items()))
    require(
        codes.ndim == 2 and codes.shape[1] == features.shape[-1] and len(codes) >= 1,
        f"codes are {codes.shape} but student[{name!r}] is {features.shape}: [codes, dim] with the "
        "same dim is needed",
    )


def _shapes(features: Mapping[str, Shaped[Array, "..."]]) -> dict[str, tuple[int, ...]]:
    return {name: features[name].shape for name in sorted(features)}


def check_array(name: str, value: object) -> None:
    require(
        hasattr(value, "shape") and hasattr(value, "dtype"),
        f"{name} must be an array, but is a {type(value).__name__}",
    )


def check_positive(name: str, value: Float[Array, ""] | float) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    kinds = int | float | np.number | np.ndarray | jax.Array
    scalar = isinstance(value, kinds) and np.ndim(value) == 0
    require(scalar and value > 0, f"{name}={value!r} must be a number above 0")
