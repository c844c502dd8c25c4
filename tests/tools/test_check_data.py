"""What check-data finds on pictures made bad in every way, and what it writes."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image
from small_data import tokenizer_of

from codebook_jax.data.images import Picture
from codebook_jax.data.sources import open_source
from codebook_jax.errors import UserError
from codebook_jax.run import record as records
from codebook_jax.tools.check_data import check_data
from codebook_jax.tools.check_data.captions import compared_captions, read_captions
from codebook_jax.tools.check_data.findings import leak, part_of
from codebook_jax.tools.check_data.inspection import Status, inspect
from codebook_jax.tools.check_data.likeness import earlier_twin, first_match
from codebook_jax.tools.prepare import prepare
from configs import base

SCRIPT = "a picture <script>alert(1)</script>"
BAD = ("missing.jpg", "empty.jpg", "text.jpg", "cut.jpg", "folder.jpg", "tiny.jpg")
COCO = "COCO_train2014_000000391895"


def picture(number, size=(120, 90)):
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def make_training(folder):
    """61 good pictures, one of every bad kind, a copy, one that looks like another, three blank
    ones.
    """
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
    picture(100).save(folder / f"{COCO}.jpg")
    entries.append({"image": f"{COCO}.jpg", "caption": "a name of its own"})
    entries.append({"image": "photo_000002.jpg", "caption": "the same picture, listed again"})
    entries.append({"image": "photo_000000.jpg", "caption": " "})
    (folder / "train.json").write_text(json.dumps(entries))


def make_evaluation(folder):
    """20 pictures of its own, two from training, one that looks like one in training, and three
    with names used there.
    """
    entries = []
    for number in range(1000, 1020):
        picture(number).save(folder / f"val_{number:06}.png")
        entries.append({"image": f"val_{number:06}.png", "caption": f"evaluation {number}"})
    entries += [{"image": f"photo_{number:06}.jpg", "caption": "leaked"} for number in (10, 11)]
    picture(12).resize((90, 70)).save(folder / "other.png")
    (folder / "val").mkdir()
    for number, name in enumerate(
        (COCO, "photo_000020", "blank0"), 2000
    ):  # two names are not telling
        picture(number).save(folder / "val" / f"{name}.png")
    names = ("other.png", f"val/{COCO}.png", "val/photo_000020.png", "val/blank0.png")
    entries += [{"image": name, "caption": "more"} for name in names]
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
    """The folder written by a check with two processes, its numbers, and the exit code."""
    workdir = tmp_path_factory.mktemp("checks") / "all"
    code = check_data(config_of(data, **{"check.processes": 2}), workdir)
    return workdir, json.loads((workdir / "check.json").read_text()), code


def test_every_kind_of_bad_picture_is_counted_and_named_with_its_reason(checked):
    workdir, found, _ = checked
    training = found["sources"][0]
    assert (training["listed"], training["without_caption"], training["images"]) == (74, 1, 72)
    assert [training[kind] for kind in ("missing", "empty", "undecodable", "tiny")] == [1, 1, 3, 1]
    assert (training["usable"], found["usable"], found["listed"]) == (67, 67, 74)
    lines = [line.split("\t") for line in (workdir / "skipped.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["training"] * 7
    assert [line[1] for line in lines[1:]] == list(BAD)
    for line, words in zip(
        lines,
        ("no caption", "not exist", "empty", "not a picture", "truncated", "a folder", "8 x 8"),
        strict=True,
    ):
        assert words in line[2]


def test_copies_and_likenesses_are_found_and_blank_pictures_are_none(checked):
    training = checked[1]["sources"][0]
    assert (training["copies"], training["near_duplicates"]) == (1, 1)


def test_leaks_are_told_by_what_shows_them(checked):
    (found,) = checked[1]["leaks"]
    assert (found["leaked"], found["images"]) == (3, 26)
    assert (found["same_content"], found["same_look"], found["same_name_alone"]) == (2, 1, 1)
    assert [tuple(pair.values()) for pair in found["pictures"]] == [
        ("photo_000010.jpg", "photo_000010.jpg", "content"),
        ("photo_000011.jpg", "photo_000011.jpg", "content"),
        ("other.png", "photo_000012.jpg", "look"),
        (f"val/{COCO}.png", f"{COCO}.jpg", "name"),
    ]


def test_more_than_the_share_allowed_is_exit_code_1_and_says_what_is_wrong(checked, data, tmp_path):
    _, found, code = checked
    assert code == 1 and len(found["verdicts"]) == 2
    assert "7 of 74 listed records of training are unusable (9.5%)" in found["verdicts"][0]
    assert (
        "3 of 26 pictures of validation " in found["verdicts"][1]
        and "(11.5%)" in found["verdicts"][1]
    )
    assert check_data(config_of(data, **{"check.max_bad_share": 0.13}), tmp_path / "out") == 0


def test_one_process_finds_what_two_find_and_may_write_over_it(checked, data, tmp_path):
    workdir = shutil.copytree(checked[0], tmp_path / "again")
    check_data(config_of(data), workdir)
    for name in ("check.json", "usable.jsonl", "skipped.tsv", "report.html"):
        assert (workdir / name).read_bytes() == (checked[0] / name).read_bytes(), name


def test_the_usable_pairs_are_a_source_that_knows_how_many_were_listed(checked, data):
    source = opened(checked[0] / "usable.jsonl")
    whole = opened(data / "train.json")
    assert (len(source), source.listed) == (67, 74)
    assert source[0].image == str(data / "photo_000000.jpg")
    assert source.captions(5) == whole.captions(5)
    assert source[len(source) - 1].image_id == source[2].image_id  # listed again
    assert not {source.name(at) for at in range(len(source))} & set(BAD)


def test_the_page_is_whole_and_shows_captions_as_text(checked, tmp_path):
    path = checked[0] / "report.html"
    page = path.read_text()
    assert "&lt;script&gt;" in page and SCRIPT not in page
    script = (
        browser.CHARTS
        + """
        const titles = [...document.querySelectorAll("h3")].map(title => title.textContent);
        found.titles = [...new Set(titles)];
        found.pictures = document.images.length;
        found.captions = [...document.querySelectorAll("figcaption")].filter(one => one.textContent.includes("<script>")).length;
        found.sums = [...document.querySelectorAll(".chart > script")].map(
            one => JSON.parse(one.textContent).series[0].values.reduce((sum, value) => sum + value, 0));
        found.said = document.querySelector(".plot").getAttribute("aria-label");
    """
    )
    found = browser.look(path, script, tmp_path)
    assert "error" not in found and not found["complaints"], found
    assert (
        found["charts"] == 6 and not found["empty"] and not found["broken"] and found["wider"] <= 0
    )
    assert found["sums"] == [133, 67, 67, 26, 26, 26]
    last, pointed = found["hovered"]
    assert last != pointed and "or more" in last and "captions by tokens" in found["said"]
    assert found["pictures"] > 48 and found["captions"] > 0
    assert {
        "A sample",
        "Captions shared by several pictures",
        "Copies of another picture: 1",
    } <= set(found["titles"])
    assert "The same file: validation and training: 2" in found["titles"]


def test_captions_are_counted_by_tokens_and_by_the_pictures_that_share_them(data, tmp_path):
    source = opened(data / "train.json")
    tokenizer = tokenizer_of(source, tmp_path, 300)
    images = inspect(source, processes=1, decode=False, least_side_px=0)
    said = read_captions(source, tokenizer)
    captions = compared_captions(said, source, images.which, examples=3)
    assert captions.count == 2 * 60 + 8 + 3 + 2
    assert captions.repeated == 8 and captions.most_repeated[0].images == 8
    assert captions.most_repeated[0].caption == "a picture <script>alert1< script>"
    _, lengths, _ = tokenizer.encode(["number 1", SCRIPT], 100)
    assert captions.lengths[lengths[0]] >= 2 and captions.lengths[lengths[1]] == 8
    assert captions.truncated(lengths[1] - 1) == 8 + captions.truncated(lengths[1])
    assert captions.truncated(32) == 0 and captions.unknown.count == 0 < captions.unknown.tokens


def test_without_decoding_files_are_only_looked_for(data, tmp_path):
    images = inspect(opened(data / "train.json"), processes=1, decode=False, least_side_px=32)
    counts = {status: int((images.status == status).sum()) for status in Status}
    assert (counts[Status.MISSING], counts[Status.EMPTY], counts[Status.UNDECODABLE]) == (
        1,
        1,
        1,
    )  # the folder
    config = config_of(data, **{"check.decode": False, "check.max_bad_share": 0.1})
    assert check_data(config, tmp_path / "out") == 1
    (found,) = json.loads((tmp_path / "out" / "check.json").read_text())["leaks"]
    assert [found[name] for name in ("leaked", "same_content", "same_look", "same_name_alone")] == [
        3,
        2,
        0,
        1,
    ]


def test_pictures_in_shards_are_checked_with_the_shards_and_listed_by_their_place(data, tmp_path):
    config = config_of(data, **{"prepare.shard_records": 40, "prepare.processes": 1})
    assert prepare(config, tmp_path / "packed") == 0
    spec = {"data.train": f"records:{tmp_path / 'packed'}"}
    assert (
        check_data(config_of(data, **spec, **{"check.max_bad_share": 0.2}), tmp_path / "out") == 0
    )
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found["sources"][0]["tiny"] == 1 and found["image_root"] is None
    first = json.loads((tmp_path / "out" / "usable.jsonl").read_text().splitlines()[0])
    assert (first["index"], first["name"]) == (0, "photo_000000.jpg")
    shard = next((tmp_path / "packed").glob("*.array_record"))
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 200] ^= 255  # of the first picture
    shard.write_bytes(content)
    assert (
        check_data(config_of(data, **spec, **{"check.max_bad_share": 0.2}), tmp_path / "out") == 1
    )
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found["sources"][0]["undecodable"] == 1
    (verdict,) = found["verdicts"]
    assert shard.name in verdict


def test_what_shards_leave_out_is_counted_and_named_with_its_reason(data, tmp_path):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        content, "PNG"
    )
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name in (
            "a.jpg",
            "a.txt",
            "a.seg.png",
            "b.x.jpg",
            "b.x.txt",
            "c.jpg",
            "d.jpg",
            "d.json",
        ):
            member = tarfile.TarInfo(name)
            body = content.getvalue() if name.endswith(("jpg", "png")) else b"a caption"
            member.size = len(body)
            shard.addfile(member, io.BytesIO(body))
    config = config_of(
        data, **{"data.train": f"webdataset:{tmp_path}/s.tar", "check.max_bad_share": 0.5}
    )
    assert check_data(config, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "check.json").read_text())["sources"][0]
    assert [found[name] for name in ("listed", "usable")] == [4, 2]
    rows = [
        line.split("\t") for line in (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    ]
    why = {name: reason for label, name, reason in rows if label == "training"}
    assert list(why) == ["s.tar/c", "s.tar/d", "s.tar/a.seg.png"]
    assert "no caption" in why["s.tar/c"] and ".json cannot be read" in why["s.tar/d"]


def png_of(width, height):
    """The beginning of a PNG of this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"a few pixels"))]
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_large_pictures_cut_short_are_found_though_they_are_decoded_small(tmp_path):
    for name, progressive in (("plain", False), ("progressive", True)):
        file = io.BytesIO()
        picture(0, (640, 480)).save(file, "JPEG", quality=90, progressive=progressive)
        assert max(Picture(file.getvalue()).shrinks) > 1
        (tmp_path / f"{name}.jpg").write_bytes(file.getvalue())
        (tmp_path / f"{name}_cut.jpg").write_bytes(file.getvalue()[:-50])
    (tmp_path / "huge.png").write_bytes(png_of(100_000, 100_000))
    os.mkfifo(tmp_path / "pipe.jpg")
    names = (
        "plain.jpg",
        "plain_cut.jpg",
        "progressive.jpg",
        "progressive_cut.jpg",
        "huge.png",
        "pipe.jpg",
    )
    entries = [{"image": name, "caption": "one"} for name in names]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    images = inspect(opened(tmp_path / "pairs.json"), processes=1, decode=True, least_side_px=32)
    assert images.usable.tolist() == [True, False, True, False, False, False]
    assert (images.status[[1, 3, 4, 5]] == Status.UNDECODABLE).all()
    for at, words in ((1, "truncated"), (3, "truncated"), (4, "pixels"), (5, "regular file")):
        assert words in images.reasons[at]


