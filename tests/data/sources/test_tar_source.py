"""Tar shards as img2dataset writes them: their contents, in every form of tar, and damage."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from small_data import stream_of, tokenizer_of

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources import open_source, tar
from codebook_jax.errors import UserError


def picture(number, form="jpeg"):
    """The bytes of a picture file, different for each number."""
    pixels = np.full((24, 30, 3), number % 251, np.uint8)
    pixels[:, :, 1] = np.arange(30) * 8
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write(path, members, form=tarfile.PAX_FORMAT, mtime=None):
    """Writes (name, content) as img2dataset's writer does, with fractional modification times."""
    with tarfile.open(path, "w", format=form) as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
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


def open_it(place, role="train", **changes):
    settings = dict(size_px=32, scenes_examples=1, seed=0) | changes
    return open_source(f"webdataset:{place}", role=role, **settings)


def records(source):
    return [source[index] for index in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """Three shards of four samples each; keys restart in each."""
    for number in range(3):
        write(tmp_path / f"{number:05d}.tar", samples(0, 4 + number))
    (tmp_path / "00000_stats.json").write_text("{}")
    return tmp_path


def test_every_sample_comes_with_its_image_and_its_caption(folder):
    source = open_it(folder)
    numbers = [number for count in (4, 5, 6) for number in range(count)]
    assert [record.image for record in records(source)] == [picture(number) for number in numbers]
    assert [record.captions for record in records(source)] == [(f"caption {n} é",) for n in numbers]
    assert [source.captions(index) for index in range(15)] == [(f"caption {n} é",) for n in numbers]
    assert [record.image_id for record in records(source)] == list(range(15))
    assert [len(source), source.listed, list(source.left_out)] == [15, 15, []]
    assert source.name(5) == "00001.tar/000000001"
    for index in (-1, 15):
        with pytest.raises(IndexError):
            source[index]


def test_shards_are_named_by_file_folder_pattern_range_and_list(folder):
    sizes = {
        f"{folder}/00001.tar": 5,
        f"{folder}/": 15,
        f"{folder}/*.tar": 15,
        f"{folder}/0000[12].tar": 11,
        f"{folder.parent}/**/{folder.name}/00002.tar": 6,
        f"{folder}/{{00000..00002}}.tar": 15,
        f"{folder}/0000{{1..2}}.tar": 11,
        f"{folder}/{{00002,00000}}.tar": 10,
    }
    assert {place: len(open_it(place)) for place in sizes} == sizes
    assert open_it(f"{folder}/{{00002,00000}}.tar").name(0).startswith("00002.tar/")
    assert len(open_it(write(folder / "odd[1].tar", samples(0, 2)))) == 2
    for number in range(8, 13):
        write(folder / f"s{number}.tar", samples(number, 1))
    source = open_it(f"{folder}/s{{8..12}}.tar")
    assert [source.captions(index) for index in range(5)] == [
        (f"caption {n} é",) for n in range(8, 13)
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_in_every_form_of_tar(tmp_path, form):
    long = "f" * 60 + "/" + "k" * 90  # longer than the field of a name
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=form) as shard:
        for name, kind in (("./", tarfile.DIRTYPE), ("x.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere.jpg"
            shard.addfile(member)
        for name in (
            f"{long}.jpg",
            f"{long}.txt",
            ".hidden",
            "README",
            "./a/é.x.jpg",
            "./a/é.PNG",
            "./a/é.txt",
        ):
            content = f"content of {name}".encode()
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid = (
                len(content),
                1e9,
                2**31,
            )  # GNU writes this uid in base 256
            if form == tarfile.USTAR_FORMAT:
                member.uid = 0
            shard.addfile(member, io.BytesIO(content))
    source = open_it(path)
    assert [source.name(index) for index in range(len(source))] == [
        f"odd.tar/{long}",
        "odd.tar/./a/é",
    ]
    assert [record[:2] for record in records(source)] == [
        (f"content of {long}.jpg".encode(), (f"content of {long}.txt",)),
        ("content of ./a/é.PNG".encode(), ("content of ./a/é.txt",)),
    ]
    # Hidden files and those without a suffix are no samples; é.x.jpg belongs to é, as in
    # WebDataset.
    assert [name for name, _ in source.left_out] == ["odd.tar/x", "odd.tar/./a/é.x.jpg"]
    assert source.listed == 3 and "a link" in source.left_out[0][1]


def test_captions_come_from_json_where_there_is_no_text_file_or_a_key_is_named(tmp_path):
    members = [
        ("a.jpg", b"A"),
        ("a.json", json.dumps({"caption": ["one", " ", "two "], "alt": "three"})),
        ("b.json", json.dumps({"caption": "four", "alt": ["five"]})),
        ("b.webp", b"B"),
        ("b.txt", "six"),
    ]
    path = write(tmp_path / "s.tar", members)
    with tarfile.open(path, "a") as shard:  # a link that is neither
        member = tarfile.TarInfo("a.cls")
        member.type, member.linkname = tarfile.SYMTYPE, "0.cls"
        shard.addfile(member)
    assert [record.captions for record in records(open_it(path))] == [("one", "two"), ("six",)]
    by_key = open_it(f"{path}?caption_key=alt")
    assert [record.captions for record in records(by_key)] == [("three",), ("five",)]
    assert by_key.fingerprint() != open_it(path).fingerprint()


def test_samples_without_an_image_or_a_caption_are_left_out_and_counted(tmp_path):
    members = [
        ("nothing.txt", "a caption"),
        ("good.jpg", b"G"),
        ("good.txt", "a caption"),
        ("silent.jpg", b"S"),
        ("empty.jpg", b"E"),
        ("empty.txt", ""),
        ("blank.jpg", b"B"),
        ("blank.txt", "\ufeff \n\u3000"),
        ("key.jpg", b"K"),
        ("key.json", '{"alt": "x"}'),
        ("number.jpg", b"N"),
        ("number.json", '{"caption": [3, null]}'),
        ("broken.jpg", b"J"),
        ("broken.json", '{"caption": "x"'),
        ("deep.jpg", b"D"),
        ("deep.json", "[" * 100_000),
        ("fine.jpg", b"F"),
        ("fine.txt", "\ufeffcafé \n"),
    ]
    source = open_it(write(tmp_path / "s.tar", members))
    assert [record[:2] for record in records(source)] == [(b"G", ("a caption",)), (b"F", ("café",))]
    assert [len(source), source.listed] == [2, 10]
    lacking = ("nothing", "silent", "empty", "blank", "key", "number", "broken", "deep")
    assert [name for name, _ in source.left_out] == [f"s.tar/{key}" for key in lacking]
    assert "has no image (jpg" in source.left_out[0][1]
    assert "no text under 'caption'" in source.left_out[4][1]
    assert all(".json cannot be read" in why for _, why in source.left_out[-2:])
    with pytest.raises(UserError, match="no sample with .*[?]caption_key=NAME"):
        open_it(f"{tmp_path}/s.tar?caption_key=title")


def pairs(source):
    return [(record.image.decode(), *record.captions) for record in records(source)]


def test_members_of_a_pair_are_found_wherever_they_are_in_the_shard(tmp_path):
    members = [(f"{n:02d}.{kind}", f"{kind} {n}") for n in range(6) for kind in ("jpg", "txt")]
    members += [(f"{n:02d}.jpg", f"jpg {n}") for n in range(6, 12)]
    members += [("12.jpg", "jpg 12"), ("13.jpg", "jpg 13")]
    members += [(f"{n:02d}.txt", f"txt {n}") for n in range(11, 5, -1)]
    members += [("12.json", '{"caption": "txt 12"}')]
    source = open_it(write(tmp_path / "s.tar", members))
    assert pairs(source) == [(f"jpg {n}", f"txt {n}") for n in range(13)]
    assert [source.name(6), source.listed] == ["s.tar/06", 14]
    assert [name for name, _ in source.left_out] == ["s.tar/13"]


def test_a_key_ends_at_the_last_dot_and_further_members_are_counted_and_never_mixed(tmp_path):
    members = []
    for key in ("00.v2", "00.v3", "01", "a.b/02"):
        members += [(f"{key}.jpg", f"image {key}"), (f"{key}.txt", f"text {key}")]
    members += [(f"{key}.seg.png", "mask") for key in ("01", "a.b/02")]
    members += [("01.png", "second"), ("01.meta.json", "{}"), ("01.cls", "3")]
    members += [("03.a.jpg", "image 03.a"), ("03.b.txt", "text 03.b")]
    source = open_it(write(tmp_path / "s.tar", members))
    keys = ("00.v2", "00.v3", "01", "a.b/02")
    assert pairs(source) == [(f"image {key}", f"text {key}") for key in keys]
    assert [source.name(index) for index in range(4)] == [f"s.tar/{key}" for key in keys]
    why = dict(source.left_out)
    assert list(why) == [f"s.tar/{name}" for name in ("03.a", "03.b", "01.seg.png", "01.png")]
    assert "has no caption" in why["s.tar/03.a"] and "has no image" in why["s.tar/03.b"]
    assert "2 *.seg.png" in why["s.tar/01.seg.png"]
    assert source.listed == 6  # further members are no samples


def test_a_member_that_is_there_twice_is_refused_or_its_sample_left_out(tmp_path):
    members = [(name, name) for name in ("a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt")]
    path = write(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=r"s\.tar: a\.(jpg|txt) .*more than once.*=skip"):
        open_it(path)
    source = open_it(path, damaged_shards="skip")
    assert pairs(source) == [("b.jpg", "b.txt")]
    assert [name for name, _ in source.left_out] == ["s.tar/a"] and source.listed == 2


def test_what_is_behind_the_end_mark_of_an_archive_is_not_lost_in_silence(tmp_path):
    parts = [write(tmp_path / f"{n}.tar", samples(n, 2)).read_bytes() for n in (0, 2)]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match=r"joined\.tar goes on behind the end mark"):
        open_it(tmp_path / "joined.tar")
    (tmp_path / "padded.tar").write_bytes(parts[0] + bytes(100_000))
    assert len(open_it(tmp_path / "padded.tar")) == 2


def test_a_caption_that_is_not_utf8_is_refused_or_its_sample_left_out(tmp_path):
    members = [("a.jpg", b"A"), ("a.txt", b"a caf\xe9"), ("b.jpg", b"B"), ("b.txt", "a café")]
    path = write(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=r"s\.tar: a\.txt is not UTF-8 text .byte e9 after 'a caf'"):
        open_it(path)
    source = open_it(path, damaged_shards="skip")
    assert pairs(source) == [("B", "a café")] and source.listed == 2
    assert "byte e9" in dict(source.left_out)["s.tar/a"]


@pytest.mark.parametrize(
    ("compress", "suffix", "tool"),
    [
        (gzip.compress, "gz", "gzip -dc"),
        (bz2.compress, "bz2", "bzip2 -dc"),
        (lzma.compress, "xz", "xz -dc"),
        (lambda _: b"\x28\xb5\x2f\xfd" + bytes(600), "zst", "zstd -dc"),
    ],
)
def test_compressed_shards_are_refused_with_what_unpacks_them(
    tmp_path, folder, compress, suffix, tool
):
    content = compress((folder / "00000.tar").read_bytes())
    for name in ("named.tar", f"00003.tar.{suffix}", f"00004.t{suffix}"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_bytes(content)
        places = [f"{tmp_path}/other", f"{tmp_path}/other/*", f"{tmp_path}/other/{name}"]
        places += [f"{tmp_path}/other/*.tar", f"{tmp_path}/other/{name.partition('.')[0]}.tar"]
        for place in places:
            with pytest.raises(UserError, match=f"is compressed: .*{tool}"):
                open_it(place)
        (tmp_path / "other" / name).unlink()
    (folder / f"00000.tar.{suffix}").write_bytes(content)  # beside its unpacked version
    assert len(open_it(folder)) == 15
    (folder / f"00009.tar.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"00009\.tar\.{suffix} is compressed"):
        open_it(folder)


def ends_of(path):
    """(where each member ends, where the end mark begins), by the standard library."""
    with tarfile.open(path) as shard:
        members = shard.getmembers()
        return [member.offset_data + member.size for member in members], shard.offset


def test_a_shard_cut_short_is_named_and_gives_its_whole_samples_if_asked(tmp_path):
    whole = write(tmp_path / "whole.tar", samples(0, 5)).read_bytes()
    ends, mark = ends_of(tmp_path / "whole.tar")
    write(tmp_path / "00001.tar", samples(7, 2))
    cut = tmp_path / "00000.tar"
    places = [*range(0, mark + 1, 331), ends[3] - 1, ends[3], ends[-1] - 1, ends[-1], mark]
    for length in places:
        cut.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"00000\.tar (ends|is empty).*damaged_shards=skip"
        ) as refusal:
            open_it(f"{tmp_path}/{{00000..00001}}.tar")
        assert "\n" not in str(refusal.value)
        source = open_it(f"{tmp_path}/{{00000..00001}}.tar", damaged_shards="skip")
        # Samples followed by a complete image; otherwise the last may lack a member.
        count = sum(end <= length for end in ends[3::3])
        found = [record.image for record in records(source)]
        assert found[-2:] == [picture(7), picture(8)]
        assert found[:-2] == [picture(number) for number in range(count)]
        assert [name for name, _ in source.left_out] == ["00000.tar"]
        assert source.listed == len(source) + 1


def test_a_shard_with_garbage_inside_is_damaged_from_there(tmp_path):
    path = write(tmp_path / "s.tar", samples(0, 3), form=tarfile.GNU_FORMAT, mtime=0)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as shard:
        header = shard.getmembers()[6].offset
    for spoiled, words in (
        (slice(header, header + 512), "is no tar file from byte"),
        (slice(header + 124, header + 136), "is no tar file from byte"),
    ):
        bad = content.copy()
        bad[spoiled] = b"-1 \xff" * ((spoiled.stop - spoiled.start) // 4)
        path.write_bytes(bad)
        with pytest.raises(UserError, match=words):
            open_it(path)
        assert len(open_it(path, damaged_shards="skip")) == 1


def with_size(path, name, field):
    """Writes this size into a member's header, with a matching checksum."""
    content = bytearray(path.read_bytes())
    at = content.rindex(name.encode() + b"\0")
    content[at + 124 : at + 136] = field
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)


def test_sizes_that_a_header_cannot_hold_are_read_from_beside_it(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as shard:
        for name, content in (
            ("a.jpg", b"A" * 600),
            ("a.txt", b"one"),
            ("b.jpg", b"B"),
            ("b.txt", b"two"),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), {"size": str(len(content))}
            shard.addfile(member, io.BytesIO(content))
    with_size(path, "a.jpg", b"%011o\0" % 0)  # as where it has gigabytes
    with tarfile.open(path) as shard:
        assert [member.size for member in shard] == [600, 3, 1, 3]
    assert [record[:2] for record in records(open_it(path))] == [
        (b"A" * 600, ("one",)),
        (b"B", ("two",)),
    ]
    write(path, [("a.jpg", b"A"), ("a.txt", "one")], form=tarfile.GNU_FORMAT, mtime=0)
    with_size(path, "a.txt", b"\xff" * 10 + b"\xfc\x00")  # -1024
    with pytest.raises(UserError, match="is no tar file from byte 1,024 on"):
        open_it(path)


def test_what_is_no_shard_is_refused_with_a_cure(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "packed.tar").write_bytes(gzip.compress((folder / "00000.tar").read_bytes()))
    (other / "text.tar").write_text("no tar\n" * 500)
    write(other / "bare.tar", [("README", "nothing"), ("a/.x", "nothing")])
    (other / "none").mkdir()
    for place, words in {
        f"{other}/packed.tar": "is compressed: .*gzip -dc",
        f"{other}/text.tar": "is no tar file from byte 0",
        f"{other}/bare.tar": "has no samples: give shards that hold KEY.jpg",
        f"{other}/none": "holds no .tar files",
        f"{other}/gone.tar": r"gone\.tar cannot be read \(No such file",
        f"{other}/x*.tar": "matches no file",
        f"{other}/{{5..3}}.tar": "matches no file",
        "https://host/{00000..00331}.tar": "https://host/.*download",
        "pipe:cat x.tar": "pipe:cat x.tar .*download",
        f"{folder}/{{00000..00004}}.tar": r"00003\.tar cannot be read",
    }.items():
        with pytest.raises(UserError, match=words):
            open_it(place)
    source = open_it(f"{folder}/{{00000..00004}}.tar", damaged_shards="skip")
    assert len(source) == 15 and [name for name, _ in source.left_out] == ["00003.tar", "00004.tar"]
    with pytest.raises(UserError, match="no sample"):
        open_it(f"{other}/text.tar", damaged_shards="skip")


def test_a_fingerprint_is_of_what_the_shards_hold_and_of_no_path(folder, tmp_path_factory):
    before = open_it(folder).fingerprint()
    moved = tmp_path_factory.mktemp("moved") / "b"
    os.rename(folder, moved)
    assert open_it(f"{moved}/*.tar").fingerprint() == before
    assert open_it(f"{moved}/0000[01].tar").fingerprint() != before
    for changed in (
        [("0.jpg", b"x"), ("0.txt", "one"), ("1.jpg", b"x"), ("1.txt", "one")],
        [("0.jpg", b"x"), ("0.txt", "one"), ("2.jpg", b"x"), ("2.txt", "one")],
        [("0.jpg", b"x"), ("0.txt", "three"), ("1.jpg", b"x"), ("1.txt", "one")],
        [("0.jpg", b"xy"), ("0.txt", "one"), ("1.jpg", b"x"), ("1.txt", "one")],
    ):
        after = open_it(write(moved / "00000.tar", changed)).fingerprint()
        assert after != before
        before = after
    os.rename(moved / "00000.tar", moved / "other.tar")
    assert open_it(moved / "other.tar").fingerprint() != before


def test_threads_share_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(tar, "_MOST_OPEN", 2)
    for number in range(3, 9):
        write(folder / f"{number:05d}.tar", samples(0, 3))
    source = open_it(folder)
    expected = records(source)
    failures = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(len(source), size=300):
            if source[index] != expected[index]:
                failures.append(index)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    numbers = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    held = [number for number in numbers if os.path.realpath(number).startswith(str(folder))]
    assert not failures and len(held) == 2


def test_a_source_crosses_to_another_process_without_its_files(folder):
    source = open_it(folder)
    source[0]
    other = pickle.loads(pickle.dumps(source))
    assert records(other) == records(source) and other.name(7) == source.name(7)
    assert other.fingerprint() == source.fingerprint()
    assert repr(other) == repr(source) and "0x" not in repr(source)


def test_a_shard_that_is_cut_or_goes_after_it_was_opened_does_not_stop_training(folder):
    source = open_it(folder)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:3000])
    with pytest.raises(UnreadableImage, match="00001.tar/000000004: the shard is not what it was"):
        source[8]
    with pytest.raises(UserError, match="not what it was at start"):
        source.captions(8)
    (folder / "00002.tar").unlink()
    with pytest.raises(UnreadableImage, match="00002.tar/000000000: No such file"):
        source[9]


def test_a_large_shard_is_held_without_an_object_a_sample(tmp_path):
    import tracemalloc

    members = [(f"{n:09d}.{kind}", kind) for n in range(3000) for kind in ("jpg", "txt")]
    path = write(tmp_path / "s.tar", members, form=tarfile.USTAR_FORMAT, mtime=0)
    tracemalloc.start()
    source = open_it(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 3000 and held / len(source) < 120


def tfds_folder(folder, numbers):
    """A prepared data set of TensorFlow Datasets with these pictures."""
    import tensorflow_datasets as tfds

    class Streamed(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            parts = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(parts))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in numbers:
                image = io.BytesIO(picture(number))
                yield number, {"image": image, "caption": f"number {number}"}

    tfds.disable_progress_bar()
    Streamed(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "streamed"


def test_shards_and_data_sets_of_both_libraries_pass_through_a_worker_process(tmp_path):
    import datasets

    members = [(f"{n}.jpg", picture(n)) for n in range(60, 90, 5)]
    members += [(f"{n}.txt", f"number {n}") for n in range(60, 90, 5)]
    members.sort()
    write(tmp_path / "00000.tar", members)
    tfds_folder(tmp_path, range(120, 150, 5))
    rows = {"image": [picture(n) for n in range(180, 210, 5)]}
    rows["caption"] = [f"number {n}" for n in range(180, 210, 5)]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    source = open_it(f"{tmp_path}/*.tar,tfds:{tmp_path}/streamed:train,hf:{tmp_path}/saved")
    tokenizer = tokenizer_of(source, tmp_path, 100)
    stream = stream_of(source, tokenizer, global_batch=9, size_px=16, views=1, workers=1)
    try:
        batches = list(itertools.islice(stream, 2))
    finally:
        stream.close()
    shown = np.concatenate([batch.image[:, :, :, 0].mean((1, 2)) for batch in batches])
    shown = 5 * (shown / 5).round()  # JPEG changes colours a little
    assert sorted(shown) == [*range(60, 90, 5), *range(120, 150, 5), *range(180, 210, 5)]
    captions = [f"number {shade:.0f}" for shade in shown]
    tokens, _, _ = tokenizer.encode(captions, 24)
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]), tokens)
    assert not any(batch.skipped.any() for batch in batches)
