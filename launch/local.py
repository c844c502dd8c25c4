"""Starts N processes of one run on this machine: for tests, and for boxes with several GPUs.

    python launch/local.py --processes=2 -- python -m codebook_jax.main
    --config=configs/base.py:tiny --workdir=runs/two

Each line of output begins with the number of its process. SIGTERM, SIGINT, SIGUSR1 and SIGHUP are
passed on to all of them. If one fails, the others have `--grace` seconds to exit. `--restarts=R`
then starts all of them again, up to R times, unless it was a user error (exit code 2). The exit
code is that of the first process that failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
USERS_MISTAKE = 2
OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"  # see README.md


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    for attempt in range(options.restarts + 1):
        group = Group(options)
        code = group.run()
        if code in (0, USERS_MISTAKE) or group.signalled or attempt == options.restarts:
            return code
        _write(
            f"local.py: starting all {options.processes} again ({attempt + 1} of "
            f"{options.restarts})\n".encode()
        )
    raise AssertionError("the loop returns")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="how many to start")
    for flag, default, text in (
        ("--devices", 0, "virtual CPU devices per process; 0: the real devices"),
        ("--gpus", 0, "GPUs of this machine to divide among the processes; 0: each sees all"),
        ("--restarts", 0, "how often to restart all after a failure"),
        ("--grace", 60.0, "seconds that the others have to exit after one failed"),
        ("--port", 0, "the port of process 0; 0: a free one"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=text)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: the command to start")
    options = parser.parse_args(argv)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error(
            "a command is missing: give it after --, e.g. -- python -m codebook_jax.main "
            "--config=..."
        )
    if options.processes < 1:
        parser.error(f"--processes={options.processes}: give at least 1")
    if options.gpus % options.processes:
        parser.error(
            f"--gpus={options.gpus} does not divide evenly among --processes={options.processes}"
        )
    return options


class Group:
    """The processes of one start."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.signalled = False
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Starts all and waits for all; returns the exit code of the first that failed, or 0."""
        port = self.options.port or free_port()
        before = {
            number: signal.signal(number, self._pass_on)
            for number in PASSED_ON
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        try:
            for own in range(self.options.processes):
                told = environment(
                    own,
                    self.options.processes,
                    port,
                    devices=self.options.devices,
                    gpus=self.options.gpus,
                    flags=os.environ.get("XLA_FLAGS", ""),
                )
                self._running.append(
                    subprocess.Popen(
                        self.options.command,
                        env={**os.environ, **told},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        # else Ctrl-C reaches them twice, and the second exits without saving
                        start_new_session=True,
                    )
                )
            echoes = [
                threading.Thread(target=_echo, args=(own, process), daemon=True)
                for own, process in enumerate(self._running)
            ]
            for echo in echoes:
                echo.start()
            code = self._wait()
            for echo in echoes:
                echo.join(timeout=5)
            return code
        finally:
            for process in self._running:
                if process.poll() is None:
                    process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> int:
        first, until = 0, None
        while (
            alive := [process for process in self._running if process.poll() is None]
        ) or until is None:
            failed = [
                (own, p.returncode)
                for own, p in enumerate(self._running)
                if p.returncode not in (None, 0)
            ]
            if failed and until is None:
                own, first = failed[0]
                until = time.monotonic() + self.options.grace
                _write(f"local.py: process {own} {_ending(first)}\n".encode())
            if not alive:
                break
            if until is not None and time.monotonic() > until:
                grace = f"{self.options.grace:.0f} s"
                _write(
                    f"local.py: {len(alive)} did not exit within {grace} and are killed\n".encode()
                )
                for process in alive:
                    process.kill()
                    process.wait()
            time.sleep(0.05)
        return first if first >= 0 else 128 - first

    def _pass_on(self, number: int, frame: object) -> None:
        self.signalled = True
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


def environment(
    own: int, processes: int, port: int, *, devices: int = 0, gpus: int = 0, flags: str = ""
) -> dict[str, str]:
    """The environment variables that tell process `own` about the run; `flags` are XLA's flags so
    far.
    """
    told = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(own),
        "PYTHONUNBUFFERED": "1",
    }
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        told |= {"XLA_FLAGS": f"{flags} {flag}".strip(), "JAX_PLATFORMS": "cpu"}
    if gpus:
        if gpus > 1:  # flags that are given come last, and so win
            told["XLA_FLAGS"] = f"{OVERLAP} {told.get('XLA_FLAGS', flags)}".strip()
        each = gpus // processes
        told["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(own * each + gpu) for gpu in range(each))
    return told


def free_port() -> int:
    """A port that nobody on this machine is listening on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _echo(own: int, process: subprocess.Popen[bytes]) -> None:
    for line in process.stdout:
        _write(f"[{own}] ".encode() + line)


def _write(line: bytes) -> None:
    """Prints a line; once the reader is gone, output is dropped so that no process blocks."""
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ending(code: int) -> str:
    return (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )


if __name__ == "__main__":
    sys.exit(main())
