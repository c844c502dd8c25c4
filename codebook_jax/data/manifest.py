"""The manifest of a folder of packed pairs: reads it, writes it, and checks the files against
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from codebook_jax.data.packing import Receipt, file_sha256, index_name, shard_name
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, write_json, written_whole

MANIFEST, SKIPPED = "manifest.json", "skipped.tsv"
PROGRESS = ".progress"  # folder of the packing's state until the manifest is written
VERSION = 1
_AT_ONCE = 8  # files hashed in parallel


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
        return (
            (self.file, self.bytes, self.sha256),
            (index_name(self.file), self.index_bytes, self.index_sha256),
        )


class Manifest(NamedTuple):
    """The contents of a folder of packed pairs."""

    source: Mapping[str, Any]  # {"repr", "fingerprint", "records"} of what was packed
    options: Mapping[str, Any]  # the fields of config.prepare that determine the content
    listed: int  # records that the source lists
    left_out: int  # records left out by the source itself: the first lines of skipped.tsv
    skipped_sha256: str  # of skipped.tsv
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def captions(self) -> int:
        return sum(shard.captions for shard in self.shards)

    @property
    def skipped(self) -> int:
        return self.left_out + sum(shard.skipped for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes + shard.index_bytes for shard in self.shards)


def write_manifest(
    folder: Path,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    listed: int,
    left_out: Sequence[tuple[str, str]],
    receipts: Sequence[Receipt],
) -> Manifest:
    """Writes `skipped.tsv`, then the manifest of these shards in order."""
    skipped_sha256 = _write_skipped(folder / SKIPPED, left_out, receipts)
    shards = tuple(
        Shard(
            shard_name(number, len(receipts)),
            receipt.records,
            receipt.captions,
            len(receipt.skipped),
            *receipt[2:6],
        )
        for number, receipt in enumerate(receipts)
    )
    manifest = Manifest(source, options, listed, len(left_out), skipped_sha256, shards)
    names = ("records", "captions", "bytes", "skipped")
    totals = {name: getattr(manifest, name) for name in names}
    content = manifest._asdict() | {"shards": [shard._asdict() for shard in shards]}
    write_json(folder / MANIFEST, {"version": VERSION, **totals, **content})
    return manifest


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder; raises UserError if there is none or it cannot be used."""
    path = Path(folder) / MANIFEST
    try:
        content = parse_json(path.read_bytes())
        if content["version"] != VERSION:
            raise UserError(
                f"{path} has version {content['version']}, but this program reads version "
                f"{VERSION}: pack the source again, or use the version of the program that packed "
                "it"
            )
        shards = tuple(Shard(**shard) for shard in content["shards"])
        fields = {name: content[name] for name in Manifest._fields}
        return Manifest(**fields | {"shards": shards})
    except OSError as failure:
        raise UserError(_no_manifest(Path(folder), failure)) from failure
    except (ValueError, KeyError, TypeError) as failure:
        raise UserError(
            f"{path} is not a valid manifest ({type(failure).__name__}: {failure}): restore the "
            "original, or remove the folder and pack the source again"
        ) from failure


def _no_manifest(folder: Path, failure: OSError) -> str:
    if not folder.is_dir():
        return f"the folder {folder} does not exist: after records: give the --workdir of a --mode=prepare run"
    if not isinstance(failure, FileNotFoundError):
        return (
            f"{folder / MANIFEST} cannot be read ({failure.strerror}): fix that, then start again"
        )
    if any(folder.glob("pairs-*.array_record")) or (folder / PROGRESS).is_dir():
        return f"{folder} is not completely packed (no {MANIFEST}): run the same --mode=prepare command again"
    return f"{folder} holds no packed pairs (no {MANIFEST}): after records: give the --workdir of a --mode=prepare run"


def misfits(folder: Path | str, shards: Sequence[Shard]) -> list[tuple[int, str]]:
    """(number, why) of each shard with a file that is missing or does not have the size in the
    manifest.
    """
    with os.scandir(
        folder
    ) as entries:  # one request: on a network disk, a request per file is slow
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    found = []
    for number, shard in enumerate(shards):
        for name, size, _ in shard.files:
            why = _size_misfit(name, sizes.get(name), size)
            if why:
                found.append((number, why))
                break
    return found


def verify(folder: Path | str, tell: Callable[[str], None] | None = None) -> list[tuple[str, str]]:
    """(file, why) of every file in a packed folder whose size or sha256 differs from the manifest.

    Reads every file; calls `tell` with each name when it is done. Raises UserError if there is no
    manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    expected = [file for shard in manifest.shards for file in shard.files]
    expected.append((SKIPPED, -1, manifest.skipped_sha256))

    def why(file: tuple[str, int, str]) -> str:
        name, size, sha256 = file
        path = folder / name
        held = path.stat().st_size if path.is_file() else None
        misfit = _size_misfit(name, held, held if size < 0 else size)
        try:
            if held is None or misfit:
                return misfit or f"{name} is missing"
            return (
                ""
                if file_sha256(path) == sha256
                else f"{name} has changed (its sha256 differs from the manifest)"
            )
        except OSError as failure:
            return f"{name} cannot be read ({failure.strerror})"
        finally:
            if tell is not None:
                tell(name)

    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as threads:
        reasons = list(threads.map(why, expected))
    return [(file[0], reason) for file, reason in zip(expected, reasons, strict=True) if reason]


def _size_misfit(name: str, held: int | None, size: int | None) -> str:
    """How a file of `held` bytes (None: missing) differs from the expected `size`; empty if it does
    not.
    """
    if held is None:
        return f"{name} is missing"
    return "" if held == size else f"{name} has {held:,} bytes instead of {size:,}"


def without_paths(text: str) -> str:
    """The repr of a source without the folders of its files."""
    return re.sub(r"'[^']*/([^'/]*)'", r"'\1'", text)


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """The lines of skipped.tsv."""
    text = (folder / SKIPPED).read_text(encoding="utf-8")
    return [tuple(line.split("\t")) for line in text.split("\n")[:-1]]


def _write_skipped(
    path: Path, left_out: Sequence[tuple[str, str]], receipts: Sequence[Receipt]
) -> str:
    """Writes a line for each record left out; returns the file's sha256."""
    with written_whole(path, errors="backslashreplace") as file:
        for rows in (left_out, *(receipt.skipped for receipt in receipts)):
            for row in rows:
                file.write("\t".join(re.sub(r"[\t\r\n]+", " ", field) for field in row) + "\n")
    return file_sha256(path)