def test_pictures_that_the_list_itself_calls_the_same_are_no_copies(tmp_path):
    for name, number in (("a.png", 1), ("b.png", 1), ("c.png", 1), ("d.png", 2)):
        picture(number).save(tmp_path / name)
    ids = {"a.png": 7, "b.png": 7, "c.png": 8, "d.png": 9}
    entries = [{"image": name, "caption": name, "image_id": key} for name, key in ids.items()]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    source = opened(tmp_path / "pairs.json")
    images = inspect(source, processes=1, decode=True, least_side_px=32)
    said = read_captions(source, tokenizer_of(source, tmp_path, 100))
    assert part_of("training", source, images, said, 3).copies.tolist() == [-1, -1, 0, -1]


def test_names_count_where_they_are_no_running_numbers(tmp_path):
    parts = []
    for label, folder in (("training", "train2014"), ("test", "val2014")):
        names = [f"COCO_val2014_{number * 997:012}" for number in range(30)]
        names += [f"{number:09}" for number in range(30)] + ["2333071", "0001"]
        entries = [{"image": f"{folder}/{name}.jpg", "caption": "one"} for name in names]
        (tmp_path / "pairs.json").write_text(json.dumps(entries))
        source = opened(tmp_path / "pairs.json")
        images = inspect(source, processes=1, decode=False, least_side_px=0)
        said = read_captions(source, tokenizer_of(source, tmp_path, 100))
        parts.append(part_of(label, source, images, said, 3))
    found = leak(parts[1], parts[0], 3, False)
    assert found.leaked.tolist() == [True] * 30 + [False] * 30 + [True, False]


