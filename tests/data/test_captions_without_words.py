# ruff: noqa: RUF001
"""Captions that cleaning leaves empty: every source leaves them out and counts them."""

import json

import pytest
import tar_files
from list_files import open_it, picture, write
from PIL import Image
from small_data import tokenizer_for_run
from small_run import config_of

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.rows import texts_in
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError
from codebook_jax.tools.check_data import check_data
from codebook_jax.tools.prepare import prepare

EMPTY = ["", " \n\u3000", "??? ???", "...", "。、！", "«»", "॥", "\ufeff\u200b", "\x00\x07"]
EMPTY += ["\ufffd\ufffd ?", "- / _", "～", "\u3164"]
WORDS = ["a", "7", "猫", "🙂", "$", "か゚", "ก", "!x!"]


def test_a_caption_has_words_if_a_letter_a_digit_or_a_symbol_is_left_of_it(tmp_path):
    assert not any(map(has_words, EMPTY))
    assert all(map(has_words, WORDS))
    tokenizer = tokenizer_for_run("", tmp_path, WORDS, 400)
    assert (tokenizer.encode(WORDS, 32)[1] > 2).all()


def write_json(folder, captions):
    pairs = [{"image": f"{at}.jpg", "caption": caption} for at, caption in enumerate(captions)]
    return f"json:{write(folder / 'pairs.json', pairs)}"


def write_shard(folder, captions):
    members = [
        (f"{at:03}.{suffix}", content)
        for at, caption in enumerate(captions)
        for suffix, content in (("jpg", picture(at)), ("txt", caption))
    ]
    return f"webdataset:{tar_files.write(folder / 's.tar', members)}"


@pytest.mark.parametrize("write_as", [write_json, write_shard])
def test_no_source_has_a_caption_without_words_and_all_are_counted(tmp_path, write_as):
    captions = [*EMPTY, *WORDS]
    source = open_it(write_as(tmp_path, captions))
    assert [source.captions(at)[0] for at in range(len(source))] == WORDS
    assert source.listed == len(captions) and len(source.left_out) == len(EMPTY)
    assert all("has no caption" in why for _, why in source.left_out)
    with pytest.raises(UserError, match=r"has no caption"):
        open_it(write_as(tmp_path, EMPTY))


def test_texts_of_library_data_sets_have_words():
    assert texts_in([*EMPTY, {"raw": "..."}, b"???", " a dog "]) == ("a dog",)


@pytest.fixture
def packed_before(tmp_path, monkeypatch):
    """A folder of packed pairs with some captions without words, as older versions packed them."""
    spec = write_json(tmp_path, ["a dog", "two cats", "???"])
    for at in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{at}.jpg")
    monkeypatch.setattr("codebook_jax.data.sources.listed.has_words", bool)
    prepare(config_of(**{"prepare.source": spec, "prepare.processes": 1}), tmp_path / "packed")
    return f"records:{tmp_path / 'packed'}"


def test_packed_pairs_of_before_lose_captions_without_words_when_they_are_read(packed_before):
    for role in ("train", "validation"):
        source = open_it(packed_before, role)
        assert [source.captions(at) for at in range(3)] == [("a dog",), ("two cats",), ()]
        assert source[0].captions == ("a dog",)
        with pytest.raises(UnreadableImage, match="has no caption with words"):
            source[2]


def test_a_check_counts_them_and_names_them(packed_before, tmp_path):
    workdir = tmp_path / "check"
    changes = {"data.train": packed_before, "check.processes": 1, "check.max_bad_share": 0.1}
    assert check_data(config_of(**changes), workdir) == 1
    found = json.loads((workdir / "check.json").read_text())["sources"][0]
    expected = {"listed": 3, "without_caption": 1, "usable": 2, "captions": 2}
    expected |= {"undecodable": 0, "unknown_tokens": 0}
    assert {name: found[name] for name in expected} == expected and found["tokens"] >= 4
    assert "2.jpg has no caption with words" in (workdir / "skipped.tsv").read_text()
