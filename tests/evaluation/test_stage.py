"""An evaluation that is killed between two calls goes on where it was, and only with what is still
the same.
"""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_gallery import Digits, Numbers, Oracle, config_of, evaluate

from codebook_jax.evaluation import stage
from codebook_jax.evaluation.encoding import encode_source
from codebook_jax.evaluation.stage import Bookkeeping, Cache, FileRows, Shares, Stage
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes.peers import Peers

COUNT = 37
# of 8 rows; a row of pairs is one of 37 images with up to 16 texts
CALLS = {"images": 5, "texts": 7}


class Killed(Exception):
    pass


class Watch:
    """Progress that ends the evaluation once `name` has made `calls`; what it saw is in `told`."""

    def __init__(self, name: str = "", calls: int = 0) -> None:
        self.name, self.calls = name, calls
        self.told: dict[str, list[int]] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        self.told.setdefault(name, []).append(done)
        if name == self.name and len(self.told[name]) == self.calls + 1:
            raise Killed

    def made(self) -> dict[str, int]:
        return {name: len(told) - 1 for name, told in self.told.items()}


@pytest.fixture(autouse=True)
def record_at_once(monkeypatch):
    monkeypatch.setattr(stage, "RECORD_EVERY_S", 0.0)


def evaluated(folder, watch=None, source=None, key="one", **changes):
    books = Bookkeeping(watch, Cache(folder / "cache", key))
    return evaluate(source or Numbers(COUNT), books=books, **changes)


def killed(folder, name, calls, source=None, **changes):
    with pytest.raises(Killed):
        evaluated(folder, Watch(name, calls), source, **changes)


@pytest.mark.parametrize("name, calls", [("images", 2), ("texts", 3), ("pairs", 1)])
def test_a_killed_evaluation_makes_only_what_was_missing(name, calls, tmp_path, capsys):
    whole = Watch()
    expected = evaluate(Numbers(COUNT), books=Bookkeeping(whole))
    assert whole.made() | CALLS == whole.made() and whole.made()["pairs"] > 2
    killed(tmp_path, name, calls)
    source, watch = Numbers(COUNT), Watch()
    assert evaluated(tmp_path, watch, source) == expected
    before = list(whole.made()).index(name)
    left = [0] * before + [whole.made()[name] - calls] + list(whole.made().values())[before + 1 :]
    assert list(watch.made().values()) == left
    done, total = whole.told[name][calls], whole.told[name][-1]
    assert watch.told[name][-1] == total - done
    assert sorted(source.read) == list(range(8 * calls if name == "images" else COUNT, COUNT))
    assert f"goes on: {done} of {total} {name} are done already" in capsys.readouterr().out


def test_an_evaluation_killed_again_and_again_comes_to_its_end(tmp_path):
    expected = evaluate(Numbers(COUNT))
    for name in ("images", "images", "texts", "pairs", "pairs"):
        killed(tmp_path, name, 1)
    assert evaluated(tmp_path) == expected


def test_another_batch_goes_on_from_the_same_rows(tmp_path):
    killed(tmp_path, "images", 2)
    source = Numbers(COUNT)
    found = evaluated(tmp_path, None, source, **{"evaluation.batch": 3})
    assert found == evaluate(Numbers(COUNT)) and min(source.read) == 16


def test_what_another_model_or_source_left_is_not_used(tmp_path):
    killed(tmp_path, "pairs", 1)
    source = Numbers(COUNT)
    assert evaluated(tmp_path, None, source, key="two") == evaluate(Numbers(COUNT))
    assert sorted(source.read) == list(range(COUNT))


def test_other_candidates_are_scored_anew(tmp_path):
    killed(tmp_path, "pairs", 1)
    more, watch = {"evaluation.rerank_top_k": 9}, Watch()
    assert evaluated(tmp_path, watch, **more) == evaluate(Numbers(COUNT), **more)
    assert watch.made()["images"] == watch.made()["texts"] == 0
    assert watch.told["pairs"][-1] > 37 * 16


def test_a_picture_that_was_mended_meanwhile_is_read(tmp_path):
    killed(tmp_path, "pairs", 1, Numbers(COUNT, broken=(5,)))
    source = Numbers(COUNT)
    assert evaluated(tmp_path, None, source) == evaluate(Numbers(COUNT))
    assert source.read == [5]


@pytest.mark.parametrize("end", ['[[0, 1], [[100, ["', '[[16], [[116, ["16"]]]]', "\0\0\0\n"])
def test_a_line_that_a_crash_cut_off_is_as_if_never_written(end, tmp_path):
    killed(tmp_path, "images", 2)
    with open(tmp_path / "cache" / "images" / "done.jsonl", "a") as file:
        file.write(end)
    killed(tmp_path, "images", 1)
    source = Numbers(COUNT)
    assert evaluated(tmp_path, None, source) == evaluate(Numbers(COUNT))
    assert sorted(source.read) == list(range(24, COUNT))


