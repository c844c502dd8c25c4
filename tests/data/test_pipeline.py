"""The stream of batches: the same with any workers, whole epochs, two views of one image, and bad
files skipped.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from beartype.door import is_bearable
from jaxtyping import jaxtyped
from PIL import Image
from small_data import BATCH, scenes_source, stream_of, tokenizer_of

from codebook_jax.data.batch import Batch
from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.pipeline import BadRate
from codebook_jax.data.sources import Record, open_source
from codebook_jax.errors import UserError


class Numbered:
    """Image n is painted n, with a ramp to the right; the indices in `bad` cannot be read."""

    def __init__(self, count, bad=(), captions=("one", "two", "three")):
        self.count, self.bad, self.words = count, frozenset(bad), captions

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise UnreadableImage(f"/data/{index}.jpg: the file is empty")
        image = np.full((40, 40, 3), index % 256, np.uint8)
        image[:, :, 1] = np.arange(40) * 6
        image[:, :, 2] = np.arange(40)[:, None] * 6
        return Record(image, self.words, index)

    def __repr__(self):
        return f"numbered({self.count})"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(scenes_source(), tmp_path_factory.mktemp("run"))


@pytest.fixture
def stream(tokenizer):
    """Opens streams and closes them after the test."""
    opened = []

    def open_stream(source, **changes):
        opened.append(stream_of(source, tokenizer, **changes))
        return opened[-1]

    yield open_stream
    for one in opened:
        one.close()


def taken(stream, count):
    return list(itertools.islice(stream, count))


def digests(batches):
    return [
        hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in batch)).hexdigest()
        for batch in batches
    ]


@pytest.fixture
def expected(stream):
    """Ten batches, over one and a half epochs of 50 scenes, made the plainest way."""
    return digests(taken(stream(scenes_source(), flip=True, threads=1, prefetch=1), 10))


def fits(batch):
    """Whether every field of a batch has the type and shape of its annotation."""
    hints = typing.get_type_hints(Batch, localns={"Array": jax.Array})
    with jaxtyped("context"):  # so that "batch" and "side" are the same in all of them
        return all(is_bearable(part, hints[name]) for name, part in batch._asdict().items())


def test_a_batch_has_the_types_and_shapes_of_its_fields(stream):
    (batch,) = taken(stream(scenes_source(), flip=True), 1)
    assert fits(batch) and fits(jax.tree.map(jax.numpy.asarray, batch))
    assert batch.image.shape == (BATCH, 24, 24, 3) and batch.tokens.shape == (BATCH, 24)
    assert (batch.skipped == 0).all() and (batch.text_length > 2).all()
    assert not fits(batch._replace(flip=batch.flip[1:]))
    assert not fits(batch._replace(teacher_image=batch.image[:, 1:]))
    assert not fits(batch._replace(tokens=batch.tokens.astype(np.int64)))


@pytest.mark.parametrize(("threads", "prefetch"), [(2, 1), (5, 7)])
def test_threads_and_reading_ahead_change_no_bit(stream, expected, threads, prefetch):
    made = stream(scenes_source(), flip=True, threads=threads, prefetch=prefetch)
    assert digests(taken(made, 10)) == expected


@pytest.mark.parametrize("workers", [1, 4])
def test_worker_processes_change_no_bit_from_any_step_and_end_when_closed(
    stream, expected, workers
):
    made = stream(scenes_source(), flip=True, workers=workers, start_step=3)
    assert digests(taken(made, 7)) == expected[3:]
    assert len(multiprocessing.active_children()) >= workers
    made.close()
    assert not multiprocessing.active_children()


WORKERS = """
import multiprocessing, os, signal, sys, time
sys.path.append(sys.argv[2])
from small_data import scenes_source, stream_of, tokenizer_of
if __name__ == "__main__":
    source = scenes_source()
    stream = stream_of(source, tokenizer_of(source, sys.argv[1]), workers=1, prefetch=2)
    next(stream)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
        os.killpg(0, number)
    time.sleep(0.5)
    for _ in range(20):
        next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_outlive_the_signals_that_a_run_handles_but_not_the_run(tmp_path):
    path = tmp_path / "workers.py"
    path.write_text(WORKERS)
    command = [sys.executable, path, tmp_path / "run", Path(__file__).parents[1]]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "resource_tracker: process died" not in done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # a zombie is not alive
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("start", [1, 6, 7])
def test_a_stream_that_starts_at_a_step_goes_on_as_the_whole_one(stream, expected, start):
    made = stream(scenes_source(), flip=True, start_step=start)
    assert digests(taken(made, 10 - start)) == expected[start:]


