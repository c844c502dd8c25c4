"""The folder that pairs are packed into: one packing at a time, continuing an interrupted one.

Until the manifest is written, it holds a plan of what is packed and a receipt per finished shard.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codebook_jax.console import Progress
from codebook_jax.data import manifest as manifests
from codebook_jax.data.manifest import MANIFEST, PROGRESS, SKIPPED, Manifest, Receipt
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs, parse_json, write_json
from codebook_jax.run.ownership import owned
from codebook_jax.run.record import check_folder

_PLAN = "plan.json"
_OWN = re.compile(rf"pairs-.*\.(array_record|jsonl)|{MANIFEST}|{SKIPPED}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
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


def begin(
    folder: Path, plan: Mapping[str, Any], place: Mapping[str, str], shards: int
) -> tuple[Manifest | None, list[tuple[str, str]]]:
    """(manifest, [(damaged file, why)]) of a finished folder, else (None, []); no stale receipts.

    `plan` says what is packed, `place` where the pictures are, which may change. Raises UserError,
    naming the differences, if the folder was begun with another plan.
    """
    progress, manifest, damaged = folder / PROGRESS, None, []
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
    else:
        try:
            begun = parse_json((progress / _PLAN).read_bytes())
        except (OSError, ValueError):  # receipts without a plan
            shutil.rmtree(progress, ignore_errors=True)
        else:
            _refuse_another(folder, begun, plan)
            for shard, receipt in receipts(folder, shards).items():
                if begun["place"] != place and receipt.skipped:  # they may be there now
                    _receipt_file(folder, shard).unlink()
    write_json(progress / _PLAN, {"version": manifests.VERSION, **plan, "place": place})
    return manifest, damaged


def save_receipt(folder: Path, shard: int, receipt: Receipt) -> None:
    """Saves what is known of a packed shard until the manifest is written."""
    write_json(_receipt_file(folder, shard), receipt._asdict())


def receipts(folder: Path, shards: int) -> dict[int, Receipt]:
    """The receipts of the shards whose files are complete on the disk."""
    found = {}
    for shard in range(shards):
        with contextlib.suppress(OSError, ValueError, TypeError):
            receipt = Receipt(**parse_json(_receipt_file(folder, shard).read_bytes()))
            file = manifests.shard_name(shard, shards)
            sizes = [(folder / name).stat().st_size for name in (file, manifests.index_name(file))]
            if sizes == [receipt.bytes, receipt.index_bytes]:
                found[shard] = receipt._replace(skipped=tuple(map(tuple, receipt.skipped)))
    return found


def _receipt_file(folder: Path, shard: int) -> Path:
    return folder / PROGRESS / f"{shard:05d}.json"


def _remove_drafts(folder: Path) -> None:
    for draft in (*folder.glob(".*.tmp"), *folder.glob(f"{PROGRESS}/.*.tmp")):
        draft.unlink(missing_ok=True)


def _refuse_another(folder: Path, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raises UserError if the source and options of what was begun are not those planned."""
    options, old, new = begun["options"], begun["source"], plan["source"]
    differ = [
        f"config.prepare.{name}={json.dumps(options.get(name))}, now {json.dumps(value)}"
        for name, value in plan["options"].items()
        if options.get(name) != value
    ]
    if old["fingerprint"] != new["fingerprint"]:
        differ.append(f"the source {old['repr']}, now {new['repr']} with other content")
    if differ:
        raise UserError(
            f"--workdir={folder} holds pairs packed with other settings: {'; '.join(differ)}: use "
            "the old values to continue it, or another --workdir"
        )


def _keep_sound(folder: Path, manifest: Manifest, damaged: set[str]) -> None:
    """Saves receipts of the undamaged shards of a finished folder."""
    lines = [] if SKIPPED in damaged else manifests.read_skipped(folder)
    rows = itertools.islice(lines, manifest.left_out, None)
    for number, shard in enumerate(manifest.shards):
        skipped = tuple(itertools.islice(rows, shard.skipped))
        if len(skipped) == shard.skipped and not damaged & {name for name, _, _ in shard.files}:
            known = shard._asdict() | {"skipped": skipped}
            save_receipt(folder, number, Receipt(*(known[name] for name in Receipt._fields)))
