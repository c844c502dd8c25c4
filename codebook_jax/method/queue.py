"""The newest teacher features of both modalities."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codebook_jax.method.pair import Pair


@flax.struct.dataclass
class Queue:
    """The newest teacher features of both modalities, a ring; only `enqueue` changes it."""

    image: Float[Array, "queue dim"]
    text: Float[Array, "queue dim"]
    cursor: Int[Array, ""]  # where the next feature goes
    filled: Int[Array, ""]  # how many are filled

    @property
    def features(self) -> Pair:
        return Pair(self.image, self.text)

    @property
    def valid(self) -> Bool[Array, " queue"]:
        """Which places already hold a feature."""
        return jnp.arange(self.image.shape[0], dtype=jnp.int32) < self.filled


def empty_queue(size: int, dim: int) -> Queue:
    """A queue in which nothing is valid; MoCo's and ALBEF's start from random features."""
    zeros = jnp.zeros((size, dim), jnp.float32)
    return Queue(zeros, zeros.copy(), jnp.int32(0), jnp.int32(0))


def enqueue(queue: Queue, features: Pair) -> Queue:
    """The queue with a batch of features in place of its oldest; any size is allowed."""
    size, batch = queue.image.shape[0], features.image.shape[0]
    places = (queue.cursor + jnp.arange(batch, dtype=jnp.int32)) % size
    put = lambda ring, new: ring.at[places].set(new.astype(ring.dtype), unique_indices=True)  # noqa: E731
    return Queue(
        put(queue.image, features.image),
        put(queue.text, features.text),
        (queue.cursor + batch) % size,
        jnp.minimum(queue.filled + batch, size),
    )


def newest(queue: Queue, count: int) -> tuple[Pair, Bool[Array, " count"]]:
    """The `count` newest features, and which of them exist already."""
    back = jnp.arange(count, dtype=jnp.int32)
    places = (queue.cursor - 1 - back) % queue.image.shape[0]
    return Pair(queue.image[places], queue.text[places]), back < queue.filled
