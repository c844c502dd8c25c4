"""The manifest of a folder of packed pairs: read, written, and compared with the files."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, write_json, written_whole

MANIFEST, SKIPPED = "manifest.json", "skipped.tsv"
PROGRESS = ".progress"  # folder of the packing's state until the manifest is written
VERSION = 1


class Shard(NamedTuple):
    """The manifest's entry for one shard."""

    file: str
    records: int
    captions: int
    skipped: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str

    @property
    def files(self) -> tuple[tuple[str, int, str], ...]:
        """(name, bytes, sha256) of the shard and of its index."""
        index = index_name(self.file), self.index_bytes, self.index_sha256
        return (self.file, self.bytes, self.sha256), index


Receipt = tuple[Shard, Sequence[tuple[str, str]]]  # and (name, why) of each record left out of it


class Manifest(NamedTuple):
    """The contents of a folder of packed pairs."""

    records: int
    captions: int
    bytes: int  # of the shards and their indexes
    skipped: int  # listed records that are in no shard
    # {"repr", "fingerprint", "records"} of what was packed, and "kind" if they are not pairs
    source: Mapping[str, str | int]
    options: Mapping[str, str | int]  # the fields of config.prepare that determine the content
    listed: int  # records that the source lists
    left_out: int  # records left out by the source itself: the first lines of skipped.tsv
    skipped_sha256: str  # of skipped.tsv
    shards: tuple[Shard, ...]

    @property
    def kind(self) -> str:
        """What the records are, as `Source.kind`."""
        return self.source.get("kind", "pairs")


def index_name(file: str) -> str:
    """The name of the index beside a shard's file."""
    return f"{file.removesuffix('.array_record')}.jsonl"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    source: Mapping[str, str | int],
    options: Mapping[str, str | int],
    *,
    listed: int,
    left_out: Sequence[tuple[str, str]],
    receipts: Sequence[Receipt],
) -> Manifest:
    """Writes `skipped.tsv`, then the manifest of these shards in order."""
    shards, lost = zip(*receipts, strict=True)
    skipped = [*left_out, *itertools.chain(*lost)]
    with written_whole(folder / SKIPPED, errors="backslashreplace") as file:
        for row in skipped:
            file.write("\t".join(re.sub(r"[\t\r\n]+", " ", field) for field in row) + "\n")
    manifest = Manifest(
        records=sum(shard.records for shard in shards),
        captions=sum(shard.captions for shard in shards),
        bytes=sum(shard.bytes + shard.index_bytes for shard in shards),
        skipped=len(skipped),
        source=source,
        options=options,
        listed=listed,
        left_out=len(left_out),
        skipped_sha256=file_sha256(folder / SKIPPED),
        shards=shards,
    )
    content = manifest._asdict() | {"shards": [shard._asdict() for shard in shards]}
    write_json(folder / MANIFEST, {"version": VERSION, **content})
    return manifest


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder; raises UserError if there is none or it cannot be used."""
    path = Path(folder) / MANIFEST
    try:
        content = parse_json(path.read_bytes())
        if content["version"] != VERSION:
            raise UserError(
                f"{path} has version {content['version']}, but this program reads version "
                f"{VERSION}: pack the source again, or use the program that packed it"
            )
        shards = tuple(Shard(**shard) for shard in content["shards"])
        return Manifest(**{name: content[name] for name in Manifest._fields} | {"shards": shards})
    except FileNotFoundError as failure:
        raise UserError(
            f"{folder} has no {MANIFEST}: after records: give the --workdir of a finished "
            "--mode=prepare run; the same command again completes one that was interrupted"
        ) from failure
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise UserError(
            f"{path} cannot be read ({type(failure).__name__}: {failure}): restore the original, "
            "or remove the folder and pack the source again"
        ) from failure


def misfits(folder: Path | str, shards: Sequence[Shard]) -> list[tuple[int, str]]:
    """(number, why) of each shard with a missing file, or one of another size."""
    sizes = _sizes(folder)
    whys = [[_misfit(name, sizes, size) for name, size, _ in shard.files] for shard in shards]
    return [(number, why[0] or why[1]) for number, why in enumerate(whys) if any(why)]


def verify(folder: Path | str, tell: Callable[[str], None] | None = None) -> list[tuple[str, str]]:
    """(file, why) of each file that differs from the manifest; `tell` is called after each file.

    Raises UserError if there is no manifest.
    """
    manifest, sizes = read_manifest(folder), _sizes(folder)

    def why(name: str, size: int | None, sha256: str) -> str:
        misfit = _misfit(name, sizes, size)
        try:
            if not misfit and file_sha256(Path(folder, name)) != sha256:
                misfit = f"{name} has changed (its sha256 differs from the manifest)"
        except OSError as failure:
            misfit = f"{name} cannot be read ({failure.strerror})"
        if tell is not None:
            tell(name)
        return misfit

    expected = [file for shard in manifest.shards for file in shard.files]
    expected.append((SKIPPED, None, manifest.skipped_sha256))
    with ThreadPoolExecutor() as threads:
        reasons = list(threads.map(why, *zip(*expected, strict=True)))
    return [(file[0], reason) for file, reason in zip(expected, reasons, strict=True) if reason]


def _sizes(folder: Path | str) -> dict[str, int]:
    """The size of each file, in one request: on a network disk, a request per file is slow."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _misfit(name: str, sizes: Mapping[str, int], size: int | None) -> str:
    """Whether a file is missing or does not have the expected `size` (None: any); or ""."""
    if name not in sizes:
        return f"{name} is missing"
    held = sizes[name]
    return "" if size in (None, held) else f"{name} has {held:,} bytes instead of {size:,}"
