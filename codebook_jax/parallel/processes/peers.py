"""What the processes of one run tell each other outside the devices: what must be the same, and
that they are alive.

Everything goes through the key-value store of JAX's coordinator, so it works before the first
collective and while one hangs. With a single process nothing here does anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from codebook_jax.errors import UserError
from codebook_jax.parallel.processes.joining import end

CHECK_S = 600  # how far the slowest process may be behind the first at a check
BEAT_S = 2.0
# a process without a beat for this long was killed, or its host is gone; parsing a long JSON is
# shorter
LOST_S = 30.0
FINISH_S = 20.0  # how long an error waits for a save in progress before it ends all processes
# how long process 0 stays so that the others hear why the run ends: the store ends with it
LINGER_S = 10.0
SKEW_S = 30.0  # between two hosts' clocks; above it a warning is printed

STORE = "codebook_jax"  # prefix of our keys in the store, which Orbax uses too
ENDED = f"{STORE}/run/ended"
SIGNS_OF_A_LOST_PEER = (
    "Gloo",
    "NCCL",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "coordination service",
    "Connection reset",
)
Give = Callable[[str, int], None]  # ends this process with a sentence and an exit code


class Peers:
    """The other processes, through `client`, the key-value store of JAX's coordinator (None: there
    are no others).
    """

    def __init__(
        self,
        client: Any = None,
        *,
        count: int = 1,
        own: int = 0,
        host: str = "",
        check_s: float = CHECK_S,
        beat_s: float = BEAT_S,
        lost_s: float = LOST_S,
        give_up: Give = end,
    ) -> None:
        self._client, self.count, self.own = client, count, own
        self._host = host or socket.gethostname()
        self._check_s, self._beat_s, self._lost_s, self._give_up = check_s, beat_s, lost_s, give_up
        self._hosts: dict[int, str] = {}
        self._checks: dict[str, int] = {}  # how often each was done
        self._stop = threading.Event()
        self._watching: threading.Thread | None = None

    # -- what must be the same

    def compare(self, check: str, facts: Mapping[str, Any], advice: str) -> None:
        """Raises UserError naming the process, its host and the first facts in which it differs
        from process 0.

        Every process calls it with the same `check`, once; a process that does not arrive in time
        is named too. Facts must be JSON values.
        """
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if len(set(self.exchange(check, digest))) == 1:  # they may be long, and the processes many
            return
        everyone = self.exchange(f"{check}, what differs", dict(facts))
        first = everyone[0]
        for process, own in enumerate(everyone):
            names = [name for name in first if own.get(name) != first[name]]
            if names:
                shown = "; ".join(
                    f"{name}={own.get(name)!r}, on process 0 {first[name]!r}" for name in names[:4]
                )
                more = f", and {len(names) - 4} more" if len(names) > 4 else ""
                raise UserError(f"{self.name(process)} differs in {shown}{more}: {advice}")

    def exchange(self, check: str, facts: Any) -> list[Any]:
        """The facts of every process at this check, in order.

        Raises UserError naming processes that did not arrive.
        """
        if self._client is None:
            return [facts]
        self._checks[check] = self._checks.get(check, 0) + 1
        place = f"{STORE}/checks/{check}/{self._checks[check]}"
        said = {"host": self._host, "facts": facts}
        self._client.key_value_set(f"{place}/{self.own}", json.dumps(said))
        try:
            self._client.wait_at_barrier(place, int(self._check_s * 1000))
        except Exception as error:  # its types differ between JAX's versions
            here = self._said(place)
            missing = [process for process in range(self.count) if process not in here]
            raise UserError(
                f"the check {check!r} waited {self._check_s:.0f} s for "
                f"{', '.join(self.name(process) for process in missing) or 'a process that left it'}: look at its log; all processes must be started together"
            ) from error
        here = self._said(place)
        return [here[process]["facts"] for process in range(self.count)]

    def clocks(self) -> str:
        """A warning if a host's clock is far from that of process 0, otherwise empty."""
        self.exchange("clock barrier", None)
        times = self.exchange("clock", time.time())
        late = [(abs(at - times[0]), process) for process, at in enumerate(times)]
        most, process = max(late)
        if most < SKEW_S:
            return ""
        return (
            f"the clock of {self.name(process)} is {most:,.0f} s off that of process 0: training "
            "does not mind, times in logs and files will"
        )

    # -- who is alive

    def watch(self) -> None:
        """Starts telling the others that this process is alive, and ends it when the run ends
        elsewhere.
        """
        if self._client is None:
            return
        self._watching = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watching.start()

    def fail(self, sentence: str) -> None:
        """Tells the others why this process ends the run, so that they exit too; the caller then
        exits.
        """
        if self._client is None:
            return
        self._stop.set()
        try:
            self._client.key_value_set(ENDED, f"{self.name(self.own)}: {sentence}")
        except Exception:
            pass  # somebody else was first, or the coordinator is gone
        self._leave_mark()
        if self.own == 0:
            self._wait_for_others()

    def end_all(self, error: Exception, first: Callable[[], object] | None = None) -> None:
        """Ends the whole run because of an error here; returns only if there are no other
        processes.

        A normal Python exit would wait for the others. After a user error, which all processes may
        share, `first` gets FINISH_S to run.
        """
        if self.count == 1:
            return
        sentence, code = str(error), 2
        if isinstance(error, UserError):
            if first is not None:
                finishing = threading.Thread(target=_try, args=(first,), daemon=True)
                finishing.start()
                finishing.join(FINISH_S)
        else:
            if of_a_peer(error):
                self._explain(str(error).partition("\n")[0])
            traceback.print_exception(error)
            sentence, code = f"{type(error).__name__}: {sentence.partition(chr(10))[0]}", 1
        self.fail(sentence)
        self._give_up(sentence, code)

    def leave(self) -> None:
        """Ends the watch and the connection of a process that is done, after the others are done
        too.
        """
        if self._client is None:
            return
        import jax

        self._leave_mark()
        self._stop.set()
        self._watching.join()
        jax.distributed.shutdown()

    def name(self, process: int) -> str:
        """A process and its host, for a sentence."""
        host = self._host if process == self.own else self._hosts.get(process)
        return f"process {process}" + (f" on {host}" if host else "")

    def _explain(self, failure: str) -> None:
        """After a step failed the way it does when another process is gone: waits until the watch
        knows which one.
        """
        print(
            f"{self.name(self.own)}: a step failed ({failure}); looking for a lost process",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(self._lost_s + 5 * self._beat_s)

    def _said(self, place: str) -> dict[int, Any]:
        found = {
            int(key.rsplit("/", 1)[1]): json.loads(value)
            for key, value in self._client.key_value_dir_get(f"{place}/")
        }
        self._hosts |= {process: said["host"] for process, said in found.items()}
        return found

    def _leave_mark(self) -> None:
        try:
            self._client.key_value_set(f"{STORE}/left/{self.own}", "", allow_overwrite=True)
        except Exception:
            pass  # the coordinator is gone, and so is everyone who would read it

    def _wait_for_others(self) -> None:
        end_of_wait = time.monotonic() + LINGER_S
        while (
            time.monotonic() < end_of_wait
            and len(self._client.key_value_dir_get(f"{STORE}/left/")) < self.count
        ):
            time.sleep(0.1)

    def _watch(self) -> None:
        heard: dict[int, tuple[str, float]] = {}
        beats, silent_since = 0, time.monotonic()
        while not self._stop.is_set():
            beats += 1
            try:
                self._client.key_value_set(
                    f"{STORE}/alive/{self.own}", str(beats), allow_overwrite=True
                )
                ended = [
                    why
                    for key, why in self._client.key_value_dir_get(f"{STORE}/run/")
                    if key == ENDED
                ]
                if not ended and self.own == 0:
                    lost = self._lost(heard)
                    if lost is not None:
                        why = f"{self.name(lost)} has not been heard of for {self._lost_s:.0f} s"
                        self._client.key_value_set(
                            ENDED, f"{why}: it was killed, or its host is gone"
                        )
                        continue
                silent_since = time.monotonic()
            except Exception as error:
                ended = []
                if time.monotonic() - silent_since > self._lost_s:
                    self._give_up(
                        f"{self.name(0)}, the coordinator, cannot be reached ({error})", 1
                    )
            if ended:
                self._end(ended[0])
            self._stop.wait(self._beat_s)

    def _end(self, why: str) -> None:
        if self._stop.is_set():
            return
        self._leave_mark()
        if self.own == 0:
            self._wait_for_others()
        self._give_up(
            f"{self.name(self.own)} ends: {why}; the same command goes on from the newest "
            "checkpoint",
            1,
        )

    def _lost(self, heard: dict[int, tuple[str, float]]) -> int | None:
        """A process whose last beat is too long ago, if any."""
        now = time.monotonic()
        left = {
            int(key.rsplit("/", 1)[1])
            for key, _ in self._client.key_value_dir_get(f"{STORE}/left/")
        }
        for key, beat in self._client.key_value_dir_get(f"{STORE}/alive/"):
            process = int(key.rsplit("/", 1)[1])
            if process not in heard or heard[process][0] != beat:
                heard[process] = beat, now
        return next(
            (p for p, (_, at) in heard.items() if p not in left and now - at > self._lost_s), None
        )


@functools.cache
def connected() -> Peers:
    """The other processes of the run, once this one has joined."""
    import jax
    from jax._src import distributed

    client = distributed.global_state.client
    return Peers(client, count=jax.process_count(), own=jax.process_index()) if client else Peers()


def _try(act: Callable[[], object]) -> None:
    try:
        act()
    except Exception:
        pass  # the earlier error is the one to report


def of_a_peer(failure: Exception) -> bool:
    """Whether a failure is what a process sees when another one is gone."""
    import jax

    text = str(failure)
    return isinstance(failure, jax.errors.JaxRuntimeError) or any(
        sign in text for sign in SIGNS_OF_A_LOST_PEER
    )
