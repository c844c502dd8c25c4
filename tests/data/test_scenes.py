"""The built-in world: its captions describe its pictures, and its splits stay separate."""

import itertools
import re
import subprocess
import sys

import numpy as np

from codebook_jax.data import scenes
from codebook_jax.data.scenes.world import (
    COLOURS,
    SHAPES,
    Background,
    Scene,
    SceneObject,
    relation_between,
)

SIZE_OF = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
TONES = {"dark": (0, 110), "light": (140, 255)}
RELATION = re.compile(r"^(?:is |that is )?(?:to the )?(left of|right of|above|over|below|under)\b")
OBJECT = re.compile(
    rf"(an?|the) (?:({'|'.join(SIZE_OF)}) )?(?:({'|'.join(COLOURS)}) "
    rf")?({'|'.join(SHAPES)})"
)
WORDS = {"over": "above", "under": "below", "left of": "left", "right of": "right"}


def training(count, seed=0):
    return [scenes.training_scene(seed, index) for index in range(count)]


def with_captions():
    """Scenes of every split with each of their captions."""
    for scene in training(1500):
        for caption in scenes.training_captions(scene):
            yield scene, caption
    for split in ("validation", "test"):
        yield from scenes.evaluation_scenes(split)
        yield from scenes.hard_scenes(split)


def parse(scene, caption):
    """Objects the caption introduces, and its (first, relation, second), found from its words
    alone.
    """
    found = []  # (start, end, position of the object in the scene)
    for match in OBJECT.finditer(caption):
        article, size, colour, shape = match.groups()
        alike = [
            position
            for position, thing in enumerate(scene.objects)
            if thing.shape == shape
            and (colour is None or thing.colour == colour)
            and (size is None or thing.size == SIZE_OF[size])
        ]
        assert alike, f"{match.group()!r} is not in the picture: {caption}"
        if article == "the":
            assert len(alike) == 1, f"{match.group()!r} could be {len(alike)} objects: {caption}"
        found.append((match.start(), match.end(), article, alike[0]))
    told = []
    for match in re.finditer(r"(left of|right of|above|over|below|under)", caption):
        after = next(item for item in found if item[0] >= match.end())
        before = [item for item in found if item[1] <= match.start()]
        between = caption[before[-1][1] : match.start()] if before else ","
        if re.fullmatch(r",? (is |that is )?(to the )?", between) and not between.startswith(","):
            first = before[-1]
        else:  # "left of B there is A"
            first = next(item for item in found if item[0] >= after[1])
        told.append((first[3], WORDS.get(match.group(), match.group()), after[3]))
    return [item[3] for item in found if item[2] != "the"], told


def test_every_caption_is_true_of_its_scene_and_names_every_object_once():
    relations = set()
    for scene, caption in with_captions():
        introduced, told = parse(scene, caption)
        assert sorted(introduced) == list(range(len(scene.objects))), caption
        assert told, caption
        for first, relation, second in told:
            a, b = scene.objects[first], scene.objects[second]
            right, down = a.x - b.x, a.y - b.y
            holds = {"left": -right, "right": right, "above": -down, "below": down}[relation]
            across = abs(down) if relation in ("left", "right") else abs(right)
            assert holds >= 0.2 and across <= 0.61 * holds, caption
            relations.add(relation)
        for word in re.findall(r"on a (\w+) background", caption):
            assert word in (scene.background.texture, scene.background.tone), caption
    assert relations == {"left", "right", "above", "below"}


def test_a_false_caption_is_found_out():
    scene, caption = next(
        (scene, caption)
        for scene, caption in scenes.hard_scenes("test")
        if " above " in caption and len(scene.objects) == 2
    )
    (first, relation, second), *_ = parse(scene, caption.replace(" above ", " below "))[1]
    assert scene.relation(first, second) != relation


def test_objects_are_whole_apart_and_all_different():
    for scene in (scene for scene, _ in with_captions()):
        kinds = {(thing.colour, thing.shape) for thing in scene.objects}
        assert len(kinds) == len(scene.objects) and len(kinds) in (2, 3)
        for thing in scene.objects:
            assert min(thing.box) > 0.03 and max(thing.box) < 0.97
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius


def test_the_picture_shows_the_colours_where_the_description_puts_them():
    wholes = ("circle", "square", "triangle", "diamond", "star", "cross")
    for scene in training(200):
        image = scenes.render(scene, 64)
        for thing in scene.objects:
            if thing.shape in wholes:
                pixel = image[int(thing.y * 64), int(thing.x * 64)].astype(int)
                assert np.abs(pixel - thing.paint).max() <= 2, thing
        low, high = TONES[scene.background.tone]
        assert low <= image[:3, :].mean() <= high


def test_every_shape_looks_different_at_64_pixels():
    pictures = []
    for shape in SHAPES:
        thing = SceneObject("red", shape, "small", 0.5, 0.5, (255, 0, 0))
        background = Background("plain", "dark", (50, 50, 50), 0.0, 6.0, 0.0, 0)
        pictures.append(scenes.render(Scene((thing,), background, 0), 64).astype(int))
    for a, b in itertools.combinations(pictures, 2):
        assert (np.abs(a - b).max(axis=2) > 100).sum() >= 8


def test_a_scene_is_the_same_picture_at_every_size():
    for scene in training(20):
        small, large = scenes.render(scene, 32).astype(float), scenes.render(scene, 256)
        shrunk = large.reshape(32, 8, 32, 8, 3).mean(axis=(1, 3))
        assert np.abs(small - shrunk).mean() < 8


