"""Tar shards that are damaged or no shards, and the indexes that are kept of whole ones."""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile

import pytest
from list_files import captions, picture, records
from tar_files import open_it, pairs, refusal, samples, write, write_three

from codebook_jax.data.sources import tar


@pytest.fixture
def folder(tmp_path):
    return write_three(tmp_path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            [("a.jpg", "A"), ("a.txt", "a"), ("a.jpg", "B")],
            r"s\.tar: a has jpg more than once.*=skip",
        ),
        ([("a.jpg", "A"), ("a.txt", b"a caf\xe9")], r"txt is not UTF-8 .*byte e9 after 'a caf'"),
    ],
)
def test_a_duplicate_member_or_a_caption_not_in_utf8_is_refused_or_left_out(
    tmp_path, members, words
):
    path = write(tmp_path / "s.tar", [*members, ("b.jpg", "B"), ("b.txt", "a café")])
    assert re.search(words, refusal(path))
    source = open_it(path, damaged_shards="skip")
    assert pairs(source) == [("B", "a café")] and source.listed == 2
    assert [name for name, _ in source.left_out] == ["s.tar/a"]


def test_what_is_behind_the_end_mark_of_an_archive_is_not_lost_in_silence(tmp_path):
    parts = [write(tmp_path / f"{n}.tar", samples(n, 2)).read_bytes() for n in (0, 2)]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    assert "joined.tar: goes on behind the end mark" in refusal(tmp_path / "joined.tar")
    (tmp_path / "padded.tar").write_bytes(parts[0] + bytes(100_000))
    assert len(open_it(tmp_path / "padded.tar")) == 2


@pytest.mark.parametrize(
    ("compress", "suffix", "tool"),
    [
        (gzip.compress, "gz", "gzip"),
        (bz2.compress, "bz2", "bzip2"),
        (lzma.compress, "xz", "xz"),
        (lambda _: b"\x28\xb5\x2f\xfd" + bytes(600), "zst", "zstd"),
    ],
)
def test_compressed_shards_are_refused_with_what_unpacks_them(folder, compress, suffix, tool):
    content, other = compress((folder / "00000.tar").read_bytes()), folder / "other"
    other.mkdir()
    for name in ("named.tar", f"00003.tar.{suffix}"):
        (other / name).write_bytes(content)
        for ending in ("", "/*", f"/{name}", "/*.tar"):
            assert re.search(f"is compressed .*{tool} -dc", refusal(f"{other}{ending}"))
        (other / name).unlink()
    (folder / f"00000.tar.{suffix}").write_bytes(content)  # beside its unpacked version
    assert len(open_it(folder)) == 15
    (folder / f"00009.tar.{suffix}").write_bytes(content)
    assert f"00009.tar.{suffix}: is compressed" in refusal(folder)


def ends_of(path):
    """(where each member ends, where the end mark begins), by the standard library."""
    with tarfile.open(path) as shard:
        members = shard.getmembers()
        return [member.offset_data + member.size for member in members], shard.offset


def test_a_shard_cut_short_is_named_and_gives_its_whole_samples_if_asked(tmp_path):
    whole = write(tmp_path / "whole.tar", samples(0, 5)).read_bytes()
    ends, mark = ends_of(tmp_path / "whole.tar")
    write(tmp_path / "00001.tar", samples(7, 2))
    place, found = f"{tmp_path}/{{00000..00001}}.tar", set()
    for length in [*range(0, mark + 1, 331), ends[3] - 1, ends[3], ends[-1] - 1, ends[-1], mark]:
        (tmp_path / "00000.tar").write_bytes(whole[:length])
        assert re.search(r"00000\.tar: (is cut|ends inside).*damaged_shards=skip", refusal(place))
        source = open_it(place, damaged_shards="skip")
        # Samples followed by a complete image; otherwise the last may lack a member.
        numbers = [*range(sum(end <= length for end in ends[3::3])), 7, 8]
        assert [record.image for record in records(source)] == [picture(n) for n in numbers]
        assert [name for name, _ in source.left_out] == ["00000.tar"]
        assert source.listed == len(source) + 1
        found.add(source.fingerprint())
    assert len(found) > 10


