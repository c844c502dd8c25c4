"""A run from start to end: build, restore, loop, log, evaluate, save. Knows nothing about
losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np

from codebook_jax import build, modes
from codebook_jax.console import say
from codebook_jax.data import text
from codebook_jax.data.batch import Batch
from codebook_jax.data.pipeline import BadRate
from codebook_jax.errors import UserError
from codebook_jax.evaluation.retrieval import counted
from codebook_jax.files import check_outputs
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers
from codebook_jax.parallel.processes.agreement import Agreement, Tally
from codebook_jax.parallel.processes.joining import end
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import BEST, FOLDER, Checkpoints, Restored
from codebook_jax.run.interruption import Interrupted, Interruption, Stuck, patience
from codebook_jax.run.metrics import FILE, Clock, Metrics, ProgressReport
from codebook_jax.run.ownership import owned
from codebook_jax.weights.start import specs

INPUT_BOUND_SHARE = (
    0.3  # of a step's time; prefetching keeps it near zero until the data cannot keep up
)
SCORE = "mean of the recalls of student/dual in validation"


def fit(config: ml_collections.ConfigDict, workdir: Path | str) -> bool:
    """Trains as `config` says, continuing from the newest checkpoint of `workdir` if it has one.

    Returns False if a signal stopped it before its last step.
    """
    workdir = Path(workdir).absolute()
    build.check(config)
    with _own_checkpoints(config, workdir) as checkpoints, Interruption() as stop:
        saved = checkpoints.steps()
        peers.connected().compare(
            "checkpoints", {"saved steps": saved}, "all hosts must see the same workdir"
        )
        parts = build.build_training(config, workdir, steps_saved=saved)
        build.announce(parts)
        say(build.whereabouts(config, workdir))
        restored = checkpoints.restore_newest(parts.task.abstract_state())
        if restored is None:
            restored = Restored(0, build.first_state(parts), {"unreadable": 0})
        else:
            say(resumption(restored, config.data.global_batch))
        parts = parts._replace(start=None)  # gigabytes, now part of the state
        step = restored.step
        redo = step not in checkpoints.scores
        with (
            Metrics(workdir, step=step, redo_evaluation=redo) as metrics,
            ProgressReport(start=step, steps=config.train.steps) as progress,
            parts.device.explaining(parts.compiled) if parts.compiled else contextlib.nullcontext(),
        ):
            run = Run(parts, checkpoints, metrics, progress, stop, restored)
            try:
                run.finish()
            except Exception as error:
                peers.connected().end_all(error, checkpoints.wait)
                raise
            done = run.step >= config.train.steps
    if done:
        say(next_steps(run.step, workdir))
    return done


class Run:
    """A run in progress: its parts, its state, and the step that the state has reached."""

    def __init__(
        self,
        parts: build.Parts,
        checkpoints: Checkpoints,
        metrics: Metrics,
        progress: ProgressReport,
        stop: Interruption,
        start: Restored,
    ) -> None:
        self.parts, self.config = parts, parts.config
        self.train_step = parts.compiled.program if parts.compiled else parts.task.step
        self.checkpoints, self.metrics, self.progress, self.stop = (
            checkpoints,
            metrics,
            progress,
            stop,
        )
        self.state, self.step = start.state, start.step
        self.agreement = Agreement(parts.mesh)
        self.agreed = False  # some process was asked to stop, and all of them know
        self.bad_in_row = 0
        self.warned_input_bound = False
        self.clock = Clock()
        self.bad_rate = BadRate(self.config.data.max_bad_rate, start.meta["unreadable"])

    @property
    def stopping(self) -> bool:
        """Whether to stop here; several processes all stop at the same step."""
        return self.stop.requested if self.agreement.alone else self.agreed

    def finish(self) -> None:
        """Trains until the last step or a signal; then saves and evaluates the newest state."""
        steps = self.config.train.steps
        if self.step >= steps:
            say(
                f"step {self.step:,} of {steps:,} is already reached: raise config.train.steps to "
                "continue"
            )
        elif self.step and self.evaluation_due() and self.step not in self.checkpoints.scores:
            self.evaluate()  # its first evaluation was cut short
        self.loop()
        self.agreed |= self.agreement.any(self.stop.requested)
        self.checkpoints.wait()
        if self.step and self.step not in self.checkpoints.steps():
            self.save()
        if not self.stopping and self.step not in self.checkpoints.scores:
            self.evaluate()
        self.checkpoints.wait()
        if self.stopping:
            saved = self.checkpoints.steps()
            newest = f"saved step {saved[-1]:,}" if saved else "nothing to save"
            say(f"{newest} on {self.stop.name or 'a signal to another process'}")

    def loop(self) -> None:
        """Runs the steps; the step number is the position in the data.

        Scalars are read one step late, so that the next batch and its step are already queued while
        the previous step runs.
        """
        pending = None
        with contextlib.ExitStack() as streams:
            batches = streams.enter_context(build.batches(self.parts, start_step=self.step))
            while self.step < self.config.train.steps and not self.stopping:
                batch = self.next_batch(batches)
                if batch is None and self.agreement.alone:
                    break
                if (
                    batch is None
                ):  # the other processes will run this step: read the same stream without workers
                    config = records.with_fields(self.config, {"data.workers": 0})
                    alike = build.batches(self.parts._replace(config=config), start_step=self.step)
                    batches = streams.enter_context(alike)
                    continue
                placed = sharding.put_batch(batch, self.parts.mesh)
                tally = self.agreement.tally(self.stop.requested, batch, placed)
                self.state, scalars = self.train_step(self.state, placed)
                self.step += 1
                self.settle(pending)
                pending = _Pending(self.step, scalars, placed.example, tally)
                evaluate = self.evaluation_due()
                if evaluate or self.step % self.config.checkpoint.every_steps == 0:
                    self.settle(pending)
                    pending = None
                    self.save()
                if evaluate and self.step < self.config.train.steps:
                    self.evaluate()
            self.settle(pending)

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None if its worker processes were killed by the signal that also stops
        this run.

        If it takes longer than `data.patience_s` the process exits, since a hanging reader cannot
        be joined.
        """
        began = time.monotonic()
        try:
            with patience(self.config.data.patience_s, f"the batch of step {self.step + 1:,}"):
                batch = next(batches)
        except Stuck as stuck:
            self.give_up(stuck)
        except UserError:
            raise
        except Exception:
            if self.stop.arrives_within(seconds=2.0):
                return None
            raise
        self.clock.waited(time.monotonic() - began)
        return batch

    def give_up(self, stuck: Stuck) -> NoReturn:
        """Saves what can be saved without the other processes, and exits."""
        if self.agreement.alone and self.step not in self.checkpoints.steps():
            self.save()
        if self.agreement.alone:
            self.checkpoints.wait()
        saved = self.checkpoints.steps()
        kept = f"step {saved[-1]:,} is saved" if saved else "nothing is saved"
        sentence = (
            f"{stuck}; {kept}: see whether the place of the training data answers, and start again"
        )
        peers.connected().fail(sentence)
        end(sentence, 1)

    def settle(self, pending: _Pending | None) -> None:
        """Reads a step's scalars: counts bad steps and records, logs if due. Raises UserError if
        the run must stop.
        """
        if pending is None:
            return
        self.agreed |= bool(pending.tally.stop)
        self.bad_rate.add(
            unreadable=int(pending.tally.unreadable), read=self.config.data.global_batch
        )
        self.progress.advance(pending.step)
        bad = bool(pending.scalars["bad_step"])
        logged = pending.step % self.config.log_every_steps == 0 or pending.step == 1
        if not (bad or logged):
            self.bad_in_row = 0
            return
        row = {name: value.item() for name, value in jax.device_get(pending.scalars).items()}
        row["data/skipped"] = self.bad_rate.unreadable
        self.bad_in_row = int(row["bad_in_row"])
        if bad:
            examples = sharding.to_host(pending.examples).tolist()
            row |= {"bad/terms": ", ".join(broken_terms(row)), "bad/examples": str(examples)}
        if logged:
            row |= self.clock.report(self.config.data.global_batch)
            self.progress.report(pending.step, row)
            self.warn_if_input_bound(row)
        self.metrics.write(pending.step, row)
        if bad:
            self.report_bad(pending.step, row["bad/terms"], examples)

    def report_bad(self, step: int, terms: str, examples: list[int]) -> None:
        """Prints which step was not finite; raises UserError after too many in a row."""
        most = self.config.optimizer.max_bad_steps
        some = ", ".join(str(example) for example in examples[:8])
        more = f" and {len(examples) - 8} more" if len(examples) > 8 else ""
        say(
            f"step {step:,} was skipped: {terms} not finite; {self.bad_in_row} in a row, the run "
            f"stops at {most}; its examples: {some}{more} (all in metrics.jsonl)"
        )
        if self.bad_in_row >= most:
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
            newest = (
                f"the checkpoint of step {saved[-1]:,} is untouched"
                if saved
                else "nothing was saved"
            )
            raise UserError(
                f"stopped at step {step:,}: {most} steps in a row were not finite ({terms}); "
                f"{newest}: try a lower config.optimizer.learning_rate, "
                "config.optimizer.clip_norm=1, or config.model.dtype=float32"
            )

    def warn_if_input_bound(self, row: Mapping[str, Any]) -> None:
        """Warns once if the device waits for data."""
        share = row["time/data_wait_share"]
        if share < INPUT_BOUND_SHARE or self.warned_input_bound or self.step < 2:
            return
        self.warned_input_bound = True
        data = self.config.data
        say(
            f"input-bound: {share:.0%} of the step time is spent waiting for data; raise "
            f"config.data.threads (now {data.threads}) or config.data.workers (now "
            f"{data.workers}), or pack smaller pictures with --mode=prepare"
        )

    def evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Saves the state unless its last steps were bad, so that it never replaces a good
        checkpoint.
        """
        if self.bad_in_row:
            say(
                f"step {self.step:,} is not saved: the last {self.bad_in_row} steps were not finite"
            )
            return
        began = time.monotonic()
        self.metrics.flush()
        meta = meta_of(self.parts, self.step, unreadable=self.bad_rate.unreadable)
        self.checkpoints.save(self.step, self.state, meta)
        self.clock.paused(time.monotonic() - began)

    def evaluate(self) -> None:
        """Retrieval on the validation data; a signal interrupts it, and the next start
        repeats it.
        """
        if self.bad_in_row:
            return
        began = time.monotonic()
        try:
            last = self.step >= self.config.train.steps
            if self.agreement.alone:
                with self.stop.may_interrupt():
                    protocols = build.validate(self.parts, self.state, last=last)
            else:
                protocols = build.validate(
                    self.parts, self.state, last=last, progress=self.interrupt
                )
        except Interrupted:
            return
        row = flat_evaluation(protocols)
        seconds = time.monotonic() - began
        self.clock.paused(seconds)
        self.metrics.write(self.step, {**row, "time/evaluation_s": seconds})
        recalls = recalls_of(protocols["student/dual"])
        self.checkpoints.record_score(self.step, float(np.mean(list(recalls.values()))), SCORE)
        best = self.checkpoints.best_step()
        say(
            f"validation at step {self.step:,}: R@1 image to text {row['eval/txt_r1']:.1f} %, text "
            f"to image {row['eval/img_r1']:.1f} % (chance {row['eval/chance_r1']:.1f} %) on "
            f"{counted(protocols['student/dual'])}"
            + ("; the best so far" if best == self.step else f"; the best is still step {best}")
        )

    def interrupt(self, what: str, done: int, of: int) -> None:
        """Called between two batches of an evaluation: raises Interrupted on all processes if one
        was asked to stop.
        """
        self.agreed |= self.agreement.any(self.stop.requested)
        if self.agreed:
            raise Interrupted


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose scalars are still on the device."""

    step: int
    scalars: dict[str, jax.Array]
    examples: jax.Array  # numbers of the batch's records
    tally: Tally


