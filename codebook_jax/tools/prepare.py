"""`--mode=prepare`: packs the pairs or examples of a source into shards, which `records:WORKDIR`
reads.

After any interruption, the same command makes the missing shards and ends with the same bytes; in a
finished folder it verifies every file and repacks damaged shards. Until the manifest is written,
the folder holds a plan of what is packed and a receipt per finished shard.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from rich import filesize

from codebook_jax.config import changed_fields
from codebook_jax.console import Progress
from codebook_jax.data import manifest as manifests
from codebook_jax.data.manifest import MANIFEST, PROGRESS, SKIPPED, Manifest, Receipt, Shard
from codebook_jax.data.packing import Packing, full_disk_named, write_shard
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs, parse_json, write_json
from codebook_jax.run.ownership import owned
from codebook_jax.run.record import check_folder
from codebook_jax.stop import Stopped, stoppable
from codebook_jax.tools import beam
from codebook_jax.tools.workers import Tell, process_count, spread

_PLAN = "plan.json"
_OWN = re.compile(rf"(pairs|examples)-.*\.(array_record|jsonl)|{MANIFEST}|{SKIPPED}")


def prepare(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Packs `config.prepare.source` into `workdir`; returns the exit code. Raises UserError for a
    source that cannot be packed, and for a folder that holds something else.
    """
    settings, workdir = config.prepare, Path(workdir)
    if settings.beam_options and not settings.beam_runner:
        raise UserError(
            f"config.prepare.beam_options={settings.beam_options!r} only applies to Apache Beam: "
            "name its runner too, as --config.prepare.beam_runner=DirectRunner"
        )
    try:
        with stoppable(), full_disk_named(workdir), _locked(workdir):
            _complete(config, workdir, _open(config))
    except Stopped as stop:
        packed = _shards(len(list(workdir.glob(f"{PROGRESS}/[0-9]*.json"))))
        print(f"stopped by {stop}: {packed} packed; the same command continues", file=sys.stderr)
        return 128 + stop.number
    return 0


def _open(config: ml_collections.ConfigDict) -> Source:
    spec = config.prepare.source or config.data.train
    source = source_of(config, spec, config.prepare.role, kind=None)
    if isinstance(source, Mixture) and source.weights is not None:
        raise UserError(f"{spec!r}: weights only apply to training: leave them out for packing")
    if not len(source):
        raise UserError(f"{spec!r} has no {source.learned} to pack")
    return source


