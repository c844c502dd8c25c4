"""What a check of the data finds, on pictures made bad in every way, and what it leaves behind."""

import html.parser
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from codebook_jax.check_data import check_data
from codebook_jax.check_data.captions import read_captions
from codebook_jax.check_data.inspection import Status, inspect
from codebook_jax.check_data.likeness import earlier_twin, first_match
from codebook_jax.data.sources import open_source
from codebook_jax.data.text import tokenizer_for_run
from codebook_jax.errors import UserError
from codebook_jax.prepare import prepare
from configs import base

SCRIPT = "a picture <script>alert(1)</script>"
BAD = ("missing.jpg", "empty.jpg", "text.jpg", "cut.jpg", "folder.jpg", "tiny.jpg")


def picture(number, size=(120, 90)):
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def make_training(folder):
    """60 good pictures, one of every bad kind, a copy, one that looks like another, three blank ones."""
    entries = []
    for number in range(60):
        name = f"photo_{number:06}.jpg"
        picture(number).save(folder / name, quality=90)
        entries.append({"image": name, "caption": [f"number {number}", f"again {number}"]})
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("404 Not Found")
    (folder / "cut.jpg").write_bytes((folder / "photo_000001.jpg").read_bytes()[:-600])
    (folder / "folder.jpg").mkdir()
    picture(1, (8, 8)).save(folder / "tiny.jpg")
    shutil.copy(folder / "photo_000005.jpg", folder / "copy.jpg")
    picture(7).resize((100, 75)).save(folder / "alike.jpg", quality=60)
    entries += [{"image": name, "caption": SCRIPT} for name in (*BAD, "copy.jpg", "alike.jpg")]
    for number in range(3):
        Image.new("RGB", (64, 64), (number * 60,) * 3).save(folder / f"blank{number}.png")
        entries.append({"image": f"blank{number}.png", "caption": f"blank {number}"})
    entries.append({"image": "photo_000002.jpg", "caption": "the same picture, listed again"})
    entries.append({"image": "photo_000000.jpg", "caption": " "})
    (folder / "train.json").write_text(json.dumps(entries))


