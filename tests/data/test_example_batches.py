"""Batches of examples: what is right, which pictures are mirrored, and that a batch depends on its
seed and step alone.
"""

import jax
import numpy as np
import pytest
from small_data import streams, taken, tokenizer_of

from codebook_jax.data.examples import ExampleSpec, label_number, shared_answers
from codebook_jax.data.pipeline import BatchStream
from codebook_jax.data.sources import Example, open_source
from codebook_jax.errors import UserError

LABELS = ("false", "true")
PICTURE = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)


def example(text="a cup", answers=("true",), pictures=1, key="dev-7", weight=1.0):
    return Example((PICTURE,) * pictures, text, answers, key, 0, weight)


def spec_of(**changes):
    given = dict(seed=0, global_batch=4, rows=slice(None), size_px=16, images=1, max_tokens=12)
    given |= dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, labels=LABELS)
    return ExampleSpec(**given | changes)


def scenes(task):
    return open_source(f"scenes:{task}", role="train", size_px=24, scenes_examples=10, seed=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(scenes("questions"), tmp_path_factory.mktemp("run"))


def stream_of(source, tokenizer, workers=0, start_step=0, threads=2, **changes):
    making = dict(workers=workers, threads=threads, prefetch=2, start_step=start_step)
    return BatchStream(source, tokenizer, spec_of(**changes), **making)


@pytest.fixture
def stream(tokenizer):
    yield from streams(stream_of, tokenizer)


# -- what is right


def test_answers_share_the_weight_by_how_many_gave_them_and_the_rarest_are_left_out():
    given = example(answers=("red",) * 6 + ("blue",) * 3 + ("2",), weight=0.5)
    assert shared_answers(given, 10) == [("red", 0.3), ("blue", 0.15), ("2", 0.05)]
    assert shared_answers(given, 2) == [("red", 0.3), ("blue", 0.15)]  # of all ten still
    assert shared_answers(example(answers=()), 2) == []


@pytest.mark.parametrize(
    "answers, said", [(("maybe",), "maybe"), ((), "none"), (("true", "false"), "true and false")]
)
def test_a_label_that_is_none_of_the_tasks_is_refused_with_its_example(answers, said):
    with pytest.raises(UserError, match=f"^'dev-7' has the label {said}, which is none of false"):
        label_number(example(answers=answers), LABELS)
    assert label_number(example(), LABELS) == 1


def test_an_unknown_label_ends_the_stream_with_that_sentence(stream):
    with pytest.raises(UserError, match="has the label .*, which is none of false, true"):
        taken(stream(scenes("statements")), 1)


def test_a_batch_has_every_answer_of_its_questions_with_its_share(stream, tokenizer):
    source = scenes("questions")
    made = stream(source, labels=(), answers=3, answer_tokens=10, max_tokens=20)
    for batch in taken(made, 3):
        assert batch.target.tokens.shape == (4, 3, 10) and batch.target.weight.shape == (4, 3)
        for row, at in enumerate(batch.example):
            shared = shared_answers(source[int(at)], 3)
            weight = [share for _, share in shared] + [0.0] * (3 - len(shared))
            np.testing.assert_allclose(batch.target.weight[row], weight, atol=1e-6)
            for words, (text, _) in zip(batch.target.tokens[row], shared, strict=False):
                assert tokenizer.decode(words) == text
            assert (batch.target.tokens[row, len(shared) :] == tokenizer.vocabulary.pad_id).all()


def test_a_question_without_answers_has_no_weight_and_so_teaches_nothing(tokenizer):
    spec = spec_of(labels=(), answers=2, answer_tokens=4)
    rng, pictures = np.random.default_rng(0), spec.pictures(2)
    told = [
        spec.read(example(answers=answers), rng, pictures[:, row])
        for row, answers in enumerate([(), ("red",)])
    ]
    numbers = {name: np.zeros(2, np.int32) for name in ("example", "skipped")}
    batch = spec.batch(pictures, told, tokenizer, numbers)
    np.testing.assert_array_equal(batch.target.weight, [[0, 0], [1, 0]])


# -- mirrored pictures


def mirrored(text, *, pictures=1, answers=("true",), labels=LABELS):
    """Texts and targets of the pictures that are mirrored, of many draws."""
    spec = spec_of(flip=True, images=pictures, labels=labels, answers=0 if labels else 2)
    rng, place = np.random.default_rng(0), spec.pictures(1)[:, 0]
    told = [spec.read(example(text, answers, pictures), rng, place) for _ in range(40)]
    assert all(read[:2] == told[-1][:2] or read[2] != told[-1][2] for read in told)
    flipped = [read[:2] for read in told if read[2]]
    assert len(flipped) == 0 or 8 < len(flipped) < 32
    return flipped


def test_a_picture_is_mirrored_with_its_text_and_its_answers():
    assert mirrored("a cup")[0] == ("a cup", 1)
    assert mirrored("a cup left of a plate")[0] == ("a cup right of a plate", 1)
    sided = mirrored("where is it?", answers=("on the left", "red"), labels=())
    assert sided[0][1] == [("on the right", 0.5), ("red", 0.5)]


def test_it_stays_as_it_is_where_what_is_said_may_mean_no_side():
    assert not mirrored("a clockwise turn")
    assert not mirrored("what did he do?", answers=("a clockwise turn",), labels=())


def test_two_pictures_are_mirrored_only_if_the_text_names_no_side():
    assert mirrored("two cups", pictures=2)[0] == ("two cups", 1)
    assert not mirrored("a cup left of a plate", pictures=2)  # it may mean the left picture


# -- the stream


@pytest.mark.parametrize("task, images", [("comparisons", 2), ("labels", 1)])
def test_a_batch_depends_on_its_seed_and_step_alone(stream, task, images):
    source, changes = scenes(task), dict(images=images, flip=True, crop_scale=(0.3, 1.0))
    names = {source[at].answers[0] for at in range(len(source))}
    changes |= dict(labels=tuple(sorted(names)))
    whole = taken(stream(source, **changes), 6)  # over two epochs of ten
    assert whole[0].images.shape == (4, images, 16, 16, 3)
    others = [stream(source, start_step=2, threads=1, **changes)]
    if task == "comparisons":
        others.append(stream(source, start_step=2, workers=2, **changes))
    for other in others:
        for batch, expected in zip(taken(other, 4), whole[2:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, batch, expected)
    again = taken(stream(source, **changes | dict(seed=1)), 1)[0]
    assert (again.images != whole[0].images).any()
    seen = np.concatenate([batch.example for batch in whole])
    assert sorted(seen[:10]) == list(range(10)) and (seen[10:20] != seen[:10]).any()