def test_a_mixture_is_checked_as_a_whole_and_source_by_source(tmp_path):
    specs = {}
    for name, numbers in (
        ("one", range(20)),
        ("two", range(15, 40)),
        ("val", (3, 30, *range(50, 68))),
    ):
        (tmp_path / name).mkdir()
        entries = []
        for number in numbers:
            picture(number).save(tmp_path / name / f"{number}.png")
            entries.append({"image": f"{number}.png", "caption": f"{name} {number % 30}"})
        (tmp_path / name / "pairs.json").write_text(json.dumps(entries))
        specs[name] = f"json:{tmp_path / name / 'pairs.json'}"
    changes = {
        "data.train": f"{specs['one']}?weight=2, {specs['two']}?weight=1",
        "data.eval": specs["val"],
        "check.max_bad_share": 0.06,  # each source has 5 % of the evaluation, both have 10 %
    }
    assert check_data(config_of(tmp_path, **changes), tmp_path / "out") == 1
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    labels = ["training", "training 1", "training 2", "validation"]
    assert [part["label"] for part in found["sources"]] == labels
    assert [part["images"] for part in found["sources"]] == [45, 20, 25, 20]
    assert [part["copies"] for part in found["sources"]] == [5, 0, 0, 0]
    (leaked,) = found["leaks"]
    assert [pair["training"] for pair in leaked["pictures"]] == ["3.png", "30.png"]
    source = opened(tmp_path / "out" / "usable.jsonl")
    assert len({source[at].image_id for at in range(45)}) == len(source) == 45
    assert source[44].image == str(tmp_path / "two" / "39.png")