def make_evaluation(folder):
    """20 pictures of its own, two of training's, one that looks like training's, and one of the same name alone."""
    entries = []
    for number in range(1000, 1020):
        picture(number).save(folder / f"val_{number:06}.png")
        entries.append({"image": f"val_{number:06}.png", "caption": f"evaluation {number}"})
    entries += [{"image": f"photo_{number:06}.jpg", "caption": "leaked"} for number in (10, 11)]
    picture(12).resize((90, 70)).save(folder / "other.png")
    (folder / "val").mkdir()
    picture(2000).save(folder / "val" / "photo_000020.png")
    picture(2001).save(folder / "val" / "blank0.png")  # everyone's name
    entries += [
        {"image": name, "caption": "more"}
        for name in ("other.png", "val/photo_000020.png", "val/blank0.png")
    ]
    (folder / "val.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_training(folder)
    make_evaluation(folder)
    return folder


def config_of(data, **changes):
    config = base.get_config("tiny")
    values = {
        "data.train": f"json:{data / 'train.json'}",
        "data.eval": f"json:{data / 'val.json'}",
        "data.tokenizer_vocabulary": 300,
        "check.processes": 1,
    }
    config.update_from_flattened_dict(values | changes)
    return config


def opened(path):
    return open_source(f"json:{path}", role="train", size_px=32, scenes_examples=1, seed=0)


@pytest.fixture(scope="module")
def checked(data, tmp_path_factory):
    """The folder that a check by two processes leaves, its numbers, and its exit code."""
    workdir = tmp_path_factory.mktemp("checks") / "all"
    code = check_data(config_of(data, **{"check.processes": 2}), workdir)
    return workdir, json.loads((workdir / "check.json").read_text()), code


def test_every_kind_of_bad_picture_is_counted_and_named_with_its_reason(checked):
    workdir, found, _ = checked
    training = found["sources"][0]
    assert (training["listed"], training["without_caption"], training["images"]) == (73, 1, 71)
    assert [training[kind] for kind in ("missing", "empty", "undecodable", "tiny")] == [1, 1, 3, 1]
    assert (training["usable"], found["usable"], found["listed"]) == (66, 66, 73)
    lines = [line.split("\t") for line in (workdir / "skipped.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["training"] * 7
    assert [line[1] for line in lines[1:]] == list(BAD)
    for line, words in zip(lines, ("no caption", "no such file", "empty", "not a picture", "truncated", "Is a directory", "8 x 8"), strict=True):
        assert words in line[2]


def test_copies_and_likenesses_are_found_and_blank_pictures_are_none(checked):
    training = checked[1]["sources"][0]
    assert (training["copies"], training["near_duplicates"]) == (1, 1)


def test_leaks_are_told_by_what_shows_them(checked):
    (leak,) = checked[1]["leaks"]
    assert (leak["leaked"], leak["images"]) == (3, 25)
    assert (leak["same_content"], leak["same_look"], leak["same_name_alone"]) == (2, 1, 1)
    assert leak["names"] == ["photo_000010.jpg", "photo_000011.jpg", "other.png"]


def test_more_than_the_share_allowed_is_exit_code_1_and_says_what_is_wrong(checked, data, tmp_path):
    _, found, code = checked
    assert code == 1 and len(found["verdicts"]) == 2
    assert "7 of 73 listed records of training are unusable (9.6%)" in found["verdicts"][0]
    assert "3 of 25 pictures of validation are in training too (12.0%)" in found["verdicts"][1]
    assert check_data(config_of(data, **{"check.max_bad_share": 0.13}), tmp_path / "out") == 0


def test_one_process_finds_what_two_find_and_may_write_over_it(checked, data, tmp_path):
    workdir = shutil.copytree(checked[0], tmp_path / "again")
    check_data(config_of(data), workdir)
    for name in ("check.json", "usable.jsonl", "skipped.tsv", "report.html"):
        assert (workdir / name).read_bytes() == (checked[0] / name).read_bytes(), name


def test_the_usable_pairs_are_a_source_that_knows_how_many_were_listed(checked, data):
    source = opened(checked[0] / "usable.jsonl")
    whole = opened(data / "train.json")
    assert (len(source), source.listed) == (66, 73)
    assert source[0].image == str(data / "photo_000000.jpg")
    assert source.captions(5) == whole.captions(5)
    assert source[len(source) - 1].image_id == source[2].image_id  # listed again
    assert not {source.name(at) for at in range(len(source))} & set(BAD)


def test_the_page_is_whole_and_shows_captions_as_text(checked):
    page = (checked[0] / "report.html").read_text()

    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], []

        def handle_starttag(self, tag, attributes):
            self.seen.append(tag)
            if tag not in ("meta", "img", "br", "line"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if self.open and self.open[-1] == tag:
                self.open.pop()

    reader = Reader()
    reader.feed(page)
    assert not reader.open and "script" not in reader.seen
    assert "&lt;script&gt;" in page
    assert reader.seen.count("svg") == 4 and reader.seen.count("img") > 48


def test_captions_are_counted_by_tokens_and_by_the_pictures_that_share_them(data, tmp_path):
    source = opened(data / "train.json")
    tokenizer = tokenizer_for_run("", tmp_path, source, 300)
    images = inspect(source, processes=1, decode=False, least_side_px=0)
    captions = read_captions(source, images.which, tokenizer, examples=3)
    assert captions.count == 2 * 60 + 8 + 3 + 1
    assert captions.repeated == 8 and captions.most_repeated[0].images == 8
    assert captions.most_repeated[0].caption == "a picture <script>alert1< script>"
    _, lengths, _ = tokenizer.encode(["number 1", SCRIPT], 100)
    assert captions.lengths[lengths[0]] >= 2 and captions.truncated(lengths[1] - 1) == 8
    assert captions.truncated(lengths[1]) == 0


def test_without_decoding_files_are_only_looked_for(data, tmp_path):
    images = inspect(opened(data / "train.json"), processes=1, decode=False, least_side_px=32)
    counts = {status: int((images.status == status).sum()) for status in Status}
    assert (counts[Status.MISSING], counts[Status.EMPTY], counts[Status.UNDECODABLE]) == (1, 1, 0)
    config = config_of(data, **{"check.decode": False, "check.max_bad_share": 0.1})
    assert check_data(config, tmp_path / "out") == 1
    (leak,) = json.loads((tmp_path / "out" / "check.json").read_text())["leaks"]
    assert (leak["leaked"], leak["same_name_alone"]) == (3, 3)  # by name: nothing else is known


def test_pictures_in_shards_are_checked_with_the_shards_and_listed_by_their_place(data, tmp_path):
    config = config_of(data, **{"prepare.shard_records": 40, "prepare.processes": 1})
    assert prepare(config, tmp_path / "packed") == 0
    spec = {"data.train": f"records:{tmp_path / 'packed'}"}
    assert check_data(config_of(data, **spec, **{"check.max_bad_share": 0.2}), tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found["sources"][0]["tiny"] == 1 and found["image_root"] is None
    first = json.loads((tmp_path / "out" / "usable.jsonl").read_text().splitlines()[0])
    assert (first["index"], first["name"]) == (0, "photo_000000.jpg")
    shard = next((tmp_path / "packed").glob("*.array_record"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    assert check_data(config_of(data, **spec, **{"check.max_bad_share": 0.2}), tmp_path / "out") == 1
    (verdict,) = json.loads((tmp_path / "out" / "check.json").read_text())["verdicts"]
    assert shard.name in verdict


def test_a_folder_with_other_things_is_left_alone(data, tmp_path):
    for name, words in (("config.json", "holds a training run"), ("notes.txt", "holds other files")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(UserError, match=words):
            check_data(config_of(data), tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"check.near_bits": 16}, "near_bits=16 of 64"),
        ({"check.processes": -1}, "processes=-1 is too small"),
        ({"check.max_bad_share": 5.0}, "give 0 to 1"),
        ({"data.train": ""}, "data.train is empty"),
    ],
)
def test_settings_that_cannot_be_checked_with_are_refused(change, words, data, tmp_path):
    with pytest.raises(UserError, match=words):
        check_data(config_of(data, **change), tmp_path / "out")


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_near_hashes_are_those_that_a_comparison_of_all_finds(bits):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 1200, dtype=np.uint64)
    for at in range(300):
        flipped = rng.choice(64, rng.integers(0, 9), replace=False).astype(np.uint64)
        hashes[900 + at] = hashes[at] ^ np.bitwise_or.reduce(np.uint64(1) << flipped, initial=np.uint64(0))
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
    first = near.argmax(axis=1)
    expected = np.where(first < np.arange(1200), first, -1)
    assert (expected >= 0).sum() > 20
    np.testing.assert_array_equal(earlier_twin(hashes, bits), expected)
    queries, others = hashes[700:], hashes[:700]
    among = near[700:, :700]
    expected = np.where(among.any(axis=1), among.argmax(axis=1), -1)
    np.testing.assert_array_equal(first_match(queries, others, bits), expected)
