"""`--mode=check-data`: what is wrong with the data, before anything is trained on them.

Looks at every picture and caption of the training and evaluation sources, and for pictures that are in both. Leaves a
table on the terminal, check.json, usable.jsonl, skipped.tsv and report.html in the workdir.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_collections
from rich.console import Console
from rich.table import Table

from codebook_jax.check_data import outputs
from codebook_jax.check_data.captions import read_captions
from codebook_jax.check_data.findings import Leak, Part, leak, same_pictures
from codebook_jax.check_data.inspection import inspect
from codebook_jax.check_data.page import page
from codebook_jax.data.manifest import verify
from codebook_jax.data.progress import Progress
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.json_files import CHECK, USABLE
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.opening import split_specs
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.data.text import Tokenizer, open_tokenizer
from codebook_jax.errors import UserError
from codebook_jax.workdir import write_json

_EXAMPLES = 10  # repeated captions that are shown
_ROWS = {  # of the table: name of a count -> what it says
    "listed": "listed records",
    "without_caption": "without a caption",
    "usable": "usable",
    "images": "pictures, each once",
    "missing": "missing",
    "empty": "empty files",
    "undecodable": "cannot be decoded",
    "tiny": "tiny",
    "copies": "the same as another",
    "near_duplicates": "look like another",
    "captions": "captions",
    "truncated": "longer than is read",
    "repeated": "of several pictures",
}


def check_data(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Checks `config.data.train`, `eval` and `test`; 1 where too much is unusable or leaked, else 0.

    Raises UserError for settings that cannot be checked with, and for a folder that holds something else.
    """
    _check(config)
    workdir = Path(workdir)
    outputs.check_folder(workdir)
    try:
        with stoppable():
            return _checked(config, workdir)
    except Stopped as stop:
        print(f"stopped by {stop}: nothing is written", file=sys.stderr, flush=True)
        return 128 + stop.number


def _checked(config: ml_collections.ConfigDict, workdir: Path) -> int:
    sources = _sources(config)
    damaged = _damaged_shards(config)
    training = next(source for label, source in sources if label == "training")
    tokenizer, _ = open_tokenizer(
        config.data.tokenizer, workdir, training, config.data.tokenizer_vocabulary
    )
    parts = [_part(config, label, source, tokenizer) for label, source in sources]
    trained = [part for part in parts if part.label == "training"]
    leaks = [
        leak(part, other, config.check.near_bits, config.check.decode)
        for part in parts
        if part.label != "training"
        for other in trained
    ]
    verdicts = [*damaged, *_verdicts(config, parts, leaks)]
    _write(config, workdir, parts, leaks, verdicts)
    return 1 if verdicts else 0


def _check(config: ml_collections.ConfigDict) -> None:
    given = config.check
    for name, least in (("processes", 0), ("least_side_px", 0), ("near_bits", 0)):
        if given[name] < least:
            raise UserError(f"config.check.{name}={given[name]} is too small: give at least {least}")
    if given.near_bits > 15:
        raise UserError(
            f"config.check.near_bits={given.near_bits} of 64 calls unlike pictures alike: give at most 15"
        )
    if not 0 <= given.max_bad_share <= 1:
        raise UserError(f"config.check.max_bad_share={given.max_bad_share} is a share: give 0 to 1")
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: name what is to be checked, as --config.data.train=json:PATH"
        )


def _sources(config: ml_collections.ConfigDict) -> list[tuple[str, Source]]:
    """(label, source) of all that is checked, those of a mixture one by one; no scenes beside real pictures."""
    found: list[tuple[str, Source]] = []
    data = config.data
    built_in = data.train.startswith("scenes")
    for label, spec, role in (
        ("training", data.train, "train"),
        ("validation", data.eval, "validation"),
        ("test", data.test, "test"),
    ):
        if not spec or (spec.startswith("scenes") and not built_in):
            continue
        source = source_of(config, spec, role)
        parts = source.sources if isinstance(source, Mixture) else [source]
        found += [(label, part) for part in parts]
    return found


def _damaged_shards(config: ml_collections.ConfigDict) -> list[str]:
    """A sentence on each packed folder of which a file is not as it was packed."""
    sentences = []
    for spec in (config.data.train, config.data.eval, config.data.test):
        for part in split_specs(spec):
            scheme, _, rest = part.partition(":")
            if scheme != "records" or not config.check.decode:
                continue
            folder = rest.partition("?")[0]
            damaged = verify(folder)
            if damaged:
                sentences.append(
                    f"{len(damaged):,} files of {folder} are damaged (first: {damaged[0][1]}): run its --mode=prepare "
                    "command again, which makes them anew"
                )
    return sentences


