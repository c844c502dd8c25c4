"""A run from start to end: build, restore, loop, log, evaluate, save; nothing about losses."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np

from codebook_jax import build, summary
from codebook_jax.console import duration, say
from codebook_jax.data import text
from codebook_jax.data.batch import Batch
from codebook_jax.data.pipeline import BadRate
from codebook_jax.errors import UserError, first_few
from codebook_jax.files import check_outputs
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers
from codebook_jax.parallel.processes.joining import end
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import BEST, FOLDER, Checkpoints, Restored
from codebook_jax.run.metrics import FILE, Metrics, Pace
from codebook_jax.run.ownership import owned
from codebook_jax.stop import Interruption, Stuck, patience
from codebook_jax.tasks.task import Evaluation
from codebook_jax.weights import start as weights

# Of a step's time; prefetching keeps it near zero until the data cannot keep up.
INPUT_BOUND_SHARE = 0.3


def fit(config: ml_collections.ConfigDict, workdir: Path | str) -> bool:
    """Trains as `config` says, continuing from the newest checkpoint of `workdir` if it has one;
    False if a signal stopped it before its last step.
    """
    workdir = Path(workdir).absolute()
    build.check(config)
    with own_checkpoints(config, workdir) as checkpoints, Interruption() as stop:
        saved = checkpoints.steps()
        peers.connected().compare(
            "checkpoints", {"saved steps": saved}, "all hosts must see the same workdir"
        )
        parts = build.build_training(config, workdir, steps_saved=saved)
        summary.announce(parts)
        say(summary.whereabouts(config, workdir))
        restored = checkpoints.restore_newest(parts.task.abstract_state())
        steps, batch = parts.config.train.steps, config.data.global_batch
        if restored is None:
            restored = Restored(0, build.first_state(parts), {"unreadable": 0})
        else:
            age = duration(time.time() - restored.meta["saved_at"])
            place = f"checkpoint {age} old, data position {restored.step * batch:,}"
            say(f"resuming at step {restored.step:,} ({place})")
        parts = parts._replace(start=None)  # gigabytes, now part of the state
        step, state, meta = restored
        with (
            Metrics(workdir, step=step, redo_evaluation=step not in checkpoints.scores) as metrics,
            Pace(start=step, steps=steps, global_batch=batch) as pace,
            parts.device.explaining(parts.compiled) if parts.compiled else contextlib.nullcontext(),
        ):
            bad_rate = BadRate(config.data.max_bad_rate, meta["unreadable"], parts.task.reads)
            run = Run(parts, checkpoints, metrics, pace, stop, bad_rate, state, step)
            try:
                run.finish()
            except Exception as error:
                peers.connected().end_all(error, checkpoints.wait)
                raise
    if run.step < steps:
        return False
    say(summary.next_steps(run.step, workdir))
    return True


class Interrupted(Exception):
    """A process was asked to stop during an evaluation."""


@dataclass
class Run:
    """A run in progress: its parts, its state, and the step that the state has reached."""

    parts: build.Parts
    checkpoints: Checkpoints
    metrics: Metrics
    pace: Pace
    stop: Interruption
    bad_rate: BadRate
    state: Any
    step: int
    agreed: bool = False  # some process was asked to stop, and all of them know
    # The step before, while it runs: its number, scalars, records and totals.
    pending: tuple[int, dict[str, jax.Array], jax.Array, Sequence[jax.Array | int]] | None = None
    bad_in_row: int = 0
    warned_input_bound: bool = False

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.parts.config

    @property
    def stopping(self) -> bool:
        """Whether to stop here; several processes all stop at the same step."""
        return bool(self.stop.name) if jax.process_count() == 1 else self.agreed

    @property
    def fine_tunes(self) -> bool:
        """Whether the run starts from a whole trained model."""
        return "model" in weights.specs(self.config.init)

    def finish(self) -> None:
        """Trains until the last step or a signal; then saves and evaluates the newest state."""
        steps = self.config.train.steps
        if self.step >= steps:
            say(f"step {self.step:,} of {steps:,} is reached: raise config.train.steps to go on")
        if self.step < steps and (self.evaluation_due() if self.step else self.fine_tunes):
            self.evaluate()  # unless the last start did
        self.loop()
        self.agree()
        self.save_newest()
        between = self.try_between()
        self.evaluate()
        scores, kept = self.checkpoints.scores, self.checkpoints.best_step()
        if between and self.step in scores and kept is not None:
            ends = {0.0: scores[0], 1.0: scores[self.step]}
            say(summary.best_between(ends | between, kept, scores[kept]))
        self.checkpoints.wait()
        if self.stopping:
            saved = [f"saved step {step:,}" for step in self.checkpoints.steps()]
            why = self.stop.name or "a signal to another process"
            say(f"{saved[-1] if saved else 'nothing to save'} on {why}")

    def loop(self) -> None:
        """Runs the steps; the step number is the position in the data.

        Scalars are read one step late, so that the next batch and its step are already queued while
        the previous step runs.
        """
        compiled = self.parts.compiled
        train_step = compiled.program if compiled else self.parts.task.step
        with contextlib.ExitStack() as streams:
            batches = streams.enter_context(build.batches(self.parts, start_step=self.step))
            while self.step < self.config.train.steps and not self.stopping:
                batch = self.next_batch(batches)
                if batch is None:  # others may run this step still: read on without workers
                    alike = build.batches(self.parts, start_step=self.step, workers=0)
                    batches = streams.enter_context(alike)
                    continue
                placed = sharding.put_batch(batch, self.parts.mesh)
                totals = self.totals(batch, placed)
                self.state, scalars = train_step(self.state, placed)
                self.step += 1
                self.settle()
                self.pending = self.step, scalars, placed.example, totals
                due = self.step < self.config.train.steps and self.evaluation_due()  # else: finish
                if due or self.step % self.config.checkpoint.every_steps == 0:
                    self.settle()
                    self.save()
                if due:
                    self.evaluate()
            self.settle()

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None if the signal that stops this run killed its worker processes.

        After `data.patience_s` the process exits, since a hanging reader cannot be joined.
        """
        began = time.monotonic()
        try:
            with patience(self.config.data.patience_s, f"the batch of step {self.step + 1:,}"):
                batch = next(batches)
        except Stuck as stuck:
            self.give_up(stuck)
        except Exception as error:
            if isinstance(error, UserError) or not self.stop.arrives_within(seconds=2.0):
                raise
            return None
        self.pace.waited(time.monotonic() - began)
        return batch

    def give_up(self, stuck: Stuck) -> NoReturn:
        """Saves what can be saved without the other processes, and exits."""
        if jax.process_count() == 1:
            self.save_newest()
            self.checkpoints.wait()
        sentence = (
            f"{stuck}; {self.checkpoints.kept()}: see whether the place of the training data "
            "answers, and start again"
        )
        peers.connected().fail(sentence)
        end(sentence, 1)

    def settle(self) -> None:
        """Reads the pending step's scalars, logs if due; raises UserError if the run must stop."""
        if self.pending is None:
            return
        (step, scalars, examples, (stop, unreadable)), self.pending = self.pending, None
        self.agreed |= bool(stop)
        self.bad_rate.add(unreadable=int(unreadable), read=self.config.data.global_batch)
        self.pace.advance(step)
        bad = bool(scalars["bad_step"])
        self.bad_in_row = self.bad_in_row + 1 if bad else 0
        logged = step % self.config.log_every_steps == 0 or step == 1
        if not (bad or logged):
            return
        row = {name: value.item() for name, value in jax.device_get(scalars).items()}
        row["data/skipped"] = self.bad_rate.unreadable
        if bad:
            examples = sharding.to_host(examples).tolist()
            row |= {"bad/terms": ", ".join(broken_terms(row)), "bad/examples": str(examples)}
        if logged:
            row |= self.pace.report(step, row["loss"])
            self.warn_if_input_bound(row["time/data_wait_share"])
        self.metrics.write(step, row)
        if bad:
            self.report_bad(step, row["bad/terms"], examples)

    def report_bad(self, step: int, terms: str, examples: list[int]) -> None:
        """Prints which step was not finite; raises UserError after too many in a row."""
        most = self.config.optimizer.max_bad_steps
        say(
            f"step {step:,} was skipped: {terms} not finite; {self.bad_in_row} in a row, the run "
            f"stops at {most}; its examples: {first_few(examples, 8)} (all in metrics.jsonl)"
        )
        if self.bad_in_row >= most:
            self.checkpoints.wait()
            raise UserError(
                f"stopped at step {step:,}: {most} steps in a row were not finite ({terms}); "
                f"{self.checkpoints.kept()}: try a lower config.optimizer.learning_rate, "
                "config.optimizer.clip_norm=1, or config.model.dtype=float32"
            )

    def warn_if_input_bound(self, share: float) -> None:
        """Warns once if the device waits for data."""
        if share < INPUT_BOUND_SHARE or self.warned_input_bound or self.step < 2:
            return
        self.warned_input_bound, data = True, self.config.data
        packed = (
            ""
            if self.parts.task.reads == "stories"
            else ", or pack smaller pictures with --mode=prepare"
        )
        say(
            f"input-bound: {share:.0%} of the step time is spent waiting for data; raise "
            f"config.data.threads (now {data.threads}) or config.data.workers (now "
            f"{data.workers}){packed}"
        )

    def evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Saves the state unless its last steps were bad: it never replaces a good checkpoint."""
        if self.bad_in_row:
            say(f"step {self.step:,} is not saved: {self.bad_in_row} steps were not finite")
            return
        meta = meta_of(self.parts, self.step, unreadable=self.bad_rate.unreadable)
        with self.pace.paused():
            self.metrics.flush()
            self.checkpoints.save(self.step, self.state, meta)

    def save_newest(self) -> None:
        """Saves the state if its step is neither saved nor being saved."""
        self.checkpoints.wait()
        if self.step and self.step not in self.checkpoints.steps():
            self.save()

    def evaluate(self) -> None:
        """Evaluates a step once on validation data; the next start repeats what is interrupted."""
        if self.bad_in_row or self.stopping or self.step in self.checkpoints.scores:
            return
        began = time.monotonic()
        try:
            with self.pace.paused():
                found = self.validate(self.state, final=self.step >= self.config.train.steps)
        except Interrupted:
            return
        seconds = time.monotonic() - began
        self.metrics.write(self.step, {**found.scalars, "time/evaluation_s": seconds})
        self.checkpoints.record_score(self.step, found.score, found.metric)
        best = self.checkpoints.best_step()
        rank = "the best so far" if best == self.step else f"the best is still step {best}"
        if best is None:
            rank = "without known answers none is the best: name data.eval that has some"
        rank = rank if self.step else "before the first step"
        say(f"validation at step {self.step:,}: {found.summary}; {rank}")
        if found.score < (start := self.checkpoints.scores.get(0, -math.inf)):
            say(summary.below_start(self.config, found, start))

    def validate(self, state: Any, *, final: bool) -> Evaluation:
        """What a state is worth on validation data; raises Interrupted."""
        return self.parts.task.evaluate(
            state,
            self.parts.validation,
            self.parts.tokenizer,
            images=build.validation_images(self.config),
            final=final,
            progress=self.interrupt,
        )

    def try_between(self) -> dict[float, float]:
        """The validation scores of weights between the first and the last ones, by the share of the
        way, if the run has ended and this was not done before (Wortsman et al. 2022).
        """
        shares, done = self.config.evaluation.between, self.step in self.checkpoints.scores
        if self.step < self.config.train.steps or self.bad_in_row or done or not self.fine_tunes:
            return {}
        if math.isnan(self.checkpoints.scores.get(0, math.nan)):  # nothing to compare them with
            return {}
        task, name = self.parts.task, self.parts.task.checkpoint_items().trained
        start = weights.read_start(self.config, task.adopts) if shares else ()
        scores = {}
        for share in shares:
            mixed = build.between(task, start, getattr(self.state, name), share)
            try:
                with self.pace.paused():
                    found = self.validate(self.state.replace(**{name: mixed}), final=False)
            except Interrupted:
                return {}
            scores[share] = found.score
            self.metrics.write(self.step, {"between/share": share, "between/score": found.score})
        return scores

    def interrupt(self, what: str, done: int, of: int) -> None:
        """Called between two batches of an evaluation: raises Interrupted on all processes."""
        self.agree()
        if self.stopping:
            raise Interrupted

    def totals(self, batch: Batch, placed: Batch) -> Sequence[jax.Array | int]:
        """Of all processes, still on the device: how many were asked to stop before this step began
        there (all go by the first step with some), and pictures replaced in its batch.
        """
        if jax.process_count() == 1:
            return bool(self.stop.name), int(np.sum(batch.skipped))
        return sums((self.flags(), placed.skipped), self.parts.mesh)

    def agree(self) -> None:
        """Learns whether any process was asked to stop; waits for all of them."""
        if jax.process_count() > 1:
            self.agreed |= bool(sums((self.flags(),), self.parts.mesh)[0])

    def flags(self) -> jax.Array:
        """Whether this process was asked to stop, bool [shards], in the places of its devices."""
        flags = np.full(sharding.data_shards(self.parts.mesh), bool(self.stop.name))
        return sharding.to_device(flags, self.parts.mesh)


@functools.partial(jax.jit, static_argnums=1)
def sums(arrays: Sequence[jax.Array], mesh: jax.sharding.Mesh) -> Sequence[jax.Array]:
    return sharding.whole([array.sum() for array in arrays], mesh)


@contextlib.contextmanager
def own_checkpoints(config: ml_collections.ConfigDict, workdir: Path) -> Iterator[Checkpoints]:
    """The checkpoints of a workdir that this run alone owns; raises UserError if it cannot."""
    check_outputs(workdir, (records.RECORD, FILE, BEST), (FOLDER, text.FOLDER))
    with owned(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        peers.connected().exchange("workdir owned", None)
        alone = build.task_class(config).checkpoint_items().alone
        with Checkpoints(workdir, alone, keep=config.checkpoint.keep) as checkpoints:
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


def broken_terms(row: Mapping[str, Any]) -> list[str]:
    """Names of the losses that are not finite; if all are, of the other scalars that are not."""
    broken = [name for name, value in row.items() if not math.isfinite(value)]
    losses = [name for name in broken if name.startswith("loss/")]
    return losses or broken or ["the gradient"]