def test_the_rows_of_processes_unite_to_the_global_batch(stream, expected):
    for rows in ([range(0, 4), range(4, 8)], [np.arange(0, 2), np.arange(2, 8)]):
        parts = [taken(stream(scenes_source(), flip=True, rows=part), 10) for part in rows]
        assert len(parts[0][0].example) == len(rows[0])
        whole = [
            [np.concatenate(fields) for fields in zip(*batches, strict=True)]
            for batches in zip(*parts, strict=True)
        ]
        assert digests(whole) == expected


def test_seeds_give_other_orders_and_other_crops(stream, expected):
    other = taken(stream(scenes_source(), flip=True, seed=1), 10)
    assert not set(digests(other)) & set(expected)
    first = taken(stream(scenes_source(), flip=True), 10)
    assert [list(batch.example) for batch in other] != [list(batch.example) for batch in first]


@pytest.mark.parametrize("count", [50, 5, 1])
def test_an_epoch_shows_every_example_once_and_the_next_in_another_order(stream, count):
    batches = taken(stream(Numbered(count)), -(-3 * count // BATCH) + 1)
    order = np.concatenate([batch.example for batch in batches])
    epochs = order[: 3 * count].reshape(3, count)
    assert (np.sort(epochs) == np.arange(count)).all()
    if count == 50:
        assert len(set(map(tuple, epochs))) == 3


def test_the_views_are_two_crops_of_the_same_image(stream):
    (batch,) = taken(stream(Numbered(100)), 1)
    for row in range(BATCH):
        example = batch.example[row]
        assert (batch.image[row, :, :, 0] == example).all()
        assert (batch.teacher_image[row, :, :, 0] == example).all()
        assert (batch.image[row] != batch.teacher_image[row]).any()
    (same,) = taken(stream(Numbered(100), views=1), 1)
    np.testing.assert_array_equal(same.image, same.teacher_image)
    np.testing.assert_array_equal(same.image, batch.image)
    whole = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), size_px=40)
    (full,) = taken(stream(Numbered(100), **whole), 1)
    np.testing.assert_array_equal(full.image[0], Numbered(100)[int(full.example[0])].image)


def test_every_caption_of_a_record_is_drawn_as_often(stream):
    source = Numbered(64, captions=("red", "green", "blue"))
    batches = taken(stream(source, global_batch=64), 30)
    drawn = np.concatenate([batch.tokens[:, 1] for batch in batches])
    words, counts = np.unique(drawn, return_counts=True)
    assert len(words) == 3 and counts.min() > 0.28 * counts.sum()


def test_a_picture_whose_caption_has_an_unclear_side_is_not_flipped_and_no_other_draw_changes(
    stream,
):
    sides = {name: Numbered(20, captions=(name,)) for name in ("on the left", "a dog", "all left")}
    place, none, unclear = (taken(stream(source, flip=True), 5) for source in sides.values())
    for batch, plain, kept in zip(place, none, unclear, strict=True):
        assert batch.flip.any() and not kept.flip.any()
        np.testing.assert_array_equal(batch.flip, plain.flip)
        np.testing.assert_array_equal(batch.image, kept.image)
        np.testing.assert_array_equal(batch.teacher_image, kept.teacher_image)
        np.testing.assert_array_equal(kept.tokens, np.repeat(kept.tokens[:1], BATCH, axis=0))


