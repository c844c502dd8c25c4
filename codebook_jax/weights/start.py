"""A run's initial weights: reads `config.init`, checks it, reports, and fills the train state.

config.init  random                          every parameter drawn at random
             image:SPEC,text:SPEC            a ViT or DeiT and a BERT; SPEC may be `random`
             model:SPEC                      a whole ALBEF model, or another run or export

SPEC is a file, a folder, or a name on the Hugging Face hub (`name@revision` for a version).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from codebook_jax.config import flat, with_fields
from codebook_jax.data import text
from codebook_jax.errors import UserError, first_few
from codebook_jax.parallel import sharding
from codebook_jax.run.checkpoint import FOLDER, Checkpoints
from codebook_jax.run.record import RECORD, recorded_config
from codebook_jax.weights import layouts
from codebook_jax.weights.files import WORDS, read_weights
from codebook_jax.weights.fill import Filled, fill
from codebook_jax.weights.layouts import PRETRAINED, Layout, Shapes
from codebook_jax.weights.load import MANIFEST, config_of, read_items

RANDOM = "random"
STAGES = {"nlvr2": "text_assignment"}  # tasks, and those whose parameters they go on with
_TOWERS = ("image", "text")
_OWN = ("student", "teacher")  # what is read of a run or export
_MOST_NAMES = 12  # in a line of the table


class Part(NamedTuple):
    """The weights read for one part of config.init."""

    part: str  # "image" | "text" | "model"
    what: str  # "image:SPEC", with which every message about it begins
    title: str
    layout: Layout  # of a train state
    arrays: Mapping[str, np.ndarray]  # by the layout's names
    stated: dict[str, Any]  # fields of the config stated by the source
    tokenizer: str  # folder of the tokenizer beside the weights; empty if there is none
    task: str = "pretrain"  # the config.task of a run or export


class Initial(NamedTuple):
    """The parameters that replace fresh ones, and the table about them."""

    arrays: dict[str, np.ndarray]  # by the state's names, such as student/towers/image/cls
    report: str


def specs(init: str) -> dict[str, str]:
    """{part: SPEC} of config.init, without random parts; raises UserError if it is malformed."""
    if init == RANDOM:
        return {}
    named = [item.strip().partition(":")[::2] for item in init.split(",")]
    if sorted(part for part, spec in named if spec) not in (["model"], list(_TOWERS)):
        raise UserError(
            f"config.init={init!r} is not a whole model or both towers: give random, model:SPEC, "
            "or image:SPEC,text:SPEC (SPEC: a file, a folder, a hub name, or random)"
        )
    return {part: spec for part, spec in named if spec != RANDOM}


def read_start(config: ml_collections.ConfigDict, adopts: Iterable[str] = ()) -> tuple[Part, ...]:
    """Reads what config.init names; raises UserError if that cannot be read, or has other heads or
    another pooling than the config, except for the fields that the task `adopts`; or is of a task
    that this one cannot start from.
    """
    parts = tuple(_read(part, spec) for part, spec in specs(config.init).items())
    for part in parts:
        if part.task not in (*PRETRAINED, config.task, STAGES.get(config.task)):
            raise UserError(
                f"{part.what} is of config.task={part.task!r}, but {config.task!r} starts from "
                "pre-trained weights, or from its own: give an export of pre-training"
            )
        size = part.stated.get("size", config.size)
        if adopts and size != config.size:
            raise UserError(
                f"{part.what} is of size {size}, but this config of {config.size}: give the "
                f"config of that size, --config=configs/FILE.py:{size}"
            )
        for tower in _TOWERS:
            name, ours = f"model.{tower}.heads", config.model[tower].heads
            theirs = part.stated.get(name, ours)
            if theirs != ours:  # the shapes would still match, but not the results
                raise UserError(
                    f"{part.what} has {theirs} heads, but config.{name}={ours}: use the number of "
                    "the weights"
                )
        pool = part.stated.get("model.pool", config.model.pool)
        if "model.pool" not in adopts and pool != config.model.pool:
            raise UserError(
                f"{part.what} was trained with model.pool={pool!r}, but config.model.pool="
                f"{config.model.pool!r}: use that of the weights"
            )
    return parts


def adopted(
    config: ml_collections.ConfigDict,
    start: tuple[Part, ...],
    record: Mapping[str, Any] | None,
    adopts: Iterable[str] = (),
) -> ml_collections.ConfigDict:
    """The config with the layer norms' epsilon, and what else the task `adopts`, of the weights or
    of an existing run's record.
    """
    stated = {name: value for part in start for name, value in part.stated.items()}
    if not start and record is not None and recorded_config(record).init != RANDOM:
        stated = _stated_by(recorded_config(record))
    found = {
        name: value
        for name, value in stated.items()
        if name.endswith(".layer_norm_eps") or name in adopts
    }
    return with_fields(config, found) if found else config


def tokenizer_of(config: ml_collections.ConfigDict, start: tuple[Part, ...]) -> str:
    """config.data.tokenizer, else the one beside the weights; raises UserError if it is needed."""
    for part in start:
        if part.part == "image" or config.data.tokenizer:
            continue
        if not part.tokenizer:
            raise UserError(
                f"{part.what} has no tokenizer beside it, and its word embeddings only fit the one "
                "they were trained with: name it, for example "
                "--config.data.tokenizer=bert-base-uncased"
            )
        return part.tokenizer
    return config.data.tokenizer


def initial(
    start: tuple[Part, ...],
    config: ml_collections.ConfigDict,
    abstract_state: Any,
    pretrained: Callable[[str], str | None] = str,
) -> Initial:
    """Our parameters, a missing teacher copied from the student; `pretrained` gives the parameter
    of pre-training that each starts as. Raises UserError for misfits.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in sharding.named(abstract_state)}
    arrays, resized, ignored = {}, {}, {}
    for part in start:
        filled = _filled(part, config, shapes, pretrained)
        where = f"{part.part} " if len(start) > 1 else ""
        arrays |= filled.arrays
        resized |= filled.resized
        ignored |= {where + key: reason for key, reason in filled.ignored.items()}
    student = {name: shape for name, shape in shapes.items() if name.startswith("student/")}
    table = [*map(_heading, start), _table(student, Filled(arrays, resized, ignored))]
    rest = []
    if any(name.startswith("teacher/") for name in shapes):
        whole = any(name.startswith("teacher/towers/") for name in shapes)
        towers = layouts.under(arrays, "student/" if whole else "student/towers/")
        copy = {f"teacher/{name}": value for name, value in towers.items()}
        copied = len(copy.keys() - arrays.keys())
        partly = f", except {copied} arrays copied from the student" if copied else ""
        whose = f"loaded{partly}" if copied < len(copy) else "a copy of the student"
        rest.append(f"teacher: {whose}")
        arrays = copy | arrays
    if "queue/image" in shapes:
        rest.append(f"queues: {'loaded' if 'queue/image' in arrays else 'empty'}")
    stage = STAGES.get(config.task)
    if stage and any(part.task not in (stage, config.task) for part in start):
        table.append(
            f"warning: {config.task} usually starts from a run of --config.task={stage} on pairs, "
            "which teaches the layers that are new: without it, expect less"
        )
    return Initial(arrays, "\n".join([*table, *filter(None, ["; ".join(rest)])]))


