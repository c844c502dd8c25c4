"""JSON files in ALBEF's format and the built-in scenes, read by index, and mistakes in files."""

import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from list_files import captions, check_source, ids, open_it, records, refusal, write

ALBEF = [
    {"image": "a.jpg", "caption": "one", "dataset": "coco"},
    {"image": "b.jpg", "caption": ["two", "three"], "image_id": 7},
    {"image": "a.jpg", "caption": "four"},
    {"image": "c/d.jpg", "caption": "five", "image_id": "7"},
]


def test_training_has_a_record_for_each_entry_and_the_same_image_the_same_id(tmp_path):
    source = open_it(f"json:{write(tmp_path / 'pairs.json', ALBEF)}")
    assert captions(source) == [("one",), ("two", "three"), ("four",), ("five",)]
    assert ids(source) == [0, 1, 0, 2]
    assert source[3].image == str(tmp_path / "c" / "d.jpg")  # which need not be there


def test_evaluation_merges_the_entries_of_an_image_but_not_two_pictures_of_one_id(tmp_path):
    others = [{"image": name, "caption": "dog", "image_id": 1} for name in ("x.png", "y.png")]
    path = write(tmp_path / "pairs.json", [*ALBEF, ALBEF[2], *others])
    for role in ("test", "validation"):
        source = open_it(f"json:{path}", role)
        merged = [("one", "four"), ("two", "three"), ("five",), ("dog",), ("dog",)]
        assert captions(source) == merged and ids(source) == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("end", ["\n\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.txt"])
def test_one_object_a_line_is_the_same_as_a_list(tmp_path, name, end):
    lines = "\ufeff" + end.join(json.dumps(entry) for entry in ALBEF) + end
    by_line = open_it(f"json:{write(tmp_path / name, lines)}")
    in_list = open_it(f"json:{write(tmp_path / 'list.json', chr(0xFEFF) + json.dumps(ALBEF))}")
    assert records(by_line) == records(in_list)
    assert by_line.fingerprint() == in_list.fingerprint()


def test_a_fingerprint_is_of_the_content_and_of_no_path(tmp_path):
    path = write(tmp_path / "pairs.json", ALBEF)
    before = open_it(f"json:{path}").fingerprint()
    moved = shutil.copy(path, tmp_path / "other.json")
    assert open_it(f"json:{moved}", image_root="/data").fingerprint() == before
    prints = [before, open_it(f"json:{write(path, ALBEF[::-1])}").fingerprint()]
    for entry, key, value in ((0, "caption", "One"), (0, "image", "z.jpg"), (1, "image_id", 8)):
        changed = [*ALBEF]
        changed[entry] = ALBEF[entry] | {key: value}
        prints.append(open_it(f"json:{write(path, changed)}").fingerprint())
    assert len(set(prints)) == 5


def test_entries_without_a_caption_are_left_out_and_counted(tmp_path):
    texts = ("", " ", None, [], [""], ["", "six"])
    further = [{"image": f"{n}.jpg", "caption": text} for n, text in enumerate(texts)]
    source = open_it(f"json:{write(tmp_path / 'pairs.json', [*ALBEF, *further])}")
    assert [len(source), source.listed] == [5, 10]
    assert [name for name, _ in source.left_out] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert source.left_out[0][1].endswith("pairs.json[4] has no caption with words")
    assert source[4].captions == ("six",) and source.name(4) == "5.jpg"


def test_an_empty_id_is_none(tmp_path):
    entry = '{"image": "%s", "caption": "x", "image_id": ""}'
    path = write(tmp_path / "pairs.json", f"[{entry % 'a'}, {entry % 'b'}]")
    assert ids(open_it(f"json:{path}")) == [0, 1]


def pair(**changes):
    return [{"image": "a", "caption": "x"} | changes]


