"""A run's initial weights: reads `config.init`, checks it against the model, reports, and fills the
train state.

config.init  random                          every parameter drawn at random
             image:SPEC,text:SPEC            a ViT or DeiT and a BERT; SPEC may be `random`
             model:SPEC                      a whole ALBEF model, or another run or export of this
             code

SPEC is a file, a folder, or a name on the Hugging Face hub (`name@revision` for one of its
versions).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from codebook_jax.config import with_fields
from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding
from codebook_jax.run.record import recorded_config
from codebook_jax.weights import albef, own, recognise
from codebook_jax.weights.files import WORDS, read_weights
from codebook_jax.weights.fill import Filled, fill
from codebook_jax.weights.layouts import ALBEF, Layout, under
from codebook_jax.weights.report import report

RANDOM = "random"
FORMS = "config.init is random, model:SPEC, or image:SPEC,text:SPEC (SPEC: a file, a folder, a hub name, or random)"
_TOWERS = ("image", "text")
_EPS = tuple(f"model.{tower}.layer_norm_eps" for tower in _TOWERS)


class Part(NamedTuple):
    """The weights read for one part of config.init."""

    part: str  # "image" | "text" | "model"
    what: str  # "image:SPEC", with which every message about it begins
    layout: Layout | None  # None: a run or export of this code
    content: Any  # tensors by the layout's names; own.Own for a run or export
    stated: dict[str, Any]  # fields of config.model stated by the source
    tokenizer: str  # folder or hub name; empty if there is none beside the weights


class Initial(NamedTuple):
    """The parameters that replace fresh ones, and the table about them."""

    arrays: dict[str, np.ndarray]  # by the state's names, such as student/towers/image/cls
    report: str


def specs(init: str) -> dict[str, str]:
    """{part: SPEC} of config.init, without random parts; raises UserError if it is malformed."""
    if init == RANDOM:
        return {}
    if not init:
        raise UserError(f"config.init is empty: {FORMS}")
    found: dict[str, str] = {}
    for item in init.split(","):
        part, colon, spec = item.strip().partition(":")
        if part not in ("image", "text", "model") or not colon or not spec or part in found:
            raise UserError(f"config.init={init!r} has the invalid part {item.strip()!r}: {FORMS}")
        found[part] = spec
    if "model" in found and len(found) > 1:
        raise UserError(
            f"config.init={init!r} names both a whole model and a tower: give one or the other"
        )
    for part, other in (("image", "text"), ("text", "image")):
        if part in found and other not in found:
            raise UserError(
                f"config.init={init!r} names no {other} tower: add {other}:SPEC, or "
                f"{other}:{RANDOM}"
            )
    return {part: spec for part, spec in found.items() if spec != RANDOM}


def read_start(config: ml_collections.ConfigDict) -> tuple[Part, ...]:
    """Reads what config.init names; nothing for random. Raises UserError if it cannot be read or
    has the wrong kind.
    """
    parts = tuple(_read(part, spec) for part, spec in specs(config.init).items())
    for part in parts:
        _refuse_other_heads(part, config)
    return parts


def adopted(
    config: ml_collections.ConfigDict, start: tuple[Part, ...], record: Mapping[str, Any] | None
) -> ml_collections.ConfigDict:
    """The config with the layer norms' epsilon of the weights.

    For an existing run it comes from its `record`, since config.init is no longer read.
    """
    found = {}
    if start:
        found = {
            name: value for part in start for name, value in part.stated.items() if name in _EPS
        }
    elif record is not None:
        before = recorded_config(record)
        if before.init != RANDOM:
            found = {
                f"model.{tower}.layer_norm_eps": before.model[tower].layer_norm_eps
                for tower in _TOWERS
            }
    return with_fields(config, found) if found else config


def tokenizer_of(config: ml_collections.ConfigDict, start: tuple[Part, ...]) -> str:
    """The tokenizer to use: config.data.tokenizer, else the one beside the weights; raises
    UserError if there is neither.
    """
    texts = [part for part in start if part.part != "image"]
    if config.data.tokenizer or not texts:
        return config.data.tokenizer
    (part,) = texts
    if not part.tokenizer:
        raise UserError(
            f"{part.what} has no tokenizer beside it, and its word embeddings only fit the one "
            "they were trained with: name it, for example "
            "--config.data.tokenizer=bert-base-uncased"
        )
    return part.tokenizer


def initial(
    start: tuple[Part, ...], config: ml_collections.ConfigDict, abstract_state: Any
) -> Initial:
    """Our parameters from the weights that were read; raises UserError if they do not fit the
    model.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in sharding.named(abstract_state)}
    of = dict(allow_partial=config.init_allow_partial)
    depth = config.model.text.depth
    arrays: dict[str, np.ndarray] = {}
    resized: dict[str, str] = {}
    ignored: dict[str, tuple[int, str]] = {}
    for part in start:
        if isinstance(part.content, own.Own):
            filled = own.fill_own(part.content, shapes, what=part.what, **of)
        elif part.part == "model":
            filled = albef.fill_state(part.content, shapes, text_depth=depth, what=part.what, **of)
        else:
            filled = _fill_tower(part, shapes, text_depth=depth, **of)
        arrays |= filled.arrays
        resized |= filled.resized
        where = f"{part.part} " if len(start) > 1 else ""
        ignored |= {where + key: reason for key, reason in filled.ignored.items()}
    teacher = {f"teacher/{name}": value for name, value in under(arrays, "student/towers/").items()}
    copied = [name for name in teacher if name not in arrays]
    arrays = teacher | arrays
    table = report(
        "\n".join(_heading(part) for part in start),
        {name: shape for name, shape in shapes.items() if name.startswith("student/")},
        Filled(arrays, resized, ignored),
        teacher=_teacher(len(copied), len(teacher)),
        queue="queue/image" in arrays,
    )
    return Initial(arrays, table)


