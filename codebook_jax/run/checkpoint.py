"""Checkpoints of a run: saved in the background, restored onto any mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jaxtyping import PyTree

from codebook_jax.console import say
from codebook_jax.errors import UserError, reason
from codebook_jax.files import check_room, parse_json, write_json, write_probe
from codebook_jax.parallel.processes import peers

REST = "rest"
META = "meta"
BEST = "best.json"
FOLDER = "checkpoints"
LEAST_ROOM = 0.9  # share of a state's bytes that must be free: trained floats hardly compress


class Restored(NamedTuple):
    """A state read back, the step it was saved after, and the metadata saved with it."""

    step: int
    state: PyTree
    meta: dict[str, Any]


class Checkpoints(contextlib.AbstractContextManager):
    """The folder `checkpoints/` of a run, one folder per step, each complete or absent.

    `alone` names the fields of the state that can be restored alone; the others are stored
    together. Every process calls every method; leaving the `with` waits for the save in progress.
    """

    def __init__(
        self, workdir: Path | str, alone: Sequence[str], *, keep: int, create: bool = True
    ) -> None:
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / FOLDER
        self._alone, self._keep = tuple(alone), keep
        self._saving: int | None = None
        self._half_written: Path | None = None
        self.scores = _read_scores(self._workdir / BEST)
        handlers = {name: ocp.StandardCheckpointHandler() for name in (*alone, REST)}
        handlers[META] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(
            create=create, cleanup_tmp_directories=create, preservation_policy=self
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        # The manager's own reader waits for all processes, forever if reading failed in one.
        own = jax.process_index()
        one = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        composite = ocp.CompositeOptions(multiprocessing_options=one)
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(composite_options=composite, **handlers),
            multiprocessing_options=one,
        )

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._reader.close()
            self._manager.close()
            if self._half_written is not None and jax.process_index() == 0:
                shutil.rmtree(self._half_written, ignore_errors=True)  # a retry needs the room

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first, without the one being written."""
        return sorted(step for step in self._manager.all_steps() if step != self._saving)

    def kept(self) -> str:
        """What a failed run leaves, for a sentence."""
        steps = self.steps()
        return f"step {steps[-1]:,} is saved" if steps else "nothing is saved"

    def best_step(self, steps: list[int] | None = None) -> int | None:
        """The saved step, or that of `steps`, that scored highest in validation; None without."""
        steps = self.steps() if steps is None else steps
        scored = [step for step in steps if not math.isnan(self.scores.get(step, math.nan))]
        return max(scored, key=self.scores.__getitem__, default=None)  # the earliest of equals

    def step_to_use(self) -> int | None:
        """The best step in validation, the newest if none was scored; None if none is saved."""
        best = self.best_step()
        return max(self.steps(), default=None) if best is None else best

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Tells Orbax to keep the newest checkpoints and the best."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self._keep :], self.best_step(steps)}
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def record_score(self, step: int, score: float, metric: str) -> None:
        """Records the validation score of the saved `step`; NaN is never the best."""
        self.wait()
        self.scores[step] = score
        best = self.best_step()
        if jax.process_index() == 0:
            scores = {at: None if math.isnan(x) else x for at, x in sorted(self.scores.items())}
            record = {"step": best, "score": scores.get(best), "metric": metric, "scores": scores}
            write_json(self._workdir / BEST, record)

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Starts writing `state` in the background.

        The arrays are copied before it returns, so the next step may donate them. Raises UserError
        if this save or the previous one failed, or if `step` is already saved.
        """
        self.wait()
        items = _items(state, self._alone).items()
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items}
        arguments[META] = ocp.args.JsonSave({"step": step, "saved_at": time.time(), **meta})
        with self._writing(step):
            # Orbax would wait for minutes for a process whose save fails
            write_probe(self._folder)
            check_room(
                self._folder, LEAST_ROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            )
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)

    def wait(self) -> None:
        """Waits until nothing is being written; raises UserError if the last save failed."""
        with self._writing(self._saving):
            self._manager.wait_until_finished()
        self._saving = None

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Raises UserError for a checkpoint that cannot be written, not for a lost process."""
        try:
            yield
        except Exception as failure:
            if jax.process_count() > 1 and peers.of_a_peer(failure):
                raise
            self._saving, self._half_written = None, self._folder / f"{step}.orbax-checkpoint-tmp"
            self._manager.reload()  # the steps that this save would have replaced, too
            raise UserError(
                f"the checkpoint of step {step:,} could not be written to {self._folder} "
                f"({getattr(failure, 'strerror', None) or reason(failure)}); {self.kept()}: mend "
                "this and start the same command again"
            ) from failure

    def restore_newest(self, abstract_state: PyTree) -> Restored | None:
        """The newest checkpoint that can be read, placed as `abstract_state` says; None when there
        is none.

        Damaged newer ones are renamed, never deleted, once an older one has been read. Raises
        UserError if none of several can be read, such as those of another model.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored, own = None, ""
            try:
                restored = self.restore(step, abstract_state)
            except jax.errors.JaxRuntimeError:  # of the device, not of the file
                raise
            except Exception as failure:
                own = reason(failure)
            # If the state is split over processes, only one may have read the damaged part.
            why = next(filter(None, peers.connected().exchange("restored", own)), None)
            if why is not None:
                damaged[step] = why
                continue
            for bad_step, why in damaged.items():
                self._set_aside(bad_step, why)
            for later in [at for at in self.scores if at > step]:
                del self.scores[later]
            return restored
        if damaged:
            step, why = next(iter(damaged.items()))
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {self._folder} can be read (step "
                f"{step:,}: {why}): repair them, give the config they were trained with, or start "
                "again in another --workdir"
            )
        return None

    def restore(
        self, step: int, abstract_state: PyTree, items: Sequence[str] | None = None
    ) -> Restored:
        """The checkpoint of `step`, each array placed as `abstract_state` says.

        Fields that are not in `items` (None: all) are None. Raises what Orbax raises if the files
        are damaged, or names or shapes differ from `abstract_state`. No process waits for another.
        """
        wanted = {
            name: tree
            for name, tree in _items(abstract_state, self._alone).items()
            if items is None or name in items
        }
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        arguments[META] = ocp.args.JsonRestore()
        stored = self._reader.restore(
            self._folder / str(step), args=ocp.args.Composite(**arguments)
        )
        trees = {name: stored[name] for name in wanted}
        return Restored(step, _state(abstract_state, trees, self._alone), stored[META])

    def _set_aside(self, step: int, why: str) -> None:
        names = (f"damaged-{step}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
        aside = next(name for name in names if not (self._folder / name).exists())
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder / aside)
        peers.connected().exchange("set_aside", "")  # nobody looks for steps before it is renamed
        say(
            f"the checkpoint of step {step:,} is damaged ({why}); it is set aside as {aside}, and "
            "the newest good one is used"
        )
        self._manager.reload()


def _read_scores(path: Path) -> dict[int, float]:
    if not path.exists():
        return {}
    try:
        scores = parse_json(path.read_bytes())["scores"]
        return {int(step): math.nan if one is None else float(one) for step, one in scores.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the record of a run's best step ({type(error).__name__}: {error}): "
            "put the original back, or remove it"
        ) from error


def read_arrays(item: Path) -> dict[str, np.ndarray]:
    """{name: array} of one saved item, such as checkpoints/<step>/student, on the host; raises what
    Orbax raises.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        there = checkpointer.metadata(item).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
        arrays = checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return traverse_util.flatten_dict(arrays, sep="/")


def _items(state: PyTree, alone: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The state as named items, each a nested dict with string keys, whatever it is built of."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    rest = traverse_util.unflatten_dict({_names(path): leaf for path, leaf in leaves})
    return {name: rest.pop(name) for name in alone if name in rest} | {REST: rest}


def _state(like: PyTree, trees: dict[str, Any], alone: Sequence[str]) -> PyTree:
    """The inverse of `_items` for the items in `trees`; other fields are None."""
    names = [field.name for field in dataclasses.fields(like)]
    absent = [name for name in names if (name if name in alone else REST) not in trees]
    leaves = traverse_util.flatten_dict(trees | trees.get(REST, {}))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[_names(path)], dataclasses.replace(like, **dict.fromkeys(absent))
    )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
