"""How this process finds the others of its run: from flags, or from what its launcher tells it."""

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

HEARTBEAT_S = 30  # without one for this long, JAX ends all processes by SIGABRT
SHUTDOWN_S = 60
SLOWER_S = 60  # by which JAX's time-out is later than ours: it would end the process silently
ALL_THREE = "give --coordinator=HOST:PORT --processes=N --process=I"


class Joining(NamedTuple):
    """How a process joins; fields that are None are left to JAX's detection method `detection`."""

    way: str
    coordinator: str | None = None
    count: int | None = None
    own: int | None = None
    devices: tuple[int, ...] | None = None  # accelerators of its own; None: all, or JAX's choice
    detection: str | None = "deactivate"


_OMPI = "OMPI_COMM_WORLD"
# Of each way: a variable without which there are no others, as in sbatch's own script (it names the
# coordinator if JAX has no detection); the count, the own number, that on this node; the detection.
LAUNCHERS = {
    "JAX": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "", "deactivate"),
    "Open MPI": (f"{_OMPI}_SIZE", f"{_OMPI}_SIZE", f"{_OMPI}_RANK", f"{_OMPI}_LOCAL_RANK", "ompi"),
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "slurm"),
    "SkyPilot": ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "", "deactivate"),
}
SKYPILOT_PORT = 8476  # of its coordinator; ours to choose


def find(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    count: int | None = None,
    own: int | None = None,
    on_a_tpu: bool = False,
    has_kubernetes: bool = False,
) -> Joining | None:
    """How to join, from the flags or else the environment; None: this process is alone."""
    if None not in (coordinator, count, own):
        found = Joining("--coordinator", coordinator, count, own)
    elif (found := _launched(environment, on_a_tpu)) and coordinator is not None:
        found = found._replace(coordinator=coordinator, detection="deactivate")
    elif (coordinator, count, own) != (None, None, None) or (
        # Open MPI does not name its first host from version 5 on
        found and found.detection == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environment
    ):
        raise UserError(
            f"--coordinator={coordinator} --processes={count} --process={own}: {ALL_THREE}; under "
            "a launcher that numbers the processes (srun, mpirun), --coordinator alone"
        )
    if found is not None:
        is_place = found.coordinator is None or re.fullmatch(r".+:\d+", found.coordinator)
        if not is_place or not 0 <= found.own < found.count:
            raise UserError(
                f"process {found.own} of {found.count}, coordinator {found.coordinator!r}: give "
                "HOST:PORT of process 0 with a free port there, and number the processes from 0 to "
                f"{found.count - 1}"
            )
        return found
    if has_kubernetes and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return Joining("Kubernetes", detection="k8s")
    return Joining("Cloud TPU", detection=None) if on_a_tpu else None


def on_a_tpu() -> bool:
    """Whether this machine has TPU chips and the library that drives them."""
    asked = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in asked and bool(chips) and importlib.util.find_spec("libtpu") is not None


def join(joining: Joining, *, timeout_s: int) -> bool:
    """Connects to the others, or exits with the reason after `timeout_s`; False: there are none."""
    import jax

    number = "a process" if joining.own is None else f"process {joining.own} of {joining.count}"
    this = f"{number} on {socket.gethostname()} ({joining.way})"

    def give_up() -> None:
        why = f"have all processes started, are the ports between the hosts open? Or {ALL_THREE}"
        if joining.coordinator is not None:
            host, _, port = joining.coordinator.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                why = "answers, but not all processes have come: look at the logs of the others"
            except OSError as error:
                why = f"cannot be reached ({error}): has process 0 started there, is the port open?"
            why = f"the coordinator {joining.coordinator} {why}"
        end(f"{this} did not find the others in {timeout_s} s: {why}", 1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *joining[1:5],
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
    for way, (sign, *names, detection) in LAUNCHERS.items():
        if not environment.get(sign) or (on_a_tpu and way == "SkyPilot"):  # JAX knows its slice
            continue
        try:
            count, own, *local = (int(environment[name]) for name in names if name)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{sign} is set, but {' and '.join(filter(None, names))} are not all numbers: set "
                "all of them, or none"
            ) from error
        if count > 1 and local:
            devices = _own_devices(environment, *local, count)
            return Joining(way, None, count, own, devices, detection)
        if count > 1:
            port = f":{SKYPILOT_PORT}" if way == "SkyPilot" else ""
            return Joining(way, environment[sign].split()[0] + port, count, own)
    return None


def _own_devices(environment: Mapping[str, str], local: int, count: int) -> tuple[int, ...] | None:
    """The GPUs of a task of SLURM or Open MPI: all of its node if it is alone there (None: not
    known), otherwise the one of its local number, or the single one that the scheduler shows it.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = len(shown.split(",")) if shown else int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if environment.get("SLURM_STEP_NUM_NODES") == str(count) or (
        environment.get(f"{_OMPI}_LOCAL_SIZE") == "1"
    ):
        return tuple(range(visible)) or None
    return (0,) if visible == 1 else (local,)
