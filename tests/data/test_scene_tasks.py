"""The built-in tasks: their answers are true, their splits are separate, and neither words alone
nor one answer for everything scores well.
"""

import collections
import functools
import hashlib
import itertools
import pickle
import re

import numpy as np
import pytest
import scene_truth
from list_files import open_it, refusal

from codebook_jax.data import scenes
from codebook_jax.data.scenes.tasks import TASKS
from codebook_jax.data.scenes.world import COLOURS, SHAPES, Scene, held_out
from codebook_jax.data.sources import Example

ROLES = ("train", "validation", "test")
SYNONYMS = ({"0", "none"}, {"1", "one"}, {"2", "two"}, {"3", "three"}, {"small", "tiny"})
SYNONYMS += ({"large", "big"}, {"striped", "stripes"}, {"checked", "checks"}, {"dotted", "dots"})
# Of the best constant answer, and of a reader of the texts alone, as docs/data.md says.
CHANCE = {"comparisons": (0.5, 0.5), "statements": (1 / 3, 1 / 3), "labels": (1 / 80, 1 / 80)}


@functools.cache
def drawn(task, role):
    count = 3000 if role == "train" else 1000
    return tuple(TASKS[task](role, 0, index) for index in range(count))


def source(task, role="train", **changes):
    return open_it(f"scenes:{task}", role, **changes)


@pytest.mark.parametrize("role", ROLES)
def test_every_question_has_the_answer_that_the_scene_gives(role):
    for example in drawn("questions", role):
        assert scene_truth.answer(*example.scenes, example.text) == example.answers[0], example


def test_ten_annotators_answer_and_few_of_them_with_a_synonym():
    varied = []
    for example in drawn("questions", "train"):
        (_, most), *others = collections.Counter(example.answers).most_common()
        assert len(example.answers) == 10 and most >= 7 and len(others) <= 1
        assert not others or set(example.answers) in SYNONYMS
        varied.append(bool(others))
    assert 0.1 < np.mean(varied) < 0.2


@pytest.mark.parametrize("role", ROLES)
def test_every_statement_has_its_label_and_each_label_once_in_three_pictures(role):
    examples = drawn("statements", role)
    for example in examples:
        assert scene_truth.label(*example.scenes, example.text) == example.answers[0], example
    for three in zip(*[iter(examples)] * 3, strict=False):
        assert len({example.text for example in three}) == 1
        assert len({example.answers for example in three}) == 3


@pytest.mark.parametrize("role", ROLES)
def test_each_sentence_of_a_set_is_true_of_one_of_its_two_pairs_of_pictures(role):
    examples = drawn("comparisons", role)
    for example in examples:
        truth = scene_truth.holds(*example.scenes, example.text)
        assert example.answers == (str(truth).lower(),), example
    for by in ("sentence", "pair"):
        answers, shared = {}, {}
        for example in examples:
            split, number, pair, sentence = example.key.split("-")
            assert split == role
            key = (number, sentence if by == "sentence" else pair)
            answers.setdefault(key, []).append(example.answers)
            shared.setdefault(key, set()).add(
                example.text if by == "sentence" else (example.scenes, example.image_id)
            )
        assert all(sorted(two) == [("false",), ("true",)] for two in answers.values())
        assert all(len(things) == 1 for things in shared.values())
    assert len({example.key for example in examples}) == len(examples)
    pictures = collections.defaultdict(set)
    for example in examples:
        pictures[example.image_id].add(example.scenes[0])
    assert all(len(those) == 1 for those in pictures.values())


def test_sentences_about_two_pictures_are_of_every_sort():
    sorts = collections.Counter(
        re.sub(r"\ban? .*|two|three|four|five|six", "...", example.text)
        for example in drawn("comparisons", "train")
    )
    assert len(sorts) == 13 and min(sorts.values()) > 20


