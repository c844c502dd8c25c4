"""The newest teacher features of every modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codebook_jax.method.numerics import require


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Queue:
    """The newest teacher features of named modalities, a ring; only `enqueue` makes a new one."""

    features: dict[str, Float[Array, "queue dim"]]
    cursor: Int[Array, ""]  # where the next feature goes
    filled: Int[Array, ""]  # how many are filled

    @property
    def valid(self) -> Bool[Array, " queue"]:
        """Which places already hold a feature."""
        size = next(iter(self.features.values())).shape[0]
        return jnp.arange(size, dtype=jnp.int32) < self.filled

    def tree_flatten_with_keys(self) -> tuple[list[tuple[object, object]], tuple[str, ...]]:
        """The arrays by name, as checkpoints call them."""
        names = tuple(sorted(self.features))
        arrays = [*((name, self.features[name]) for name in names)]
        arrays += [("cursor", self.cursor), ("filled", self.filled)]
        return [(jax.tree_util.GetAttrKey(name), array) for name, array in arrays], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: Sequence[Array]) -> Queue:
        """A queue of these arrays."""
        *features, cursor, filled = arrays
        return cls(dict(zip(names, features, strict=True)), cursor, filled)


def empty_queue(names: Sequence[str], *, size: int, dim: int) -> Queue:
    """A queue of the newest `size` features of each modality, in which nothing is valid yet.

    MoCo's and ALBEF's start from random features.

    >>> queue = empty_queue(("audio", "text"), size=4, dim=2)
    >>> queue = enqueue(queue, {"audio": jnp.ones((3, 2)), "text": jnp.zeros((3, 2))})
    >>> queue.valid
    Array([ True,  True,  True, False], dtype=bool)
    """
    require(size >= 1, f"size={size} must be 1 or more")
    return Queue(
        {name: jnp.zeros((size, dim), jnp.float32) for name in names}, jnp.int32(0), jnp.int32(0)
    )


def enqueue(queue: Queue, features: Mapping[str, Float[Array, "batch dim"]]) -> Queue:
    """The queue with a batch of features in place of its oldest; at most as many as it holds."""
    require(
        sorted(features) == sorted(queue.features),
        f"features of {sorted(features)} do not go into a queue of {sorted(queue.features)}",
    )
    size, batch = (len(next(iter(some.values()))) for some in (queue.features, features))
    require(batch <= size, f"a batch of {batch} features is more than the queue holds, {size}")
    places = (queue.cursor + jnp.arange(batch, dtype=jnp.int32)) % size
    put = lambda ring, new: ring.at[places].set(new.astype(ring.dtype), unique_indices=True)  # noqa: E731
    return Queue(
        {name: put(ring, features[name]) for name, ring in queue.features.items()},
        (queue.cursor + batch) % size,
        jnp.minimum(queue.filled + batch, size),
    )


def newest(
    queue: Queue, count: int
) -> tuple[dict[str, Float[Array, "count dim"]], Bool[Array, " count"]]:
    """The `count` newest features, and which of them exist already."""
    back = jnp.arange(count, dtype=jnp.int32)
    places = (queue.cursor - 1 - back) % len(queue.valid)
    return {name: ring[places] for name, ring in queue.features.items()}, back < queue.filled