def _teacher(copied: int, every: int) -> str:
    if copied == every:
        return "a copy of the student"
    return f"loaded, except {copied} arrays copied from the student" if copied else "loaded"


def placed(state: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The state with these arrays in place of its fresh ones, sharded like them."""

    def put(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in arrays:
            return leaf
        value = np.asarray(arrays[name], leaf.dtype)
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(put, state)


def _read(part: str, spec: str) -> Part:
    what = f"{part}:{spec}"
    path = Path(os.path.expanduser(spec)).absolute()
    if part == "model" and own.is_own(path):
        found = own.read_own(path, what)
        stated = {
            f"model.{tower}.{field}": found.config.model[tower][field]
            for tower in _TOWERS
            for field in ("heads", "layer_norm_eps")
        }
        return Part(part, what, None, found, stated, found.tokenizer)
    try:
        weights = read_weights(spec, f"config.init names {what}")
    except UserError as error:
        raise UserError(f"{error}; --config.init={RANDOM} starts from random weights") from error
    stated = weights.config
    tokenizer = ""
    if any((weights.folder / name).is_file() for name in WORDS):
        tokenizer = str(weights.folder)
    if part == "image":
        layout, arrays = recognise.image_tower(weights.arrays, what)
        recognise.refuse_other_kind(stated, ("vit", "deit"), what)
        return Part(part, what, layout, arrays, _stated("image", stated), "")
    if part == "text":
        layout, arrays = recognise.text_tower(weights.arrays, what)
        recognise.refuse_other_kind(stated, ("bert",), what)
        return Part(part, what, layout, arrays, _stated("text", stated), tokenizer)
    if not albef.is_albef(weights.arrays):
        raise UserError(
            f"{what} is neither an ALBEF model (visual_encoder.*, text_encoder.*) nor a run or "
            "export of this code: for a single tower use image:SPEC or text:SPEC"
        )
    parts = {tower: stated.get(name) for tower, name in (("image", "vision"), ("text", "text"))}
    both = {
        name: value
        for tower, of in parts.items()
        if isinstance(of, dict)
        for name, value in _stated(tower, of).items()
    }
    return Part(part, what, ALBEF, dict(weights.arrays), both, tokenizer)


def _stated(tower: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about a tower that only config.json states, not its tensors."""
    names = {"num_attention_heads": "heads", "layer_norm_eps": "layer_norm_eps"}
    return {
        f"model.{tower}.{ours}": config[theirs]
        for theirs, ours in names.items()
        if theirs in config
    }


def _refuse_other_heads(part: Part, config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the number of heads differs: the shapes would still match, but the
    results would not.
    """
    for tower in _TOWERS:
        name = f"model.{tower}.heads"
        if part.stated.get(name, heads := config.model[tower].heads) != heads:
            raise UserError(
                f"{part.what} has {part.stated[name]} heads, but config.{name}={heads}: use the "
                "number of the weights"
            )


def _fill_tower(
    part: Part, shapes: Mapping[str, Any], *, text_depth: int, allow_partial: bool
) -> Filled:
    prefix = "student/towers/"
    towers = under(shapes, prefix)
    filled = fill(
        part.layout,
        part.content,
        towers,
        text_depth=text_depth,
        what=part.what,
        allow_partial=allow_partial,
    )
    return Filled(
        {prefix + name: value for name, value in filled.arrays.items()},
        {prefix + name: note for name, note in filled.resized.items()},
        filled.ignored,
    )


def _heading(part: Part) -> str:
    title = part.layout.title if part.layout is not None else part.content.title
    silent = [
        tower
        for tower in (_TOWERS if part.part == "model" else (part.part,))
        if f"model.{tower}.heads" not in part.stated
    ]
    unsaid = (
        f"; without a number of heads for its {' and '.join(silent)} tower: using config.model's"
    )
    return f"{part.what} ({title}{unsaid if silent else ''})"
