"""Opens the sources that a config names: `json:PATH`, `records:FOLDER?weight=2`, several separated
by commas.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import ml_collections

from codebook_jax.data.sources import (
    annotations,
    builders,
    hub,
    json_files,
    records,
    scenes,
    tables,
    tar,
    visual_genome,
)
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.record import Source
from codebook_jax.errors import UserError

ROLES = ("train", "validation", "test")
DAMAGED = ("refuse", "skip")  # what to do about damaged shards


class Request(NamedTuple):
    """The arguments of a scheme's opener."""

    place: str  # the part after the scheme: a path or a name
    options: Mapping[str, str]  # those that the scheme allows
    role: str  # one of ROLES
    settings: Settings

    @property
    def merge(self) -> bool:
        """Whether an image is one record with all its captions: in evaluation, not in training."""
        return self.role != "train"

    @property
    def image_root(self) -> str:
        return os.path.expanduser(self.options.get("image_root", self.settings.image_root))


class Settings(NamedTuple):
    """The settings shared by all sources."""

    size_px: int  # of scenes
    scenes_examples: (
        int  # for training, like the seed: validation and test scenes are always the same
    )
    seed: int
    image_root: str = ""
    path_map: str = ""
    damaged_shards: str = "refuse"


class Scheme(NamedTuple):
    open: Callable[[Request], Source]
    form: str  # for messages
    options: tuple[str, ...] = ()


_FILES = ("image_root",)
_KEYS = ("image_key", "caption_key", "id_key")
SCHEMES = {
    "scenes": Scheme(scenes.open_scenes, "scenes"),
    "json": Scheme(json_files.open_json, "json:PAIRS.json(l)", (*_FILES, *_KEYS)),
    "csv": Scheme(tables.open_csv, "csv:PAIRS.csv", (*_FILES, *_KEYS, "quotes")),
    "tsv": Scheme(tables.open_tsv, "tsv:PAIRS.tsv", (*_FILES, *_KEYS, "quotes")),
    "coco": Scheme(annotations.open_coco, "coco:CAPTIONS.json", (*_FILES, "per")),
    "karpathy": Scheme(
        annotations.open_karpathy, "karpathy:DATASET.json", (*_FILES, "split", "per")
    ),
    "vg": Scheme(visual_genome.open_visual_genome, "vg:REGION_DESCRIPTIONS.json", (*_FILES, "per")),
    "webdataset": Scheme(tar.open_webdataset, "webdataset:SHARDS.tar", ("caption_key",)),
    "records": Scheme(records.open_records, "records:FOLDER"),
    "tfds": Scheme(builders.open_tfds, "tfds:NAME[/CONFIG]:SPLIT", ("data_dir", *_KEYS)),
    "hf": Scheme(hub.open_hugging_face, "hf:NAME_OR_FOLDER:SPLIT", _KEYS),
}


def open_source(
    spec: str,
    *,
    role: str,
    size_px: int,
    scenes_examples: int,
    seed: int,
    image_root: str = "",
    path_map: str = "",
    damaged_shards: str = "refuse",
) -> Source:
    """The source, or the mixture of sources, that `spec` names, for the `role` "train",
    "validation" or "test".

    Raises UserError if it cannot be opened.
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r} is not one of {ROLES}")
    if damaged_shards not in DAMAGED:
        raise UserError(
            f"config.data.damaged_shards={damaged_shards!r} is not one of {', '.join(DAMAGED)}"
        )
    settings = Settings(size_px, scenes_examples, seed, image_root, path_map, damaged_shards)
    parts = split_specs(spec)
    opened = [_open(part, role, settings) for part in parts]
    weights = [weight for _, weight in opened]
    if len(opened) == 1:
        return opened[0][0]
    given = sum(weight is not None for weight in weights)
    if given not in (0, len(weights)):
        raise UserError(
            f"{spec!r}: {given} of {len(weights)} sources have a weight: give ?weight= to each, or "
            "to none (every record once per epoch)"
        )
    if given and role != "train":
        raise UserError(f"{spec!r}: weights only apply to training: leave them out for evaluation")
    return Mixture([source for source, _ in opened], weights if given else None)


def source_of(config: ml_collections.ConfigDict, spec: str, role: str) -> Source:
    """The source that `spec` names, for `role`, with the fields of `config`."""
    return open_source(
        spec,
        role=role,
        size_px=config.model.image.size_px,
        scenes_examples=config.data.scenes_examples,
        seed=config.seed,
        image_root=config.data.image_root,
        path_map=config.data.path_map,
        damaged_shards=config.data.damaged_shards,
    )


def split_specs(spec: str) -> list[str]:
    """The parts of a mixture: split at each comma that a scheme follows."""
    names = "|".join(SCHEMES)
    return [part.strip() for part in re.split(rf",\s*(?=(?:{names})(?:[:?,]|$))", spec)]


def forms() -> str:
    """The forms of a source's name, for messages."""
    return ", ".join(scheme.form for scheme in SCHEMES.values())


def _open(spec: str, role: str, settings: Settings) -> tuple[Source, float | None]:
    """The source, and its weight in a mixture (None: not given)."""
    name, rest = re.match(r"(?:(\w+)(?::|(?=\?)|$))?(.*)", spec, re.DOTALL).groups()
    scheme = SCHEMES.get(name)
    if scheme is None or (name != "scenes" and not rest.partition("?")[0]):
        hint = (
            f"did you mean json:{spec}" if spec.endswith((".json", ".jsonl")) else f"use {forms()}"
        )
        raise UserError(f"{spec!r} does not name a source for {role} data: {hint}")
    place, options = _options(spec, rest, scheme.options)
    weight = _weight(spec, options.pop("weight", None))
    return scheme.open(Request(os.path.expanduser(place), options, role, settings)), weight


def _options(spec: str, rest: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(the place, {option: value}) after a scheme; raises UserError for an unknown option."""
    place, mark, tail = rest.rpartition("?")
    if not mark or not re.match(r"\w+=", tail):
        return rest, {}
    options = {}
    for part in tail.split("&"):
        name, equals, value = part.partition("=")
        if not equals or name not in ("weight", *allowed):
            known = ", ".join(("weight", *allowed))
            close = difflib.get_close_matches(name, ("weight", *allowed), n=1)
            hint = (
                f"did you mean {close[0]}" if close and equals else f"use NAME=VALUE with {known}"
            )
            raise UserError(f"{spec!r}: {part!r} is not an option of this source: {hint}")
        options[name] = value
    return place, options


def _weight(spec: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{spec!r}: weight={text} is not a number above 0")
    return weight
