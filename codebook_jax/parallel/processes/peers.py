"""What the processes of one run tell each other outside the devices: what must be the same, and why
the run ends.

Each has a TCP connection to process 0, which sends every message to all in one order, also while a
collective hangs. A process that dies closes its connection: all get `(process, "gone")` at once.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent import futures
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from codebook_jax.errors import UserError, first_few
from codebook_jax.parallel.processes.joining import HEARTBEAT_S, end

ANSWER_S = 10.0  # for a host to answer
CHECK_S = 600.0  # how far the slowest process may be behind the first at a check
SEEN_S = 15.0  # how long a network file system may take to show a new file
FINISH_S = 20.0  # how long an error waits for a save in progress before it ends all processes
GRACE_S = 2.0  # for a process to end with its own message, if it fails as another did
LINGER_S = 10.0  # how long process 0 waits for the others to end; JAX aborts them with it
OFFER_BYTES = 1024
LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "Connection reset")


class Peers:
    """The other processes, through the connection of `reach`; without one there are none."""

    def __init__(
        self,
        connection: Connection | None = None,
        *,
        count: int = 1,
        own: int = 0,
        give_up: Callable[[str, int], None] = end,
    ) -> None:
        self.count, self.own = count, own
        self.names = [f"process {n}" for n in range(count)]  # each with its host, once it is known
        self._connection, self._give_up = connection, give_up
        self._rounds: Counter[str] = Counter()  # how often each check was done
        self._facts: dict[str, dict[int, Any]] = defaultdict(dict)  # of each process at a check
        self._arrived, self._sending = threading.Condition(), threading.Lock()
        self._has_failed, self._is_ending = threading.Event(), False
        self._left, self._gone = set[int](), set[int]()
        if connection is not None:
            threading.Thread(target=self._listen, daemon=True).start()
            self._tell("host", socket.gethostname())

    def compare(self, check: str, facts: Mapping[str, Any], advice: str) -> None:
        """Raises UserError naming the process and the first facts that differ from process 0's."""
        first = self.exchange(check, None if self.own else facts)[0]
        own = [
            f"{name}={facts.get(name)!r}, on process 0 {value!r}"
            for name, value in first.items()
            if facts.get(name) != value
        ]
        everyone = self.exchange(f"{check}, what differs", own)
        for name, differences in zip(self.names, everyone, strict=True):
            if differences:
                shown = first_few(differences, 4, between="; ", last=", and")
                raise UserError(f"{name} differs in {shown}: {advice}")

    def exchange(self, check: str, facts: Any) -> list[Any]:
        """The facts of every process; raises UserError naming those that are CHECK_S late."""
        if self._connection is None:
            return [facts]
        self._rounds[check] += 1
        place = f"{check} {self._rounds[check]}"
        self._tell("facts", (place, facts))
        with self._arrived:
            everyone = self._facts[place]
            if not self._arrived.wait_for(lambda: len(everyone) == self.count, CHECK_S):
                missing = [name for n, name in enumerate(self.names) if n not in everyone]
                raise UserError(
                    f"the check {check!r} waited {CHECK_S:.0f} s for {', '.join(missing)}: look at "
                    "its log; all processes must be started together"
                )
            del self._facts[place]
        return [everyone[process] for process in range(self.count)]

    def check_folder(self, folder: Path) -> None:
        """Raises UserError naming the process that cannot write the folder or see others' files."""
        if self.count == 1:
            return
        token = self.exchange("workdir token", secrets.token_hex(8))[0]
        first, own = (folder / f".start-{token}-{process}" for process in (0, self.own))
        problem, until = "", time.monotonic() + SEEN_S
        try:
            # A pattern lists the folder, which makes NFS ask its server.
            while self.own and not any(folder.glob(f"{first.name}*")):
                if time.monotonic() > until:
                    problem = "does not see the file that process 0 wrote"
                    break
                time.sleep(0.2)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                own.touch()
        except OSError as error:
            problem = f"cannot write there ({error.strerror})"
        problems = self.exchange("workdir", problem)
        with contextlib.suppress(OSError):
            own.unlink()
        for name, problem in zip(self.names, problems, strict=True):
            if problem:
                raise UserError(
                    f"--workdir={folder} is not one folder for all processes: {name} {problem}: "
                    "give a folder that every host mounts and can write to, such as NFS, Lustre or "
                    "a mounted bucket"
                )

    def fail(self, sentence: str, code: int = 1) -> None:
        """Tells the others why the run ends, so that they exit too; the caller then exits."""
        self._has_failed.set()
        self._tell("end", (sentence, code))
        self._wait_for_others()

    def end_all(self, error: Exception, first: Callable[[], object] | None = None) -> None:
        """Ends the whole run because of an error here; returns only if this process is alone. After
        a user error, which all processes may share, `first` gets FINISH_S to run.
        """
        import jax

        if not jax.distributed.is_initialized():
            return
        sentence, code = str(error), 2
        if not isinstance(error, UserError):
            sentence, code = f"{type(error).__name__}: {sentence.partition(chr(10))[0]}", 1
            if of_a_peer(error):
                print(f"a step failed ({sentence}); looking for a lost process", file=sys.stderr)
                time.sleep(HEARTBEAT_S + 10)  # the channel or JAX ends this process with its name
            traceback.print_exception(error)
        elif first is not None:
            self._has_failed.set()  # others that fail of the same do not end it meanwhile
            # what it raises is dropped: the earlier error is the one to report
            futures.wait([futures.ThreadPoolExecutor().submit(first)], FINISH_S)
        self.fail(sentence, code)
        self._give_up(sentence, code)

    def leave(self) -> None:
        """Disconnects a process that is done, after the others are done too."""
        if self._connection is not None:
            import jax

            self._tell("left")
            jax.distributed.shutdown()

    def _tell(self, kind: str, content: Any = None) -> None:
        """Sends a message to all processes, this one included; nothing if process 0 is gone."""
        if self._connection is not None:
            with self._sending, contextlib.suppress(OSError):
                self._connection.send((self.own, kind, content))

    def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._receive(*self._connection.recv())
        self._receive(0, "gone", None)

    def _receive(self, process: int, kind: str, content: Any) -> None:
        if kind == "host":
            self.names[process] = f"process {process} on {content}"
        elif kind == "facts":
            place, facts = content
            with self._arrived:
                self._facts[place][process] = facts
                self._arrived.notify_all()
        elif kind == "left":
            self._left.add(process)
        elif kind == "gone":
            self._gone.add(process)
            if process not in self._left:
                why = f"{self.names[process]} is lost: it was killed, or its host is gone"
                self._end(0, why, 1)
        elif process != self.own:
            sentence, code = content
            self._end(GRACE_S, f"{self.names[process]}: {sentence}", code)

    def _end(self, after_s: float, why: str, code: int) -> None:
        """Ends this process, unless it fails by itself before; the first reason stands."""

        def end_unless_failed() -> None:
            if not self._has_failed.is_set():
                self._wait_for_others()
                again = "; the same command goes on from the newest checkpoint" if code == 1 else ""
                self._give_up(f"{self.names[self.own]} ends: {why}{again}", code)

        if not self._is_ending:
            self._is_ending = True
            threading.Timer(after_s, end_unless_failed).start()

    def _wait_for_others(self) -> None:
        until = time.monotonic() + LINGER_S
        while self.own == 0 and len(self._gone) < self.count - 1 and time.monotonic() < until:
            time.sleep(0.05)