@pytest.mark.parametrize("role", ROLES)
def test_every_expression_fits_one_object_and_the_boxes_hold_it_once(role):
    places = collections.Counter()
    for index, example in enumerate(drawn("expressions", role)):
        (scene,) = example.scenes
        assert scene_truth.referent(scene, example.text) == example.referent, example
        assert example.answers == () and set(scene.objects) <= set(example.candidates)
        places[example.candidates.index(example.referent)] += 1
        if index < 100:
            made = source("expressions", role, size_px=64, scenes_examples=100)[index]
            assert len(made.proposals) == 4 and made.proposals.count(made.box) == 1
            overlaps = [overlap(box, made.box) for box in made.proposals if box != made.box]
            assert max(overlaps) < 0.3
    assert min(places.values()) > 0.2 * index  # in four places


def overlap(first, second):
    """Intersection over union."""
    (x, y, w, h), (x2, y2, w2, h2) = first, second
    both = max(0, min(x + w, x2 + w2) - max(x, x2)) * max(0, min(y + h, y2 + h2) - max(y, y2))
    return both / (w * h + w2 * h2 - both)


@pytest.mark.parametrize("size_px", [32, 64, 97])
def test_a_box_holds_the_pixels_of_its_object_and_no_more(size_px):
    made = source("expressions", size_px=size_px)
    for index, example in enumerate(drawn("expressions", "train")[:50]):
        (scene,) = example.scenes
        at = scene.objects.index(example.referent)
        pictures = []
        for paint in ((0, 0, 0), (255, 255, 255)):  # so that its faintest pixel differs
            objects = list(scene.objects)
            objects[at] = objects[at]._replace(paint=paint)
            pictures.append(scenes.render(scene._replace(objects=tuple(objects)), size_px))
        rows, columns = np.nonzero((pictures[0] != pictures[1]).any(axis=-1))
        x, y, width, height = made[index].box
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
        without = Scene((*scene.objects[:at], *scene.objects[at + 1 :]), scene.background, 0)
        shown = (made[index].images[0] != scenes.render(without, size_px)).any(axis=-1)
        shown[int(y) : int(y + height), int(x) : int(x + width)] = False
        assert not shown.any()


def test_labels_name_the_one_object_and_every_class_is_as_frequent():
    for role in ROLES:
        examples = drawn("labels", role)[:800]
        for example in examples:
            ((thing,),) = (scene.objects for scene in example.scenes)
            assert example.answers == (f"{thing.colour} {thing.shape}",) and example.text == ""
        counts = collections.Counter(example.answers for example in examples)
        assert set(counts.values()) == {10} and len(counts) == len(COLOURS) * len(SHAPES)


@pytest.mark.parametrize("task", TASKS)
def test_no_scene_of_an_evaluation_can_occur_in_training(task):
    shown = {
        role: {scene for example in drawn(task, role) for scene in example.scenes} for role in ROLES
    }
    for one, other in itertools.combinations(shown.values(), 2):
        assert not {scene.objects for scene in one} & {scene.objects for scene in other}
    if task == "labels":  # one object: no pair to hold out
        return
    for role, those in shown.items():
        for scene in those:
            kinds = [thing[:2] for thing in scene.objects]
            splits = {held_out(*pair) for pair in itertools.combinations(kinds, 2)}
            assert splits == {None} if role == "train" else role in splits <= {None, role}


