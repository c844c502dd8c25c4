"""`--mode=prepare`: packs the pairs of a source into shards, which `records:WORKDIR` reads.

Work is kept shard by shard: after any interruption, the same command makes the missing shards and
ends with the same bytes. In a finished folder it verifies every file and repacks damaged shards.
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

import ml_collections
from rich import filesize

from codebook_jax.console import Progress
from codebook_jax.data.manifest import PROGRESS, SKIPPED, Manifest, without_paths, write_manifest
from codebook_jax.data.packing import Packing, full_disk_named, shard_count, write_shard
from codebook_jax.data.sources import Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.errors import UserError
from codebook_jax.tools.prepare import beam, folder
from codebook_jax.tools.workers import Tell, process_count, spread


def prepare(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Packs `config.prepare.source` into `workdir`; returns the exit code.

    Raises UserError for a source that cannot be packed, and for a folder that holds something else.
    """
    settings, workdir = config.prepare, Path(workdir)
    if settings.beam_options and not settings.beam_runner:
        raise UserError(
            f"config.prepare.beam_options={settings.beam_options!r} only applies to Apache Beam: "
            "name its runner too, as --config.prepare.beam_runner=DirectRunner"
        )
    try:
        with stoppable(), full_disk_named(workdir), folder.locked(workdir):
            _complete(config, workdir, _open(config))
    except Stopped as stop:
        packed = _shards(len(list(workdir.glob(f"{PROGRESS}/[0-9]*.json"))))
        print(f"stopped by {stop}: {packed} packed; the same command continues", file=sys.stderr)
        return 128 + stop.number
    return 0


def _open(config: ml_collections.ConfigDict) -> Source:
    spec = config.prepare.source or config.data.train
    source = source_of(config, spec, config.prepare.role)
    if isinstance(source, Mixture) and source.weights is not None:
        raise UserError(f"{spec!r}: weights only apply to training: leave them out for packing")
    if not len(source):
        raise UserError(f"{spec!r} has no pairs to pack")
    return source


def _complete(config: ml_collections.ConfigDict, workdir: Path, source: Source) -> None:
    """Completes the folder, from whatever state it is in."""
    settings = config.prepare
    packing = Packing(settings.side_px, settings.quality, settings.shard_records)
    shards = shard_count(len(source), packing.shard_records)
    described = {"repr": without_paths(repr(source)), "fingerprint": source.fingerprint()}
    described["records"] = len(source)
    plan = {"source": described, "options": {"role": settings.role, **packing._asdict()}}
    place = {name: config.data[name] for name in ("train", "image_root", "path_map")}
    place["source"] = settings.source
    before, damaged = folder.begin(workdir, plan, place, shards)
    if before is not None and not damaged:
        print(f"already complete, all files verified: {_summary(workdir, before)}", flush=True)
        return
    _pack_missing(settings, workdir, source, packing, folder.receipts(workdir, shards))
    receipts = folder.receipts(workdir, shards)
    if len(receipts) < shards:
        raise UserError(
            f"{shards - len(receipts):,} of {shards:,} shards in {workdir} are missing or "
            "changed: use a folder that every worker can reach and nothing else writes to, and "
            "run the same command again"
        )
    if not sum(receipt.records for receipt in receipts.values()):
        for file in workdir.glob("pairs-*"):  # so that the next start tries again
            file.unlink()
        shutil.rmtree(workdir / PROGRESS)
        raise UserError(
            f"{source!r}: none of {len(source):,} pictures could be read (first: "
            f"{': '.join(receipts[0].skipped[0])}): check config.data.image_root and the files"
        )
    counts = {"listed": source.listed, "left_out": source.left_out}
    manifest = write_manifest(workdir, **plan, **counts, receipts=list(receipts.values()))
    shutil.rmtree(workdir / PROGRESS)
    for _, why in damaged:
        print(f"{why}: remade")
    for old, new in zip(before.shards, manifest.shards, strict=True) if before else ():
        if old != new:
            print(
                f"{new.file} holds {new.records:,} pairs, {old.records:,} before: its pictures "
                "have changed"
            )
    print(_summary(workdir, manifest), flush=True)


def _pack_missing(
    settings: ml_collections.ConfigDict,
    workdir: Path,
    source: Source,
    packing: Packing,
    receipts: dict[int, Receipt],
) -> None:
    """Packs the shards that have no receipt; `settings` are those of config.prepare."""
    shards = shard_count(len(source), packing.shard_records)
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
    if settings.beam_runner and missing:
        options = {"runner": settings.beam_runner, "options": settings.beam_options}
        beam.pack(pack_shard, source, missing, workdir.absolute() / PROGRESS, **options)
        return
    skipped = sum(len(receipt.skipped) for receipt in receipts.values())
    done = skipped + sum(receipt.records for receipt in receipts.values())
    with Progress("packed", "pairs", len(source), done=done, skipped=skipped) as progress:
        options = {"processes": settings.processes, "field": "prepare.processes"}
        spread(pack_shard, source, missing, **options, tell=progress.advance)


def _pack_shard(
    workdir: Path, packing: Packing, source: Source, shard: int, tell: Tell | None = None
) -> None:
    """Packs a shard and saves its receipt; raises UserError if the disk is full."""
    with full_disk_named(workdir):
        receipt = write_shard(source, shard, workdir, packing, tell)
        folder.save_receipt(workdir, shard, receipt)


def _summary(workdir: Path, manifest: Manifest) -> str:
    left_out = f"; {manifest.skipped:,} skipped: see {SKIPPED}" if manifest.skipped else ""
    return (
        f"packed {manifest.records:,} of {manifest.listed:,} listed pairs into "
        f"{_shards(len(manifest.shards))}, {filesize.decimal(manifest.bytes)}{left_out}; train "
        f"with --config.data.train=records:{workdir}"
    )


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' * (count != 1)}"
