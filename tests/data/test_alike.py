"""Groups of alike captions: a function of seed and position, the same records, the most alike."""

import numpy as np
import pytest
from small_data import BATCH, digests, scenes_source, stream_of, streams, taken, tokenizer_of

from codebook_jax.data.alike import Alike, AlikeOrder, groups_of_alike, weighted
from codebook_jax.errors import UserError
from codebook_jax.tasks import limits
from configs import base

GROUP, WINDOW = 4, 2  # a window of so many batches
ALIKE = Alike(GROUP, WINDOW * BATCH, 24)
BATCHES = 10  # of 8 of 50 scenes: into the second epoch


@pytest.fixture(scope="module")
def source():
    return scenes_source()


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    return tokenizer_of(source, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def stream(tokenizer):
    yield from streams(stream_of, tokenizer)


def test_a_window_has_the_records_of_a_plain_one_and_the_first_is_a_plain_one(stream, source):
    plain, alike = (
        np.stack([batch.example for batch in taken(stream(source, **changes), BATCHES)])
        for changes in ({}, {"alike": ALIKE})
    )
    np.testing.assert_array_equal(alike[:WINDOW], plain[:WINDOW])
    windows = [x.reshape(-1, WINDOW * BATCH) for x in (plain, alike)]
    assert (windows[0][1:] != windows[1][1:]).any(axis=1).all()
    np.testing.assert_array_equal(*(np.sort(window, axis=1) for window in windows))


@pytest.mark.parametrize(
    ("start", "reading"), [(3, dict(threads=4, prefetch=5)), (5, {}), (2, dict(workers=2))]
)
def test_a_stream_of_alike_pairs_is_the_same_from_any_step_and_however_it_is_read(
    stream, source, start, reading
):
    straight = digests(taken(stream(source, alike=ALIKE), BATCHES))
    other = stream(source, alike=ALIKE, start_step=start, **reading)
    assert digests(taken(other, BATCHES - start)) == straight[start:]
    assert digests(taken(stream(source, alike=ALIKE, seed=1), 4))[2:] != straight[2:4]


def test_each_group_is_a_record_and_the_free_ones_most_similar_to_it():
    rng = np.random.default_rng(0)
    count, size, words = 60, 5, 30
    record = np.concatenate([np.arange(count), rng.integers(0, count, 40)])
    # a common first token, rare and frequent words
    tokens = np.minimum(rng.geometric(0.1, (len(record), 6)), words - 1)
    tokens[:, 0] = 0
    of_tokens = weighted(np.repeat(record, 6), tokens.ravel(), count)
    groups = groups_of_alike(of_tokens, np.ones(count, int), size, np.random.default_rng(1))
    np.testing.assert_array_equal(np.sort(groups.ravel()), np.arange(count))
    has = np.zeros((count, words))
    has[record[:, None], tokens] = 1
    weight = has * np.log(count / np.maximum(has.sum(axis=0), 1))
    similarity = weight @ weight.T
    norms = np.sqrt(np.diag(similarity))
    similarity /= norms[:, None] * norms
    order = np.random.default_rng(1).permutation(count)
    free, found = set(range(count)), {frozenset(group.tolist()) for group in groups}
    for first in order:
        if first in free:
            (group,) = (group for group in found if first in group)
            assert group <= free
            free -= group
            chosen = sorted(similarity[first, other] for other in group - {first})
            best = sorted(similarity[first, other] for other in free | group - {first})
            # similarities are rounded to a thousandth
            np.testing.assert_allclose(chosen, best[-len(chosen) :], atol=5e-3)
    assert len(found) == count // size


def test_a_record_that_a_window_has_several_times_is_in_different_groups():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 24)
    counts[0] += -counts.sum() % 4
    words = weighted(np.repeat(np.arange(24), 5), rng.integers(0, 20, 24 * 5), 24)
    groups = groups_of_alike(words, counts, 4, rng)
    np.testing.assert_array_equal(np.bincount(groups.ravel()), counts)
    twice = sum(len(set(group.tolist())) < 4 for group in groups)
    assert twice <= 2  # the last ones have no others left


class Few:
    """Records with few words, some without a caption and one whose captions cannot be read."""

    def __len__(self):
        return 30

    def captions(self, index):
        if index == 7:
            raise UserError("the file has changed")
        return () if index % 3 == 2 else (f"a {'red' if index % 2 else 'blue'} ring",)


@pytest.mark.parametrize("window", [16, 10_000])  # a window is at most an epoch
def test_records_without_readable_captions_keep_their_places(tokenizer, window):
    order = [number % 30 for number in range(100)]
    alike = AlikeOrder(order, Few(), tokenizer, 0, Alike(4, window, 24))
    size = min(window, 28)
    for which in range(3):
        positions = range(which * size, (which + 1) * size)
        found = [alike[position] for position in positions]
        assert sorted(found) == sorted(order[position] for position in positions)


@pytest.mark.parametrize("filler", ["padding", "an unknown word"])
def test_neither_padding_nor_unknown_words_make_captions_alike(filler):
    unknown, ids = 1, np.array([[5, 1, 1], [6, 1, 1], [5, 7, 8], [6, 9, 10]], np.int32)
    lengths = np.array([1, 1, 3, 3] if filler == "padding" else [3] * 4, np.int32)

    class Ids:
        unknown_id = unknown if filler == "an unknown word" else None

        def encode(self, captions, max_tokens):
            rows = [int(caption) for caption in captions]
            return ids[rows], lengths[rows], 0

    class Numbers:
        def __len__(self):
            return 4

        def captions(self, index):
            return (str(index),)

    order = AlikeOrder([0, 1, 2, 3] * 2, Numbers(), Ids(), 0, Alike(2, 4, 3))
    found = {frozenset((order[at], order[at + 1])) for at in (4, 6)}
    assert found == {frozenset({0, 2}), frozenset({1, 3})}


def test_groups_that_do_not_fill_a_batch_are_refused():
    config = base.paper("tiny")
    config.data.alike = 7
    with pytest.raises(UserError, match="config.data.global_batch=64, config.data.alike=7"):
        limits.check(config)
