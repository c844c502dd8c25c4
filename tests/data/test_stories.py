"""Batches of stories: one crop for all frames of a story, padding, and the same rows however and
wherever they are read.
"""

import itertools
import typing

import jax
import numpy as np
import pytest
from beartype.door import is_bearable
from jaxtyping import jaxtyped
from small_data import digests, streams, taken, tokenizer_of
from small_stories import BATCH, Numbered, stories_source, stream_of_stories

from codebook_jax.data.batch import StoryBatch
from codebook_jax.data.pipeline import BadRate
from codebook_jax.data.stories import evenly_spaced
from codebook_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(stories_source(), tmp_path_factory.mktemp("run"))


@pytest.fixture
def stream(tokenizer):
    yield from streams(stream_of_stories, tokenizer)


def test_a_batch_has_the_types_and_shapes_of_its_fields(stream):
    (batch,) = taken(stream(stories_source(), max_frames=7), 1)
    hints = typing.get_type_hints(StoryBatch, localns={"Array": jax.Array})
    with jaxtyped("context"):  # so that "batch" and "side" are the same in all of them
        assert all(is_bearable(part, hints[name]) for name, part in batch._asdict().items())
    assert batch.frames.shape == (BATCH, 7, 24, 24, 3) and batch.tokens.shape == (BATCH, 6, 24)


@pytest.mark.parametrize(
    ("start", "reading"),
    [(0, dict(threads=1, prefetch=1)), (0, dict(threads=5, prefetch=7)), (3, dict(workers=1))],
)
def test_rows_are_the_same_from_any_step_and_however_they_are_read(stream, start, reading):
    expected = digests(taken(stream(stories_source()), 8))  # over an epoch of 50 stories
    made = taken(stream(stories_source(), start_step=start, **reading), 8 - start)
    assert digests(made) == expected[start:] and len(set(expected)) == 8
    assert digests(taken(stream(stories_source(), seed=1), 1)) != expected[:1]


def test_the_rows_of_processes_unite_to_the_global_batch(stream):
    (whole,) = taken(stream(stories_source()), 1)
    parts = [taken(stream(stories_source(), rows=range(*r)), 1)[0] for r in ((0, 3), (3, 8))]
    for name, *fields in zip(StoryBatch._fields, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(fields), getattr(whole, name), name)


def test_what_is_padded_follows_what_the_story_has(stream, tokenizer):
    for batch in taken(stream(Numbered(50), max_frames=7, max_sentences=4), 7):
        np.testing.assert_array_equal(batch.frame_count, 1 + batch.example % 7)
        np.testing.assert_array_equal(batch.sentence_count, 1 + batch.example % 4)
        for number in range(7):
            real = batch.frame_count > number
            for frames in (batch.frames, batch.teacher_frames):
                assert (frames[real, number, :, :, 2] == number + 1).all()
                assert not frames[~real, number].any()
        real = np.arange(4) < batch.sentence_count[:, None]
        assert (batch.tokens[~real] == tokenizer.vocabulary.pad_id).all()
        assert (batch.text_length[~real] == 1).all()
        encoded = tokenizer.encode(("one", "two", "three", "four"), 24)
        for row, count in enumerate(batch.sentence_count):
            np.testing.assert_array_equal(batch.tokens[row, :count], encoded.tokens[:count])
            np.testing.assert_array_equal(batch.text_length[row, :count], encoded.lengths[:count])


def test_every_frame_of_a_story_gets_the_same_crop(stream):
    crops = set()
    for batch in taken(stream(Numbered(50)), 3):
        for row, count in enumerate(batch.frame_count):
            for frames in (batch.frames[row], batch.teacher_frames[row]):
                places = frames[:count, :, :, 1]
                assert (places == places[0]).all()
                crops.add(places[0].tobytes())
        assert (batch.frames != batch.teacher_frames).any()
    assert len(crops) > 40  # of 48: another one for each story and each view


def test_with_one_view_the_teacher_sees_the_frames_of_the_student(stream):
    (one,), (two,) = (taken(stream(Numbered(50), views=views), 1) for views in (1, 2))
    assert one.teacher_frames is one.frames
    np.testing.assert_array_equal(one.frames, two.frames)


def test_of_a_longer_story_evenly_spaced_frames_and_sentences_are_read(stream, tokenizer):
    encoded = tokenizer.encode(("one", "two", "three", "four"), 24).tokens
    found = 0
    for batch in taken(stream(Numbered(28), max_frames=3, max_sentences=2), 4):
        for row, example in enumerate(batch.example):
            if example % 7 == 6:
                assert batch.frames[row, :, 0, 0, 2].tolist() == [1, 4, 7]
            if example % 4 == 3:
                np.testing.assert_array_equal(batch.tokens[row], encoded[[0, 3]])
                found += 1
    assert found >= 4


def test_evenly_spaced_places_keep_the_ends_and_the_order():
    assert evenly_spaced(3, 8) == [0, 1, 2] and evenly_spaced(9, 3) == [0, 4, 8]
    assert evenly_spaced(5, 1) == [0] and evenly_spaced(0, 3) == []
    for count, most in itertools.product(range(1, 40), range(2, 20)):
        places = evenly_spaced(count, most)
        gaps = set(np.diff(places).tolist())
        assert [places[0], places[-1]] == [0, count - 1] and len(places) == min(count, most)
        assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_an_unreadable_frame_gives_way_to_the_next_story(stream, capsys):
    good = taken(stream(Numbered(10)), 5)
    made = taken(stream(Numbered(10, bad={3, 4, 9})), 5)
    passed = {3: (5, 2), 4: (5, 1), 9: (0, 1)}
    for before, after in zip(good, made, strict=True):
        expected = [passed.get(example, (example, 0)) for example in before.example]
        assert list(zip(after.example, after.skipped, strict=True)) == expected
        np.testing.assert_array_equal(after.frame_count, np.minimum(1 + after.example % 7, 6))
        for row, count in enumerate(after.frame_count):  # nothing is left of the unreadable story
            assert (after.frames[row, :count, :, :, 0] == after.example[row]).all()
            assert not after.frames[row, count:].any()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "its story is replaced" in printed[0] and "/data/" in printed[0]
    with pytest.raises(UserError, match=r"none of 20 stories in a row .*first: /data/.*image_root"):
        next(stream(Numbered(20, range(20))))


def test_too_many_unreadable_stories_stop_a_run_without_advice_about_pairs():
    with pytest.raises(UserError, match="1 of 9 stories could not be read") as raised:
        BadRate(0, 0, kind="stories").add(unreadable=1, read=8)
    assert "check-data" not in str(raised.value)
