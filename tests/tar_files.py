"""Tar shards as img2dataset writes them, for tests."""

import io
import json
import tarfile
import time

import list_files
from list_files import picture, records

LINK = object()  # in place of a member's content


def write(path, members, form=tarfile.PAX_FORMAT, mtime=None):
    """Writes (name, content) as img2dataset's writer does, with fractional modification times."""
    with tarfile.open(path, "w", format=form) as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is LINK:
                member.type, member.linkname, content = tarfile.SYMTYPE, "elsewhere", b""
            content = content.encode() if isinstance(content, str) else content
            member.size, member.mtime = len(content), time.time() if mtime is None else mtime
            shard.addfile(member, io.BytesIO(content))
    return path


def samples(first, count):
    """What img2dataset writes for images `first`, ...: KEY.jpg, KEY.json, KEY.txt."""
    for number in range(first, first + count):
        key = f"{number:09d}"
        yield f"{key}.jpg", picture(number)
        yield f"{key}.json", json.dumps({"caption": f"json {number}", "alt": [f"a {number}", "b"]})
        yield f"{key}.txt", f"caption {number} é\n"


def open_it(place, **changes):
    return list_files.open_it(f"webdataset:{place}", **changes)


def refusal(place, **changes):
    return list_files.refusal(f"webdataset:{place}", **changes)


def pairs(source):
    return [(record.image.decode(), *record.captions) for record in records(source)]


def write_three(folder):
    """Three shards of 4, 5 and 6 samples; keys restart in each."""
    for number in range(3):
        write(folder / f"{number:05d}.tar", samples(0, 4 + number))
    (folder / "00000_stats.json").write_text("{}")
    (folder / "notes.txt").write_text("about the shards")
    return folder
