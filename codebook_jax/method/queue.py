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
    """The newest teacher features of named modalities, a ring; only `enqueue` makes a new one.

    `empty_queue` makes the first. A pytree, which may be part of a train state.

    >>> queue = empty_queue(("text",), size=2, dim=1)
    >>> queue = enqueue(queue, {"text": jnp.ones((1, 1))})
    >>> print(queue.valid, queue.cursor)
    [ True False] 1
    """

    features: dict[str, Float[Array, "queue dim"]]
    cursor: Int[Array, ""]  # where the next feature goes
    filled: Int[Array, ""]  # how many are filled
    ids: Int[Array, " queue"] | None = None  # of the samples, if it remembers them

    @property
    def valid(self) -> Bool[Array, " queue"]:
        """Which places already hold a feature."""
        size = next(iter(self.features.values())).shape[0]
        return jnp.arange(size, dtype=jnp.int32) < self.filled

    def tree_flatten_with_keys(self) -> tuple[list[tuple[object, object]], tuple[str, ...]]:
        """The arrays by name, as checkpoints call them."""
        names = tuple(sorted(self.features))
        arrays = [*((name, self.features[name]) for name in names)]
        arrays += [("cursor", self.cursor), ("filled", self.filled), ("ids", self.ids)]
        return [(jax.tree_util.GetAttrKey(name), array) for name, array in arrays], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: Sequence[Array]) -> Queue:
        """A queue of these arrays."""
        *features, cursor, filled, ids = arrays
        return cls(dict(zip(names, features, strict=True)), cursor, filled, ids)


def empty_queue(names: Sequence[str], *, size: int, dim: int, with_ids: bool = False) -> Queue:
    """A queue of the newest `size` features of each modality, in which nothing is valid yet.

    `with_ids`, it remembers whose features they are, so that `instance_alignment` can leave out the
    query's own. Raises ValueError unless `size` is at least 1. Source: MoCo (He et al. 2020, 3.2).
    Departure: MoCo's and ALBEF's start from random features.

    >>> queue = empty_queue(("audio", "text"), size=4, dim=2)
    >>> three = jnp.ones((3, 2))
    >>> queue = enqueue(queue, {"audio": three, "text": three})
    >>> queue.valid
    Array([ True,  True,  True, False], dtype=bool)
    """
    require(size >= 1, f"size={size} must be 1 or more")
    features = {name: jnp.zeros((size, dim), jnp.float32) for name in names}
    ids = jnp.full(size, -1, jnp.int32) if with_ids else None  # of no sample
    return Queue(features, jnp.int32(0), jnp.int32(0), ids)


def enqueue(
    queue: Queue,
    features: Mapping[str, Float[Array, "batch dim"]],
    ids: Int[Array, " batch"] | None = None,
) -> Queue:
    """The queue with a batch of features in place of its oldest; `ids` are of its samples.

    Raises ValueError if the features' names are not the queue's, they are more than it holds, or
    the ids are missing in a queue that remembers them.
    Source: MoCo (He et al. 2020, 3.2); Li et al. 2021, 3.2.

    >>> queue = empty_queue(("text",), size=2, dim=1)
    >>> for value in (1.0, 2.0, 3.0):
    ...     queue = enqueue(queue, {"text": jnp.full((1, 1), value)})
    >>> print(queue.features["text"].ravel())
    [3. 2.]
    """
    require(
        sorted(features) == sorted(queue.features),
        f"features of {sorted(features)} do not go into a queue of {sorted(queue.features)}",
    )
    require_ids(queue, ids)
    size, batch = (len(next(iter(some.values()))) for some in (queue.features, features))
    require(batch <= size, f"a batch of {batch} features is more than the queue holds, {size}")
    places = (queue.cursor + jnp.arange(batch, dtype=jnp.int32)) % size
    put = lambda ring, new: ring.at[places].set(new.astype(ring.dtype), unique_indices=True)  # noqa: E731
    return Queue(
        {name: put(ring, features[name]) for name, ring in queue.features.items()},
        (queue.cursor + batch) % size,
        jnp.minimum(queue.filled + batch, size),
        None if queue.ids is None else put(queue.ids, ids),
    )


def require_ids(queue: Queue, ids: Int[Array, " batch"] | None) -> None:
    """Raises ValueError if the queue remembers ids and a batch has none."""
    require(
        queue.ids is None or ids is not None,
        "the queue remembers the ids of samples (with_ids): give the ids of the batch",
    )


def newest(
    queue: Queue, count: int
) -> tuple[dict[str, Float[Array, "count dim"]], Bool[Array, " count"]]:
    """The `count` newest features, newest first, and which of them exist already.

    `count` is at most the queue's size. Source: SwAV, "Working with small batches" (Caron et al.
    2020, 3.1).

    >>> queue = empty_queue(("text",), size=4, dim=1)
    >>> queue = enqueue(queue, {"text": jnp.array([[1.0], [2.0]])})
    >>> features, here = newest(queue, 3)
    >>> print(features["text"].ravel(), here)
    [2. 1. 0.] [ True  True False]
    """
    back = jnp.arange(count, dtype=jnp.int32)
    places = (queue.cursor - 1 - back) % len(queue.valid)
    return {name: ring[places] for name, ring in queue.features.items()}, back < queue.filled
