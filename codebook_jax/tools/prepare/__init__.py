"""`--mode=prepare`: packs the pairs of a source into shards in the workdir, which `records:WORKDIR`
reads.

Work is kept shard by shard: after any interruption, the same command makes the missing shards and
ends with the same bytes. In a finished folder it verifies every file and repacks damaged shards.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import ml_collections

from codebook_jax.data.manifest import SKIPPED, Manifest, Receipt, without_paths
from codebook_jax.data.packing import Packing, full_disk_named, shard_count
from codebook_jax.data.progress import Progress
from codebook_jax.data.sources import ROLES, Source, source_of
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.stop import Stopped, stoppable
from codebook_jax.errors import UserError, refuse_below
from codebook_jax.tools.prepare import beam, workers
from codebook_jax.tools.prepare.folder import Folder


def prepare(config: ml_collections.ConfigDict, workdir: Path | str) -> int:
    """Packs `config.prepare.source` into `workdir`; returns the exit code.

    Raises UserError for invalid settings, and for a folder that holds something else.
    """
    _check(config)
    folder = Folder(Path(workdir))
    folder.check()
    try:
        with stoppable(), folder.locked(), full_disk_named(folder.path):
            _pack(config, folder, _opened(config))
    except Stopped as stop:
        kept = len(folder.kept())
        done = f"{kept:,} shard{'s are' if kept != 1 else ' is'} packed; " if kept else ""
        print(f"stopped by {stop}: {done}the same command continues", file=sys.stderr, flush=True)
        return 128 + stop.number
    return 0


def _check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for invalid values."""
    given = config.prepare
    if given.role not in ROLES:
        raise UserError(f"config.prepare.role={given.role!r} is not one of {', '.join(ROLES)}")
    if not 1 <= given.quality <= 100:
        raise UserError(f"config.prepare.quality={given.quality} is not between 1 and 100")
    for name, least in (("side_px", 0), ("shard_records", 1), ("processes", 0)):
        refuse_below(f"prepare.{name}", given[name], least)
    if given.beam_options and not given.beam_runner:
        raise UserError(
            f"config.prepare.beam_options={given.beam_options!r} only applies to Apache Beam: name "
            "its runner too, as --config.prepare.beam_runner=DirectRunner"
        )


def _opened(config: ml_collections.ConfigDict) -> Source:
    spec = config.prepare.source or config.data.train
    source = source_of(config, spec, config.prepare.role)
    if isinstance(source, Mixture) and source.weights is not None:
        raise UserError(f"{spec!r}: weights only apply to training: leave them out for packing")
    if not len(source):
        raise UserError(f"{spec!r} has no pairs to pack")
    return source


def _pack(config: ml_collections.ConfigDict, folder: Folder, source: Source) -> None:
    """Completes the folder, from whatever state it is in."""
    given = config.prepare
    packing = Packing(given.side_px, given.quality, given.shard_records)
    shards = shard_count(len(source), packing.shard_records)
    plan = {
        "source": {
            "repr": without_paths(repr(source)),
            "fingerprint": source.fingerprint(),
            "records": len(source),
        },
        "options": {"role": given.role, **packing._asdict()},
    }
    place = {name: config.data[name] for name in ("train", "image_root", "path_map")}
    place["source"] = given.source
    before, damaged = folder.start(plan, place, shards)
    if before is not None and not damaged:
        print(f"already complete, all files verified: {_summary(folder, before)}", flush=True)
        return
    _make(config, folder, source, packing, shards)
    receipts = folder.kept()
    if len(receipts) < shards:
        raise UserError(
            f"{shards - len(receipts):,} of {shards:,} shards in {folder.path} are missing or "
            "changed: use a folder that every worker can reach and nothing else writes to, and "
            "run the same command again"
        )
    if not sum(receipt.records for receipt in receipts.values()):
        _refuse_all_bad(folder, source, receipts)
    manifest = folder.finish(
        plan,
        listed=source.listed,
        left_out=source.left_out,
        receipts=[receipts[shard] for shard in range(shards)],
    )
    for sentence in _remade(before, manifest, damaged):
        print(sentence, flush=True)
    print(_summary(folder, manifest), flush=True)


def _make(
    config: ml_collections.ConfigDict, folder: Folder, source: Source, packing: Packing, shards: int
) -> None:
    """Packs the missing shards."""
    kept = folder.kept()
    todo = [shard for shard in range(shards) if shard not in kept]
    done = sum(receipt.records + len(receipt.skipped) for receipt in kept.values())
    given = config.prepare
    count = max(1, min(given.processes or os.cpu_count() or 1, len(todo)))
    by = given.beam_runner or f"{count} process{'es' * (count != 1)}"
    most = f", shorter sides reduced to {given.side_px} px" if given.side_px else ""
    print(
        f"packing {len(source):,} records of {source!r} into {_shards(shards)} in {folder.path}, "
        f"by {by}{most}",
        flush=True,
    )
    if kept:
        print(f"{len(kept):,} of {shards:,} shards are packed already", flush=True)
    if not todo:
        return
    folder.source_file.write_bytes(pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL))
    job = workers.Job(folder.path.absolute(), folder.source_file.absolute(), packing)
    if given.beam_runner:
        beam.pack(job, todo, given.beam_runner, given.beam_options)
        return
    skipped = sum(len(receipt.skipped) for receipt in kept.values())
    with (
        Progress("packed", "pairs", len(source), done=done, skipped=skipped) as progress,
        contextlib.closing(workers.pack(job, source, todo, count)) as reports,
    ):
        for read, bad in reports:
            progress.advance(read, bad)


def _refuse_all_bad(folder: Folder, source: Source, receipts: dict[int, Receipt]) -> None:
    """Raises UserError because nothing could be read, and clears the folder, so that the next start
    tries again.
    """
    name, why = receipts[0].skipped[0]
    folder.clear()
    raise UserError(
        f"{source!r}: none of {len(source):,} pictures could be read (first: {name}: {why}): check "
        "config.data.image_root and the files"
    )


def _remade(before: Manifest | None, after: Manifest, damaged: list[tuple[str, str]]) -> list[str]:
    """A sentence on each repacked file of a finished folder, and on each shard whose pairs
    changed.
    """
    if before is None:
        return []
    changed = [
        f"{new.file} holds {new.records:,} pairs, {old.records:,} before: its pictures have changed"
        for old, new in zip(before.shards, after.shards, strict=True)
        if old != new
    ]
    return [*(f"{why}: remade" for _, why in damaged), *changed]


def _summary(folder: Folder, manifest: Manifest) -> str:
    left_out = f"; {manifest.skipped:,} skipped: see {SKIPPED}" if manifest.skipped else ""
    return (
        f"packed {manifest.records:,} of {manifest.listed:,} listed pairs into "
        f"{_shards(len(manifest.shards))}, {_size(manifest.bytes)}{left_out}; train with "
        f"--config.data.train=records:{folder.path}"
    )


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' * (count != 1)}"


def _size(count: int) -> str:
    amount: Any = count
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"
