"""`--mode=check-data`: finds what is wrong with the data before training.

Checks every picture and caption of the training and evaluation sources, and looks for pictures in
both. Prints a table, and writes check.json, usable.jsonl, skipped.tsv and report.html to the
workdir.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import warnings
from pathlib import Path

import ml_collections
from rich.console import Console
from rich.table import Table

from codebook_jax.data.manifest import verify
from codebook_jax.data.progress import Progress
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.json_files import CHECK, USABLE
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.opening import split_specs
from codebook_jax.data.sources.sample import sample_captions
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.data.text import Tokenizer, open_tokenizer, said_unknown, spelling
from codebook_jax.errors import UserError, refuse_below
from codebook_jax.files import check_outputs, write_json
from codebook_jax.run.record import check_folder
from codebook_jax.tools.check_data import outputs, page
from codebook_jax.tools.check_data.captions import read_captions
from codebook_jax.tools.check_data.findings import Leak, Part, joined_part, leak, part_of
from codebook_jax.tools.check_data.inspection import inspect, keep_quiet

_ROWS = {  # of the table: name of a count -> label
    "listed": "listed records",
    "without_caption": "without a picture or caption",
    "usable": "usable",
    "images": "distinct pictures",
    "missing": "missing",
    "empty": "empty files",
    "undecodable": "cannot be decoded",
    "tiny": "tiny",
    "copies": "same as another",
    "near_duplicates": "look like another",
    "captions": "captions",
    "truncated": "longer than the limit",
    "repeated": "shared by several pictures",
    "tokens": "tokens",
    "unknown_tokens": "unknown tokens",
}


def check_data(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Checks `config.data.train`, `eval` and `test`; returns 1 if too much is unusable or leaked,
    else 0.

    Raises UserError for invalid settings, and for a folder that holds something else.
    """
    _check(config)
    workdir = Path(workdir)
    check_folder(workdir, outputs.is_own, "for the report")
    check_outputs(workdir, (USABLE, outputs.SKIPPED, outputs.PAGE, CHECK))
    try:
        with stoppable(), warnings.catch_warnings():
            keep_quiet()
            return _checked(config, workdir)
    except Stopped as stop:
        print(f"stopped by {stop}: nothing was written", file=sys.stderr, flush=True)
        return 128 + stop.number


def _checked(config: ml_collections.ConfigDict, workdir: Path) -> int:
    sources = _sources(config)
    damaged = _damaged_shards(config)
    tokenizer, _ = open_tokenizer(
        config.data.tokenizer,
        workdir,
        sample_captions(sources["training"]),
        config.data.tokenizer_vocabulary,
        **spelling(config.data),
    )
    parts = {label: _parts(config, label, source, tokenizer) for label, source in sources.items()}
    training, *_ = trained = parts.pop("training")
    others = list(itertools.chain(*parts.values()))
    leaks = [
        leak(part, training, config.check.near_bits, config.check.decode)
        for part in others
        if not isinstance(part.source, Mixture)
    ]
    verdicts = [*damaged, *_verdicts(config, [training, *others], leaks)]
    _write(config, workdir, trained, others, leaks, verdicts)
    return 1 if verdicts else 0


def _check(config: ml_collections.ConfigDict) -> None:
    given = config.check
    for name, least in (("processes", 0), ("least_side_px", 0), ("near_bits", 0)):
        refuse_below(f"check.{name}", given[name], least)
    if given.near_bits > 15:
        raise UserError(
            f"config.check.near_bits={given.near_bits} of 64 would match unrelated pictures: use "
            "at most 15"
        )
    if not 0 <= given.max_bad_share <= 1:
        raise UserError(
            f"config.check.max_bad_share={given.max_bad_share} is not a share: use 0 to 1"
        )
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: name the data to check, for example "
            "--config.data.train=json:PATH"
        )


def _sources(config: ml_collections.ConfigDict) -> dict[str, Source]:
    """The sources to check, by label; built-in scenes are left out beside real pictures."""
    data = config.data
    built_in = _is_built_in(data.train)
    found = {}
    for label, spec, role in (
        ("training", data.train, "train"),
        ("validation", data.eval, "validation"),
        ("test", data.test, "test"),
    ):
        if spec and (built_in or not _is_built_in(spec)):
            found[label] = source_of(config, spec, role)
        elif spec:
            print(f"{label} data are the built-in scenes: not checked", flush=True)
    return found


def _is_built_in(spec: str) -> bool:
    return any(re.match(r"scenes\b", part) for part in split_specs(spec))


def _damaged_shards(config: ml_collections.ConfigDict) -> list[str]:
    """A sentence on each packed folder with damaged files."""
    specs = itertools.chain(
        *map(split_specs, (config.data.train, config.data.eval, config.data.test))
    )
    packed = (spec.removeprefix("records:") for spec in specs if spec.startswith("records:"))
    folders = dict.fromkeys(os.path.expanduser(spec.partition("?")[0]) for spec in packed)
    sentences = []
    for folder in folders if config.check.decode else ():
        damaged = verify(folder)
        if damaged:
            sentences.append(
                f"{folder} has {len(damaged):,} damaged files (first: {damaged[0][1]}): run its "
                "--mode=prepare command again, which repacks them"
            )
    return sentences