LONG = """
import sys
sys.modules["jax"] = None
from codebook_jax.check_data import check_data
from configs import base
if __name__ == "__main__":
    config = base.get_config("tiny")
    config.data.train, config.check.processes = sys.argv[1], 2
    sys.exit(check_data(config, sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_ended_leaves_no_process_and_needs_no_jax(number, tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    picture(0, (2400, 1600)).save(tmp_path / "0.png")  # a tenth of a second each
    for copy in range(1, 2000):
        os.link(tmp_path / "0.png", tmp_path / f"{copy}.png")
    entries = [{"image": f"{copy}.png", "caption": "one"} for copy in range(2000)]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    command = [
        sys.executable,
        tmp_path / "long.py",
        f"json:{tmp_path / 'pairs.json'}",
        tmp_path / "out",
    ]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            workers = eventually(lambda: len(found := children(process.pid)) >= 3 and found)
            process.send_signal(number)
            assert process.wait(timeout=20) == (143 if number == signal.SIGTERM else -9)
            assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
        finally:
            process.kill()
    assert not (tmp_path / "out").exists()


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def eventually(what, timeout=20):
    until = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def test_a_folder_with_other_things_is_left_alone(data, tmp_path):
    for name, words in (
        ("config.json", "holds a training run"),
        ("notes.txt", "holds other files"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(UserError, match=words):
            check_data(config_of(data), tmp_path / name)


def test_what_was_found_is_shown_though_it_cannot_be_written(data, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(records, "write_probe", lambda *_: None)
    with pytest.raises(PermissionError):
        check_data(config_of(data, **{"check.decode": False}), tmp_path)
    assert "listed records" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"check.near_bits": 16}, "near_bits=16 of 64"),
        ({"check.processes": -1}, "processes=-1 is too small"),
        ({"check.max_bad_share": 5.0}, "max_bad_share=5.0 .*0 to 1"),
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
        hashes[900 + at] = hashes[at] ^ np.bitwise_or.reduce(
            np.uint64(1) << flipped, initial=np.uint64(0)
        )
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
    first = near.argmax(axis=1)
    expected = np.where(first < np.arange(1200), first, -1)
    assert (expected >= 0).sum() > 20
    np.testing.assert_array_equal(earlier_twin(hashes, bits), expected)
    queries, others = hashes[700:], hashes[:700]
    among = near[700:, :700]
    expected = np.where(among.any(axis=1), among.argmax(axis=1), -1)
    np.testing.assert_array_equal(first_match(queries, others, bits), expected)
