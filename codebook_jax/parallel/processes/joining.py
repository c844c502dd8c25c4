"""How this process finds the others of its run: from flags, JAX's variables, Open MPI, SLURM,
Kubernetes or a Cloud TPU.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from typing import NamedTuple

from codebook_jax.errors import UserError

HEARTBEAT_S = 100  # of JAX's own watch, which ends a process by SIGABRT; peers.py notices earlier
SHUTDOWN_S = 60
# what JAX reads from Open MPI up to version 4; version 5 no longer sets it
ORTE_URI = "OMPI_MCA_orte_hnp_uri"
# JAX's time-out is later than ours by this, since it ends the process without saying who is missing
SLOWER_S = 60


class Joining(NamedTuple):
    """How a process joins; fields that are None are left to JAX's detection method `detection`."""

    way: str
    coordinator: str | None = None
    count: int | None = None
    own: int | None = None
    devices: tuple[int, ...] | None = (
        None  # local accelerators of this process; None: all, or JAX's choice
    )
    detection: str | None = "deactivate"


def find(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    count: int | None = None,
    own: int | None = None,
    on_a_tpu: bool = False,
    has_kubernetes: bool = False,
) -> Joining | None:
    """How to join, from the flags (`coordinator`, `count`, `own`) or the environment; None: this
    process is alone.

    Raises UserError if only part is given. A launcher's count and number are also used with a given
    `coordinator`.
    """
    given = _given(coordinator, count, own)
    if given is not None and None not in (count, own):
        return _checked(given)
    launched = _of_jax(environment) or _of_open_mpi(environment) or _of_slurm(environment)
    if given is not None and launched is None:
        raise UserError(
            f"--coordinator={coordinator} is given without --processes=N and --process=I, and no "
            "launcher (srun, mpirun) provides them: give all three"
        )
    if given is not None:
        launched = launched._replace(coordinator=coordinator, detection="deactivate")
    elif launched is not None and launched.detection == "ompi" and ORTE_URI not in environment:
        raise UserError(
            "this Open MPI does not name its first host: give --coordinator=HOST:PORT of process 0 "
            "too"
        )
    if launched is not None:
        return launched if launched.detection != "deactivate" else _checked(launched)
    if has_kubernetes and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return Joining("Kubernetes", detection="k8s")
    if on_a_tpu:
        return Joining("Cloud TPU", detection=None)
    return None


def on_a_tpu() -> bool:
    """Whether this machine has TPU chips and the library that drives them."""
    asked = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in asked and bool(chips) and importlib.util.find_spec("libtpu") is not None


def join(joining: Joining, *, timeout_s: int) -> bool:
    """Connects to the other processes; if that takes longer than `timeout_s`, says why and exits
    with 1.

    Returns False on a TPU machine whose environment names no others: this process is alone.
    """
    import jax

    def give_up() -> None:
        end(f"{_who(joining)} did not find the others in {timeout_s} s: {_why(joining)}", 1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            joining.coordinator,
            joining.count,
            joining.own,
            list(joining.devices) if joining.devices else None,
            cluster_detection_method=joining.detection,
            initialization_timeout=timeout_s + SLOWER_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if joining.detection is None and isinstance(error, ValueError):  # nothing was found
            return False
        raise UserError(
            f"{_who(joining)} could not join: {str(error).splitlines()[0]}; give "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    finally:
        timer.cancel()
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # JAX's handler would swallow it, since nothing here asks JAX
    return True


def describe(joining: Joining) -> str:
    """One line on this process and its devices, once it has joined."""
    import jax
    from jax._src import distributed

    mine, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {mine} "
        f"of {jax.device_count()} devices ({kind}), coordinator "
        f"{distributed.global_state.coordinator_address} ({joining.way})"
    )


def end(sentence: str, code: int) -> None:
    """Prints the sentence and exits at once: after a lost peer, a normal exit would wait for it."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _given(coordinator: str | None, count: int | None, own: int | None) -> Joining | None:
    if coordinator is None:
        if count is not None or own is not None:
            raise UserError("--processes and --process need --coordinator=HOST:PORT of process 0")
        return None
    return Joining("--coordinator", coordinator, count, own)


def _of_jax(environment: Mapping[str, str]) -> Joining | None:
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    if names[0] not in environment:
        return None
    try:
        count, own = int(environment[names[1]]), int(environment[names[2]])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{names[0]} is set, but {names[1]} and {names[2]} are not both numbers: set all "
            "three, or none"
        ) from error
    return Joining(names[0], environment[names[0]], count, own)


def _of_open_mpi(environment: Mapping[str, str]) -> Joining | None:
    count = int(environment.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count < 2:
        return None
    here = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    return Joining(
        "Open MPI",
        None,
        count,
        int(environment["OMPI_COMM_WORLD_RANK"]),
        _own_devices(environment, here, local),
        "ompi",
    )


def _of_slurm(environment: Mapping[str, str]) -> Joining | None:
    needed = "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"
    if any(name not in environment for name in needed) or int(environment["SLURM_NTASKS"]) < 2:
        return None  # sbatch and salloc without srun start one process
    node = int(environment.get("SLURM_NODEID", "0"))
    here = _tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), node)
    devices = _own_devices(environment, here, int(environment["SLURM_LOCALID"]))
    return Joining(
        "SLURM",
        None,
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_PROCID"]),
        devices,
        "slurm",
    )


def _own_devices(
    environment: Mapping[str, str], tasks_here: int, local: int
) -> tuple[int, ...] | None:
    """The GPUs of one of several tasks on a node: all of them if it is alone there, otherwise its
    own.

    If the scheduler shows each task a single GPU, it is that one. None: not known, JAX takes the
    one of the local number.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = (
        len(shown.split(",")) if shown else int(environment.get("SLURM_GPUS_ON_NODE", "0") or 0)
    )
    if tasks_here == 1 and visible:
        return tuple(range(visible))
    if visible == 1:
        return (0,)
    return (local,) if tasks_here > 1 else None


def _tasks_of_node(layout: str, node: int) -> int:
    """The number of tasks on a node, from SLURM's `8(x2),4`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", layout):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else 0


def _checked(joining: Joining) -> Joining:
    host, colon, port = joining.coordinator.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise UserError(
            f"the coordinator {joining.coordinator!r} is not HOST:PORT: give the host of process 0 "
            "and a free port there"
        )
    if not 0 <= joining.own < joining.count:
        raise UserError(
            f"process {joining.own} of {joining.count}: processes are numbered from 0 to "
            f"{joining.count - 1}"
        )
    return joining


def _who(joining: Joining) -> str:
    number = "a process" if joining.own is None else f"process {joining.own} of {joining.count}"
    return f"{number} on {socket.gethostname()} ({joining.way})"


def _why(joining: Joining) -> str:
    """What this process can tell about the coordinator."""
    address = joining.coordinator
    if address is None:
        from jax._src import distributed

        address = distributed.global_state.coordinator_address
    if address is None:
        return "no coordinator was found; give --coordinator=HOST:PORT --processes=N --process=I"
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            pass
    except OSError as error:
        local = " (that is this machine itself)" if host.startswith(("127.", "localhost")) else ""
        return f"the coordinator {address}{local} cannot be reached ({error}): has process 0 started there, is the port open?"
    return f"the coordinator {address} answers, but not all processes have come: look at the logs of the others"