def _filled(
    part: Part,
    config: ml_collections.ConfigDict,
    shapes: Shapes,
    pretrained: Callable[[str], str | None],
) -> Filled:
    """What a part gives to the parameters of `shapes`, by their names."""
    options = dict(text_depth=config.model.text.depth, allow_partial=config.init_allow_partial)
    if part.task in (config.task, STAGES.get(config.task)):
        heads = {name for name in shapes if "/head/" in name}  # of other classes, they are fresh
        own = {n for n in heads if n in part.arrays and part.arrays[n].shape != shapes[n]}
        wanted = {name: shape for name, shape in shapes.items() if name not in own}
        arrays = {name: array for name, array in part.arrays.items() if name not in own}
        return fill(part.layout, arrays, wanted, what=part.what, **options)
    sources = {name: pretrained(name) for name in shapes}
    sources = {name: source for name, source in sources.items() if source}
    theirs: dict[str, tuple[int, ...]] = {}
    for name in sorted(sources, key=lambda name: "/towers/" not in name):
        theirs.setdefault(sources[name], shapes[name])
    arrays, unused = dict(part.arrays), {}
    if part.layout is layouts.OWN:
        for name in arrays.keys() - theirs.keys():
            unused[name] = int(arrays.pop(name).size), "not used by this task"
    found = fill(part.layout, arrays, theirs, what=part.what, **options)
    return Filled(
        {
            name: found.arrays[source]
            for name, source in sources.items()
            if source in found.arrays and found.arrays[source].shape == shapes[name]
        },
        {n: found.resized[source] for n, source in sources.items() if source in found.resized},
        found.ignored | dict(sorted(unused.items())),
    )