def test_rows_whose_file_is_gone_are_made_again(tmp_path):
    killed(tmp_path, "texts", 1)
    (tmp_path / "cache" / "images" / "student_tokens").unlink()
    source = Numbers(COUNT)
    assert evaluated(tmp_path, None, source) == evaluate(Numbers(COUNT))
    assert sorted(source.read) == list(range(COUNT))


def test_rows_are_recorded_seldom_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "RECORD_EVERY_S", 1000.0)
    killed(tmp_path, "texts", 3)
    lines = {
        name: len((tmp_path / "cache" / name / "done.jsonl").read_text().splitlines())
        for name in CALLS
    }
    assert lines == {"images": 2, "texts": 1}  # the first says what of


def test_a_full_disk_is_said_with_the_numbers_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    source = Numbers(COUNT)
    with pytest.raises(OSError, match="0 MB are free for") as full:
        evaluated(tmp_path, None, source)
    assert full.value.errno == errno.ENOSPC and source.read == []
    assert full.value.filename == str(tmp_path / "cache" / "images")


def test_rows_in_a_file_are_those_of_an_array_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(11, 3, 2)).astype(jnp.bfloat16)
    (tmp_path / "rows").write_bytes(bytes(values.nbytes))
    rows = FileRows(tmp_path / "rows", values.shape, jnp.bfloat16)
    order = np.array([4, 5, 6, 0, 10, 9, 1, 2, 3, 7, 8])
    for part in np.split(order, [4, 5]):
        rows[part] = values[part]
    assert rows[:].dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[:], values)
    np.testing.assert_array_equal(rows[[[3, 3], [0, 10]]], values[[[3, 3], [0, 10]]])


def test_tokens_are_kept_in_the_type_in_which_they_are_computed_and_not_in_memory(tmp_path):
    class Halves(Oracle):
        def _encode_images(self, towers, images):
            features, tokens = super()._encode_images(towers, images)
            return features, tokens.astype(jnp.bfloat16)

    halves = Halves(sharding.make_mesh(-1, 1, 1))
    given = halves, {"student": 0.0}, Numbers(COUNT, broken=(2,)), Digits(), config_of()
    books = Bookkeeping(None, Cache(tmp_path, "one"))
    of = [
        encode_source(*given, images=0, with_tokens=("student",), **options)
        for options in ({}, {"books": books})
    ]
    in_memory, in_files = (gallery.features["student"].image_tokens for gallery in of)
    assert isinstance(in_files, FileRows) and in_files.dtype == in_memory.dtype == jnp.bfloat16
    assert in_files.path.stat().st_size == COUNT * 3 * 2
    places = of[0].positions
    np.testing.assert_array_equal(in_files[places], in_memory[places])
    np.testing.assert_array_equal(in_memory[places][:, 0, 0], places)


@pytest.mark.parametrize(
    "own", [[0, 1, 2], [3, 4], [0, 1, 2, 3, 4]], ids=["first", "second", "both"]
)
def test_owners_make_their_rows_in_calls_of_one_shape(own, monkeypatch):
    """The second owner has more to do than the first, and fewer rows of a call to do it in."""
    owners = np.array([0] * 4 + [1] * 8)
    monkeypatch.setattr(Peers, "exchange", lambda *_: [np.arange(12)])  # nothing is done
    shares = Shares([np.array([0, 1, 2]), np.array([3, 4])], np.array(own))
    made = Stage(Bookkeeping(), "things", "", 12, {"x": jax.ShapeDtypeStruct((1,), np.int32)})
    calls = made.calls(shares, owners)
    whole = [[0, 1, 2, 4, 5], [3, -1, -1, 6, 7], [-1, -1, -1, 8, 9], [-1, -1, -1, 10, 11]]
    np.testing.assert_array_equal(calls, np.array(whole)[:, own])
    for places in calls:
        places = places[places >= 0]
        made.write(places, {"x": places})
    np.testing.assert_array_equal(made.done, shares.is_own(owners))
    assert shares.owners(np.arange(5), 5).tolist() == [0, 0, 0, 1, 1]


def test_the_journal_says_what_is_done(tmp_path):
    killed(tmp_path, "images", 1)
    head, line = (tmp_path / "cache" / "images" / "done.jsonl").read_text().splitlines()
    assert json.loads(head)["key"] == "one"
    rows, notes = json.loads(line)
    assert rows == list(range(8)) and notes[3] == [103, ["3", "3"]]
