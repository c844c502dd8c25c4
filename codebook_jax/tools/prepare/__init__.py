"""`--mode=prepare`: packs the pairs of a source into shards, which `records:WORKDIR` reads.

Work is kept shard by shard: after any interruption, the same command makes the missing shards and
ends with the same bytes. In a finished folder it verifies every file and repacks damaged shards.
"""

from __future__ import annotations

import functools
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_collections
from rich import filesize

from codebook_jax.data.manifest import PROGRESS, SKIPPED, Manifest, without_paths, write_manifest
from codebook_jax.data.packing import Packing, full_disk_named, shard_count, write_shard
from codebook_jax.data.progress import Progress
from codebook_jax.data.sources import ROLES, Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.errors import UserError, refuse_below
from codebook_jax.tools.prepare import beam, folder
from codebook_jax.tools.workers import Tell, process_count, spread

_SOURCE = "source.pickle"  # for the workers of Beam


def prepare(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Packs `config.prepare.source` into `workdir`; returns the exit code.

    Raises UserError for invalid settings, and for a folder that holds something else.
    """
    _check(config)
    workdir = Path(workdir)
    folder.check(workdir)
    try:
        with stoppable(), folder.locked(workdir), full_disk_named(workdir):
            _complete(config, workdir, _open(config))
    except Stopped as stop:
        done = folder.receipt_count(workdir)
        packed = f"{_shards(done)} {'is' if done == 1 else 'are'} packed; " if done else ""
        print(f"stopped by {stop}: {packed}the same command continues", file=sys.stderr, flush=True)
        return 128 + stop.number
    return 0


def _check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for invalid values."""
    settings = config.prepare
    if settings.role not in ROLES:
        raise UserError(f"config.prepare.role={settings.role!r} is not one of {', '.join(ROLES)}")
    if not 1 <= settings.quality <= 100:
        raise UserError(f"config.prepare.quality={settings.quality} is not between 1 and 100")
    for name, least in (("side_px", 0), ("shard_records", 1), ("processes", 0)):
        refuse_below(f"prepare.{name}", settings[name], least)
    if settings.beam_options and not settings.beam_runner:
        raise UserError(
            f"config.prepare.beam_options={settings.beam_options!r} only applies to Apache Beam: "
            "name its runner too, as --config.prepare.beam_runner=DirectRunner"
        )


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
    described = {
        "repr": without_paths(repr(source)),
        "fingerprint": source.fingerprint(),
        "records": len(source),
    }
    options = {"role": settings.role, **packing._asdict()}
    place = {name: config.data[name] for name in ("train", "image_root", "path_map")}
    place["source"] = settings.source
    plan = {"source": described, "options": options}
    before, damaged = folder.begin(workdir, plan, place, shards)
    if before is not None and not damaged:
        print(f"already complete, all files verified: {_summary(workdir, before)}", flush=True)
        return
    _pack_missing(settings, workdir, source, packing)
    receipts = folder.receipts(workdir, shards)
    if len(receipts) < shards:
        raise UserError(
            f"{shards - len(receipts):,} of {shards:,} shards in {workdir} are missing or "
            "changed: use a folder that every worker can reach and nothing else writes to, and "
            "run the same command again"
        )
    if not sum(receipt.records for receipt in receipts.values()):
        name, why = receipts[0].skipped[0]
        folder.clear(workdir)  # so that the next start tries again
        raise UserError(
            f"{source!r}: none of {len(source):,} pictures could be read (first: {name}: {why}): "
            "check config.data.image_root and the files"
        )
    manifest = write_manifest(
        workdir,
        described,
        options,
        listed=source.listed,
        left_out=source.left_out,
        receipts=[receipts[shard] for shard in range(shards)],
    )
    shutil.rmtree(workdir / PROGRESS)
    for sentence in _remade(before, manifest, damaged):
        print(sentence, flush=True)
    print(_summary(workdir, manifest), flush=True)


def _pack_missing(
    settings: ml_collections.ConfigDict, workdir: Path, source: Source, packing: Packing
) -> None:
    """Packs the shards that have no receipt; `settings` are those of config.prepare."""
    shards = shard_count(len(source), packing.shard_records)
    receipts = folder.receipts(workdir, shards)
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
        file = workdir.absolute() / PROGRESS / _SOURCE
        file.write_bytes(pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL))
        options = {"runner": settings.beam_runner, "options": settings.beam_options}
        beam.pack(pack_shard, file, missing, **options)
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


def _remade(
    before: Manifest | None, after: Manifest, damaged: list[tuple[str, str]]
) -> Iterator[str]:
    """A sentence on each repacked file, and on each shard whose pairs changed."""
    yield from (f"{why}: remade" for _, why in damaged)
    for old, new in zip(before.shards, after.shards, strict=True) if before else ():
        if old != new:
            yield (
                f"{new.file} holds {new.records:,} pairs, {old.records:,} before: its pictures "
                "have changed"
            )


def _summary(workdir: Path, manifest: Manifest) -> str:
    left_out = f"; {manifest.skipped:,} skipped: see {SKIPPED}" if manifest.skipped else ""
    return (
        f"packed {manifest.records:,} of {manifest.listed:,} listed pairs into "
        f"{_shards(len(manifest.shards))}, {filesize.decimal(manifest.bytes)}{left_out}; train "
        f"with --config.data.train=records:{workdir}"
    )


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' * (count != 1)}"
