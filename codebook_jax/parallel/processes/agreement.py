"""What all processes must agree on in every step: whether one was asked to stop, and how much was
unreadable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from codebook_jax.data.batch import Batch
from codebook_jax.parallel import sharding


class Tally(NamedTuple):
    """Totals of a step over all processes; still on the device."""

    stop: Any  # bool: a process was asked to stop before this step began there
    unreadable: Any  # pictures that were replaced in its batch


class Agreement:
    """Sums over the processes that do not wait for the previous step; all processes read the same
    sums of a step.

    A process asked to stop may be a step ahead of another, so all go by the first step whose tally
    says so. A single process agrees with itself at once, without a device.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.alone = jax.process_count() == 1
        if self.alone:
            return
        self._mesh = mesh
        whole = NamedSharding(mesh, P())
        tally = lambda stop, skipped: Tally(stop.any(), skipped.sum())  # noqa: E731
        self._tally = jax.jit(tally, out_shardings=whole)
        self._any = jax.jit(lambda stop: stop.any(), out_shardings=whole)

    def tally(self, stop: bool, own: Batch, placed: Batch) -> Tally:
        """The tally of a step, from this process's rows of the batch and the batch placed on the
        devices.
        """
        if self.alone:
            return Tally(stop, int(np.sum(own.skipped)))
        return self._tally(self._flags(stop), placed.skipped)

    def any(self, stop: bool) -> bool:
        """Whether `stop` is true on any process; waits for all of them."""
        return stop if self.alone else bool(self._any(self._flags(stop)))

    def _flags(self, stop: bool) -> jax.Array:
        """This process's flag, in the places of its own devices."""
        return sharding.to_device(np.full(sharding.data_shards(self._mesh), stop), self._mesh)
