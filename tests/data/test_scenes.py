"""The built-in world: its captions describe its pictures, and its splits stay separate."""

import hashlib
import itertools
import re

import numpy as np
from small_stories import told_frames

from codebook_jax.data import scenes
from codebook_jax.data.scenes import stories
from codebook_jax.data.scenes.world import COLOURS, SHAPES, Background, Scene, SceneObject

SIZE_OF = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
TONES = {"dark": (0, 110), "light": (140, 255)}
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
    told = [stories.training_story(0, index) for index in range(200)]
    for story in (*told, *stories.evaluation_stories("test")):
        yield from ((scene, caption) for _, scene, caption in told_frames(story))


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
        assert sorted(introduced) == list(range(len(scene.objects))) and told, caption
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


def test_objects_are_whole_apart_and_all_different():
    for scene, _ in with_captions():
        assert len({thing[:2] for thing in scene.objects}) == len(scene.objects) in (2, 3)
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


def test_scenes_follow_from_split_seed_and_index_in_every_process_and_version():
    parts = []
    for index in (0, 7, 123_456_789):
        scene = scenes.training_scene(5, index)
        captions = scenes.training_captions(scene)
        parts += [scenes.render(scene, 40).tobytes(), repr(captions).encode()]
    for listed in (scenes.evaluation_scenes("test"), scenes.hard_scenes("validation")):
        parts.append(repr([caption for _, caption in listed]).encode())
    digest = "3c8e98e5fa85e585e90098ce186a1520e3ec2baae5c417e0309c503844d3f65f"  # from any process
    assert hashlib.sha256(b"".join(parts)).hexdigest() == digest
    assert scenes.training_scene(5, 0) != scenes.training_scene(6, 0)
    assert scenes.training_scene(5, 0) != scenes.training_scene(5, 1)


def kinds_of_pairs(scene):
    """The unordered (colour, shape) pairs of a scene."""
    kinds = [thing[:2] for thing in scene.objects]
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
    sets = [{caption for scene in training(20_000) for caption in scenes.training_captions(scene)}]
    for split in ("validation", "test"):
        sets.append(set())
        for listed in (scenes.evaluation_scenes(split), scenes.hard_scenes(split)):
            captions = {caption for _, caption in listed}
            assert len(captions) == len(listed) == 1000
            sets[-1] |= captions
    for a, b in itertools.combinations(sets, 2):
        assert not a & b


def facts(scene):
    """The objects of a scene, and the relations that hold between them."""
    kinds = [thing[:2] for thing in scene.objects]
    return set(kinds), {(kinds[a], relation, kinds[b]) for a, relation, b in scene.relations()}


def told_in(scene, caption):
    """The relations that a caption of the scene tells."""
    kinds = [thing[:2] for thing in scene.objects]
    return {(kinds[a], relation, kinds[b]) for a, relation, b in parse(scene, caption)[1]}


def test_a_reader_of_objects_and_relations_finds_the_picture_of_nearly_every_caption():
    for split in ("validation", "test"):
        pairs, by_objects = scenes.evaluation_scenes(split), {}
        for scene, _ in pairs:
            objects, holds = facts(scene)
            by_objects.setdefault(frozenset(objects), []).append(holds)
        fitting = 0
        for scene, caption in pairs:
            told = told_in(scene, caption)
            fitting += sum(told <= holds for holds in by_objects[frozenset(facts(scene)[0])]) == 1
        assert fitting >= 990


def test_hard_pairs_differ_in_binding_or_relation_alone():
    counts = {"binding": 0, "order": 0, "relation": 0}
    listed = scenes.hard_scenes("test")
    for (a, caption_a), (b, caption_b) in zip(listed[::2], listed[1::2], strict=True):
        assert a.background == b.background
        assert np.any(scenes.render(a, 64) != scenes.render(b, 64))
        words = [re.sub(r"\ban\b", "a", caption).split() for caption in (caption_a, caption_b)]
        changed = {word for pair in zip(*words, strict=True) if len(set(pair)) > 1 for word in pair}
        if sorted(words[0]) != sorted(words[1]):
            counts["relation"] += 1
            assert changed <= {"left", "right", "above", "below", "over", "under"}
        elif changed <= set(COLOURS):
            counts["binding"] += 1
            assert {thing.box for thing in a.objects} == {thing.box for thing in b.objects}
        else:
            counts["order"] += 1
        # neither caption is true of the other picture
        assert not told_in(a, caption_a) & facts(b)[1]
        assert not told_in(b, caption_b) & facts(a)[1]
    assert min(counts.values()) > 140