DIGEST = """
import hashlib
from codebook_jax.data import scenes
parts = []
for index in (0, 7, 123_456_789):
    scene = scenes.training_scene(5, index)
    parts += [scenes.render(scene, 40).tobytes(), repr(scenes.training_captions(scene)).encode()]
for listed in (scenes.evaluation_scenes("test"), scenes.hard_scenes("validation")):
    parts.append(repr([caption for _, caption in listed]).encode())
digest = hashlib.sha256(b"".join(parts)).hexdigest()
print(digest)
"""


def test_scenes_follow_from_split_seed_and_index_in_every_process_and_version():
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True)
    assert done.stdout.strip() == (
        "3c8e98e5fa85e585e90098ce186a1520e3ec2baae5c417e0309c503844d3f65f"
    )
    assert scenes.training_scene(5, 0) != scenes.training_scene(6, 0)
    assert scenes.training_scene(5, 0) != scenes.training_scene(5, 1)


def kinds_of_pairs(scene):
    """The unordered (colour, shape) pairs of a scene."""
    kinds = [(thing.colour, thing.shape) for thing in scene.objects]
    return {frozenset(pair) for pair in itertools.combinations(kinds, 2)}


def test_a_tenth_of_the_pairs_is_held_out_and_each_evaluation_scene_shows_one():
    trained = set().union(*(kinds_of_pairs(scene) for scene in training(20_000)))
    kinds = len(COLOURS) * len(SHAPES)
    possible = kinds * (kinds - 1) // 2
    assert 0.86 <= len(trained) / possible <= 0.94
    shown = {}
    for split in ("validation", "test"):
        for scene, _ in (*scenes.evaluation_scenes(split), *scenes.hard_scenes(split)):
            new = kinds_of_pairs(scene) - trained
            assert new
            shown.setdefault(split, set()).update(new)
    assert not shown["validation"] & shown["test"]


def test_no_caption_is_in_two_splits_or_twice_in_evaluation():
    trained = {caption for scene in training(20_000) for caption in scenes.training_captions(scene)}
    sets = [trained]
    for split in ("validation", "test"):
        captions = [caption for _, caption in scenes.evaluation_scenes(split)]
        assert len(set(captions)) == len(captions) == 1000
        sets.append(set(captions))
        hard = [caption for _, caption in scenes.hard_scenes(split)]
        assert len(set(hard)) == len(hard) == 1000
        sets[-1] |= set(hard)
    for a, b in itertools.combinations(sets, 2):
        assert not a & b


def test_a_reader_of_objects_and_relations_finds_the_picture_of_nearly_every_caption():
    for split in ("validation", "test"):
        pairs = scenes.evaluation_scenes(split)
        told = []
        for scene, caption in pairs:
            introduced, relations = parse(scene, caption)
            kind = [(thing.colour, thing.shape) for thing in scene.objects]
            told.append(
                (
                    frozenset(kind[i] for i in introduced),
                    [(kind[a], r, kind[b]) for a, r, b in relations],
                )
            )
        by_objects = {}
        for scene, _ in pairs:
            key = frozenset((thing.colour, thing.shape) for thing in scene.objects)
            by_objects.setdefault(key, []).append(scene)
        fitting = 0
        for objects, relations in told:
            fits = 0
            for scene in by_objects[objects]:
                kind = [(thing.colour, thing.shape) for thing in scene.objects]
                holds = {(kind[a], r, kind[b]) for a, r, b in scene.relations()}
                fits += set(relations) <= holds
            fitting += fits == 1
        assert fitting >= 990


def test_hard_pairs_differ_in_binding_or_relation_alone():
    kinds = {"binding": 0, "order": 0, "relation": 0}
    listed = scenes.hard_scenes("test")
    for (a, caption_a), (b, caption_b) in zip(listed[::2], listed[1::2], strict=True):
        assert a.background == b.background
        assert np.any(scenes.render(a, 64) != scenes.render(b, 64))
        words_a, words_b = caption_a.split(), caption_b.split()
        changed = {
            word for x, y in zip(words_a, words_b, strict=True) if x != y for word in (x, y)
        } - {"a", "an"}
        same_words = sorted(set(words_a) - {"a", "an"}) == sorted(set(words_b) - {"a", "an"})
        if same_words and changed <= set(COLOURS):
            kinds["binding"] += 1
            assert {thing.box for thing in a.objects} == {thing.box for thing in b.objects}
        elif same_words:
            kinds["order"] += 1
        else:
            kinds["relation"] += 1
            assert changed <= {"left", "right", "above", "below", "over", "under"}
        # neither caption is true of the other picture
        for scene, caption in ((a, caption_b), (b, caption_a)):
            kind = [(thing.colour, thing.shape) for thing in scene.objects]
            own = b if scene is a else a
            own_kind = [(thing.colour, thing.shape) for thing in own.objects]
            (first, relation, second), *_ = parse(own, caption)[1]
            holds = {(kind[x], r, kind[y]) for x, r, y in scene.relations()}
            assert (own_kind[first], relation, own_kind[second]) not in holds
    assert min(kinds.values()) > 140


def test_relations_are_not_told_where_they_are_not_clear():
    def at(x, y):
        return SceneObject("red", "circle", "small", x, y, (0, 0, 0))

    assert relation_between(at(0.2, 0.5), at(0.8, 0.6)) == "left"
    assert relation_between(at(0.5, 0.8), at(0.5, 0.3)) == "below"
    assert relation_between(at(0.2, 0.2), at(0.8, 0.8)) is None
    assert relation_between(at(0.4, 0.5), at(0.5, 0.5)) is None
