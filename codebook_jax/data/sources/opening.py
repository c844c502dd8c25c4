"""Opens the sources that a config names: `json:PATH`, `records:FOLDER?weight=2`, or several. A new
source is a function of a Request that returns a Source, and a line of `SCHEMES` with its options.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections

from codebook_jax.data.sources.annotations import open_annotations
from codebook_jax.data.sources.builders import open_tfds
from codebook_jax.data.sources.class_folders import open_folders
from codebook_jax.data.sources.comparisons import open_comparisons
from codebook_jax.data.sources.expressions import open_expressions
from codebook_jax.data.sources.hub import open_hugging_face
from codebook_jax.data.sources.json_files import open_json
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.questions import open_questions
from codebook_jax.data.sources.record import KINDS, PARTS, Request, Settings, Source
from codebook_jax.data.sources.records import Records
from codebook_jax.data.sources.scenes import open_scenes
from codebook_jax.data.sources.statements import open_statements
from codebook_jax.data.sources.tables import open_table
from codebook_jax.data.sources.tar import Shards
from codebook_jax.errors import UserError, did_you_mean


class Scheme(NamedTuple):
    open: Callable[[Request], Source]
    form: str  # for messages
    options: tuple[str, ...] = ()


_KEYS = tuple(f"{part}_key" for part in PARTS)
_TABLE = ("image_root", *_KEYS, "quotes")
_IMAGES = ("image_root", "per")
SCHEMES = {
    "scenes": Scheme(open_scenes, "scenes"),
    "json": Scheme(open_json, "json:PAIRS.json(l)", ("image_root", *_KEYS)),
    "csv": Scheme(open_table, "csv:PAIRS.csv", _TABLE),
    "tsv": Scheme(open_table, "tsv:PAIRS.tsv", _TABLE),
    "coco": Scheme(open_annotations, "coco:CAPTIONS.json", _IMAGES),
    "karpathy": Scheme(open_annotations, "karpathy:DATASET.json", (*_IMAGES, "split")),
    "vg": Scheme(open_annotations, "vg:REGION_DESCRIPTIONS.json", _IMAGES),
    "vqa": Scheme(open_questions, "vqa:QUESTIONS.json", ("image_root", "annotations", "split")),
    "nlvr2": Scheme(open_comparisons, "nlvr2:SENTENCES.json(l)", ("image_root",)),
    "entailment": Scheme(open_statements, "entailment:SENTENCES.json(l)", ("image_root",)),
    "grounding": Scheme(
        open_expressions, "grounding:EXPRESSIONS.json", ("image_root", "detections")
    ),
    "folders": Scheme(open_folders, "folders:FOLDER"),
    "webdataset": Scheme(Shards, "webdataset:SHARDS.tar", ("caption_key",)),
    "records": Scheme(Records, "records:FOLDER"),
    "tfds": Scheme(open_tfds, "tfds:NAME[/CONFIG]:SPLIT", ("data_dir", *_KEYS)),
    "hf": Scheme(open_hugging_face, "hf:NAME_OR_FOLDER:SPLIT", _KEYS),
}
_USUAL = {  # sources of each kind
    "pairs": "json:PAIRS.json or scenes",
    "stories": "scenes:stories or json:STORIES.json",
    "questions": "vqa:QUESTIONS.json or scenes:questions",
    "comparisons": "nlvr2:SENTENCES.json or scenes:comparisons",
    "statements": "entailment:SENTENCES.jsonl or scenes:statements",
    "expressions": "grounding:EXPRESSIONS.json or scenes:expressions",
    "labels": "folders:FOLDER or scenes:labels",
}
_A_STORY = 'a story is {"frames": [PATHS], "captions": [TEXTS]}'
_SPEC = re.compile(r"(?:(\w+)(?::|(?=\?)|$))?(.*?)(?:\?(\w+=[^?]*))?", re.DOTALL)


def open_source(spec: str, *, role: str, **settings: str | int) -> Source:
    """The source that `spec` names, or the mixture, for one of ROLES, with the fields of Settings;
    raises UserError if it cannot be opened.
    """
    opened = [_open(part, role, Settings(**settings)) for part in split_specs(spec)]
    if len(opened) == 1:
        return opened[0][0]
    sources, weights = zip(*opened, strict=True)
    kinds = {source.kind for source in sources}
    if "stories" in kinds:
        raise UserError(f"{spec!r}: stories are read from one source alone: put them in one file")
    if len(kinds) > 1:
        held = " and ".join(sorted(KINDS[kind][0] for kind in kinds))
        raise UserError(f"{spec!r} mixes {held}: name sources of one kind")
    weighted = sum(weight is not None for weight in weights)
    if weighted and (weighted < len(weights) or role != "train"):
        how_many = f"{weighted} of {len(weights)} {role} sources have a weight"
        raise UserError(f"{spec!r}: {how_many}: give ?weight= to all of training, or to none")
    return Mixture(sources, weights if weighted else None)


def source_of(
    config: ml_collections.ConfigDict,
    spec: str,
    role: str,
    *,
    kind: str | None = "pairs",
    also: Sequence[str] = (),
) -> Source:
    """The source that `spec` names, for `role`, with the fields of `config`; raises UserError too
    if its records are not of this `kind` (None: of any but stories), nor of those in `also`.
    """
    names = ("scenes_examples", "image_root", "path_map", "damaged_shards")
    settings = {name: config.data[name] for name in names}
    settings |= {"size_px": config.model.image.size_px, "seed": config.seed}
    try:
        source = open_source(spec, role=role, **settings)
    except UserError as error:
        if kind == "stories" and spec.startswith("json:"):
            raise UserError(f"{error}; {_A_STORY}") from None
        raise
    if source.kind in (kind, *also):
        return source
    if kind is not None or source.kind == "stories":
        kind = kind or "pairs"
        cure = f"name a source of those, such as {_USUAL[kind]}"
        if source.kind == "stories":
            cure = "train on them with configs/sequences.py; check-data and prepare take none"
        raise UserError(f"{spec} lists {KINDS[source.kind][0]}, not {KINDS[kind][0]}: {cure}")
    return source


def split_specs(spec: str) -> list[str]:
    """The parts of a mixture: split at each comma that a scheme follows."""
    names = "|".join(SCHEMES)
    return [part.strip() for part in re.split(rf",\s*(?=(?:{names})(?:[:?,]|$))", spec)]


def _open(spec: str, role: str, settings: Settings) -> tuple[Source, float | None]:
    """The source, and its weight in a mixture (None: not given)."""
    name, place, tail = _SPEC.fullmatch(spec).groups(default="")
    scheme = SCHEMES.get(name)
    if scheme is None or (name != "scenes" and not place):
        hint = f"use {', '.join(scheme.form for scheme in SCHEMES.values())}"
        if spec.endswith((".json", ".jsonl")):
            hint = f"did you mean json:{spec}"
        raise UserError(f"{spec!r} does not name a source for {role} data: {hint}")
    options = dict(part.partition("=")[::2] for part in tail.split("&") if part)
    allowed = ("weight", *scheme.options)
    for option in options:
        if option not in allowed:
            raise UserError(
                f"{spec!r}: {option!r} is not an option of this source: use NAME=VALUE with "
                f"{', '.join(allowed)}{did_you_mean(option, allowed)}"
            )
    weight = None
    if "weight" in options:
        with contextlib.suppress(ValueError):
            weight = float(options["weight"])
        if weight is None or not 0 < weight < float("inf"):
            raise UserError(f"{spec!r}: weight={options['weight']} is not a number above 0")
    request = Request(name, os.path.expanduser(place), options, role, settings)
    return scheme.open(request), weight