def _complete(config: ml_collections.ConfigDict, workdir: Path, source: Source) -> None:
    """Completes the folder, from whatever state it is in."""
    settings = config.prepare
    packing = Packing(settings.side_px, settings.quality, settings.shard_records)
    shards = -(-len(source) // packing.shard_records)
    without_folders = re.sub(r"'[^']*/([^'/]*)'", r"'\1'", repr(source))
    facts = {"repr": without_folders, "fingerprint": source.fingerprint(), "records": len(source)}
    if source.kind != "pairs":  # so that what was packed of pairs before stays as it is
        facts["kind"] = source.kind
    plan = {"source": facts, "options": {"role": settings.role, **packing._asdict()}}
    place = {name: config.data[name] for name in ("train", "image_root", "path_map")}
    place["source"] = settings.source
    finished, damaged = _begin(workdir, plan, place, shards)
    if finished is not None:
        print(f"already complete, all files verified: {_summary(workdir, finished)}", flush=True)
        return
    _pack_missing(settings, workdir, source, packing, shards)
    receipts = _receipts(workdir, shards)
    if len(receipts) < shards:
        raise UserError(
            f"{shards - len(receipts):,} of {shards:,} shards in {workdir} are missing or "
            "changed: use a folder that every worker can reach and nothing else writes to, and "
            "run the same command again"
        )
    if not any(written.records for written, _ in receipts.values()):
        for file in [each for each in workdir.iterdir() if _OWN.fullmatch(each.name)]:
            file.unlink()  # so that the next start tries again
        shutil.rmtree(workdir / PROGRESS)
        raise UserError(
            f"{source!r}: none of {len(source):,} pictures could be read (first: "
            f"{': '.join(receipts[0][1][0])}): check config.data.image_root and the files"
        )
    counts = {"listed": source.listed, "left_out": source.left_out}
    manifest = manifests.write_manifest(workdir, **plan, **counts, receipts=list(receipts.values()))
    shutil.rmtree(workdir / PROGRESS)
    for why in damaged:
        print(f"{why}: remade")
    print(_summary(workdir, manifest), flush=True)


def _pack_missing(
    settings: ml_collections.ConfigDict,
    workdir: Path,
    source: Source,
    packing: Packing,
    shards: int,
) -> None:
    """Packs those of the shards that have no receipt; `settings` are those of config.prepare."""
    receipts = _receipts(workdir, shards)
    missing = [shard for shard in range(shards) if shard not in receipts]
    count = process_count(settings.processes, len(missing))
    by = settings.beam_runner or f"{count} process{'es' * (count != 1)}"
    most = f", shorter sides reduced to {settings.side_px} px" if settings.side_px else ""
    print(
        f"packing {len(source):,} records of {source!r} into {_shards(shards)} in {workdir}, "
        f"by {by}{most}",
        flush=True,
    )
    if receipts:
        print(f"{len(receipts):,} of {shards:,} shards are packed already", flush=True)
    pack_shard = functools.partial(_pack_shard, workdir.absolute(), packing)
    if settings.beam_runner:
        options = {"runner": settings.beam_runner, "options": settings.beam_options}
        beam.pack(pack_shard, source, missing, workdir.absolute() / PROGRESS, **options)
        return
    skipped = sum(written.skipped for written, _ in receipts.values())
    done = skipped + sum(written.records for written, _ in receipts.values())
    with Progress("packed", source.learned, len(source), done=done, skipped=skipped) as progress:
        options = {"processes": settings.processes, "field": "prepare.processes"}
        spread(pack_shard, source, missing, **options, tell=progress.advance)


def _pack_shard(
    workdir: Path, packing: Packing, source: Source, shard: int, tell: Tell | None = None
) -> None:
    written, skipped = write_shard(source, shard, workdir, packing, tell)
    write_json(_receipt_file(workdir, shard), [written._asdict(), skipped])


def _summary(workdir: Path, manifest: Manifest) -> str:
    left_out = f"; {manifest.skipped:,} skipped: see {SKIPPED}" if manifest.skipped else ""
    return (
        f"packed {manifest.records:,} of {manifest.listed:,} listed {manifest.kind} into "
        f"{_shards(len(manifest.shards))}, {filesize.decimal(manifest.bytes)}{left_out}; train "
        f"with --config.data.train=records:{workdir}"
    )


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' * (count != 1)}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out, and removes drafts of killed ones; raises UserError if one is
    packing, or if the folder holds something else.
    """
    names = check_folder(folder, lambda name: bool(_OWN.fullmatch(name)), "to pack into")
    packed = [name for name in names if not name.startswith(".")]
    if packed and MANIFEST not in names and not (folder / PROGRESS / _PLAN).exists():
        raise UserError(
            f"--workdir={folder} holds shards ({packed[0]}, ...) without {MANIFEST}, so it is "
            "unknown what they were packed from: remove them, or use another folder"
        )
    check_outputs(folder, (MANIFEST, SKIPPED), (PROGRESS,))
    with owned(folder):
        try:
            _remove_drafts(folder)
            yield
        finally:
            _remove_drafts(folder)


def _begin(
    folder: Path, plan: Mapping[str, Any], place: Mapping[str, str], shards: int
) -> tuple[Manifest | None, list[str]]:
    """(the manifest of a finished folder without damage, or None; what is damaged and how). Raises
    UserError if it was begun with another plan; `place`, where the pictures are, may change.
    """
    progress, damaged = folder / PROGRESS, []
    if (folder / MANIFEST).exists():
        manifest = manifests.read_manifest(folder)
        _refuse_another(folder, manifest._asdict(), plan)
        shutil.rmtree(progress, ignore_errors=True)
        files = 2 * len(manifest.shards) + 1
        print(f"already packed: verifying {files:,} files", flush=True)
        with Progress("verified", "files", files) as shown:
            damaged = manifests.verify(folder, lambda _: shown.advance(1))
        if not damaged:
            return manifest, []
        _keep_sound(folder, manifest, {file for file, _ in damaged})
    elif (progress / _PLAN).exists():
        begun = parse_json((progress / _PLAN).read_bytes())
        _refuse_another(folder, begun, plan)
        for shard, (_, skipped) in _receipts(folder, shards).items():
            if begun["place"] != place and skipped:  # they may be there now
                _receipt_file(folder, shard).unlink()
    write_json(progress / _PLAN, {"version": manifests.VERSION, **plan, "place": place})
    return None, [why for _, why in damaged]


def _receipts(folder: Path, shards: int) -> dict[int, Receipt]:
    """The receipts of the shards whose files are complete on the disk."""
    found = {}
    for shard in range(shards):
        with contextlib.suppress(OSError, ValueError, TypeError):
            known, skipped = parse_json(_receipt_file(folder, shard).read_bytes())
            written = Shard(**known)
            if all((folder / name).stat().st_size == size for name, size, _ in written.files):
                found[shard] = written, skipped
    return found


def _receipt_file(folder: Path, shard: int) -> Path:
    return folder / PROGRESS / f"{shard:05d}.json"


def _remove_drafts(folder: Path) -> None:
    for draft in (*folder.glob(".*.tmp"), *folder.glob(f"{PROGRESS}/.*.tmp")):
        draft.unlink(missing_ok=True)


def _refuse_another(folder: Path, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raises UserError if the source and options of what was begun are not those planned."""
    old, new = begun["source"], plan["source"]
    differ = [
        f"config.prepare.{name}={json.dumps(before)}, now {json.dumps(after)}"
        for name, (before, after) in changed_fields(begun["options"], plan["options"]).items()
    ]
    if old["fingerprint"] != new["fingerprint"]:
        differ.append(f"the source {old['repr']}, now {new['repr']} with other content")
    if differ:
        raise UserError(
            f"--workdir={folder} was packed with other settings: {'; '.join(differ)}: use "
            "the old values to continue it, or another --workdir"
        )


def _keep_sound(folder: Path, manifest: Manifest, damaged: set[str]) -> None:
    """Saves receipts of the undamaged shards of a finished folder, and removes the others, which
    may get another name.
    """
    lines = () if SKIPPED in damaged else (folder / SKIPPED).read_text("utf-8").split("\n")
    rows = (line.split("\t") for line in lines[manifest.left_out : -1])
    for number, shard in enumerate(manifest.shards):
        skipped = list(itertools.islice(rows, shard.skipped))
        names = {name for name, _, _ in shard.files}
        if len(skipped) == shard.skipped and not damaged & names:
            write_json(_receipt_file(folder, number), [shard._asdict(), skipped])
        for name in names if damaged & names else ():
            (folder / name).unlink(missing_ok=True)
