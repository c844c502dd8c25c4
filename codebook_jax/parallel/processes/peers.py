"""What the processes of one run tell each other outside the devices: what must be the same, and why
the run ends.

With a single process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from codebook_jax.errors import UserError, first_few
from codebook_jax.parallel.processes import channel
from codebook_jax.parallel.processes.joining import HEARTBEAT_S, end

CHECK_S = 600.0  # how far the slowest process may be behind the first at a check
FINISH_S = 20.0  # how long an error waits for a save in progress before it ends all processes
GRACE_S = 2.0  # for a process to end with its own message, if it fails as another did
LINGER_S = 10.0  # how long process 0 waits for the others to end; JAX aborts them with it
OFFER_BYTES = 1024
LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "Connection reset")


class Peers:
    """The other processes, through a connection to the channel; without one there are none."""

    def __init__(
        self,
        connection: Connection | None = None,
        *,
        count: int = 1,
        own: int = 0,
        host: str = "",
        give_up: Callable[[str, int], None] = end,
    ) -> None:
        self.count, self.own = count, own
        self._connection, self._give_up = connection, give_up
        self._hosts: dict[int, str] = {}
        self._rounds: Counter[str] = Counter()  # how often each check was done
        self._facts: dict[str, dict[int, Any]] = defaultdict(dict)  # of each process at a check
        self._arrived, self._sending = threading.Condition(), threading.Lock()
        self._has_failed = threading.Event()
        self._left, self._gone = set[int](), set[int]()
        self._is_ending = False
        if connection is not None:
            threading.Thread(target=self._listen, daemon=True).start()
            self._tell("host", host or socket.gethostname())

    def compare(self, check: str, facts: Mapping[str, Any], advice: str) -> None:
        """Raises UserError naming the process, its host and the first facts in which it differs
        from process 0.

        Every process calls it with the same `check`. Facts must be JSON values.
        """
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if len(set(self.exchange(check, digest))) == 1:  # they may be long, and the processes many
            return
        everyone = self.exchange(f"{check}, what differs", dict(facts))
        first = everyone[0]
        for process, own in enumerate(everyone):
            names = [name for name in first if own.get(name) != first[name]]
            if names:
                differences = [
                    f"{name}={own.get(name)!r}, on process 0 {first[name]!r}" for name in names
                ]
                shown = first_few(differences, 4, between="; ", last=", and")
                raise UserError(f"{self.name(process)} differs in {shown}: {advice}")

    def exchange(self, check: str, facts: Any) -> list[Any]:
        """The facts of every process at this check, in order; raises UserError naming processes
        that did not arrive within CHECK_S.
        """
        if self._connection is None:
            return [facts]
        self._rounds[check] += 1
        place = f"{check} {self._rounds[check]}"
        self._tell("facts", place, facts)
        with self._arrived:
            everyone = self._facts[place]
            if not self._arrived.wait_for(lambda: len(everyone) == self.count, CHECK_S):
                missing = [self.name(n) for n in range(self.count) if n not in everyone]
                raise UserError(
                    f"the check {check!r} waited {CHECK_S:.0f} s for {', '.join(missing)}: look at "
                    "its log; all processes must be started together"
                )
            del self._facts[place]
        return [everyone[process] for process in range(self.count)]

    def fail(self, sentence: str, code: int = 1) -> None:
        """Tells the others why the run ends, so that they exit too; the caller then exits."""
        if self._connection is not None:
            self._has_failed.set()
            self._tell("end", sentence, code)
            self._wait_for_others()

    def end_all(self, error: Exception, first: Callable[[], object] | None = None) -> None:
        """Ends the whole run because of an error here; returns only if this process is alone.

        A normal Python exit would wait for the others. After a user error, which all processes may
        share, `first` gets FINISH_S to run.
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
            finishing = threading.Thread(target=_try, args=(first,), daemon=True)
            finishing.start()
            finishing.join(FINISH_S)
        self.fail(sentence, code)
        self._give_up(sentence, code)

    def leave(self) -> None:
        """Disconnects a process that is done, after the others are done too."""
        if self._connection is not None:
            import jax

            self._tell("left")
            jax.distributed.shutdown()

    def name(self, process: int) -> str:
        """A process and its host, for a sentence."""
        host = self._hosts.get(process)
        return f"process {process}" + (f" on {host}" if host else "")

    def _tell(self, *message: Any) -> None:
        """Sends a message to all processes, this one included; nothing if process 0 is gone."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.send((self.own, *message))

    def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._receive(*self._connection.recv())
        self._receive(0, "gone")

    def _receive(self, process: int, kind: str, *content: Any) -> None:
        if kind == "host":
            (self._hosts[process],) = content
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
                why = f"{self.name(process)} is lost: it was killed, or its host is gone"
                self._end(why, 1, after_s=0)
        elif kind == "end" and process != self.own:
            sentence, code = content
            self._end(f"{self.name(process)}: {sentence}", code, after_s=GRACE_S)

    def _end(self, why: str, code: int, *, after_s: float) -> None:
        def end_unless_failed() -> None:
            if not self._has_failed.is_set():
                self._wait_for_others()
                again = "; the same command goes on from the newest checkpoint" if code == 1 else ""
                self._give_up(f"{self.name(self.own)} ends: {why}{again}", code)

        if not self._is_ending:
            self._is_ending = True
            threading.Timer(after_s, end_unless_failed).start()

    def _wait_for_others(self) -> None:
        until = time.monotonic() + LINGER_S
        while self.own == 0 and len(self._gone) < self.count - 1 and time.monotonic() < until:
            time.sleep(0.05)


_alone = Peers()
_others: list[Peers] = []


def connect(coordinator: str | None) -> Peers:
    """Connects this process to the others of the run it has joined; `coordinator` is the address of
    process 0 if it is known. Raises UserError if their numbers of devices differ.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    count, own = jax.process_count(), jax.process_index()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            f"processes 0 to {count - 1} have {', '.join(str(devices[n]) for n in range(count))} "
            "devices: give each the same number"
        )
    offer = channel.open_channel(count, coordinator) if own == 0 else ""
    padded = np.frombuffer(offer.encode().ljust(OFFER_BYTES), np.uint8)
    offer = bytes(multihost_utils.broadcast_one_to_all(padded)).decode()
    _others.append(Peers(channel.reach(offer, own), count=count, own=own))
    return connected()


def connected() -> Peers:
    """The other processes of the run, if it has some."""
    return _others[0] if _others else _alone


def of_a_peer(failure: Exception) -> bool:
    """Whether a failure is what a process sees when another one is gone."""
    import jax

    is_of_jax = isinstance(failure, jax.errors.JaxRuntimeError)
    return is_of_jax or any(sign in str(failure) for sign in LOST_PEER)


def _try(act: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # the earlier error is the one to report
        act()