def _part(
    config: ml_collections.ConfigDict, label: str, source: Source, tokenizer: Tokenizer
) -> Part:
    given = config.check
    print(f"looking at {label}: {source!r}", flush=True)
    with Progress("looked at", "pictures", len(source)) as progress:
        images = inspect(
            source,
            processes=given.processes,
            decode=given.decode,
            least_side_px=given.least_side_px,
            tell=progress.advance,
        )
    captions = read_captions(source, images.which, tokenizer, examples=_EXAMPLES)
    return Part(label, source, images, captions, *same_pictures(images, given.near_bits))


def _verdicts(
    config: ml_collections.ConfigDict, parts: list[Part], leaks: list[Leak]
) -> list[str]:
    """A sentence on each share that is above the limit."""
    limit = config.check.max_bad_share
    sentences = []
    for part in parts:
        bad = part.source.listed - int(part.usable_records.sum())
        if bad > limit * part.source.listed:
            sentences.append(
                f"{bad:,} of {part.source.listed:,} listed records of {part.label} are unusable "
                f"({bad / part.source.listed:.1%}), more than config.check.max_bad_share={limit:g}: {outputs.SKIPPED} "
                f"names them; train on {USABLE}, or mend them"
            )
    for one in leaks:
        count, images = int(one.leaked.sum()), len(one.content)
        if count > limit * images:
            sentences.append(
                f"{count:,} of {images:,} pictures of {one.evaluation.label} are in training too ({count / images:.1%}), "
                f"more than config.check.max_bad_share={limit:g}: take them out of one of the two, {CHECK} names them"
            )
    return sentences


def _write(
    config: ml_collections.ConfigDict,
    workdir: Path,
    parts: list[Part],
    leaks: list[Leak],
    verdicts: list[str],
) -> None:
    """Leaves the files, and shows the table."""
    max_tokens = config.model.text.max_tokens
    counts = [part.counts(max_tokens) for part in parts]
    trained = [part for part in parts if part.label == "training"]
    root = outputs.image_root(trained)
    rows = [["", *(part.label for part in parts)]]
    rows += [[text, *(f"{count[name]:,}" for count in counts)] for name, text in _ROWS.items()]
    listed, usable = (
        sum(count[name] for count, part in zip(counts, parts, strict=True) if part in trained)
        for name in ("listed", "usable")
    )
    outputs.write_usable(workdir / USABLE, trained, root)
    outputs.write_skipped(workdir / outputs.SKIPPED, parts)
    with outputs.written_whole(workdir / outputs.PAGE) as file:
        file.write(page("The data", rows, parts, leaks, max_tokens))
    write_json(
        workdir / CHECK,
        {
            "listed": listed,
            "usable": usable,
            "image_root": root,
            "max_tokens": max_tokens,
            "sources": [
                {"label": part.label, "source": repr(part.source), **count}
                for part, count in zip(parts, counts, strict=True)
            ],
            "leaks": [one.counts() | {"names": _leaked_names(one)} for one in leaks],
            "verdicts": verdicts,
        },
    )
    _show(rows, leaks, verdicts)
    print(f"training on {usable:,} of {listed:,} listed pairs ({usable / max(1, listed):.1%})")
    if root is not None:
        print(f"train with --config.data.train=json:{workdir / USABLE}")
    print(f"{workdir / outputs.PAGE} shows samples, {workdir / outputs.SKIPPED} names what is unusable", flush=True)


def _leaked_names(one: Leak) -> list[str]:
    source, first = one.evaluation.source, one.evaluation.images.first
    return [source.name(int(first[at])) for at in one.leaked.nonzero()[0]]


def _show(rows: list[list[str]], leaks: list[Leak], verdicts: list[str]) -> None:
    table = Table()
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for one in leaks:
        count = one.counts()
        console.print(
            f"{count['leaked']:,} of {count['images']:,} pictures of {count['evaluation']} are in training "
            f"({count['same_content']:,} the same file, {count['same_look']:,} look the same; "
            f"{count['same_name_alone']:,} more have the same name alone)"
        )
    for sentence in verdicts:
        console.print(f"problem: {sentence}")