LONG = "9" * 5000
BROKEN = [
    ([], "lists no pairs"),
    ("", "lists no pairs"),
    ('{"annotations":\n []}', r'line 1 has no key "image" \(its keys: annotations'),
    ('{"annotations": []}', 'line 1 has no key "image" .its keys: annotations'),
    ('\n"hello\n', "JSON .*line 2"),
    ('[{"image": "a.jpg", "caption": "one"},\n {"image": ', "JSON .*line 2"),
    ('{"image": "a", "caption": "b"}\n{"image" "a"}\n', "JSON .*line 2"),
    ([3], r'\[0\] has no key "image" \(it is 3\)'),
    ([*pair(), {"img": "a", "caption": "x"}], r'\[1\] has no key "image" \(its keys: img, cap'),
    ([{"image": "a.jpg", "text": "x"}], r'\[0\] has no key "caption"'),
    (pair(image=3), 'key "image": 3 is not the path'),
    (pair(caption={"en": "x"}), 'key "caption": .* neither a text nor a list'),
    (pair(caption=["x", 3]), 'key "caption": .* neither'),
    (pair(caption=" "), "lists no pairs"),
    (pair(image_id=1.5), 'key "image_id": 1.5 is not an id'),
    (json.dumps(pair(image_id="?")).replace('"?"', LONG), r"\[0\] cannot be .*5000 digits"),
    ('[{"image": "a", "caption": "x", "image_id": NaN}]', '"image_id": NaN is not'),
    ('[{"image": "a", "caption": "x", "caption": "y"}]', r"\[0\] cannot .*the key 'caption' twice"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_with_the_place_and_a_cure(tmp_path, content, words):
    path = write(tmp_path / "pairs.json", content)
    said = refusal(f"json:{path}")
    assert re.search(words, said) and str(path) in said


def test_files_that_cannot_be_read_are_refused(tmp_path):
    assert "gone.json cannot be read" in refusal(f"json:{tmp_path}/gone.json")
    assert "cannot be read" in refusal(f"json:{tmp_path}")
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "pairs.json").write_bytes('[{"image": "a", "caption": "é"}]'.encode(encoding))
        assert "pairs.json is not UTF-8" in refusal(f"json:{tmp_path}/pairs.json")


@pytest.mark.parametrize(
    ("spec", "role", "words"),
    [
        ("pairs.json", "train", "did you mean json:pairs.json"),
        ("scene", "train", "use scenes, .*json:"),
        ("json:", "test", "use scenes"),
        ("", "train", "'' .*train.*scenes, .*json:"),
        ("scenes:easy", "test", "scenes:easy .*scenes:hard"),
        ("scenes:hard", "train", "scenes:hard .*config.data.eval"),
        ("scenes?wieght=2", "train", "did you mean weight"),
        ("scenes?weight=0", "train", "weight=0 is not a number above 0"),
        ("json:a.json?root=/b", "train", "use NAME=VALUE with weight, image_root"),
        ("scenes?weight=2, scenes", "train", "1 of 2 train sources have a weight"),
        ("scenes?weight=2, scenes:hard?weight=1", "test", "2 of 2 test sources have a weight"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_what_was_meant(spec, role, words):
    assert re.search(words, refusal(spec, role))


def test_scenes_are_a_source_in_every_role():
    train = open_it("scenes")
    assert len(train) == 50 and train[3].image.shape == (32, 32, 3)
    assert len(train[3].captions) >= 4 and train[3].image_id == 3
    found = {}
    for spec in ("scenes", "scenes:hard"):
        for role in ("validation", "test"):
            source = open_it(spec, role=role)
            found[spec, role] = set(captions(source))
            assert len(source) == len(found[spec, role]) == 1000
            assert all(len(texts) == 1 for texts in found[spec, role])
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
    path = write(tmp_path / "pairs.json", ALBEF)
    for spec in ("scenes", "scenes:hard", f"json:{path}"):
        check_source(open_it(spec, "train" if spec == "scenes" else "test"))
    check_source(open_it("scenes", "validation"))
    assert repr(open_it(f"json:{path}")) == f"json('{path}', images=4)"


def test_a_large_file_is_held_without_an_object_an_entry(tmp_path):
    entries = (
        {"image": f"train/{n % 5000:06d}.jpg", "caption": f"caption number {n}"}
        for n in range(20_000)
    )
    path = write(tmp_path / "large.jsonl", "\n".join(map(json.dumps, entries)))
    tracemalloc.start()
    source = open_it(f"json:{path}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 20_000
    assert held / len(source) < 150
