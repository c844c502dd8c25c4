"""What processes agree on in every step: whether to stop, and how much was unreadable."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from codebook_jax.data.batch import Batch
from codebook_jax.parallel import sharding


class Tally(NamedTuple):
    """Totals of a step over all processes; still on the device."""

    stop: Bool[jax.Array, ""] | bool  # a process was asked to stop before this step began there
    unreadable: Int[jax.Array, ""] | int  # pictures that were replaced in its batch


class Agreement:
    """Sums over the processes that no step waits for; all go by the first tally that says stop."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.alone, self._mesh = jax.process_count() == 1, mesh

    def tally(self, stop: bool, own: Batch, placed: Batch) -> Tally:
        """The tally of a step; `own` are this process's rows of the batch that is `placed`."""
        if self.alone:
            return Tally(stop, int(np.sum(own.skipped)))
        return _sums(self._flags(stop), placed.skipped, self._mesh)

    def any(self, stop: bool) -> bool:
        """Whether `stop` is true on any process; waits for all of them."""
        if self.alone:
            return stop
        flags = self._flags(stop)
        return bool(_sums(flags, flags, self._mesh).stop)

    def _flags(self, stop: bool) -> Bool[jax.Array, "shards"]:
        """This process's flag, in the places of its own devices."""
        return sharding.to_device(np.full(sharding.data_shards(self._mesh), stop), self._mesh)


@functools.partial(jax.jit, static_argnums=2)
def _sums(stop: jax.Array, skipped: jax.Array, mesh: jax.sharding.Mesh) -> Tally:
    return sharding.whole(Tally(stop.any(), skipped.sum()), mesh)
