"""Packed pairs read by index: the same in every process, damage is named, and nothing is read
needlessly.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import list_files
import numpy as np
import pytest
from list_files import captions, check_source, ids, records
from small_packing import content, jpeg, pack, write_many

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.data.manifest import verify
from codebook_jax.data.sources import records as records_module
from codebook_jax.errors import UserError

COUNT = 22
SHARD, INDEX = "pairs-00002-of-00006.array_record", "pairs-00002-of-00006.jsonl"


def open_it(folder, role="train", **changes):
    return list_files.open_it(f"records:{folder}", role, **changes)


def refusal(folder, **changes):
    return list_files.refusal(f"records:{folder}", **changes)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """22 pictures, number 5 unreadable, packed four per shard. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("records")
    source = write_many(folder / "pictures", COUNT)
    (folder / "pictures" / "5.jpg").write_bytes(b"no picture")
    assert pack(source, folder / "packed") == 0
    return folder / "packed"


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copied")


def numbers():
    return [number for number in range(COUNT) if number != 5]


def test_every_record_is_the_one_that_was_packed(packed):
    source = open_it(packed)
    assert [len(source), source.listed, list(source.left_out)] == [COUNT - 1, COUNT, []]
    for index, number in enumerate(numbers()):
        assert source[index] == (jpeg(number), (f"picture {number}",), number)
        assert source.captions(index) == (f"picture {number}",)
        assert source.name(index) == f"{number}.jpg"
    check_source(source)


def test_records_of_one_image_are_one_to_evaluate_and_two_pictures_of_one_id_stay_two(tmp_path):
    path = write_many(tmp_path / "pictures", 5)
    images = [(0, "a", "x"), (1, ["b", "c"], "y"), (0, "d", "x"), (2, "e", "z"), (3, "f", "z")]
    entries = [
        {"image": f"{image}.jpg", "caption": caption, "image_id": key}
        for image, caption, key in (*images, (0, ["a", "g"], "x"))
    ]
    path.write_text(json.dumps(entries))
    assert pack(path, tmp_path / "packed") == 0
    listed = list_files.open_it(f"json:{path}", "test")
    merged = open_it(tmp_path / "packed", role="test")
    assert captions(merged) == [("a", "d", "g"), ("b", "c"), ("e",), ("f",)]
    assert [merged.name(index) for index in range(4)] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    for record, plain in zip(records(merged), records(listed), strict=True):
        assert record[1:] == plain[1:] and (decode(record.image) == decode(plain.image)).all()
    train = open_it(tmp_path / "packed")
    assert len(train) == 6 and train.fingerprint() != merged.fingerprint()


def test_a_fingerprint_is_of_the_content_and_of_no_path(packed, copied, tmp_path):
    source = open_it(packed)
    assert open_it(copied).fingerprint() == source.fingerprint()
    assert repr(source) == f"records('{packed}', images={COUNT - 1})"
    path = write_many(tmp_path / "pictures", COUNT)
    path.write_text(path.read_text().replace("picture 20", "photo 20"))
    assert pack(path, tmp_path / "other") == 0
    assert open_it(tmp_path / "other").fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("file", "size", "words"),
    [
        (SHARD, None, f"{SHARD} is missing"),
        (SHARD, -1, f"{SHARD} has .* bytes instead of"),
        (INDEX, None, f"{INDEX} is missing"),
    ],
)
def test_a_damaged_shard_is_named_refused_skipped_and_remade(packed, copied, file, size, words):
    whole = (copied / file).read_bytes()
    (copied / file).unlink()
    if size is not None:
        (copied / file).write_bytes(whole[:size])
    cure = ".*same --mode=prepare command again.*damaged_shards=skip"
    assert re.search(words + cure, refusal(copied))
    source = open_it(copied, damaged_shards="skip")
    assert ids(source) == [number for number in numbers() if number not in (8, 9, 10, 11)]
    [(name, why)] = source.left_out
    assert [source.listed, name] == [COUNT, SHARD] and why.endswith("4 records left out")
    assert source.fingerprint() != open_it(packed).fingerprint()
    assert pack(packed.parent / "pictures" / "pairs.json", copied) == 0
    assert content(copied) == content(packed)
    assert len(open_it(copied)) == COUNT - 1


