"""How a run of two processes handles faults: `python benchmarks/faults.py [--only NAME ...] [--out
FILE]`.

Every row starts a small run of two real processes on this machine, injects one fault, waits for the
end, starts the same command again without the fault, and compares every logged number and every
array of the last checkpoint with an undisturbed run. Times are in seconds. The rows that mount file
systems need root on Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from absl import logging

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_table import Row, read, table
from small_run import command, together

from codebook_jax.files import write_json
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.run.metrics import FILE, read_rows

STEPS, EVERY, KILLS = 24, 4, 8
ITEMS = ("student", "teacher", "moments", "queue", "meta")  # of a checkpoint
CHANGES = {
    "mesh.fsdp": 2,  # each process holds one half of the state
    "optimizer.max_bad_steps": 5,
    "train.steps": STEPS,
    "checkpoint.every_steps": EVERY,
    "evaluation.every_steps": 0,
    "evaluation.rerank_top_k": 0,
}


class Run:
    """The processes of one start, and their output."""

    def __init__(
        self,
        workdir: Path,
        *,
        fault: str = "none:0:0",
        changes: Mapping[str, Any] = MappingProxyType({}),
        own: Mapping[int, list[str]] = MappingProxyType({}),
        processes: int = 2,
        started: int | None = None,
    ) -> None:
        self.workdir, self.began = workdir, time.monotonic()
        self.logs = [workdir.with_name(f"{workdir.name}.{n}.log") for n in range(processes)]
        given = command(workdir, **CHANGES | changes)
        commands = [[*given, *own.get(n, [])] for n in range(started or processes)]
        told = {"JAX_PLATFORMS": "cpu", "FAULT": fault}
        with contextlib.ExitStack() as open_logs:
            outputs = [open_logs.enter_context(open(log, "w")) for log in self.logs]
            self.processes = together(commands, os.environ | told, outputs, processes)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        path = self.workdir / FILE
        return read_rows(path) if path.exists() else []

    def step(self) -> int:
        """The last logged step with a finite loss."""
        good = [row["step"] for row in self.rows() if row.get("loss") is not None]
        return max(good, default=0)

    def wait_for(self, ready: Callable[[], bool], limit_s: float = 240) -> None:
        """Raises RuntimeError with all output if the run ends first or takes too long."""
        until = time.monotonic() + limit_s
        while not ready():
            if all(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"it ended too early:\n{self.said()}")
            if time.monotonic() > until:
                raise RuntimeError(f"it did not get there in {limit_s} s:\n{self.said()}")
            time.sleep(0.01)

    def end(self, limit_s: float = 240) -> list[int]:
        """The exit codes once all have ended; processes that hang are killed and count as None."""
        until = time.monotonic() + limit_s
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(until - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        return codes

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def sentence(self) -> str:
        """The sentence that matters: an error, or else what was saved."""
        for log in self.logs:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            for start in ("error: ", "saved step", "the checkpoint of step", "the clock"):
                found = [line for line in lines if line.startswith(start)]
                if found:
                    return found[-1].removeprefix("error: ")
        fatal = re.search(r"Terminating process because[^.]*\.", self.said())
        return fatal.group() if fatal else ""


class Faults:
    """The rows, made in one folder with one undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._numbers = folder, itertools.count()
        self.straight = Run(folder / "straight")
        if self.straight.end() != [0, 0]:
            raise RuntimeError(self.straight.said())

    # -- each returns its row

    def kill_at_random(self, number: int) -> Row:
        """SIGKILL of one process at a random moment between its first step and its last."""
        draw = random.Random(number)
        victim, at = draw.randrange(2), draw.uniform(1, STEPS - 2)
        run = Run(self._new(), fault="slow:*:0")
        run.wait_for(lambda: run.step() >= int(at))
        during_save = number % 4 == 0
        if during_save:
            saved = run.workdir / "checkpoints"
            is_saving = lambda: any("tmp" in path.name for path in saved.iterdir())  # noqa: E731
            run.wait_for(lambda: is_saving() or run.step() >= STEPS - 1)
        else:
            time.sleep((at % 1) * 0.2)
        run.processes[victim].kill()
        when = " during a save" if during_save else ""
        return self.ended(f"SIGKILL of process {victim} at step {run.step()}{when}", run)

    def signalled(self, name: str, number: int, victims: list[int], workers: int) -> Row:
        """A signal to one process, or to the process groups with the workers that read the data."""
        run = Run(self._new(), fault="slow:*:0", changes={"data.workers": workers})
        run.wait_for(lambda: run.step() >= 12)
        for victim in victims:
            kill = os.killpg if workers else os.kill
            kill(run.processes[victim].pid, number)
        return self.ended(name, run)

    def other_config(self) -> Row:
        run = Run(self._new(), own={1: ["--config.optimizer.learning_rate=0.1"]})
        return self.ended("another config on one host", run)

    def not_shared(self) -> Row:
        run = Run(self.folder / "shared", own={1: [f"--workdir={self._new()}"]})
        return self.ended("a workdir that is not shared", run)

    def missing_process(self) -> Row:
        run = Run(self._new(), started=1, own={0: ["--join_timeout_s=10"]})
        return self.ended("a process that never starts (join time-out 10 s)", run)

    def bad_record(self) -> Row:
        """One picture of the list is truncated; the undisturbed run, in one process, has it too."""
        from PIL import Image

        pictures = self.folder / "pictures"
        pictures.mkdir()
        draw = np.random.default_rng(0)
        pairs = []
        for n in range(64):
            noise = Image.fromarray(draw.integers(0, 255, (40, 40, 3), np.uint8))
            noise.save(pictures / f"{n}.jpg")
            pairs.append({"image": f"{n}.jpg", "caption": f"noise number {n}", "image_id": n})
        (pictures / "3.jpg").write_bytes((pictures / "3.jpg").read_bytes()[:200])
        (pictures / "pairs.json").write_text(json.dumps(pairs))
        changes = {"data.train": f"json:{pictures / 'pairs.json'}", "data.max_bad_rate": 0.1}
        alone = Run(self.folder / "alone", processes=1, changes=changes | {"mesh.fsdp": 1})
        alone.end()
        run = Run(self.folder / "bad", changes=changes)
        codes = run.end()
        skipped, expected = (
            [row["data/skipped"] for row in each.rows() if "data/skipped" in row][-1]
            for each in (run, alone)
        )
        happened = f"exit codes {codes}; {skipped} substitutes counted (one process: {expected})"
        return Row("a bad record", happened, None, None, 0, "trains to the end")

    def truncated(self, number: int) -> Row:
        """The largest file of one item in the newest checkpoint is cut in half."""
        item = ITEMS[number]
        run = Run(self._new())
        run.end()
        folder = run.workdir / "checkpoints" / str(STEPS) / item
        files = [path for path in folder.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        return self.resumed(f"newest checkpoint cut short in {item}/", "", run, None, reached=STEPS)

    def full_disk(self) -> Row:
        with mounted(self.folder / "disk", "6m") as place:
            keep = {"checkpoint.keep": 100}
            run = Run(place / "run", changes=keep)
            codes = run.end()
            happened, reached = f"exit codes {codes}: {run.sentence()}", run.step()
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            return self.resumed("disk full", happened, run, None, reached, changes=keep)

    def read_only(self) -> Row:
        with mounted(self.folder / "ro", "200m") as place:
            run = Run(place / "run", fault="slow:*:0")
            run.wait_for(lambda: run.step() >= 12)
            began = time.monotonic()
            # Over itself: files open for writing belong to the mount below, which would keep it
            # from becoming read-only.
            subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
            codes, ended = run.end(), time.monotonic() - began
            happened, reached = f"exit codes {codes}: {run.sentence()}", run.step()
            subprocess.run(["umount", "-l", str(place)], check=True)
            name = "checkpoint folder becomes read-only"
            return self.resumed(name, happened, run, ended, reached)

    # -- pieces

    def inside(self, name: str, fault: str, changes: dict[str, Any]) -> Row:
        """A fault that the process injects into itself."""
        run = Run(self._new(), fault=fault, changes=changes)
        step = int(fault.rsplit(":", 1)[1])
        if step:
            run.wait_for(lambda: run.step() >= step - 1)
        if not fault.startswith("stop"):
            return self.ended(name, run)
        began = time.monotonic()
        code, ended = run.processes[0].wait(240), time.monotonic() - began
        run.processes[1].kill()
        happened = f"exit codes {[code, 'killed after']}: {run.sentence()}"
        return self.resumed(name, happened, run, ended, run.step())

    def _new(self) -> Path:
        """A folder for the next run."""
        return self.folder / f"run{next(self._numbers)}"

    def ended(self, name: str, run: Run) -> Row:
        """Waits for the end after a fault, then restarts."""
        began = time.monotonic()
        codes, ended = run.end(), time.monotonic() - began
        return self.resumed(name, f"exit codes {codes}: {run.sentence()}", run, ended, run.step())

    def resumed(
        self,
        name: str,
        happened: str,
        run: Run,
        ended_s: float | None,
        reached: int,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> Row:
        """Runs the same command again to its end, and compares."""
        again = Run(run.workdir, changes=changes)
        resumed_s: list[float] = []

        def going() -> bool:
            if re.search(r"^step \d+/", again.said(), re.M):
                resumed_s.append(time.monotonic() - again.began)
                return True
            return all(process.poll() is not None for process in again.processes)

        again.wait_for(going)
        codes = again.end()
        if codes != [0, 0]:
            raise RuntimeError(f"{name}: it did not go on, exit codes {codes}:\n{again.said()}")
        found = re.search(r"resuming at step ([\d,]+)", again.said())
        start = int(found.group(1).replace(",", "")) if found else 0
        return Row(
            name,
            happened or again.sentence(),
            None if ended_s is None else round(ended_s, 1),
            round(resumed_s[0], 1) if resumed_s else None,
            max(reached - start, 0),
            self.compared(again),
        )

    def compared(self, run: Run) -> str:
        """How the logged numbers and the last checkpoint's arrays compare with the undisturbed
        run's.
        """
        same_rows = _timeless(run) == _timeless(self.straight)
        mine, theirs = _arrays(run.workdir), _arrays(self.straight.workdir)
        largest = max(float(np.max(np.abs(mine[n] - theirs[n]), initial=0)) for n in theirs)
        if same_rows and largest == 0:
            return "bit for bit"
        return f"{'same' if same_rows else 'other'} metrics, arrays off by {largest:.1e}"


def _timeless(run: Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in run.rows()
    ]


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system in memory of that size; whatever was mounted there is away afterwards."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        while place.is_mount():
            subprocess.run(["umount", "-l", str(place)], check=True)


def _arrays(workdir: Path) -> dict[str, np.ndarray]:
    folder = workdir / "checkpoints" / str(STEPS)
    return {
        f"{item}/{name}": np.asarray(array, np.float64)
        for item in ITEMS
        if item != "meta"
        for name, array in read_arrays(folder / item).items()
    }


SIGNALS = {  # name, signal, to which processes, data workers of each, which get it too
    "coordinator_gone": ("the coordinator (process 0) killed", signal.SIGKILL, [0], 0),
    "sigterm_to_one": ("SIGTERM to one process", signal.SIGTERM, [1], 0),
    "sigterm_to_all": ("SIGTERM to all, their data workers too", signal.SIGTERM, [0, 1], 2),
    "sigusr1_to_host": ("SIGUSR1 to one host, data workers too", signal.SIGUSR1, [1], 2),
}
INSIDE = {  # name, fault of tests/faulty_run.py, changes of the config
    "hangs": ("a process that hangs (SIGSTOP)", "stop:1:13", {}),
    "stuck_input": ("stuck input (patience 10 s)", "stuck:1:13", {"data.patience_s": 10}),
    "nan": ("NaN in the codebook of all", "nan:*:13", {}),
    "crash": ("an unforeseen exception on one host", "raise:1:13", {}),
    "worker_killed": ("a data worker killed", "kill-worker:1:13", {"data.workers": 2}),
    "other_code": ("other code on one host", "code:1:0", {}),
}


def named_rows(faults: Faults) -> dict[str, Callable[[], Row]]:
    """Each row by its name."""
    rows: dict[str, Callable[[], Row]] = {}
    for n in range(KILLS):
        rows[f"kill{n}"] = functools.partial(faults.kill_at_random, n)
    for n in range(len(ITEMS)):
        rows[f"truncated{n}"] = functools.partial(faults.truncated, n)
    for name, settings in SIGNALS.items():
        rows[name] = functools.partial(faults.signalled, *settings)
    for name, settings in INSIDE.items():
        rows[name] = functools.partial(faults.inside, *settings)
    others = faults.bad_record, faults.other_config, faults.not_shared, faults.missing_process
    rows |= {method.__name__: method for method in others}
    if hasattr(os, "geteuid") and os.geteuid() == 0 and sys.platform == "linux":
        rows |= {"full_disk": faults.full_disk, "read_only": faults.read_only}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of rows; default: all")
    parser.add_argument("--out", help="a JSON file for the rows; rows of other names stay in it")
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # Orbax warns of files that these folders never have
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    rows = read(options.out) if options.out and Path(options.out).exists() else {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        made = named_rows(Faults(Path(folder)))
        for name in options.only or made:
            try:
                rows[name] = made[name]()
            except Exception as failure:
                failed.append(name)
                print(f"{name} FAILED: {failure}", flush=True)
                continue
            print(f"{name}: {rows[name]._asdict()}", flush=True)
            if options.out:
                write_json(options.out, {n: rows[n]._asdict() for n in made if n in rows})
    print(table(list(rows.values())))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
