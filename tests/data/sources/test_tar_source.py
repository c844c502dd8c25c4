"""Tar shards as img2dataset writes them: their samples, in every form of tar."""

import functools
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from list_files import captions, check_source, picture, records
from tar_files import LINK, open_it, pairs, refusal, samples, write, write_three

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources import tar
from codebook_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return write_three(tmp_path)


def test_every_sample_comes_with_its_image_and_its_caption(folder):
    source = open_it(folder)
    numbers = [number for count in (4, 5, 6) for number in range(count)]
    assert records(source) == [
        (picture(number), (f"caption {number} é",), index) for index, number in enumerate(numbers)
    ]
    assert captions(source) == [(f"caption {number} é",) for number in numbers]
    assert [len(source), source.listed, list(source.left_out)] == [15, 15, []]
    assert source.name(5) == "00001.tar/000000001"
    check_source(source)


def test_shards_are_named_by_file_folder_pattern_range_and_list(folder):
    for place, size in {
        f"{folder}/00001.tar": 5,
        f"{folder}/": 15,
        f"{folder}/*.tar": 15,
        f"{folder}/0000[12].tar": 11,
        f"{folder.parent}/**/{folder.name}/00002.tar": 6,
        f"{folder}/{{00000..00002}}.tar": 15,
        f"{folder}/0000{{1..2}}.tar": 11,
    }.items():
        assert len(open_it(place)) == size, place
    assert open_it(f"{folder}/{{00002,00000}}.tar").name(0).startswith("00002.tar/")
    assert len(open_it(write(folder / "odd[1].tar", samples(0, 2)))) == 2
    for number in range(8, 12):
        write(folder / f"s{number}.tar", samples(number, 1))
    found = captions(open_it(f"{folder}/s{{8..11}}.tar"))
    assert found == [(f"caption {n} é",) for n in range(8, 12)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_in_every_form_of_tar(tmp_path, form):
    long = "f" * 60 + "/" + "k" * 90  # longer than the field of a name
    names = (f"{long}.jpg", f"{long}.txt", ".hidden", "README", "./a/é.x.jpg", "./a/é.PNG")
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=form) as shard:
        for name, kind in (("./", tarfile.DIRTYPE), ("x.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere.jpg"
            shard.addfile(member)
        for name in (*names, "./a/é.txt"):
            content = f"content of {name}".encode()
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1e9
            member.uid = 0 if form == tarfile.USTAR_FORMAT else 2**31  # in base 256 by GNU
            shard.addfile(member, io.BytesIO(content))
    source = open_it(path)
    assert [source.name(index) for index in range(2)] == [f"odd.tar/{long}", "odd.tar/./a/é"]
    assert pairs(source) == [
        (f"content of {long}.jpg", f"content of {long}.txt"),
        ("content of ./a/é.PNG", "content of ./a/é.txt"),
    ]
    # Hidden files and those without a suffix are no samples; é.x.jpg belongs to é, as in
    # WebDataset.
    assert [name for name, _ in source.left_out] == ["odd.tar/x"]
    assert source.listed == 3 and "a link" in source.left_out[0][1]


def test_captions_come_from_json_where_there_is_no_text_file_or_a_key_is_named(tmp_path):
    members = [
        ("a.jpg", "A"),
        ("a.json", json.dumps({"caption": ["one", " ", "two "], "alt": "three"})),
        ("b.json", json.dumps({"caption": "four", "alt": ["five"]})),
        ("b.webp", "B"),
        ("b.txt", "six"),
        ("a.cls", LINK),  # neither
    ]
    path = write(tmp_path / "s.tar", members)
    assert pairs(open_it(path)) == [("A", "one", "two"), ("B", "six")]
    by_key = open_it(f"{path}?caption_key=alt")
    assert pairs(by_key) == [("A", "three"), ("B", "five")]
    assert by_key.fingerprint() != open_it(path).fingerprint()


def test_samples_without_an_image_or_a_caption_are_left_out_and_counted(tmp_path):
    lacking = {  # key: (what it has beside an image, why it is left out)
        "nothing": (None, "has no image (jpg"),
        "silent": ({}, "has no caption"),
        "empty": ({"txt": ""}, "has no caption"),
        "blank": ({"txt": "\ufeff \n\u3000"}, "has no caption"),
        "key": ({"json": '{"alt": "x"}'}, "under 'caption'"),
        "number": ({"json": '{"caption": [3, null]}'}, "under 'caption'"),
        "broken": ({"json": '{"caption": "x"'}, ".json cannot be read"),
        "deep": ({"json": "[" * 100_000}, ".json cannot be read"),
    }
    members = [("good.jpg", "G"), ("good.txt", "a caption"), ("nothing.txt", "a caption")]
    for key, (held, _) in lacking.items():
        if held is not None:
            held = {"jpg": "?"} | held
            members += [(f"{key}.{end}", text) for end, text in held.items()]
    members += [("fine.jpg", "F"), ("fine.txt", "\ufeffcafé \n")]
    source = open_it(write(tmp_path / "s.tar", members))
    assert pairs(source) == [("G", "a caption"), ("F", "café")]
    assert [len(source), source.listed] == [2, 10]
    assert [name for name, _ in source.left_out] == [f"s.tar/{key}" for key in lacking]
    for (_, why), (_, words) in zip(source.left_out, lacking.values(), strict=True):
        assert words in why
    assert "no sample" in refusal(f"{tmp_path}/s.tar?caption_key=title")


def test_members_of_a_pair_are_found_wherever_they_are_in_the_shard(tmp_path):
    members = [(f"{n:02d}.{kind}", f"{kind} {n}") for n in range(6) for kind in ("jpg", "txt")]
    members += [(f"{n:02d}.jpg", f"jpg {n}") for n in range(6, 14)]
    members += [(f"{n:02d}.txt", f"txt {n}") for n in range(11, 5, -1)]
    members += [("12.json", '{"caption": "txt 12"}')]
    source = open_it(write(tmp_path / "s.tar", members))
    assert pairs(source) == [(f"jpg {n}", f"txt {n}") for n in range(13)]
    assert [source.name(6), source.listed] == ["s.tar/06", 14]
    assert [name for name, _ in source.left_out] == ["s.tar/13"]


def test_a_key_ends_at_the_last_dot_and_further_members_are_never_mixed(tmp_path):
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
    assert list(why) == ["s.tar/03.a", "s.tar/03.b"]
    assert "has no caption" in why["s.tar/03.a"] and "has no image" in why["s.tar/03.b"]
    assert source.listed == 6  # further members are no samples


def test_names_that_are_not_utf8_stay_apart(tmp_path):
    members = [
        (f"caf{end}.{kind}", f"{kind} {n}")
        for n, end in enumerate(("\udce9", "\udce8"))
        for kind in ("jpg", "txt")
    ]
    source = open_it(write(tmp_path / "s.tar", members, form=tarfile.GNU_FORMAT, mtime=0))
    assert pairs(source) == [("jpg 0", "txt 0"), ("jpg 1", "txt 1")]
    assert source.name(1) == "s.tar/caf\ufffd"


def test_a_fingerprint_is_of_what_the_shards_hold_and_of_no_path(folder, tmp_path_factory):
    prints = [open_it(folder).fingerprint()]
    moved = tmp_path_factory.mktemp("moved") / "b"
    os.rename(folder, moved)
    assert open_it(f"{moved}/*.tar").fingerprint() == prints[0]
    prints.append(open_it(f"{moved}/0000[01].tar").fingerprint())
    for key, image, text in (
        ("1", "x", "one"),
        ("2", "x", "one"),
        ("1", "x", "three"),
        ("1", "xy", "one"),
    ):
        changed = [("0.jpg", image), ("0.txt", text), (f"{key}.jpg", "x"), (f"{key}.txt", "one")]
        prints.append(open_it(write(moved / "00000.tar", changed)).fingerprint())
    os.rename(moved / "00000.tar", moved / "other.tar")
    prints.append(open_it(moved / "other.tar").fingerprint())
    assert len(set(prints)) == len(prints)


# The open source


def test_threads_share_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(tar, "_opened", functools.lru_cache(2)(tar._opened.__wrapped__))
    for number in range(3, 9):
        write(folder / f"{number:05d}.tar", samples(0, 3))
    source = open_it(folder)
    expected = records(source)

    def wrong(seed):
        drawn = np.random.default_rng(seed).integers(len(source), size=300)
        return [index for index in drawn if source[index] != expected[index]]

    with ThreadPoolExecutor(6) as pool:
        assert not any(pool.map(wrong, range(6)))
    numbers = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    assert sum(os.path.realpath(number).startswith(str(folder)) for number in numbers) == 2


def test_a_shard_that_is_cut_or_goes_after_it_was_opened_does_not_stop_training(folder):
    source = open_it(folder)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match="00001.tar/000000004: the shard is not what it was"):
        source[8]
    with pytest.raises(UserError, match="not what it was at start"):
        source.captions(8)
    (folder / "00002.tar").unlink()
    with pytest.raises(UnreadableImage, match="00002.tar/000000000: .*No such file"):
        source[9]


def test_compressed_shards_are_found_and_other_files_beside_shards_are_not(tmp_path):
    for name in ("a.tar", "a.tar.gz", "b.tgz", "c.tar.gz", "d.tar.sha256", "e.tar.part"):
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a.tar", "b.tgz", "c.tar.gz")]
    assert tar.shard_paths(str(tmp_path)) == tar.shard_paths(f"{tmp_path}/*.tar") == found
