"""JSON files in ALBEF's format and the built-in scenes, read by index, and mistakes in files."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codebook_jax.data.images import decode
from codebook_jax.data.sources import open_source
from codebook_jax.errors import UserError

EMOJI = Path(__file__).parents[3] / ".." / "shared" / "data" / "emoji"


def open_it(spec, role="train", **changes):
    options = dict(size_px=32, scenes_examples=50, image_root="", seed=0) | changes
    return open_source(spec, role=role, **options)


def write(folder, entries, name="pairs.json"):
    path = folder / name
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def records(source):
    return [source[index] for index in range(len(source))]


ALBEF = [
    {"image": "a.jpg", "caption": "one", "dataset": "coco"},
    {"image": "b.jpg", "caption": ["two", "three"], "image_id": 7},
    {"image": "a.jpg", "caption": "four"},
    {"image": "c/d.jpg", "caption": "five", "image_id": "7"},
]


def test_training_has_a_record_for_each_entry_and_the_same_image_the_same_id(tmp_path):
    source = open_it(f"json:{write(tmp_path, ALBEF)}")
    assert [record.captions for record in records(source)] == [
        ("one",),
        ("two", "three"),
        ("four",),
        ("five",),
    ]
    assert [record.image_id for record in records(source)] == [0, 1, 0, 2]
    assert source[3].image == str(tmp_path / "c" / "d.jpg")


def test_evaluation_merges_the_entries_of_an_image_into_one_record(tmp_path):
    source = open_it(f"json:{write(tmp_path, [*ALBEF, ALBEF[2]])}", role="test")
    assert [record.captions for record in records(source)] == [
        ("one", "four"),
        ("two", "three"),
        ("five",),
    ]
    assert [record.image_id for record in records(source)] == [0, 1, 2]


def test_two_pictures_of_one_id_both_stay_in_evaluation(tmp_path):
    entries = [
        {"image": "x.png", "caption": "dog", "image_id": 1},
        {"image": "y.png", "caption": "dog", "image_id": 1},
    ]
    source = open_it(f"json:{write(tmp_path, entries)}", role="validation")
    assert [record.image_id for record in records(source)] == [0, 0]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.txt"])
def test_one_object_a_line_is_the_same_as_a_list(tmp_path, name):
    lines = "\n\n".join(json.dumps(entry) for entry in ALBEF) + "\n"
    by_line = open_it(f"json:{write(tmp_path, lines, name)}")
    in_list = open_it(f"json:{write(tmp_path, ALBEF, 'list.json')}")
    assert records(by_line) == records(in_list)
    assert by_line.fingerprint() == in_list.fingerprint()
    assert len(open_it(f"json:{write(tmp_path, chr(0xFEFF) + json.dumps(ALBEF), 'bom.json')}")) == 4


def test_the_image_root_is_the_files_folder_unless_given(tmp_path):
    path = write(tmp_path, ALBEF)
    assert open_it(f"json:{path}", image_root="/data/coco")[0].image == "/data/coco/a.jpg"
    inside = [{"image": "/data/coco/sub/./a.jpg", "caption": "one"}]
    source = open_it(f"json:{write(tmp_path, inside)}", image_root="/data/coco/")
    assert source[0].image == "/data/coco/sub/a.jpg"


def test_a_fingerprint_is_of_the_content_and_of_no_path(tmp_path):
    (tmp_path / "moved").mkdir()
    path = write(tmp_path, ALBEF)
    moved = shutil.copy(path, tmp_path / "moved" / "other.json")
    before = open_it(f"json:{path}").fingerprint()
    assert open_it(f"json:{moved}").fingerprint() == before
    for entry, key, value in ((0, "caption", "One"), (0, "image", "z.jpg"), (1, "image_id", 8)):
        changed = [dict(one) for one in ALBEF]
        changed[entry][key] = value
        assert open_it(f"json:{write(tmp_path, changed)}").fingerprint() != before
    assert open_it(f"json:{write(tmp_path, ALBEF[::-1])}").fingerprint() != before


BROKEN = {
    "no entries": ([], "lists no pairs"),
    "empty": ("", "is empty"),
    "blank": (" \n\n", "is empty"),
    "object": (
        '{"annotations":\n []}',
        "holds a JSON object with the keys annotations, not a list",
    ),
    "object on one line": (
        '{"annotations": []}',
        'line 1 has no key "image" .its keys: annotations',
    ),
    "text": ('\n"hello\n', "line 2 is not JSON"),
    "cut short": ('[{"image": "a.jpg", "caption": "one"},\n {"image": ', "line 2 is not JSON"),
    "bad line": ('{"image": "a", "caption": "b"}\n{"image" "a"}\n', "line 2 is not JSON"),
    "number": ([3], r"\[0\] is a number, not a pair"),
    "no image": (
        [ALBEF[0], {"img": "a.jpg", "caption": "x"}],
        r'\[1\] has no key "image" \(its keys: img, cap',
    ),
    "no caption": ([{"image": "a.jpg", "text": "x"}], r'\[0\] has no key "caption"'),
    "image type": ([{"image": 3, "caption": "x"}], 'key "image": 3 is not the path'),
    "empty image": ([{"image": "", "caption": "x"}], 'key "image": "" is not the path'),
    "caption type": (
        [{"image": "a", "caption": {"en": "x"}}],
        'key "caption": .* neither a text nor a list',
    ),
    "caption list": ([{"image": "a", "caption": ["x", 3]}], 'key "caption": .* neither'),
    "caption number": ([{"image": "a", "caption": 3}], 'key "caption": 3 is neither'),
    "empty caption": ([{"image": "a", "caption": " "}], "lists no pairs"),
    "id type": (
        [{"image": "a", "caption": "x", "image_id": 1.5}],
        'key "image_id": 1.5 is not an id',
    ),
    "long id": (
        '[{"image": "a", "caption": "x", "image_id": %s}]' % ("9" * 5000),
        r'\[0\], key "image_id": .*5,000 digits.* is not an id',
    ),
    "long id on a line": (
        '{"image": "a", "caption": "x"}\n{"image": "b", "caption": "x", "image_id": -%s}'
        % ("9" * 5000),
        r'line 2, key "image_id": .*5,001 digits',
    ),
    "infinite id": (
        '[{"image": "a", "caption": "x", "image_id": 1e400}]',
        '"image_id": Infinity is not',
    ),
    "id not a number": (
        '[{"image": "a", "caption": "x", "image_id": NaN}]',
        '"image_id": NaN is not',
    ),
    "deep": (
        f'[{{"image": "a", "caption": "x"}}, {"[" * 100_000}',
        r"\[1\] cannot be read .*nested",
    ),
    "deep line": (
        f'{{"image": "a", "caption": "x"}}\n{"[" * 100_000}',
        "line 2 cannot be read .*nested",
    ),
    "key twice": (
        '[{"image": "a", "caption": "x", "caption": "y"}]',
        r"\[0\] cannot be read .*the key 'caption' twice",
    ),
    "id truth": ([{"image": "a", "caption": "x", "image_id": True}], 'key "image_id": true'),
}


def test_entries_without_a_caption_are_left_out_and_counted(tmp_path):
    empty = [
        {"image": f"{n}.jpg", "caption": text} for n, text in enumerate(("", " ", None, [], [""]))
    ]
    source = open_it(
        f"json:{write(tmp_path, [*ALBEF, *empty, {'image': 'e.jpg', 'caption': ['', 'six']}])}"
    )
    assert [len(source), source.listed] == [5, 10]
    assert [name for name, _ in source.left_out] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert source.left_out[0][1].endswith("pairs.json[4] has no caption with words")
    assert source[4].captions == ("six",) and source.name(4) == "e.jpg"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_place_and_a_cure(tmp_path, name):
    content, words = BROKEN[name]
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=words) as refusal:
        open_it(f"json:{path}")
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "image",
    [
        "/etc/passwd",
        "../secret.jpg",
        "a/../../secret.jpg",
        "a/b/../../../x.jpg",
        "..",
        ".",
        "a\x00.jpg",
        "/export/home/coco/train2014/1.jpg",
    ],
)
def test_a_path_that_leaves_the_image_root_is_refused_at_load(tmp_path, image):
    path = write(tmp_path, [ALBEF[0], {"image": image, "caption": "x"}])
    with pytest.raises(UserError, match=r"\[1\].*outside the image root .*config.data.image_root"):
        open_it(f"json:{path}")


def test_a_folder_whose_name_begins_as_the_roots_does_is_outside_it(tmp_path):
    (tmp_path / "root").mkdir()
    sibling = str(tmp_path / "root2" / "a.jpg")
    path = write(tmp_path / "root", [{"image": sibling, "caption": "x"}])
    with pytest.raises(UserError, match="outside the image root"):
        open_it(f"json:{path}")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_every_way_and_a_byte_order_mark_is_passed_over(tmp_path, end):
    lines = "\ufeff" + end.join(json.dumps(entry) for entry in ALBEF) + end
    assert len(open_it(f"json:{write(tmp_path, lines)}")) == 4


def test_a_long_number_under_a_key_that_is_not_read_is_passed_over(tmp_path):
    path = write(tmp_path, '[{"image": "a", "caption": "x", "hash": %s}]' % ("9" * 5000))
    assert open_it(f"json:{path}").captions(0) == ("x",)


def test_an_empty_id_is_no_id(tmp_path):
    entries = [{"image": f"{n}.jpg", "caption": "x", "image_id": ""} for n in range(2)]
    source = open_it(f"json:{write(tmp_path, entries)}")
    assert [source[index].image_id for index in range(2)] == [0, 1]


def test_missing_image_files_are_no_error_at_load(tmp_path):
    assert not (tmp_path / "a.jpg").exists()
    assert len(open_it(f"json:{write(tmp_path, ALBEF)}")) == 4


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json cannot be read"):
        open_it(f"json:{tmp_path}/gone.json")
    with pytest.raises(UserError, match="cannot be read"):
        open_it(f"json:{tmp_path}")
    (tmp_path / "wide.json").write_bytes('[{"image": "a", "caption": "x"}]'.encode("utf-16"))
    with pytest.raises(UserError, match=r"wide\.json is not UTF-8"):
        open_it(f"json:{tmp_path}/wide.json")
    (tmp_path / "latin.json").write_bytes('[{"image": "a", "caption": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        open_it(f"json:{tmp_path}/latin.json")


@pytest.mark.parametrize(
    ("spec", "role", "words"),
    [
        ("pairs.json", "train", "did you mean json:pairs.json"),
        ("scene", "train", "use scenes, .*json:"),
        ("json:", "test", "use scenes"),
        ("", "train", "'' .*train.*scenes, .*json:"),
        ("scenes:easy", "test", "scenes:easy .*scenes or scenes:hard"),
        ("scenes:hard", "train", "scenes:hard .*config.data.eval"),
        ("scenes?wieght=2", "train", "did you mean weight"),
        ("scenes?weight=0", "train", "weight=0 is not a number above 0"),
        ("json:a.json?root=/b", "train", "use NAME=VALUE with weight, image_root"),
        ("scenes?weight=2, scenes", "train", "1 of 2 sources have a weight"),
        ("scenes?weight=2, scenes:hard?weight=1", "test", "scenes:hard.weight=1.*weights"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_what_was_meant(spec, role, words):
    with pytest.raises(UserError, match=words):
        open_it(spec, role=role)
    with pytest.raises(UserError, match="scenes_examples=0"):
        open_it("scenes", scenes_examples=0)


def test_a_way_with_damaged_shards_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="damaged_shards='mend' is not one of refuse, skip"):
        open_it("scenes", damaged_shards="mend")


def test_scenes_are_a_source_in_every_role():
    train = open_it("scenes")
    assert len(train) == 50 and train[3].image.shape == (32, 32, 3)
    assert len(train[3].captions) >= 4 and train[3].image_id == 3
    found = {}
    for spec in ("scenes", "scenes:hard"):
        for role in ("validation", "test"):
            source = open_it(spec, role=role)
            assert len(source) == 1000
            found[spec, role] = {source.captions(index) for index in range(1000)}
            assert all(len(captions) == 1 for captions in found[spec, role])
            assert source[999].captions == source.captions(999)
            with pytest.raises(IndexError):
                source[1000]
            assert len(found[spec, role]) == 1000
    for one in ("scenes", "scenes:hard"):
        for other in ("scenes", "scenes:hard"):
            assert not found[one, "validation"] & found[other, "test"]


def test_evaluation_scenes_are_the_same_for_every_seed_and_training_scenes_are_not():
    for role, same in (("train", False), ("test", True), ("validation", True)):
        a, b = open_it("scenes", role=role), open_it("scenes", role=role, seed=1)
        assert np.array_equal(a[0].image, b[0].image) == same
        assert (a.fingerprint() == b.fingerprint()) == same
    assert open_it("scenes", scenes_examples=51).fingerprint() != open_it("scenes").fingerprint()


def test_sources_cross_to_workers_and_show_no_address(tmp_path):
    specs = [("scenes", "train"), ("scenes", "test"), ("scenes:hard", "test")]
    specs += [(f"json:{write(tmp_path, ALBEF)}", "train")]
    for spec, role in specs:
        source = open_it(spec, role=role)
        other = pickle.loads(pickle.dumps(source))
        assert other.fingerprint() == source.fingerprint()
        assert repr(other) == repr(source) and "0x" not in repr(source)
        np.testing.assert_equal(other[1], source[1])


def test_a_large_file_is_held_without_an_object_an_entry(tmp_path):
    import tracemalloc

    lines = "".join(
        f'{{"image": "train/{n % 5000:06d}.jpg", "caption": "caption number {n}"}}\n'
        for n in range(20_000)
    )
    path = write(tmp_path, lines, "large.jsonl")
    tracemalloc.start()
    source = open_it(f"json:{path}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 20_000
    assert held / len(source) < 150


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji set is not beside this checkout")
def test_every_emoji_picture_of_the_validation_list_decodes():
    path = os.fspath((EMOJI / "val.json").resolve())
    source = open_it(f"json:{path}", role="validation")
    for index in range(len(source)):
        image = decode(source[index].image)
        assert image.ndim == 3 and image.std() > 0
    train = open_it(f"json:{EMOJI.resolve() / 'train.json'}")
    assert decode(train[0].image).shape == (*np.asarray(Image.open(train[0].image)).shape[:2], 3)
