"""The folder that pairs are packed into: allows one packing at a time, and reuses what an earlier
one finished.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codebook_jax.data.manifest import (
    MANIFEST,
    PROGRESS,
    SKIPPED,
    VERSION,
    Manifest,
    Receipt,
    index_name,
    read_manifest,
    read_skipped,
    shard_name,
    verify,
    write_manifest,
)
from codebook_jax.data.progress import Progress
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs, parse_json, write_json
from codebook_jax.run.ownership import owned
from codebook_jax.run.record import check_folder

PLAN, SOURCE = "plan.json", "source.pickle"


def keep(folder: Path, shard: int, receipt: Receipt) -> None:
    """Saves the receipt of a packed shard until the manifest is written."""
    write_json(folder / PROGRESS / f"{shard:05d}.json", receipt._asdict())


class Folder:
    """A folder of packed pairs, complete or not.

    Until the manifest is written, it holds a plan of what is packed, and a receipt for each
    finished shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source_file = path / PROGRESS / SOURCE
        self._shards = 0

    def check(self) -> None:
        """Raises UserError if the folder holds something else."""
        names = check_folder(self.path, _is_own, "to pack into")
        visible = [name for name in names if not name.startswith(".")]
        if visible and MANIFEST not in names and not (self.path / PROGRESS / PLAN).exists():
            raise UserError(
                f"--workdir={self.path} holds shards ({visible[0]}, ...) without {MANIFEST}, so it "
                "is unknown what they were packed from: remove them, or use another folder"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from packing into the folder; raises UserError if one already
        does.
        """
        check_outputs(self.path, (MANIFEST, SKIPPED), (PROGRESS,))
        with owned(self.path):
            try:
                self._sweep()
                yield
            finally:
                self._sweep()  # killed processes leave drafts

    def plan(self) -> dict[str, Any] | None:
        """{"source", "options", "place"} of an unfinished packing; None if there is none."""
        try:
            return parse_json((self.path / PROGRESS / PLAN).read_bytes())
        except (OSError, ValueError):
            return None

    def start(
        self, plan: Mapping[str, Any], place: Mapping[str, str], shards: int
    ) -> tuple[Manifest | None, list[tuple[str, str]]]:
        """Prepares to pack `shards` shards; returns (manifest, [(damaged file, why)]), or (None,
        []) if unfinished.

        `place` is where the pictures are, which may change. Afterwards `kept` has the shards that
        are still valid. Raises UserError, naming the differences, if the folder was begun with
        another source or other options.
        """
        self._shards = shards
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            self._refuse_another({"source": manifest.source, "options": manifest.options}, plan)
            shutil.rmtree(self.path / PROGRESS, ignore_errors=True)
            damaged = self._verified(manifest)
            if damaged:
                self._write_plan(plan, place)
                self._keep_sound(manifest, {file for file, _ in damaged})
            return manifest, damaged
        begun = self.plan()
        if begun is not None:
            self._refuse_another(begun, plan)
            if begun["place"] != place:
                for shard, receipt in self.kept().items():
                    if receipt.skipped:  # the missing pictures may be there now
                        self._receipt_file(shard).unlink()
        else:
            shutil.rmtree(self.path / PROGRESS, ignore_errors=True)  # receipts without a plan
        self._write_plan(plan, place)
        return None, []

    def kept(self) -> dict[int, Receipt]:
        """The receipts of the shards that are complete on the disk."""
        receipts = {}
        for shard in range(self._shards):
            receipt = self._receipt(shard)
            if receipt is not None:
                receipts[shard] = receipt
        return receipts

    def finish(
        self,
        plan: Mapping[str, Any],
        *,
        listed: int,
        left_out: Sequence[tuple[str, str]],
        receipts: Sequence[Receipt],
    ) -> Manifest:
        """Writes the manifest of all shards, and removes the plan and receipts."""
        manifest = write_manifest(
            self.path,
            plan["source"],
            plan["options"],
            listed=listed,
            left_out=left_out,
            receipts=receipts,
        )
        shutil.rmtree(self.path / PROGRESS)
        return manifest

    def clear(self) -> None:
        """Removes everything that was packed."""
        for name in os.listdir(self.path):
            if _is_own(name):
                (self.path / name).unlink()
        shutil.rmtree(self.path / PROGRESS)

    def _receipt_file(self, shard: int) -> Path:
        return self.path / PROGRESS / f"{shard:05d}.json"

    def _receipt(self, shard: int) -> Receipt | None:
        """The receipt of a shard; None if it is not packed, or its files are missing or changed."""
        try:
            receipt = Receipt(**parse_json(self._receipt_file(shard).read_bytes()))
            file = shard_name(shard, self._shards)
            held = [(self.path / name).stat().st_size for name in (file, index_name(file))]
        except (OSError, ValueError, TypeError):
            return None
        if held != [receipt.bytes, receipt.index_bytes]:
            return None
        return receipt._replace(skipped=tuple(map(tuple, receipt.skipped)))

    def _sweep(self) -> None:
        """Removes the drafts of killed processes."""
        for folder in (self.path, self.path / PROGRESS):
            for draft in folder.glob(".*.tmp"):
                draft.unlink(missing_ok=True)

    def _write_plan(self, plan: Mapping[str, Any], place: Mapping[str, str]) -> None:
        write_json(self.path / PROGRESS / PLAN, {"version": VERSION, **plan, "place": place})

    def _refuse_another(self, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        differ = []
        old, new = begun["source"], plan["source"]
        if old["fingerprint"] != new["fingerprint"]:
            held = f"{old['repr']}, now {new['repr']}"
            same = " with other content" if old["repr"] == new["repr"] else ""
            differ.append(f"the source {held}{same}")
        for name, value in plan["options"].items():
            if begun["options"].get(name) != value:
                before = json.dumps(begun["options"].get(name))
                differ.append(f"config.prepare.{name}={before}, now {json.dumps(value)}")
        if differ:
            raise UserError(
                f"--workdir={self.path} holds pairs packed with other settings: "
                f"{'; '.join(differ)}: use the old values to continue it, or another --workdir"
            )

    def _verified(self, manifest: Manifest) -> list[tuple[str, str]]:
        count = 2 * len(manifest.shards) + 1
        print(f"already packed: verifying {count:,} files", flush=True)
        with Progress("verified", "files", count) as progress:
            return verify(self.path, lambda _: progress.advance(1))

    def _keep_sound(self, manifest: Manifest, damaged: set[str]) -> None:
        """Saves receipts of the undamaged shards of a finished folder."""
        lines = [] if SKIPPED in damaged else read_skipped(self.path)
        rows = itertools.islice(lines, manifest.left_out, None)
        for number, shard in enumerate(manifest.shards):
            skipped = tuple(itertools.islice(rows, shard.skipped))
            if len(skipped) == shard.skipped and not damaged & {name for name, _, _ in shard.files}:
                keep(
                    self.path,
                    number,
                    Receipt(
                        shard.records,
                        shard.captions,
                        shard.bytes,
                        shard.sha256,
                        shard.index_bytes,
                        shard.index_sha256,
                        skipped,
                    ),
                )


def _is_own(name: str) -> bool:
    shard = name.startswith("pairs-") and name.endswith((".array_record", ".jsonl"))
    return shard or name in (MANIFEST, SKIPPED)