def test_a_flip_is_drawn_for_half_the_rows_and_swaps_left_and_right_before_the_tokens(
    stream, tokenizer
):
    source = Numbered(64, captions=("a circle left of a square",))
    batches = taken(stream(source, flip=True, global_batch=64), 10)
    texts = ["a circle left of a square", "a circle right of a square"]
    plain, mirrored = tokenizer.encode(texts, 24).tokens
    flips = np.concatenate([batch.flip for batch in batches])
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert 0.4 < flips.mean() < 0.6
    assert (tokens[flips] == mirrored).all() and (tokens[~flips] == plain).all()
    (unflipped,) = taken(stream(source, global_batch=64), 1)
    assert not unflipped.flip.any()
    np.testing.assert_array_equal(unflipped.image, batches[0].image)  # the mirror is the device's


def test_an_unreadable_image_gives_way_to_the_next_and_is_counted_and_named(stream, capsys):
    bad = {3, 4, 9}
    good = taken(stream(Numbered(10)), 5)
    made = taken(stream(Numbered(10, bad)), 5)
    for before, after in zip(good, made, strict=True):
        passed = {3: (5, 2), 4: (5, 1), 9: (0, 1)}
        for row, example in enumerate(before.example):
            assert (after.example[row], after.skipped[row]) == passed.get(example, (example, 0))
            assert (after.image[row, :, :, 0] == after.example[row]).all()
            assert after.image_id[row] == after.example[row]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "/data/" in printed[0] and "the file is empty" in printed[0]


def test_missing_broken_and_good_files_train_and_the_same_in_workers(stream, tmp_path):
    entries = []
    for number in range(12):
        Image.new("RGB", (30, 20), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
        entries.append({"image": f"{number}.png", "caption": f"red {number}"})
    (tmp_path / "2.png").unlink()
    (tmp_path / "5.png").write_bytes(b"")
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(whole[: len(whole) // 2])
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(entries))
    source = open_source(f"json:{path}", role="train", size_px=24, scenes_examples=0, seed=0)
    batches = taken(stream(source), 3)
    assert sum(batch.skipped.sum() for batch in batches) == 6  # three bad of twelve, two epochs
    assert not {2, 5, 7} & set(np.concatenate([batch.example for batch in batches]).tolist())
    assert digests(taken(stream(source, workers=1), 3)) == digests(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_one_readable_image_is_refused(stream, workers):
    made = stream(Numbered(20, range(20)), workers=workers)
    with pytest.raises(UserError, match=r"numbered\(20\): none of 20 .*first: /data/.*image_root"):
        next(made)
    with pytest.raises(UserError, match="no records"):
        stream(Numbered(0))


def test_closing_a_stream_ends_its_threads_and_leaves_no_next_batch(stream):
    before = set(threading.enumerate())
    made = stream(scenes_source(), threads=4)
    next(made)
    assert set(threading.enumerate()) - before
    made.close()
    made.close()
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in left)
    with pytest.raises(StopIteration):
        next(made)


def test_the_modules_of_the_data_never_import_jax_themselves():
    names = ("scenes", "sources", "images", "text", "pipeline")
    code = "import sys; sys.modules['jax'] = None\n" + "\n".join(
        f"import codebook_jax.data.{name}" for name in names
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_few_bad_images_by_chance_do_not_stop_a_run_and_many_do():
    rate = BadRate(0.01, 500)  # those of an earlier start are reported, but not judged again
    for batch in range(2000):
        rate.add(unreadable=int(batch % 2 == 0), read=64)  # 0.8 %
    assert rate.unreadable == 1500
    rate = BadRate(0.01, 0)
    with pytest.raises(UserError, match=r"of [\d,]+ images could not be read, .*max_bad_rate=0.01"):
        for _ in range(2000):
            rate.add(unreadable=1, read=64)  # 1.5 %
    assert rate.unreadable < 1000
    rate = BadRate(0.01, 0)
    rate.add(unreadable=4, read=4)
    with pytest.raises(UserError, match="5 of 9 images"):
        rate.add(unreadable=1, read=0)


def test_a_rate_of_zero_allows_none_and_of_one_allows_all():
    with pytest.raises(UserError, match="1 of 65"):
        BadRate(0, 0).add(unreadable=1, read=64)
    rate = BadRate(1, 0)
    rate.add(unreadable=1000, read=1)
    assert rate.unreadable == 1000