def import_weights(config: ml_collections.ConfigDict, workdir: Path | str) -> None:
    """Makes a run whose checkpoint of step 0 holds the weights that config.init names."""
    workdir = Path(workdir).absolute()
    build.check(config)
    if not specs(config.init):
        raise UserError(
            "config.init=random names no weights to import: give some, e.g. "
            "--config.init=model:ALBEF.pth"
        )
    with _own_checkpoints(config, workdir) as checkpoints:
        if saved := checkpoints.steps():
            raise UserError(
                f"--workdir={workdir} already holds a run (step {saved[-1]:,}): give another "
                "folder to import into"
            )
        parts = build.build_training(config, workdir, steps_saved=[], learns=False)
        build.announce(parts)
        checkpoints.save(0, build.first_state(parts), meta_of(parts, 0, unreadable=0))
        checkpoints.wait()
    say(next_steps(0, workdir))


@contextlib.contextmanager
def _own_checkpoints(config: ml_collections.ConfigDict, workdir: Path) -> Iterator[Checkpoints]:
    """The checkpoints of a workdir owned by this run; raises UserError if another run owns it or it
    cannot be written.
    """
    check_outputs(workdir, (records.RECORD, FILE, BEST), (FOLDER, text.FOLDER))
    alone = owned(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone:
        peers.connected().exchange("workdir owned", None)
        with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
            yield checkpoints


def meta_of(parts: build.Parts, step: int, *, unreadable: int) -> dict[str, Any]:
    """The metadata saved with the state of `step`."""
    return {
        "config": parts.config.to_dict(),
        "data_position": step * parts.config.data.global_batch,
        "fingerprint": parts.source.fingerprint(),
        "unreadable": unreadable,
        "versions": records.package_versions(),
    }


def next_steps(step: int, workdir: Path) -> str:
    """What a trained run can be used for, with the command for each."""
    uses = [name for name, mode in modes.MODES.items() if mode.group in modes.USES]
    width = max(map(len, uses))
    lines = [f"  {name:{width}}  {modes.command_line(name, workdir)}" for name in uses]
    return "\n".join(
        [f"{workdir} holds the model of step {step:,}; what you can do with it:", *lines]
    )


def resumption(restored: Restored, global_batch: int) -> str:
    """The sentence printed when a run resumes."""
    minutes = (time.time() - restored.meta["saved_at"]) / 60
    age = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return (
        f"resuming at step {restored.step:,} (checkpoint {age} old, data position "
        f"{restored.step * global_batch:,})"
    )


def broken_terms(row: Mapping[str, Any]) -> list[str]:
    """Names of the losses that are not finite; if all of them are finite, of the other scalars that
    are not.
    """
    broken = [name for name, value in row.items() if not math.isfinite(value)]
    losses = [name for name in broken if name.startswith("loss/")]
    return losses or broken or ["the gradient"]


def flat_evaluation(protocols: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`eval/txt_r1`, ... of student/dual with its chance and counts, and the recalls of the other
    protocols.
    """
    row = {f"eval/{name}": value for name, value in protocols["student/dual"].items()}
    for protocol, prefix in (("teacher/dual", "teacher"), ("student/reranked", "reranked")):
        if protocol in protocols:
            row |= {
                f"eval/{prefix}_{name}": value
                for name, value in recalls_of(protocols[protocol]).items()
            }
    return row


def recalls_of(values: Mapping[str, float]) -> dict[str, float]:
    """The recalls of a protocol, without its chance levels and counts."""
    return {name: value for name, value in values.items() if name.startswith(("txt_r", "img_r"))}
