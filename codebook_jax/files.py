"""Files read and written safely: strict JSON, whole files or none, outputs checked early."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from codebook_jax.errors import FULL_DISK, UNREACHABLE, UserError


@contextlib.contextmanager
def _not_too_deep() -> Iterator[None]:
    try:
        yield
    except RecursionError as failure:
        raise ValueError("lists or objects are nested too deeply") from failure


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {key!r} twice")
    return content


# (text, start) to (the value that begins there, where it ends), like `parse_json`
parse_json_at = _not_too_deep()(json.JSONDecoder(object_pairs_hook=_object).raw_decode)


@_not_too_deep()
def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text; raises ValueError if it is not JSON, repeats a key in an object,
    or is nested too deep for the stack.
    """
    return json.loads(text, object_pairs_hook=_object)


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as JSON so that a reader sees the old file or the new one, never a part."""
    with written_whole(path) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


@contextlib.contextmanager
def written_whole(path: Path | str, *, errors: str = "strict") -> Iterator[IO[str]]:
    """A UTF-8 text file that gets its name once it is written completely; `errors` as in `open`."""
    path = Path(path)
    # random, since two hosts may share process numbers; a longer name may be too long
    draft = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with refused(path, *UNREACHABLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(draft, "w", encoding="utf-8", errors=errors, newline="\n")
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with refused(path, *UNREACHABLE):
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_outputs(folder: Path, files: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Raises UserError if one of these files and folders could not be written into `folder`, which
    need not exist. Every mode calls it before it loads anything, so that no work is lost.
    """
    with refused(folder):
        write_probe(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    for name in (*files, *folders):
        path, kind = folder / name, "file" if name in files else "folder"
        with refused(path):
            with contextlib.suppress(FileNotFoundError):
                path.lstat()  # a name may be too long
            if path.exists() and path.is_dir() != (kind == "folder"):
                raise UserError(
                    f"{path} is not a {kind}, and a {kind} of this name must be written: move it "
                    "away, or give another place"
                )
            if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_room(folder: Path, size: float) -> None:
    """Raises OSError, as a full disk does, if fewer than `size` bytes are free there."""
    free = shutil.disk_usage(folder).free
    if free < size:
        room = f"{free / 1e6:,.0f} MB are free for {size / 1e6:,.0f} MB"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {room}", str(folder))


def write_probe(folder: Path) -> None:
    """Writes a small file into the folder and removes it; raises OSError if that fails."""
    path = folder / f".writable-{secrets.token_hex(8)}"
    try:
        with open(path, "xb") as file:
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def refused(path: Path, *but: int) -> Iterator[None]:
    """Raises UserError instead of OSError, except for a full disk and the error numbers `but`."""
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL_DISK, *but):
            raise
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make it writable, or give another place"
        ) from error
