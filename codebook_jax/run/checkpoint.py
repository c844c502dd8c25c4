"""Checkpoints of a run: saved in the background, restored onto any mesh, the newest and the best
kept.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jaxtyping import PyTree

from codebook_jax.console import say
from codebook_jax.errors import UserError, first_few
from codebook_jax.files import parse_json, write_json, write_probe
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


class Checkpoints:
    """The folder `checkpoints/` of a run, one folder per step, each complete or absent.

    `alone` names the fields of the state that can be restored alone; the others are stored
    together. Every process calls every method. Use it in a `with`: leaving waits for the save in
    progress.
    """

    def __init__(
        self, workdir: Path | str, alone: Sequence[str], *, keep: int, create: bool = True
    ) -> None:
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / FOLDER
        self._alone = tuple(alone)
        self._saving: int | None = None
        self._failed: list[int] = []
        self.scores: dict[int, float] = _read_scores(self._workdir / BEST)
        handlers = {name: ocp.StandardCheckpointHandler() for name in (*alone, REST)}
        handlers[META] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(
            create=create, preservation_policy=_NewestAndBest(keep, self.scores)
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        # After reading, the manager's own reader waits for all processes, forever if one of them
        # failed.
        own = jax.process_index()
        one = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        composite = ocp.CompositeOptions(multiprocessing_options=one)
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(composite_options=composite, **handlers),
            multiprocessing_options=one,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._reader.close()
            self._manager.close()
            if jax.process_index() == 0:
                for (
                    step
                ) in self._failed:  # its own half-written folder takes the space a retry needs
                    shutil.rmtree(self._folder / f"{step}.orbax-checkpoint-tmp", ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first, without the one being written."""
        return sorted(step for step in self._manager.all_steps() if step != self._saving)

    def best_step(self) -> int | None:
        """The saved step that scored highest in validation; None when none was scored."""
        return _best_of(self.scores, self.steps())

    def step_to_use(self) -> int | None:
        """The best step in validation, the newest if none was scored; None if none is saved."""
        best = self.best_step()
        return max(self.steps(), default=None) if best is None else best

    def record_score(self, step: int, score: float, metric: str) -> None:
        """Records the validation score of the saved `step`; NaN is never the best."""
        self.wait()
        self.scores[step] = score
        best = self.best_step()
        if jax.process_index() == 0:
            scores = {str(at): _plain(value) for at, value in sorted(self.scores.items())}
            shown = None if best is None else _plain(self.scores[best])
            record = {"step": best, "score": shown, "metric": metric, "scores": scores}
            write_json(self._workdir / BEST, record)

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> bool:
        """Starts writing `state` in the background; prints a note and returns False if `step` is
        already saved.

        The arrays are copied before it returns, so the next step may donate them. Raises UserError
        if this save or the previous one failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            say(f"step {step:,} is already saved and stays as it is")
            return False
        arguments = {
            name: ocp.args.StandardSave(tree) for name, tree in _items(state, self._alone).items()
        }
        arguments[META] = ocp.args.JsonSave({"step": step, "saved_at": time.time(), **meta})
        self._check_room(step, state)
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        except Exception as failure:
            raise self._failure(failure) from failure
        return True

    def _check_room(self, step: int, state: PyTree) -> None:
        """Raises UserError if this process cannot write, or if all of them would run out of room.

        Otherwise Orbax would wait many minutes for a process that failed while writing.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            write_probe(self._folder)
            free = shutil.disk_usage(self._folder).free
        except OSError as problem:
            raise self._failure_of(step, problem.strerror) from problem
        if free < size * LEAST_ROOM:
            raise self._failure_of(
                step,
                f"{free / 1e6:,.0f} MB are free for {size / 1e6:,.0f} MB: No space left on device",
            )

    def wait(self) -> None:
        """Waits until nothing is being written; raises UserError if the last save failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as failure:
            raise self._failure(failure) from failure
        self._saving = None

    def restore_newest(self, abstract_state: PyTree) -> Restored | None:
        """The newest checkpoint that can be read, placed as `abstract_state` says; None when there
        is none.

        Damaged newer ones are renamed, never deleted, once an older one has been read. Raises
        UserError if shapes differ from `abstract_state`, or if there are checkpoints but none can
        be read.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, abstract_state)
            except (
                UserError,
                jax.errors.JaxRuntimeError,
            ):  # the latter comes from the device, not from the file
                raise
            except Exception as failure:
                restored, own = None, reason(failure)
            else:
                own = ""
            # If the state is split over processes, only one may have read the damaged part.
            failures = filter(None, peers.connected().exchange("restored", own))
            if (failure := next(failures, None)) is not None:
                damaged.append((step, failure))
                continue
            for bad_step, failure in damaged:
                self._set_aside(bad_step, failure)
            for later in [at for at in self.scores if at > step]:
                del self.scores[later]
            return restored
        if damaged:
            step, failure = damaged[0]
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {self._folder} can be read (step "
                f"{step:,}: {failure}): repair them, or start again in another --workdir"
            )
        return None

    def restore(
        self, step: int, abstract_state: PyTree, items: Sequence[str] | None = None
    ) -> Restored:
        """The checkpoint of `step`, each array placed as `abstract_state` says.

        Fields that are not in `items` (None: all) are None. Raises UserError if a name, shape or
        type differs from `abstract_state`, and whatever reading raises if the files are damaged. No
        process waits for another.
        """
        wanted = {
            name: tree
            for name, tree in _items(abstract_state, self._alone).items()
            if items is None or name in items
        }
        self._compare(step, wanted)
        stored = self._read(
            step, {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        )
        trees = {name: stored[name] for name in wanted}
        return Restored(step, _state(abstract_state, trees, self._alone), stored[META])

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved with the state of `step`: step, config, data position, versions, ..."""
        return self._read(step, {})[META]

    def _read(self, step: int, arguments: dict[str, Any]) -> Any:
        """The saved META and the items in `arguments`."""
        arguments = arguments | {META: ocp.args.JsonRestore()}
        return self._reader.restore(self._folder / str(step), args=ocp.args.Composite(**arguments))

    def _compare(self, step: int, wanted: dict[str, Any]) -> None:
        stored = self._manager.item_metadata(step)
        differences = []
        for name, tree in wanted.items():
            if name not in stored or stored[name] is None:
                raise FileNotFoundError(f"{name} is missing")
            before, now = _described(stored[name].tree), _described(tree)
            for leaf in sorted(before.keys() | now.keys()):
                old = before[leaf] if leaf in before else "missing"
                new = now[leaf] if leaf in now else "missing"
                if old != new:
                    differences.append(f"{name}/{leaf} is {old} in the checkpoint and {new} now")
        if differences:
            shown = first_few(differences, 3, between="; ", last=", and")
            raise UserError(
                f"the checkpoint of step {step:,} in {self._folder} does not fit this config: "
                f"{shown}; give the config it was trained with, or another --workdir"
            )

    def _set_aside(self, step: int, failure: str) -> None:
        aside = self._folder / f"damaged-{step}"
        if jax.process_index() == 0:
            number = 1
            while aside.exists():
                number += 1
                aside = self._folder / f"damaged-{step}-{number}"
            (self._folder / str(step)).rename(aside)
        peers.connected().exchange("set_aside", "")  # nobody looks for steps before it is renamed
        say(
            f"the checkpoint of step {step:,} is damaged ({failure}); it is set aside as "
            f"{aside.name}, and the newest good one is used"
        )
        self._manager.reload()

    def _failure(self, failure: Exception) -> Exception:
        if jax.process_count() > 1 and peers.of_a_peer(failure):
            return failure  # it cannot be fixed here
        step, self._saving = self._saving, None
        self._failed.append(step)
        return self._failure_of(step, reason(failure))

    def _failure_of(self, step: int, why: str) -> UserError:
        # it has already forgotten the steps that this save would have replaced
        self._manager.reload()
        steps = self.steps()
        kept = (
            f"step {steps[-1]:,} is the newest complete one"
            if steps
            else "there is no complete one yet"
        )
        return UserError(
            f"the checkpoint of step {step:,} could not be written to {self._folder} ({why}); "
            f"{kept}: mend this and start the same command again"
        )


class _NewestAndBest:
    """Keeps the newest `keep` checkpoints and the one that scored highest."""

    def __init__(self, keep: int, scores: dict[int, float]) -> None:
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self._keep :], _best_of(self._scores, steps)}
        return [step in kept for step in steps]


def _best_of(scores: dict[int, float], steps: list[int]) -> int | None:
    scored = [step for step in sorted(steps) if step in scores and not math.isnan(scores[step])]
    return max(scored, key=scores.__getitem__, default=None)  # the earliest of equals


def _read_scores(path: Path) -> dict[int, float]:
    if not path.exists():
        return {}
    try:
        scores = parse_json(path.read_bytes())["scores"]
        return {int(step): math.nan if one is None else float(one) for step, one in scores.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the record of a run's best step ({type(error).__name__}: {error}): put "
            "the original back, or remove it to choose the best among future evaluations"
        ) from error


def _plain(score: float) -> float | None:
    return None if math.isnan(score) else score


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
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    rest = {name: value for name, value in fields.items() if name not in alone}
    return {name: _nested(fields[name]) for name in alone} | {REST: _nested(rest)}


def _state(like: PyTree, trees: dict[str, Any], alone: Sequence[str]) -> PyTree:
    """The inverse of `_items` for the items in `trees`; other fields are None."""
    found = {}
    for field in dataclasses.fields(like):
        name, old = field.name, getattr(like, field.name)
        item = name if name in alone else REST
        if item not in trees:
            found[name] = None
        elif item == REST:
            found[name] = _unnested({name: old}, trees[REST])[name]
        else:
            found[name] = _unnested(old, trees[name])
    return dataclasses.replace(like, **found)


def _nested(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return traverse_util.unflatten_dict({_names(path): leaf for path, leaf in leaves})


def _unnested(like: PyTree, nested: dict[str, Any]) -> Any:
    flat = traverse_util.flatten_dict(nested)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_names(path)], like)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _described(tree: PyTree) -> dict[str, str]:
    leaves = traverse_util.flatten_dict(dict(tree), sep="/")
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def reason(failure: Exception) -> str:
    """The first line of an error, short; a full disk by its name."""
    text = str(failure).strip()
    if "No space left on device" in text:
        return "No space left on device"
    if "Disk quota exceeded" in text:
        return "Disk quota exceeded"
    line = text.splitlines()[0].partition(" See full TensorStore details")[0] if text else ""
    line = line if len(line) <= 160 else f"{line[:157]}..."
    return f"{type(failure).__name__}: {line}"