_connected = [Peers()]


def connect(coordinator: str | None) -> Peers:
    """Connects to the others of the run, by the `coordinator`'s address if it is known."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    count, own = jax.process_count(), jax.process_index()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            f"the processes have {[*devices.values()]} devices: give all the same number"
        )
    offer = open_channel(count, coordinator) if own == 0 else ""
    padded = np.frombuffer(offer.encode().ljust(OFFER_BYTES), np.uint8)
    offer = bytes(multihost_utils.broadcast_one_to_all(padded)).decode()
    _connected.append(Peers(reach(offer, own), count=count, own=own))
    return connected()


def connected() -> Peers:
    """The other processes of the run, if it has some."""
    return _connected[-1]


def of_a_peer(failure: Exception) -> bool:
    """Whether a failure is what a process sees when another one is gone."""
    import jax

    is_of_jax = isinstance(failure, jax.errors.JaxRuntimeError)
    return is_of_jax or any(sign in str(failure) for sign in LOST_PEER)


def open_channel(count: int, coordinator: str | None) -> str:
    """Starts process 0's sending of what each process says to all; returns what `reach` needs:
    addresses, port, and a token without which nobody is let in.
    """
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=ipv6)
    addresses = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address to send from
        addresses.append(probe.getsockname()[0])
    addresses += [socket.gethostname(), "127.0.0.1"]
    token = secrets.token_hex(16)
    threading.Thread(target=_serve, args=(server, count, token), daemon=True).start()
    return json.dumps([addresses, server.getsockname()[1], token])


def reach(offer: str, process: int) -> Connection:
    """A connection to process 0; raises UserError if none of its addresses answers."""
    addresses, port, token = json.loads(offer)
    for address in addresses:
        with contextlib.suppress(OSError, EOFError):
            reached = socket.create_connection((address, port), timeout=ANSWER_S)
            reached.settimeout(None)
            connection = Connection(reached.detach())
            connection.send_bytes(f"{token} {process}".encode())
            if connection.poll(6 * ANSWER_S) and connection.recv_bytes(100) == token.encode():
                return connection
    raise UserError(
        f"process {process} on {socket.gethostname()} gets no answer from process 0 at "
        f"{', '.join(addresses)}, port {port}: open the ports between the hosts, or give "
        "--coordinator=HOST:PORT of an address that all can reach"
    )


def _serve(server: socket.socket, count: int, token: str) -> None:
    processes: dict[Connection, int] = {}
    while len(processes) < count:
        connection = Connection(server.accept()[0].detach())
        with contextlib.suppress(OSError, EOFError, ValueError):
            said = connection.recv_bytes(100).decode() if connection.poll(ANSWER_S) else ""
            if said.startswith(token):
                processes[connection] = int(said.removeprefix(token))
                connection.send_bytes(token.encode())
                continue
        connection.close()
    while processes:
        for connection in wait(list(processes)):
            try:
                message = connection.recv()
            except (OSError, EOFError):
                message = processes.pop(connection), "gone", None
            for other in processes:
                with contextlib.suppress(OSError):  # it is gone too
                    other.send(message)