def _parts(
    config: ml_collections.ConfigDict, label: str, source: Source, tokenizer: Tokenizer
) -> list[Part]:
    """The findings on a source; for a mixture, on all of it and then on each source."""
    if not isinstance(source, Mixture):
        return [_part(config, label, source, tokenizer)]
    parts = [
        _part(config, f"{label} {number}", part, tokenizer)
        for number, part in enumerate(source.sources, 1)
    ]
    return [joined_part(label, source, parts, config.check.near_bits), *parts]


def _part(
    config: ml_collections.ConfigDict, label: str, source: Source, tokenizer: Tokenizer
) -> Part:
    given = config.check
    print(f"checking {label}: {source!r}", flush=True)
    with Progress("looked at", "pictures", len(source)) as progress:
        images = inspect(
            source,
            processes=given.processes,
            decode=given.decode,
            least_side_px=given.least_side_px,
            tell=progress.advance,
        )
    with Progress("read captions of", "records", len(source)) as progress:
        said = read_captions(source, tokenizer, progress.advance)
    return part_of(label, source, images, said, given.near_bits)


def _verdicts(config: ml_collections.ConfigDict, parts: list[Part], leaks: list[Leak]) -> list[str]:
    """A sentence on each share above the limit."""
    limit = config.check.max_bad_share
    over = f"more than config.check.max_bad_share={limit:g}"
    sentences = []
    for part in parts:
        listed, held = part.source.listed, len(part.source) + len(part.source.left_out)
        bad = listed - int(part.usable_records.sum())
        if bad > limit * listed:
            before = (
                f", {listed - held:,} of them before this list was made" if listed > held else ""
            )
            which = "the others" if before else "them"
            sentences.append(
                f"{bad:,} of {listed:,} listed records of {part.label} are unusable "
                f"({bad / listed:.1%}), {over}{before}: {outputs.SKIPPED} names {which}; train on "
                f"{USABLE}, or fix them"
            )
    for one in leaks:
        count, images = int(one.leaked.sum()), len(one.content)
        if count > limit * images:
            sentences.append(
                f"{count:,} of {images:,} pictures of {one.evaluation.label} are also in training "
                f"({count / images:.1%}), {over}: remove them from one of the two; {CHECK} names "
                "them"
            )
    return sentences


def _write(
    config: ml_collections.ConfigDict,
    workdir: Path,
    trained: list[Part],
    others: list[Part],
    leaks: list[Leak],
    verdicts: list[str],
) -> None:
    """Prints the table and writes the files; the first of `trained` is the whole training data."""
    max_tokens = config.model.text.max_tokens
    parts = [*trained, *others]
    counts = [part.counts(max_tokens) for part in parts]
    root = outputs.image_root(trained[0])
    rows = [["", *(part.label for part in parts)]]
    rows += [[text, *(f"{count[name]:,}" for count in counts)] for name, text in _ROWS.items()]
    _show(rows, leaks, verdicts)
    outputs.write_usable(workdir / USABLE, trained[1:] or trained, root)
    single = [part for part in parts if not isinstance(part.source, Mixture)]
    outputs.write_skipped(workdir / outputs.SKIPPED, single)
    page.write(workdir / outputs.PAGE, rows, parts, leaks, verdicts, max_tokens)
    write_json(
        workdir / CHECK,
        {
            "listed": counts[0]["listed"],
            "usable": counts[0]["usable"],
            "image_root": root,
            "max_tokens": max_tokens,
            "sources": [
                {"label": part.label, "source": repr(part.source), **count}
                | {"most_repeated": [one._asdict() for one in part.captions.most_repeated]}
                for part, count in zip(parts, counts, strict=True)
            ],
            "leaks": [one.counts() | {"pictures": list(one.named())} for one in leaks],
            "verdicts": verdicts,
        },
    )
    for sentence in _advice(workdir, trained[0], root):
        print(sentence, flush=True)


def _advice(workdir: Path, training: Part, root: str | None) -> list[str]:
    """What to do next."""
    usable, listed = int(training.usable_records.sum()), training.source.listed
    sentences = [
        f"training on {usable:,} of {listed:,} listed pairs ({usable / listed:.1%})",
        said_unknown(training.captions.unknown, "all training captions"),
    ]
    if root is not None:
        sentences.append(f"train with --config.data.train=json:{workdir / USABLE}")
    elif usable:
        sentences.append(
            f"these pictures are not separate files, so {USABLE} lists their positions: train on "
            "the source itself, which skips unusable pictures, or pack it with --mode=prepare"
        )
    if root is not None and isinstance(training.source, Mixture) and training.source.weights:
        sentences.append(f"{USABLE} has no weights: every pair appears once per epoch")
    sentences.append(
        f"{workdir / outputs.PAGE} shows samples, {workdir / outputs.SKIPPED} names what is "
        "unusable"
    )
    return sentences


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
            f"{count['leaked']:,} of {count['images']:,} pictures of {count['evaluation']} are in "
            f"training, or look like one there ({count['same_content']:,} the same file, "
            f"{count['same_look']:,} look the same; {count['same_name_alone']:,} more have only "
            "the same name)"
        )
    for sentence in verdicts:
        console.print(f"problem: {sentence}")
