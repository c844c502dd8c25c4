"""What check-data finds on pictures made bad in every way, and what it writes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import browser
import numpy as np
import pytest
from bad_pictures import BAD, COCO, SCRIPT, make_evaluation, make_training, picture, write_pairs
from small_data import tokenizer_for_run, tokenizer_of
from small_run import ROOT

from codebook_jax import files
from codebook_jax.data.images import Picture
from codebook_jax.data.sources import open_source
from codebook_jax.data.sources.record import sample_captions
from codebook_jax.errors import UserError
from codebook_jax.tools.check_data import check_data
from codebook_jax.tools.check_data.findings import (
    earlier_twin,
    find,
    find_leak,
    first_match,
    read_captions,
)
from codebook_jax.tools.check_data.inspection import Status, inspect
from codebook_jax.tools.prepare import prepare
from configs import base


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


def check(data, workdir, **changes):
    """(the exit code, what check.json holds)"""
    code = check_data(config_of(data, **changes), workdir)
    return code, json.loads((workdir / "check.json").read_text())


def opened(path):
    return open_source(f"json:{path}", role="train", size_px=32, scenes_examples=1, seed=0)


def found_in(path, workdir, *, decode=True, max_tokens=32):
    """The findings on the pairs of a JSON file."""
    source = opened(path)
    found = inspect(source, processes=1, decode=decode, least_side_px=32)
    captions = read_captions(source, tokenizer_for_run("", workdir, sample_captions(source), 300))
    return find("training", source, found, captions, bits=3, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def checked(data, tmp_path_factory):
    """The folder written by a check with two processes, its numbers, and the exit code."""
    workdir = tmp_path_factory.mktemp("checks") / "all"
    code, found = check(data, workdir, **{"check.processes": 2})
    return workdir, found, code


def test_every_kind_of_bad_picture_is_counted_and_named_with_its_reason(checked):
    workdir, found, _ = checked
    training = found["sources"][0]
    assert (training["listed"], training["without_caption"], training["images"]) == (74, 1, 72)
    assert [training[kind] for kind in ("missing", "empty", "undecodable", "tiny")] == [1, 1, 3, 1]
    assert (training["usable"], found["usable"], found["listed"]) == (67, 67, 74)
    assert (training["copies"], training["near_duplicates"]) == (1, 1)  # blank ones are neither
    first, *lines = [
        line.split("\t") for line in (workdir / "skipped.tsv").read_text().splitlines()
    ]
    assert first[0] == "training" and "no caption" in first[2]
    for (_, name, reason), (bad, words) in zip(lines, BAD.items(), strict=True):
        assert name == bad and words in reason


def test_leaks_are_counted_by_their_evidence(checked):
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
    unusable, leaked = found["verdicts"]
    assert code == 1
    assert "7 of 74 listed records of training are unusable (9.5%)" in unusable
    assert "3 of 26 pictures of validation " in leaked and "(11.5%)" in leaked
    assert check(data, tmp_path / "out", **{"check.max_bad_share": 0.13})[0] == 0


def test_one_process_finds_what_two_find_and_may_write_over_it(checked, data, tmp_path):
    workdir = shutil.copytree(checked[0], tmp_path / "again")
    check_data(config_of(data), workdir)
    for name in ("check.json", "usable.jsonl", "skipped.tsv", "report.html"):
        assert (workdir / name).read_bytes() == (checked[0] / name).read_bytes(), name


def test_the_usable_pairs_are_a_source_that_knows_how_many_were_listed(checked, data):
    source, whole = opened(checked[0] / "usable.jsonl"), opened(data / "train.json")
    assert (len(source), source.listed) == (67, 74)
    assert source[0].image == str(data / "photo_000000.jpg")
    assert source.captions(5) == whole.captions(5)
    assert source[len(source) - 1].image_id == source[2].image_id  # listed again
    assert not {source.name(at) for at in range(len(source))} & set(BAD)


def test_the_page_is_whole_and_shows_captions_as_text(checked, tmp_path):
    path = checked[0] / "report.html"
    page = path.read_text()
    assert "&lt;script&gt;" in page and SCRIPT not in page
    script = """
        const texts = name => [...document.querySelectorAll(name)].map(one => one.textContent);
        found.titles = texts("h3");
        found.pictures = document.images.length;
        found.captions = texts("figcaption").filter(text => text.includes("<script>")).length;
        found.sums = texts(".chart > script").map(text =>
            JSON.parse(text).series[0].values.reduce((sum, value) => sum + value, 0));
        found.said = document.querySelector(".plot").getAttribute("aria-label");
    """
    found = browser.look(path, browser.CHARTS + script, tmp_path)
    browser.check_page(found)
    assert found["charts"] == 6 and found["sums"] == [133, 67, 67, 26, 26, 26]
    last, pointed = found["hovered"]
    assert last != pointed and "or more" in last and "captions by tokens" in found["said"]
    assert found["pictures"] > 48 and found["captions"] > 0
    shared = "Captions shared by several pictures"
    assert {"A sample", shared, "Copies of another picture: 1"} <= set(found["titles"])
    assert "The same file: validation and training: 2" in found["titles"]


def test_captions_are_counted_by_tokens_and_by_the_pictures_that_share_them(data, tmp_path):
    part = found_in(data / "train.json", tmp_path, decode=False)
    counts = part.counts
    assert counts["captions"] == 2 * 60 + 8 + 3 + 2
    assert counts["repeated"] == 8 == part.most_repeated[0]["images"]
    assert part.most_repeated[0]["caption"] == "a picture <script>alert1< script>"
    tokenizer = tokenizer_of(part.source, tmp_path, 300)
    _, lengths, _ = tokenizer.encode(["number 1", SCRIPT], 100)
    assert (part.captions["tokens"] == lengths[1]).sum() == 8
    limit = int(lengths[1]) - 1
    cut = found_in(data / "train.json", tmp_path, decode=False, max_tokens=limit).counts
    assert cut["truncated"] == (part.captions["tokens"] > limit).sum() >= 8
    assert counts["truncated"] == 0
    assert counts["unknown_tokens"] == 0 < counts["tokens"]


def test_without_decoding_files_are_only_looked_for(data, tmp_path):
    found = inspect(opened(data / "train.json"), processes=1, decode=False, least_side_px=32)
    bad = (Status.MISSING, Status.EMPTY, Status.UNDECODABLE)  # the last is the folder
    assert [int((found["status"] == status).sum()) for status in bad] == [1, 1, 1]
    options = {"check.decode": False, "check.max_bad_share": 0.1}
    code, found = check(data, tmp_path / "out", **options)
    (leak,) = found["leaks"]
    names = ("leaked", "same_content", "same_look", "same_name_alone")
    assert code == 1 and [leak[name] for name in names] == [3, 2, 0, 1]


def test_pictures_in_shards_are_checked_with_the_shards_and_give_no_list_of_files(data, tmp_path):
    config = config_of(data, **{"prepare.shard_records": 40, "prepare.processes": 1})
    assert prepare(config, tmp_path / "packed") == 0
    options = {"data.train": f"records:{tmp_path / 'packed'}", "check.max_bad_share": 0.2}
    usable = tmp_path / "out" / "usable.jsonl"
    usable.parent.mkdir()
    usable.write_text("of an earlier check")
    code, found = check(data, tmp_path / "out", **options)
    assert code == 0 and found["sources"][0]["tiny"] == 1 and found["image_root"] is None
    assert not usable.exists()
    shard = next((tmp_path / "packed").glob("*.array_record"))
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 200] ^= 255  # of the first picture
    shard.write_bytes(content)
    code, found = check(data, tmp_path / "out", **options)
    (verdict,) = found["verdicts"]
    assert code == 1 and found["sources"][0]["undecodable"] == 1 and shard.name in verdict


def test_what_shards_leave_out_is_counted_and_named_with_its_reason(data, tmp_path):
    content = io.BytesIO()
    picture(0, (40, 40)).save(content, "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name in "a.jpg a.txt a.seg.png b.x.jpg b.x.txt c.jpg d.jpg d.json".split():
            member = tarfile.TarInfo(name)
            body = content.getvalue() if name.endswith(("jpg", "png")) else b"a caption"
            member.size = len(body)
            shard.addfile(member, io.BytesIO(body))
    options = {"data.train": f"webdataset:{tmp_path}/s.tar", "check.max_bad_share": 0.5}
    code, found = check(data, tmp_path / "out", **options)
    assert code == 0 and [found["sources"][0][name] for name in ("listed", "usable")] == [4, 2]
    lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    why = dict(line.split("\t")[1:] for line in lines if line.startswith("training"))
    assert list(why) == ["s.tar/c", "s.tar/d"]
    assert "no caption" in why["s.tar/c"] and ".json cannot be read" in why["s.tar/d"]


def test_large_pictures_cut_short_are_found_though_they_are_decoded_small(tmp_path):
    for name, progressive in (("plain", False), ("progressive", True)):
        file = io.BytesIO()
        picture(0, (640, 480)).save(file, "JPEG", quality=90, progressive=progressive)
        assert max(Picture(file.getvalue()).shrinks) > 1
        (tmp_path / f"{name}.jpg").write_bytes(file.getvalue())
        (tmp_path / f"{name}_cut.jpg").write_bytes(file.getvalue()[:-50])
    (tmp_path / "huge.ppm").write_bytes(b"P6 100000 100000 255\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    bad = {"plain_cut.jpg": "truncated", "progressive_cut.jpg": "truncated"}
    bad |= {"huge.ppm": "pixels", "pipe.jpg": "regular file"}
    write_pairs(tmp_path, [(name, "one") for name in ("plain.jpg", "progressive.jpg", *bad)])
    found = inspect(opened(tmp_path / "pairs.json"), processes=1, decode=True, least_side_px=32)
    assert found["status"].tolist() == [Status.USABLE] * 2 + [Status.UNDECODABLE] * 4
    for at, words in enumerate(bad.values(), 2):
        assert words in found["reason"][at]


def test_pictures_that_the_list_itself_calls_the_same_are_no_copies(tmp_path):
    entries = []
    for name, number, key in (("a", 1, 7), ("b", 1, 7), ("c", 1, 8), ("d", 2, 9)):
        picture(number).save(tmp_path / f"{name}.png")
        entries.append({"image": f"{name}.png", "caption": name, "image_id": key})
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    assert found_in(tmp_path / "pairs.json", tmp_path).copies.tolist() == [-1, -1, 0, -1]


def test_names_count_where_they_are_no_running_numbers(tmp_path):
    parts = []
    for folder in ("train2014", "val2014"):
        names = [f"COCO_val2014_{number * 997:012}" for number in range(30)]
        names += [f"{number:09}" for number in range(30)] + ["2333071", "0001"]
        write_pairs(tmp_path, [(f"{folder}/{name}.jpg", "one") for name in names])
        parts.append(found_in(tmp_path / "pairs.json", tmp_path, decode=False))
    found = find_leak(parts[1], parts[0], near_bits=3, decoded=False)
    assert (found.matches["name"] >= 0).tolist() == [True] * 30 + [False] * 30 + [True, False]
    assert found.leak["leaked"] == 31


def test_a_mixture_is_checked_as_a_whole_and_source_by_source(tmp_path):
    specs = {}
    numbers = {"one": range(20), "two": range(15, 40), "val": (3, 30, *range(50, 68))}
    for name, own in numbers.items():
        (tmp_path / name).mkdir()
        for number in own:
            picture(number).save(tmp_path / name / f"{number}.png")
        pairs = [(f"{number}.png", f"{name} {number % 30}") for number in own]
        specs[name] = write_pairs(tmp_path / name, pairs)
    changes = {
        "data.train": f"{specs['one']}?weight=2, {specs['two']}?weight=1",
        "data.eval": specs["val"],
        "check.max_bad_share": 0.06,  # each source has 5 % of the evaluation, both have 10 %
    }
    code, found = check(tmp_path, tmp_path / "out", **changes)
    labels = ["training", "training 1", "training 2", "validation"]
    assert code == 1 and [part["label"] for part in found["sources"]] == labels
    assert [part["images"] for part in found["sources"]] == [45, 20, 25, 20]
    assert [part["copies"] for part in found["sources"]] == [5, 0, 0, 0]
    assert [part["captions"] for part in found["sources"]] == [45, 20, 25, 20]
    (leaked,) = found["leaks"]
    assert [pair["training"] for pair in leaked["pictures"]] == ["3.png", "30.png"]
    source = opened(tmp_path / "out" / "usable.jsonl")
    assert len({source[at].image_id for at in range(45)}) == len(source) == 45
    assert source[44].image == str(tmp_path / "two" / "39.png")


LONG = """
import sys
sys.modules["jax"] = None
from codebook_jax.tools.check_data import check_data
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
    spec = write_pairs(tmp_path, [(f"{copy}.png", "one") for copy in range(2000)])
    command = [sys.executable, tmp_path / "long.py", spec, tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        own = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            workers = eventually(lambda: len(found := own.read_text().split()) >= 3 and found)
            process.send_signal(number)
            assert process.wait(timeout=20) == (143 if number == signal.SIGTERM else -9)
            assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
        finally:
            process.kill()
    assert not (tmp_path / "out").exists()


def eventually(what, timeout=20):
    until = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def test_a_folder_with_other_files_and_no_data_to_check_are_refused(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        check_data(config_of(data), tmp_path)
    with pytest.raises(UserError, match="data.train is empty"):
        check_data(config_of(data, **{"data.train": ""}), tmp_path)


def test_what_was_found_is_shown_though_it_cannot_be_written(data, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(files, "write_probe", lambda *_: None)
    with pytest.raises(PermissionError):
        check_data(config_of(data, **{"check.decode": False}), tmp_path)
    assert "listed records" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_near_hashes_are_those_that_a_comparison_of_all_finds(bits):
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**64, 1200, dtype=np.uint64)
    for at in range(300):
        flipped = rng.choice(64, rng.integers(0, 9), replace=False).astype(np.uint64)
        mask = np.bitwise_or.reduce(np.uint64(1) << flipped, initial=np.uint64(0))
        hashes[900 + at] = hashes[at] ^ mask
    hashes[[5, 17]] = 0  # unknown
    near = (np.bitwise_count(hashes[:, None] ^ hashes) <= bits) & (hashes != 0)
    near[hashes == 0] = False
    first = np.where(near.any(axis=1), near.argmax(axis=1), 1200)
    expected = np.where(first < np.arange(1200), first, -1)
    assert (expected >= 0).sum() > 20
    np.testing.assert_array_equal(earlier_twin(hashes, bits), expected)
    among = near[700:, :700]
    expected = np.where(among.any(axis=1), among.argmax(axis=1), -1)
    np.testing.assert_array_equal(first_match(hashes[700:], hashes[:700], bits), expected)
