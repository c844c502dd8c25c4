"""`--mode=check-data`: checks every picture and caption before training, and looks for pictures in
both training and evaluation data. Prints a table, and writes `outputs.FILES`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import numpy as np

from codebook_jax.data.manifest import verify
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.record import sample_captions
from codebook_jax.data.sources.scenes import Drawn
from codebook_jax.data.text import Tokenizer, open_tokenizer, said_unknown, spelling
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs
from codebook_jax.run.record import check_folder
from codebook_jax.stop import Stopped, stoppable
from codebook_jax.tools.check_data import outputs
from codebook_jax.tools.check_data.examples import as_pairs
from codebook_jax.tools.check_data.findings import Part, find, find_leak, read_captions
from codebook_jax.tools.check_data.inspection import inspect, pieces_of
from codebook_jax.tools.check_data.outputs import CHECK, FILES, PAGE, SKIPPED, USABLE

_FIELDS = {"training": "train", "validation": "eval", "test": "test"}  # of config.data


def check_data(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Checks the data of `config`; returns 1 if too much is unusable or leaked, else 0. Raises
    UserError without training data, and for a folder that holds something else.
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
            parts = _find(config, workdir)
            verdicts = list(_verdicts(config, parts))
            root = outputs.write(workdir, parts, verdicts, decoded=config.check.decode)
    except Stopped as stop:
        print(f"stopped by {stop}: nothing was written", file=sys.stderr, flush=True)
        return 128 + stop.number
    for sentence in _advice(workdir, parts[0], root):
        print(sentence, flush=True)
    return 1 if verdicts else 0


def _find(config: ml_collections.ConfigDict, workdir: Path) -> list[Part]:
    """The findings on each source, training first."""
    data, sources = config.data, {}
    for label, field in _FIELDS.items():
        if data[field]:
            role = "train" if label == "training" else label
            sources[label] = source_of(config, data[field], role, kind=None)
    drawn = [
        label
        for label, source in sources.items()
        if any(isinstance(piece, Drawn) for piece in pieces_of(source))
    ]
    for label in drawn if "training" not in drawn else ():
        print(f"{label} data are the built-in scenes: not checked", flush=True)
        del sources[label]
    sample, size = sample_captions(sources["training"]), data.tokenizer_vocabulary
    tokenizer, _ = open_tokenizer(data.tokenizer, workdir, sample, size, **spelling(data))
    parts = [part for named in sources.items() for part in _parts(config, *named, tokenizer)]
    options = {"near_bits": config.check.near_bits, "decoded": config.check.decode}
    for at, part in enumerate(parts):
        if not (part.label.startswith("training") or isinstance(part.source, Mixture)):
            parts[at] = find_leak(part, parts[0], **options)
    return parts


def _parts(
    config: ml_collections.ConfigDict, label: str, source: Source, tokenizer: Tokenizer
) -> Iterator[Part]:
    """The findings on a source; for a mixture, on all of it and then on each source."""
    settings = config.check
    print(f"checking {label}: {source!r}", flush=True)
    source = as_pairs(source)
    options = {name: settings[name] for name in ("processes", "decode", "least_side_px")}
    found, captions = inspect(source, **options), read_captions(source, tokenizer)
    limits = settings.near_bits, config.model.text.max_tokens
    yield find(label, source, found, captions, *limits)
    for number, piece in enumerate(source.sources if isinstance(source, Mixture) else ()):
        start, stop = source.starts[number : number + 2].tolist()
        own = captions[slice(*np.searchsorted(captions["record"], (start, stop)))].copy()
        own_found = found[start:stop].copy()
        own["record"] -= start
        own_found["first"] -= start
        yield find(f"{label} {number + 1}", piece, own_found, own, *limits)


def _verdicts(config: ml_collections.ConfigDict, parts: list[Part]) -> Iterator[str]:
    """A sentence on each packed folder with damaged files, and each share above the limit."""
    limit = config.check.max_bad_share
    over = f"more than config.check.max_bad_share={limit:g}"
    pieces = [piece for part in parts for piece in pieces_of(part.source)]
    for folder in dict.fromkeys(piece.place for piece in pieces if piece.form == "records"):
        if config.check.decode and (damaged := verify(folder)):
            yield (
                f"{folder} has {len(damaged):,} damaged files (first: {damaged[0][1]}): run its "
                "--mode=prepare command again, which repacks them"
            )
    for part in parts:
        listed = part.counts["listed"]
        bad = listed - part.counts["usable"]
        if bad > limit * listed and not part.label.startswith("training "):  # of a mixture
            yield (
                f"{bad:,} of {listed:,} listed records of {part.label} are unusable "
                f"({bad / listed:.1%}), {over}: {SKIPPED} names those in this list: "
                "fix them, or train without them"
            )
    for found in filter(None, (part.leak for part in parts)):
        leaked, images = found["leaked"], found["images"]
        if leaked > limit * images:
            yield (
                f"{leaked:,} of {images:,} pictures of {found['evaluation']} are also in training "
                f"({leaked / images:.1%}), {over}: remove them from one of the two; {CHECK} names "
                "them"
            )


def _advice(workdir: Path, training: Part, root: str | None) -> Iterator[str]:
    """What to do next."""
    counts = training.counts
    usable, listed = counts["usable"], counts["listed"]
    learned = f"{usable:,} of {listed:,} listed {training.source.learned}"
    yield f"training on {learned} ({usable / listed:.1%})"
    yield said_unknown(counts["unknown_tokens"], counts["tokens"], "all training captions")
    if root is not None:
        yield f"train with --config.data.train=json:{workdir / USABLE}"
        if isinstance(training.source, Mixture) and training.source.weights:
            yield f"{USABLE} has no weights: every pair appears once per epoch"
    elif usable:
        yield (
            f"{USABLE} is written for pairs whose pictures are separate files: train on the source "
            "itself, which skips unusable pictures, or pack it with --mode=prepare"
        )
    yield f"{workdir / PAGE} shows samples, {workdir / SKIPPED} names what is unusable"