def test_more_damaged_shards_are_counted_and_all_of_them_are_no_source(copied):
    for path in copied.glob("*0[13]-of*.array_record"):
        path.write_bytes(b"")
    assert re.search("00001-of-00006.*2 of 6 shards are damaged", refusal(copied))
    for path in copied.glob("*.array_record"):
        path.unlink()
    assert "6 of 6 shards are damaged" in refusal(copied, damaged_shards="skip")


def test_a_flipped_byte_anywhere_in_a_picture_is_found_when_its_record_is_read(copied):
    shard = copied / SHARD
    whole = shard.read_bytes()
    picture = jpeg(9)
    start = whole.index(picture)
    rng = np.random.default_rng(0)
    for at in [0, len(picture) - 1, *rng.integers(0, len(picture), 20)]:
        flipped = bytearray(whole)
        flipped[start + at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(flipped)
        source = open_it(copied)
        with pytest.raises(UnreadableImage, match=f"{SHARD}, record 1: .*hash mismatch"):
            source[8]
        assert source[7].image == jpeg(8) and source[9].image == jpeg(10)
    [(file, why)] = verify(copied)
    assert file == SHARD and SHARD in why and "sha256" in why


def test_a_shard_that_goes_away_while_it_is_read_is_an_unreadable_image(copied):
    source = open_it(copied)
    (copied / SHARD).unlink()
    with pytest.raises(UnreadableImage, match=f"{SHARD}, record 0"):
        source[7]
    (copied / INDEX).unlink()
    with pytest.raises(UserError, match=r"00006.jsonl, line 2 .*--mode=prepare"):
        source.captions(8)


def test_folders_that_are_not_packed_are_refused_with_what_to_do(copied, tmp_path):
    manifest = copied / "manifest.json"
    text = manifest.read_text()
    for change, words in (
        (text.replace('"version": 1', '"version": 2'), r"json .*version 2\b.* version 1\b"),
        (text[:300], r"manifest\.json .*JSONDecodeError"),
        (text.replace('"captions"', '"words"'), r"manifest\.json .*TypeError: .*words"),
    ):
        manifest.write_text(change)
        assert re.search(words, refusal(copied))
    manifest.unlink()
    assert re.search(r"no manifest\.json.*same command again", refusal(copied))
    (tmp_path / "empty").mkdir()
    assert re.search(r"empty .*no manifest\.json.*--workdir", refusal(tmp_path / "empty"))
    assert re.search("gone .*--workdir", refusal(tmp_path / "gone"))


def test_many_threads_read_more_shards_than_stay_open(packed, monkeypatch):
    for name in ("_reader", "_index"):
        few = functools.lru_cache(2)(getattr(records_module, name).__wrapped__)
        monkeypatch.setattr(records_module, name, few)
    source = open_it(packed)
    expected = [(jpeg(number), f"{number}.jpg") for number in numbers()]

    def wrong(seed):
        drawn = np.random.default_rng(seed).integers(0, COUNT - 1, 200)
        return [n for n in drawn if (source[n].image, source.name(n)) != expected[n]]

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(wrong, range(8)))
    assert records_module._reader.cache_info().currsize == 2


def test_packing_and_reading_touch_no_device():
    """Their own imports do not include JAX; Grain imports it, but starts nothing."""
    code = """
import sys
import codebook_jax.tools.prepare, codebook_jax.data.sources.records
assert not {"codebook_jax.run.metrics", "flax"} & set(sys.modules)
"""
    environment = os.environ | {"JAX_PLATFORMS": "none"}  # to ask for devices would fail
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
