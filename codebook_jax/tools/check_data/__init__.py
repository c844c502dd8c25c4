"""`--mode=check-data`: finds what is wrong with the data before training.

Checks every picture and caption of the training and evaluation sources, and looks for pictures in
both. Prints a table, and writes check.json, usable.jsonl, skipped.tsv and report.html.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np

from codebook_jax.data.manifest import verify
from codebook_jax.data.progress import Progress
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.opening import split_specs
from codebook_jax.data.sources.sample import sample_captions
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.data.text import Tokenizer, Unknown, open_tokenizer, said_unknown, spelling
from codebook_jax.errors import UserError, refuse_below
from codebook_jax.files import check_outputs
from codebook_jax.run.record import check_folder
from codebook_jax.tools.check_data import outputs
from codebook_jax.tools.check_data.captions import read_captions
from codebook_jax.tools.check_data.findings import Leak, Part, find, find_leak
from codebook_jax.tools.check_data.inspection import inspect
from codebook_jax.tools.check_data.outputs import CHECK, FILES, PAGE, SKIPPED, USABLE
from codebook_jax.tools.workers import quiet_pillow

_SOURCES = (  # label, field of config.data, role
    ("training", "train", "train"),
    ("validation", "eval", "validation"),
    ("test", "test", "test"),
)


def check_data(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Checks the data of `config`; returns 1 if too much is unusable or leaked, else 0.

    Raises UserError for invalid settings, and for a folder that holds something else.
    """
    _check_settings(config)
    workdir = Path(workdir)
    check_folder(workdir, FILES.__contains__, "for the report")
    check_outputs(workdir, FILES)
    try:
        with stoppable(), warnings.catch_warnings():
            quiet_pillow()
            check = _find(config, workdir)
            root = outputs.write(workdir, check)
    except Stopped as stop:
        print(f"stopped by {stop}: nothing was written", file=sys.stderr, flush=True)
        return 128 + stop.number
    for sentence in _advice(workdir, check.training[0], root):
        print(sentence, flush=True)
    return 1 if check.verdicts else 0


def _check_settings(config: ml_collections.ConfigDict) -> None:
    settings = config.check
    for name in ("processes", "least_side_px", "near_bits", "max_bad_share"):
        refuse_below(f"check.{name}", settings[name], 0)
    for name, most in (("near_bits", 15), ("max_bad_share", 1)):
        if not settings[name] <= most:
            raise UserError(f"config.check.{name}={settings[name]} is too large: use 0 to {most}")
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: name the data to check, for example "
            "--config.data.train=json:PATH"
        )


def _find(config: ml_collections.ConfigDict, workdir: Path) -> outputs.Check:
    data, decode = config.data, config.check.decode
    sources = _sources(config)
    verdicts = list(_damaged_folders(config)) if decode else []
    tokenizer, _ = open_tokenizer(
        data.tokenizer,
        workdir,
        sample_captions(sources["training"]),
        data.tokenizer_vocabulary,
        **spelling(data),
    )
    training, *others = (
        _parts(config, label, source, tokenizer) for label, source in sources.items()
    )
    others = list(itertools.chain(*others))
    leaks = [
        find_leak(part, training[0], near_bits=config.check.near_bits, decoded=decode)
        for part in others
        if not isinstance(part.source, Mixture)
    ]
    verdicts += _verdicts(config.check.max_bad_share, [training[0], *others], leaks)
    return outputs.Check(training, others, leaks, verdicts)


def _sources(config: ml_collections.ConfigDict) -> dict[str, Source]:
    """The sources to check, by label; built-in scenes are left out beside real pictures."""
    sources = {}
    for label, field, role in _SOURCES:
        spec = config.data[field]
        if spec and (_is_built_in(config.data.train) or not _is_built_in(spec)):
            sources[label] = source_of(config, spec, role)
        elif spec:
            print(f"{label} data are the built-in scenes: not checked", flush=True)
    return sources


def _is_built_in(spec: str) -> bool:
    return any(re.match(r"scenes\b", part) for part in split_specs(spec))


def _damaged_folders(config: ml_collections.ConfigDict) -> Iterator[str]:
    """A sentence on each packed folder with damaged files."""
    specs = split_specs(",".join(config.data[field] for _, field, _ in _SOURCES))
    packed = [spec.removeprefix("records:") for spec in specs if spec.startswith("records:")]
    for folder in dict.fromkeys(os.path.expanduser(spec.partition("?")[0]) for spec in packed):
        damaged = verify(folder)
        if damaged:
            yield (
                f"{folder} has {len(damaged):,} damaged files (first: {damaged[0][1]}): run its "
                "--mode=prepare command again, which repacks them"
            )


def _parts(
    config: ml_collections.ConfigDict, label: str, source: Source, tokenizer: Tokenizer
) -> list[Part]:
    """The findings on a source; for a mixture, on all of it and then on each source."""
    settings = config.check
    print(f"checking {label}: {source!r}", flush=True)
    with Progress("looked at", "pictures", len(source)) as progress:
        images = inspect(
            source,
            processes=settings.processes,
            decode=settings.decode,
            least_side_px=settings.least_side_px,
            tell=progress.advance,
        )
    with Progress("read captions of", "records", len(source)) as progress:
        captions = read_captions(source, tokenizer, progress.advance)
    limits = settings.near_bits, config.model.text.max_tokens
    parts = [find(label, source, images, captions, *limits)]
    if isinstance(source, Mixture):
        for number, piece in enumerate(source.sources, 1):
            start, stop = source.starts[number - 1 : number + 1].tolist()
            own = captions[slice(*np.searchsorted(captions["record"], (start, stop)))].copy()
            own["record"] -= start
            name = f"{label} {number}"
            parts.append(find(name, piece, images.of_records(start, stop), own, *limits))
    return parts


def _verdicts(limit: float, parts: list[Part], leaks: list[Leak]) -> Iterator[str]:
    """A sentence on each share above the limit."""
    over = f"more than config.check.max_bad_share={limit:g}"
    for part in parts:
        listed = part.source.listed
        bad = listed - int(part.usable_records.sum())
        if bad > limit * listed:
            yield (
                f"{bad:,} of {listed:,} listed records of {part.label} are unusable "
                f"({bad / listed:.1%}), {over}: {SKIPPED} names those in this list; "
                f"train on {USABLE}, or fix them"
            )
    for count in (leak.counts() for leak in leaks):
        leaked, images = count["leaked"], count["images"]
        if leaked > limit * images:
            yield (
                f"{leaked:,} of {images:,} pictures of {count['evaluation']} are also in training "
                f"({leaked / images:.1%}), {over}: remove them from one of the two; {CHECK} names "
                "them"
            )


def _advice(workdir: Path, training: Part, root: str | None) -> Iterator[str]:
    """What to do next."""
    counts = training.counts()
    usable, listed = counts["usable"], counts["listed"]
    unknown = Unknown(counts["unknown_tokens"], counts["tokens"])
    yield f"training on {usable:,} of {listed:,} listed pairs ({usable / listed:.1%})"
    yield said_unknown(unknown, "all training captions")
    if root is not None:
        yield f"train with --config.data.train=json:{workdir / USABLE}"
        if isinstance(training.source, Mixture) and training.source.weights:
            yield f"{USABLE} has no weights: every pair appears once per epoch"
    elif usable:
        yield (
            f"these pictures are not separate files, so {USABLE} lists their positions: train on "
            "the source itself, which skips unusable pictures, or pack it with --mode=prepare"
        )
    yield f"{workdir / PAGE} shows samples, {workdir / SKIPPED} names what is unusable"
