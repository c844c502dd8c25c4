"""How much memory a device has for a run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from codebook_jax.parallel.processes import peers


def device_memory() -> int | None:
    """Bytes that this run can use on a device, the smallest over all processes; None if unknown.

    On a CPU: the host's free memory, divided among its devices.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        free = _host_memory()
        found = None if free is None else free // jax.local_device_count()
    else:
        found = (device.memory_stats() or {}).get("bytes_limit")
    everyone = peers.connected().exchange("memory", found)  # all must reach the same answer
    return min((each for each in everyone if each is not None), default=None)


def _host_memory() -> int | None:
    """Free memory of the host, or what its container may still use if that is less."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(
            1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        )
    with contextlib.suppress(OSError, ValueError):  # "max" if there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(
            limit - int((group / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
        )
    return max(min(found), 0) if found else None