def test_a_shard_with_garbage_inside_is_damaged_from_there(tmp_path):
    path = write(tmp_path / "s.tar", samples(0, 3), form=tarfile.GNU_FORMAT, mtime=0)
    content = path.read_bytes()
    with tarfile.open(path) as shard:
        header = shard.getmembers()[6].offset
    for first, size in ((header, 512), (header + 124, 12)):
        garbage = b"-1 \xff" * (size // 4)
        path.write_bytes(content[:first] + garbage + content[first + size :])
        assert f"header or end mark at byte {header:,}" in refusal(path)
        assert len(open_it(path, damaged_shards="skip")) == 1


def test_sizes_that_a_header_cannot_hold_are_read_from_beside_it(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as shard:
        contents = {"a.jpg": b"A" * 600, "a.txt": b"1", "b.jpg": b"B", "b.txt": b"2"}
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), {"size": str(len(content))}
            shard.addfile(member, io.BytesIO(content))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"a.jpg\0")
    content[at + 124 : at + 136] = b"%011o\0" % 0  # as where it has gigabytes
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])  # the checksum
    path.write_bytes(content)
    assert pairs(open_it(path)) == [("A" * 600, "1"), ("B", "2")]


def test_what_is_no_shard_is_refused_with_a_cure(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "text.tar").write_text("no tar\n" * 500)
    write(other / "bare.tar", [("README", "nothing"), ("a/.x", "nothing")])
    (other / "none").mkdir()
    for place, words in {
        f"{other}/text.tar": "no tar file: no header .* at byte 0",
        f"{other}/bare.tar": "has no sample .*KEY.jpg",
        f"{other}/none": "names no .tar file",
        f"{other}/gone.tar": r"gone\.tar: cannot be read \(No such file",
        f"{other}/x*.tar": "names no .tar file",
        f"{other}/{{5..3}}.tar": "names no .tar file",
        "https://host/{00000..00331}.tar": "https://host/00000.tar: cannot be read",
        f"{folder}/{{00000..00004}}.tar": r"00003\.tar: cannot be read",
    }.items():
        assert re.search(words, refusal(place)), place
    source = open_it(f"{folder}/{{00000..00004}}.tar", damaged_shards="skip")
    assert len(source) == 15 and [name for name, _ in source.left_out] == ["00003.tar", "00004.tar"]
    assert "no sample" in refusal(f"{other}/text.tar", damaged_shards="skip")


# The kept index


@pytest.fixture
def settled(folder):
    """The shards, written long enough ago for their indexes to be kept."""
    for path in folder.glob("*.tar"):
        os.utime(path, (1e9, 1e9))
    return folder


@pytest.fixture
def headers_read(monkeypatch):
    """The shards whose headers were read, as they are."""
    read, real = [], tar._read_shard
    monkeypatch.setattr(
        tar, "_read_shard", lambda file, key: read.append(file.name) or real(file, key)
    )
    return read


def test_headers_are_read_once_and_again_where_a_shard_has_changed(settled, headers_read):
    first = open_it(settled)
    assert len(headers_read) == 3 and len([*(settled / ".tar_index").iterdir()]) == 3
    again = open_it(f"{settled}/*.tar")
    assert len(headers_read) == 3
    assert records(again) == records(first) and again.fingerprint() == first.fingerprint()
    assert captions(open_it(f"{settled}?caption_key=alt"))[1] == ("a 1", "b")
    assert len(headers_read) == 6
    os.utime(settled / "00001.tar", (1e9, 2e9))
    assert len(open_it(settled)) == 15 and headers_read[6:] == [f"{settled}/00001.tar"]
    write(settled / "00002.tar", samples(0, 1))
    assert len(open_it(settled)) == 10
    (settled / "00000.tar").unlink()
    assert "00000.tar: cannot be read" in refusal(f"{settled}/{{00000..00001}}.tar")


def test_an_index_that_is_none_is_made_again(settled, headers_read):
    expected = records(open_it(settled))
    for content in ("", "[]", '{"version": 1}', "\udcff"):
        for path in (settled / ".tar_index").iterdir():
            path.write_text(content, errors="surrogateescape")
        assert records(open_it(settled)) == expected
    assert len(headers_read) == 15


def test_what_may_still_change_or_is_damaged_leaves_no_index(folder):
    open_it(folder)
    cut = (folder / "00000.tar").read_bytes()[:-20_000]
    (folder / "00000.tar").write_bytes(cut)
    os.utime(folder / "00000.tar", (1e9, 1e9))
    open_it(f"{folder}/00000.tar", damaged_shards="skip")
    assert not (folder / ".tar_index").exists()


def test_beside_shards_that_nobody_may_write_the_index_is_in_the_cache(
    settled, headers_read, monkeypatch, tmp_path_factory
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (settled / ".tar_index").write_text("in the way")  # root may write everywhere
    for _ in range(2):
        assert len(open_it(settled)) == 15
    assert len(headers_read) == 3 and len([*cache.rglob("*.json")]) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(settled / ".tar_index"))  # none can be kept
    assert len(open_it(settled)) == 15 and len(headers_read) == 6
