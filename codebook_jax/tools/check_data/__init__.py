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

from codebook_jax.console import Progress
from codebook_jax.data.manifest import verify
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.opening import split_specs
from codebook_jax.data.sources.sample import sample_captions
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.data.text import Tokenizer, Unknown, open_tokenizer, said_unknown, spelling
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs
from codebook_jax.run.record import check_folder
from codebook_jax.tools.check_data import outputs
from codebook_jax.tools.check_data.captions import read_captions
from codebook_jax.tools.check_data.findings import Leak, Part, find, find_leak
from codebook_jax.tools.check_data.inspection import inspect
from codebook_jax.tools.check_data.outputs import CHECK, FILES, PAGE, SKIPPED, USABLE

_SOURCES = (  # label, field of config.data, role
    ("training", "train", "train"),
    ("validation", "eval", "validation"),
    ("test", "test", "test"),
)


def check_data(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Checks the data of `config`; returns 1 if too much is unusable or leaked, else 0.

    Raises UserError without training data, and for a folder that holds something else.
    """
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: name the data to check, for example "
            "--config.data.train=json:PATH"
        )
    workdir = Path(workdir)
    check_folder(workdir, FILES.__contains__, "for the report")
    check_outputs(workdir, FILES)
    try:
        with stoppable(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of broken EXIF blocks
            parts, leaks, verdicts = _find(config, workdir)
            root = outputs.write(workdir, parts, leaks, verdicts)
    except Stopped as stop:
        print(f"stopped by {stop}: nothing was written", file=sys.stderr, flush=True)
        return 128 + stop.number
    for sentence in _advice(workdir, parts[0], root):
        print(sentence, flush=True)
    return 1 if verdicts else 0


def _find(
    config: ml_collections.ConfigDict, workdir: Path
) -> tuple[list[Part], list[Leak], list[str]]:
    """(the findings on each source, the pictures also in training, what is above the limit)."""
    data, decode = config.data, config.check.decode
    sources = {}
    for label, field, role in _SOURCES:
        if data[field] and (_is_built_in(data.train) or not _is_built_in(data[field])):
            sources[label] = source_of(config, data[field], role)
        elif data[field]:
            print(f"{label} data are the built-in scenes: not checked", flush=True)
    verdicts = list(_damaged_folders(config)) if decode else []
    sample, size = sample_captions(sources["training"]), data.tokenizer_vocabulary
    tokenizer, _ = open_tokenizer(data.tokenizer, workdir, sample, size, **spelling(data))
    training, *others = (list(_parts(config, *named, tokenizer)) for named in sources.items())
    others = list(itertools.chain(*others))
    leaks = [
        find_leak(part, training[0], near_bits=config.check.near_bits, decoded=decode)
        for part in others
        if not isinstance(part.source, Mixture)
    ]
    verdicts += _verdicts(config.check.max_bad_share, [training[0], *others], leaks)
    return [*training, *others], leaks, verdicts


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
) -> Iterator[Part]:
    """The findings on a source; for a mixture, on all of it and then on each source."""
    settings = config.check
    print(f"checking {label}: {source!r}", flush=True)
    with Progress("looked at", "pictures", len(source)) as progress:
        options = {name: settings[name] for name in ("processes", "decode", "least_side_px")}
        images = inspect(source, **options, tell=progress.advance)
    with Progress("read captions of", "records", len(source)) as progress:
        captions = read_captions(source, tokenizer, progress.advance)
    limits = settings.near_bits, config.model.text.max_tokens
    yield find(label, source, images, captions, *limits)
    if isinstance(source, Mixture):
        for number, piece in enumerate(source.sources, 1):
            start, stop = source.starts[number - 1 : number + 1].tolist()
            own = captions[slice(*np.searchsorted(captions["record"], (start, stop)))].copy()
            own["record"] -= start
            name = f"{label} {number}"
            yield find(name, piece, images.of_records(start, stop), own, *limits)


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