def placed(state: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The state with these arrays in place of its fresh ones, sharded like them."""

    def put(name: str, leaf: jax.Array) -> jax.Array:
        if name not in arrays:
            return leaf
        value = np.asarray(arrays[name], leaf.dtype)
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])

    leaves = [put(name, leaf) for name, leaf in sharding.named(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _read(part: str, spec: str) -> Part:
    what = f"{part}:{spec}"
    path = Path(os.path.expanduser(spec)).absolute()
    is_run = (path / RECORD).is_file() and (path / FOLDER).is_dir()
    if part == "model" and (is_run or (path / MANIFEST).is_file()):
        return _read_own(path, what)
    weights = read_weights(spec, f"config.init names {what}")
    layout, arrays = layouts.recognise(part, weights.arrays, what)
    if part == "model":  # as `write_albef` describes it
        both = {"image": weights.config.get("vision"), "text": weights.config.get("text")}
        described = {tower: about for tower, about in both.items() if isinstance(about, dict)}
    else:
        layouts.refuse_other_kind(part, weights.config, what)
        described = {part: weights.config}
        names = layouts.prefixed("student/towers/", "", layout.names)
        layout = layout._replace(names=names)  # as in a train state
    has_words = any((weights.folder / name).is_file() for name in WORDS)
    tokenizer = str(weights.folder) if has_words and part != "image" else ""
    stated = _stated(described) | ({"model.pool": "cls"} if part == "model" else {})
    return Part(part, what, layout.title, layout, arrays, stated, tokenizer)


def _read_own(path: Path, what: str) -> Part:
    """The weights of an export, or those of a run's best, or else newest, checkpoint."""
    config = config_of(path)
    folder, title = path, "an export"
    if not (path / MANIFEST).is_file():
        with Checkpoints(path, (), keep=1, create=False) as checkpoints:
            step = checkpoints.step_to_use()
        if step is None:
            raise UserError(f"{what} has no checkpoint yet: train it first")
        folder, title = path / FOLDER / str(step), f"the checkpoint of step {step:,}"
    arrays = read_items(folder, [item for item in _OWN if (folder / item).is_dir()])
    tokenizer = str(path / text.FOLDER) if (path / text.FOLDER).is_dir() else ""
    stated = _stated_by(config)
    return Part("model", what, title, layouts.OWN, arrays, stated, tokenizer, config.task)


def _stated_by(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the config of a run or export says of its weights."""
    size = {"size": config.size} if "size" in config else {}
    return size | {f"model.{name}": value for name, value in flat(config.model.to_dict()).items()}


def _stated(described: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about each tower that its tensors do not show, as fields of the config."""
    names = {"heads": "heads", "num_attention_heads": "heads", "layer_norm_eps": "layer_norm_eps"}
    return {
        f"model.{tower}.{ours}": described[tower][theirs]
        for tower in _TOWERS
        for theirs, ours in names.items()
        if theirs in described.get(tower, {})
    }


def _heading(part: Part) -> str:
    towers = _TOWERS if part.part == "model" else (part.part,)
    silent = " and ".join(name for name in towers if f"model.{name}.heads" not in part.stated)
    unsaid = f"; without a number of heads for its {silent} tower: using config.model's"
    return f"{part.what} ({part.title}{unsaid if silent else ''})"


def _table(student: Shapes, filled: Filled) -> str:
    """The table: arrays and numbers of each category, and names, with whole parts abbreviated."""
    kinds: dict[str, list[str]] = {}
    for key, (_, kind) in filled.ignored.items():
        kinds.setdefault(kind, []).append(key)
    several = {kind: f"{len(keys)}: {keys[0]}, ..." for kind, keys in kinds.items() if keys[1:]}
    ignored = [f"{kind} ({several.get(kind, keys[0])})" for kind, keys in kinds.items()]
    resized = [name for name in student if name in filled.resized]
    loaded = [name for name in student if name in filled.arrays.keys() - filled.resized.keys()]
    fresh = [name for name in student if name not in filled.arrays]
    sizes = {name: math.prod(shape) for name, shape in student.items()}
    sizes |= {key: size for key, (size, _) in filled.ignored.items()}
    lines = [f"{'':18} {'arrays':>6} {'numbers':>13}"]
    for title, counted, names in (
        ("loaded", loaded, _parts_of(loaded, student)),
        ("resized", resized, [f"{_short(name)} {filled.resized[name]}" for name in resized]),
        ("newly initialised", fresh, _parts_of(fresh, student)),
        ("ignored", filled.ignored, ignored),
    ):
        numbers = sum(sizes[name] for name in counted)
        shown = first_few(names, _MOST_NAMES, last=", and")
        lines.append(f"{title:18} {len(counted):6,} {numbers:13,}  {shown}")
    return "\n".join(lines)


def _parts_of(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The names, abbreviated to a part if they include everything that `every` has below it."""
    others = [f"{other}/" for other in every if other not in names]
    found: dict[str, None] = {}
    for name in names:
        parts = itertools.accumulate(name.split("/"), "{}/{}".format)
        whole = (part for part in parts if not any(o.startswith(f"{part}/") for o in others))
        found[_short(next(whole))] = None
    return list(found)


def _short(name: str) -> str:
    return re.sub(r"^student/(towers/)?", "", name)
