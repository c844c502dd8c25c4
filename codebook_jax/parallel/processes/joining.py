"""How this process finds the others of its run: from flags, or from what its launcher tells it."""

from __future__ import annotations

import glob
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from typing import NamedTuple

from codebook_jax.errors import UserError

HEARTBEAT_S = 30  # without one for this long, JAX ends all processes by SIGABRT
SHUTDOWN_S = 60
SLOWER_S = 60  # by which JAX's time-out is later than ours: it would end the process silently
SKYPILOT, SKYPILOT_PORT = "SkyPilot", 8476  # the port of its coordinator is ours to choose
ALL_THREE = "give --coordinator=HOST:PORT --processes=N --process=I"


class Joining(NamedTuple):
    """How a process joins; fields that are None are left to JAX's detection method `detection`."""

    way: str
    coordinator: str | None = None
    count: int | None = None
    own: int | None = None
    # local accelerators of this process; None: all, or JAX's choice
    devices: tuple[int, ...] | None = None
    detection: str | None = "deactivate"


_OMPI = "OMPI_COMM_WORLD"
# Of each way: a variable without which there are no others, as in sbatch's own script (it names the
# coordinator if JAX has no detection); the count, the own number, that on this node; the detection.
LAUNCHERS = {
    "JAX": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "", "deactivate"),
    "Open MPI": (
        f"{_OMPI}_LOCAL_SIZE",
        f"{_OMPI}_SIZE",
        f"{_OMPI}_RANK",
        f"{_OMPI}_LOCAL_RANK",
        "ompi",
    ),
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "slurm"),
    SKYPILOT: ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "", "deactivate"),
}


def find(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    count: int | None = None,
    own: int | None = None,
    on_a_tpu: bool = False,
    has_kubernetes: bool = False,
) -> Joining | None:
    """How to join, from the flags (`coordinator`, `count`, `own`; a launcher may give the last two)
    or the environment; None: this process is alone. Raises UserError if only part is given.
    """
    if coordinator is None and (count is not None or own is not None):
        raise UserError("--processes and --process need --coordinator=HOST:PORT of process 0")
    if None not in (coordinator, count, own):
        return _checked(Joining("--coordinator", coordinator, count, own))
    launched = _launched(environment, on_a_tpu)
    if coordinator is not None:
        if launched is None:
            raise UserError(
                f"--coordinator={coordinator} is given without --processes=N and --process=I, and "
                "no launcher (srun, mpirun) provides them: give all three"
            )
        return _checked(launched._replace(coordinator=coordinator, detection="deactivate"))
    if launched is not None:
        if launched.detection == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environment:
            raise UserError(  # as from version 5 on
                "this Open MPI does not name its first host: give --coordinator=HOST:PORT of "
                "process 0 too"
            )
        return launched
    if has_kubernetes and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return Joining("Kubernetes", detection="k8s")
    return Joining("Cloud TPU", detection=None) if on_a_tpu else None


def on_a_tpu() -> bool:
    """Whether this machine has TPU chips and the library that drives them."""
    asked = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in asked and bool(chips) and importlib.util.find_spec("libtpu") is not None


def join(joining: Joining, *, timeout_s: int) -> bool:
    """Connects to the other processes, or exits with 1 and the reason after `timeout_s`; False on a
    TPU machine whose environment names no others.
    """
    import jax

    number = "a process" if joining.own is None else f"process {joining.own} of {joining.count}"
    this = f"{number} on {socket.gethostname()} ({joining.way})"

    def give_up() -> None:
        end(f"{this} did not find the others in {timeout_s} s: {_why(joining.coordinator)}", 1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            joining.coordinator,
            joining.count,
            joining.own,
            joining.devices,
            cluster_detection_method=joining.detection,
            initialization_timeout=timeout_s + SLOWER_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if joining.detection is None and isinstance(error, ValueError):  # nothing was found
            return False
        reason = str(error).splitlines()[0]
        raise UserError(f"{this} could not join: {reason}; {ALL_THREE}") from error
    finally:
        timer.cancel()
    # JAX's handler would swallow it, since nothing here asks JAX
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return True


def describe(joining: Joining) -> str:
    """One line on this process and its devices, once it has joined."""
    import jax

    mine, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    coordinator = f", coordinator {joining.coordinator}" if joining.coordinator else ""
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {mine} "
        f"of {jax.device_count()} devices ({kind}){coordinator} ({joining.way})"
    )


def end(sentence: str, code: int) -> None:
    """Prints the sentence and exits at once: after a lost peer, a normal exit would wait for it."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _launched(environment: Mapping[str, str], on_a_tpu: bool) -> Joining | None:
    for way, (sign, *names, local, detection) in LAUNCHERS.items():
        if not environment.get(sign) or (on_a_tpu and way == SKYPILOT):  # JAX knows its slice
            continue
        try:
            count, own = (int(environment[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{sign} is set, but {' and '.join(names)} are not both numbers: set all three, or "
                "none"
            ) from error
        if count < 2:
            continue
        if detection != "deactivate":
            devices = _own_devices(environment, int(environment[local]), count)
            return Joining(way, None, count, own, devices, detection)
        coordinator = environment[sign].split()[0]
        port = f":{SKYPILOT_PORT}" if way == SKYPILOT else ""
        return _checked(Joining(way, f"{coordinator}{port}", count, own))
    return None


def _own_devices(environment: Mapping[str, str], local: int, count: int) -> tuple[int, ...] | None:
    """The GPUs of a task of SLURM or Open MPI: all of its node if it is alone there (None: not
    known), otherwise the one of its local number, or the single one that the scheduler shows it.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = len(shown.split(",")) if shown else int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if environment.get("SLURM_STEP_NUM_NODES") == str(count) or (
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    ):
        return tuple(range(visible)) or None
    return (0,) if visible == 1 else (local,)


def _checked(joining: Joining) -> Joining:
    host, _, port = joining.coordinator.rpartition(":")
    if not host or not port.isdigit():
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


def _why(coordinator: str | None) -> str:
    """What this process can tell about the coordinator."""
    if coordinator is None:
        return f"have all processes started, are the ports between the hosts open? Or {ALL_THREE}"
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        state = "answers, but not all processes have come: look at the logs of the others"
    except OSError as error:
        state = f"cannot be reached ({error}): has process 0 started there, is the port open?"
    return f"the coordinator {coordinator} {state}"