def test_examples_follow_from_role_seed_and_index_in_every_process_and_version():
    parts = []
    for task in TASKS:
        for role, index in itertools.product(ROLES, (0, 7, 49)):
            example = source(task, role, seed=5)[index]
            pictures = [image.tobytes() for image in example.images]
            parts += [*pictures, repr(example._replace(images=())).encode()]
    digest = "f6b444200eb0c405fd8bd901ba60a091f7d8ebb051e36bb9d3e04639f11063eb"  # from any process
    assert hashlib.sha256(b"".join(parts)).hexdigest() == digest


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_a_source_of_examples_in_every_role(task):
    for role, length in (("train", 50), ("validation", 1000), ("test", 1000)):
        made = source(task, role, size_px=24)
        assert len(made) == length and made.kind == task
        example, other = made[7], pickle.loads(pickle.dumps(made))
        assert isinstance(example, Example) and example.weight == 1
        assert {image.shape for image in example.images} == {(24, 24, 3)}
        assert len(example.images) == (2 if task == "comparisons" else 1)
        assert made.captions(7) == (example.text, *dict.fromkeys(example.answers))
        np.testing.assert_equal(other[7], example)
        assert other.fingerprint() == made.fingerprint() and repr(other) == repr(made)
        for read in (made.__getitem__, made.captions, made.name):
            for index in (-1, length):
                with pytest.raises(IndexError):
                    read(index)
        reseeded = source(task, role, seed=1, size_px=24)
        assert (reseeded.fingerprint() == made.fingerprint()) == (role != "train")
        assert np.array_equal(reseeded[7].images, example.images) == (role != "train")
    assert source(task, scenes_examples=51).fingerprint() != source(task).fingerprint()
    assert len({source(each).fingerprint() for each in TASKS}) == len(TASKS)


def test_a_name_that_is_no_task_is_refused_with_all_that_are():
    said = refusal("scenes:question", "test")
    assert all(f"scenes:{task}" in said for task in ("question", *TASKS, "stories", "hard"))


def test_texts_are_short_and_their_new_words_are_few():
    known = {
        word
        for index in range(2000)
        for caption in scenes.training_captions(scenes.training_scene(0, index))
        for word in re.findall(r"\w+", caption)
    }
    new = set()
    for task in TASKS:
        for example in drawn(task, "train"):
            assert len(example.text.split()) <= 22
            new |= set(re.findall(r"\w+", example.text)) - known
    plurals = {f"{shape}{'es' if shape == 'cross' else 's'}" for shape in SHAPES}
    asking = "what how many are does have or colour shape size pattern object objects"
    telling = "both neither at least exactly one only other pictures show shows more than in "
    telling += "two three four five six"
    assert new - plurals == {*asking.split(), *telling.split()}


@pytest.mark.parametrize("role", ["validation", "test"])
@pytest.mark.parametrize("task", ["questions", "comparisons", "statements", "labels"])
def test_one_answer_for_all_and_the_words_alone_score_as_documented(task, role):
    tested = drawn(task, role)
    constant = max(
        np.mean([accuracy(example, answer) for example in tested])
        for answer in {answer for example in tested for answer in example.answers}
    )
    by_words = words_alone(drawn(task, "train"), tested)
    if task == "questions":
        assert 0.14 < constant < 0.2 and by_words < 0.42
    else:
        chance, reader = CHANCE[task]
        assert constant == pytest.approx(chance, abs=1e-3)
        assert by_words == pytest.approx(reader, abs=1e-3)


def accuracy(example, answer):
    """Of an answer: as in VQA; of a label: whether it is right."""
    if len(example.answers) == 1:
        return float(example.answers == (answer,))
    agreeing = [example.answers.count(answer) - (given == answer) for given in example.answers]
    return np.mean([min(1, number / 3) for number in agreeing])


def words_alone(learned, tested):
    """How often naive Bayes finds the answer from a text's words and its pairs of words."""
    labels = sorted({example.answers[0] for example in learned})
    number = {word: n for n, word in enumerate(sorted(set().union(*map(bag, learned))))}
    found = np.ones((len(labels), len(number)))
    frequency = np.full(len(labels), 2.0)
    for example in learned:
        at = labels.index(example.answers[0])
        frequency[at] += 1
        found[at, [number[word] for word in bag(example)]] += 1
    share = found / frequency[:, None]
    present, absent = np.log(share), np.log1p(-share)
    scores = []
    for example in tested:
        there = [number[word] for word in bag(example) if word in number]
        score = np.log(frequency) + absent.sum(1) + (present - absent)[:, there].sum(1)
        scores.append(accuracy(example, labels[int(score.argmax())]))
    return np.mean(scores)


def bag(example):
    words = re.findall(r"\w+", example.text)
    return {*words, *(" ".join(pair) for pair in itertools.pairwise(words))}
