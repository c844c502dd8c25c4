"""Opens the sources that a config names: `json:PATH`, `records:FOLDER?weight=2`, or several.

A new source is a module with an opener, and a line of `SCHEMES`:

    def open_pairs(request: Request) -> Source: ...  # request.place, .options, .role, .settings

    "pairs": Scheme(pairs.open_pairs, "pairs:FILE", ("image_root",)),

Only the options of that line are let through. A format that lists image files yields an `Entry` for
each and returns `Listed(request, entries)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
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
)
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.record import DAMAGED, PARTS, ROLES, Request, Settings, Source
from codebook_jax.errors import UserError, did_you_mean


class Scheme(NamedTuple):
    open: Callable[[Request], Source]
    form: str  # for messages
    options: tuple[str, ...] = ()


_KEYS = tuple(f"{part}_key" for part in PARTS)
_TABLE = ("image_root", *_KEYS, "quotes")
_IMAGES = ("image_root", "per")
SCHEMES = {
    "scenes": Scheme(scenes.open_scenes, "scenes"),
    "json": Scheme(json_files.open_json, "json:PAIRS.json(l)", ("image_root", *_KEYS)),
    "csv": Scheme(tables.open_table, "csv:PAIRS.csv", _TABLE),
    "tsv": Scheme(tables.open_table, "tsv:PAIRS.tsv", _TABLE),
    "coco": Scheme(annotations.open_coco, "coco:CAPTIONS.json", _IMAGES),
    "karpathy": Scheme(annotations.open_karpathy, "karpathy:DATASET.json", (*_IMAGES, "split")),
    "vg": Scheme(annotations.open_visual_genome, "vg:REGION_DESCRIPTIONS.json", _IMAGES),
    "webdataset": Scheme(tar.open_webdataset, "webdataset:SHARDS.tar", ("caption_key",)),
    "records": Scheme(records.Records, "records:FOLDER"),
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
    """The source that `spec` names, or the mixture, for one of ROLES; UserError if it cannot be."""
    if role not in ROLES:
        raise ValueError(f"role={role!r} is not one of {ROLES}")
    if damaged_shards not in DAMAGED:
        field = f"config.data.damaged_shards={damaged_shards!r}"
        raise UserError(f"{field} is not one of {', '.join(DAMAGED)}")
    settings = Settings(size_px, scenes_examples, seed, image_root, path_map, damaged_shards)
    opened = [_open(part, role, settings) for part in split_specs(spec)]
    if len(opened) == 1:
        return opened[0][0]
    sources, weights = zip(*opened, strict=True)
    weighted = sum(weight is not None for weight in weights)
    if weighted not in (0, len(weights)):
        how_many = f"{weighted} of {len(weights)} sources have a weight"
        raise UserError(f"{spec!r}: {how_many}: give ?weight= to each, or to none")
    if weighted and role != "train":
        raise UserError(f"{spec!r}: weights only apply to training: leave them out for evaluation")
    return Mixture(sources, weights if weighted else None)


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


def _open(spec: str, role: str, settings: Settings) -> tuple[Source, float | None]:
    """The source, and its weight in a mixture (None: not given)."""
    name, rest = re.match(r"(?:(\w+)(?::|(?=\?)|$))?(.*)", spec, re.DOTALL).groups()
    scheme = SCHEMES.get(name)
    if scheme is None or (name != "scenes" and not rest.partition("?")[0]):
        hint = f"use {', '.join(scheme.form for scheme in SCHEMES.values())}"
        if spec.endswith((".json", ".jsonl")):
            hint = f"did you mean json:{spec}"
        raise UserError(f"{spec!r} does not name a source for {role} data: {hint}")
    place, options = _options(spec, rest, ("weight", *scheme.options))
    weight = _weight(spec, options.pop("weight", None))
    request = Request(name, os.path.expanduser(place), options, role, settings)
    return scheme.open(request), weight


def _options(spec: str, rest: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """(the place, {option: value}) after a scheme; raises UserError for an unknown option."""
    place, mark, tail = rest.rpartition("?")
    if not mark or not re.match(r"\w+=", tail):
        return rest, {}
    options = {}
    for part in tail.split("&"):
        name, equals, value = part.partition("=")
        if not equals or name not in allowed:
            raise UserError(
                f"{spec!r}: {part!r} is not an option of this source: use NAME=VALUE with "
                f"{', '.join(allowed)}{did_you_mean(name, allowed)}"
            )
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
