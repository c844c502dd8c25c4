"""The stream of batches: the same with any workers, whole epochs, two views of one image, and bad
files skipped.
"""

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
from small_data import BATCH, digests, scenes_source, stream_of, streams, taken, tokenizer_of

from codebook_jax.data.batch import Batch
from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.pipeline import BadRate
from codebook_jax.data.sources import Record
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
    yield from streams(stream_of, tokenizer)


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


@pytest.mark.parametrize(
    ("start", "reading"),
    [
        (0, dict(threads=2, prefetch=1)),
        (0, dict(threads=5, prefetch=7)),
        (1, {}),
        (7, {}),  # the second epoch
        (3, dict(workers=1)),
        (3, dict(workers=4)),
    ],
)
def test_a_stream_is_the_same_from_any_step_and_however_it_is_read(
    stream, expected, start, reading
):
    made = stream(scenes_source(), flip=True, start_step=start, **reading)
    assert digests(taken(made, 10 - start)) == expected[start:]
    assert len(multiprocessing.active_children()) >= reading.get("workers", 0)
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
    first = taken(stream(scenes_source(), flip=True), 10)
    assert not set(digests(other)) & set(expected)
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
    batches = taken(stream(Numbered(64, captions=("red", "green", "blue")), global_batch=64), 30)
    words, counts = np.unique([batch.tokens[:, 1] for batch in batches], return_counts=True)
    assert len(words) == 3 and counts.min() > 0.28 * counts.sum()


def test_an_unclear_side_in_the_caption_prevents_the_flip_and_changes_no_other_draw(stream):
    place, none, unclear = (
        taken(stream(Numbered(20, captions=(caption,)), flip=True), 5)
        for caption in ("on the left", "a dog", "all left")
    )
    for batch, plain, kept in zip(place, none, unclear, strict=True):
        assert batch.flip.any() and not kept.flip.any()
        np.testing.assert_array_equal(batch.flip, plain.flip)
        np.testing.assert_array_equal(batch.image, kept.image)
        np.testing.assert_array_equal(batch.teacher_image, kept.teacher_image)


def test_a_flip_of_half_the_rows_swaps_left_and_right_before_the_tokens(stream, tokenizer):
    texts = ["a circle left of a square", "a circle right of a square"]
    source = Numbered(64, captions=texts[:1])
    batches = taken(stream(source, flip=True, global_batch=64), 10)
    plain, mirrored = tokenizer.encode(texts, 24).tokens
    flips = np.concatenate([batch.flip for batch in batches])
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert 0.4 < flips.mean() < 0.6
    assert (tokens[flips] == mirrored).all() and (tokens[~flips] == plain).all()
    (unflipped,) = taken(stream(source, global_batch=64), 1)
    assert not unflipped.flip.any()
    np.testing.assert_array_equal(unflipped.image, batches[0].image)  # the mirror is the device's


def test_an_unreadable_image_gives_way_to_the_next_and_is_counted_and_named(stream, capsys):
    good = taken(stream(Numbered(10)), 5)
    made = taken(stream(Numbered(10, bad={3, 4, 9})), 5)
    passed = {3: (5, 2), 4: (5, 1), 9: (0, 1)}
    for before, after in zip(good, made, strict=True):
        expected = [passed.get(example, (example, 0)) for example in before.example]
        assert list(zip(after.example, after.skipped, strict=True)) == expected
        assert (after.image[:, :, :, 0] == after.example[:, None, None]).all()
        assert (after.image_id == after.example).all()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "/data/" in printed[0] and "the file is empty" in printed[0]


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
    started = set(threading.enumerate()) - before
    made.close()
    made.close()
    for thread in started:
        thread.join(timeout=5)
    assert started and not any(thread.is_alive() for thread in started)
    with pytest.raises(StopIteration):
        next(made)


def test_the_modules_of_the_data_never_import_jax_themselves():
    code = "import sys; sys.modules['jax'] = None\n"
    code += "from codebook_jax.data import scenes, sources, images, text, pipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_few_bad_images_by_chance_do_not_stop_a_run_and_many_do():
    rate = BadRate(0.01, 500)  # those of an earlier start are reported, but not judged again
    for batch in range(2000):
        rate.add(unreadable=int(batch % 2 == 0), read=64)  # 0.8 %
    assert rate.unreadable == 1500
    BadRate(1, 0).add(unreadable=1000, read=1)
    with pytest.raises(UserError, match="1 of 65"):
        BadRate(0, 0).add(unreadable=1, read=64)
    rate = BadRate(0.01, 0)
    with pytest.raises(UserError, match=r"of [\d,]+ images could not be read, .*max_bad_rate=0.01"):
        for _ in range(2000):
            rate.add(unreadable=1, read=64)  # 1.5 %
    assert rate.unreadable < 1000
