"""The built-in stories: what changes in them, what their sentences tell, and how the stories of an
evaluation differ.
"""

import hashlib
import itertools

import numpy as np
import pytest
from list_files import check_source
from small_stories import kinds_of, stories_source, told_frames

from codebook_jax.data.scenes.stories import evaluation_stories, training_story
from codebook_jax.data.scenes.world import held_out

SPLITS = ("validation", "test")


def training(count=300):
    return [training_story(0, index) for index in range(count)]


def in_first_order(split):
    return evaluation_stories(split)[::2]


def all_first():
    return [*training(), *in_first_order("validation"), *in_first_order("test")]


def test_stories_are_the_same_in_every_process_and_version():
    parts = []
    for source in (stories_source(seed=5), stories_source("test"), stories_source("validation")):
        for index in (0, 7, 49):
            story = source[index]
            parts += [frame.tobytes() for frame in story.frames] + [repr(story.captions).encode()]
    digest = "d29b821a48cfab4591d025bd4ce4efbe36becccb2198196d669ad6a21de4e647"
    assert hashlib.sha256(b"".join(parts)).hexdigest() == digest


def test_one_object_and_the_other_change_in_turn_and_both_move():
    similar = []
    for story in all_first():
        assert (
            len(story.frames) in (5, 6) and len({scene.background for scene in story.frames}) == 1
        )
        assert len(set(map(kinds_of, story.frames))) == len(story.frames)
        changed = []
        for before, after in itertools.pairwise(story.frames):
            same = [a[:2] == b[:2] for a, b in zip(before.objects, after.objects, strict=True)]
            assert sorted(same) == [False, True]
            changed.append(same.index(False))
            kept, left = (scene.objects[same.index(True)] for scene in (before, after))
            assert (kept.size, kept.paint) == (left.size, left.paint)
            new, old = after.objects[changed[-1]], before.objects[changed[-1]]
            similar.append((new.colour == old.colour) + (new.shape == old.shape))
            for a, b in zip(before.objects, after.objects, strict=True):
                assert (a.x, a.y) != (b.x, b.y)
        assert all(a != b for a, b in itertools.pairwise(changed))
    assert set(similar) == {0, 1}  # both change, or one of colour and shape does


def test_sentences_tell_the_frames_in_order_and_all_but_one_at_most():
    lacking = []
    for story in [*training(), *evaluation_stories("validation"), *evaluation_stories("test")]:
        numbers = [number for number, _, _ in told_frames(story)]
        assert numbers == sorted(set(numbers))
        lacking.append(len(story.frames) - len(numbers))
        assert not {"then", "before", "after", "next", "now", "first", "last"} & set(
            " ".join(story.captions).split()
        )
    assert set(lacking) == {0, 1} and 0.4 < np.mean(lacking) < 0.6
    untold = {
        number
        for story in training()
        for number in set(range(6)) - {told for told, _, _ in told_frames(story)}
        if len(story.frames) == 6 and len(story.captions) == 5
    }
    assert untold == set(range(6))


def test_each_split_shows_pairs_of_objects_and_tells_sentences_of_its_own():
    for split, stories in (
        (None, training(400)),
        *((split, evaluation_stories(split)) for split in SPLITS),
    ):
        for story in stories:
            assert {held_out(*kinds_of(scene)) for scene in story.frames} == {split}
    told = [
        {words for story in stories for words in story.captions}
        for stories in (training(400), *map(evaluation_stories, SPLITS))
    ]
    for one, other in itertools.combinations(told, 2):
        assert not one & other


@pytest.mark.parametrize("split", SPLITS)
def test_stories_2k_and_2k_plus_1_differ_in_their_order_alone(split):
    stories = evaluation_stories(split)
    assert len(stories) == len({story.captions for story in stories}) == 400
    bags = []
    for one, other in zip(stories[::2], stories[1::2], strict=True):
        assert told_set(one) == told_set(other) and set(one.frames) == set(other.frames)
        bags.append(frozenset(map(kinds_of, one.frames)))
        for items, order in ((one.frames, other.frames), (one.captions, other.captions)):
            places = [items.index(item) for item in order]
            out = sum(a > b for a, b in itertools.combinations(places, 2))
            assert out >= 2  # one swap of neighbours puts one pair out of order
    assert len(set(bags)) == 200


def told_set(story):
    return {(scene, words) for _, scene, words in told_frames(story)}


def test_stories_are_a_source_in_every_role():
    train = stories_source(size_px=24)
    assert len(train) == 50 and train.kind == "stories"
    assert {frame.shape for frame in train[3].frames} == {(24, 24, 3)} and train[3].story_id == 3
    sources = [train, stories_source("validation"), stories_source("test")]
    for source in sources:
        check_source(source)
    assert len({source.fingerprint() for source in sources}) == 3
    for role, same in (("train", False), ("test", True)):
        other = stories_source(role, seed=1, size_px=24)
        first = stories_source(role, size_px=24)
        assert (first.fingerprint() == other.fingerprint()) == same
        assert (first.captions(0) == other.captions(0)) == same
    assert stories_source(scenes_examples=51).fingerprint() != train.fingerprint()
