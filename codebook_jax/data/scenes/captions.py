"""Captions of a scene, in the wordings of training and of evaluation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from codebook_jax.data.scenes.world import Scene, SceneObject, pick

CAPTIONS = 4  # per training scene
MOST_WORDS = 22  # 24 tokens with [CLS] and [SEP]
_SIZE_WORD = 0.75  # share of the mentions of an object that give its size
_BACKGROUND_WORDS = 0.3  # share of the captions that describe the background, if there is room
_UNSEEN_WORDING = 0.25  # share of the evaluation captions in a wording not used in training

RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
_OPENINGS = ("", "", "", "a picture of", "an image of")

# A, B, C: an object with its article; a, b: "the" object; r: how A relates to B; s: how C relates
# to t, which is A or B.
_TWO = ("{A} {r} {B}", "{A} is {r} {B}", "there is {A} {r} {B}", "{r} {B} there is {A}")
_TWO += ("{A} and {B}, {a} {r} {b}",)
_TWO_UNSEEN = ("{A} and {B}: {a} is {r} {b}", "{r} {B} is {A}")
_THREE = ("{A} {r} {B} with {C} {s} {t}", "{A} is {r} {B}, and {C} is {s} {t}")
_THREE += ("there is {A} {r} {B}, {s} {t} is {C}", "{A}, {B} and {C}, {a} {r} {b}")
_THREE_UNSEEN = ("{r} {B} is {A}, and {s} {t} is {C}", "there is {A}, {B} and {C}, {a} is {r} {b}")
HARD_WORDINGS = ("{A} {r} {B}", "{A} is {r} {B}", "there is {A} {r} {B}", "{A} that is {r} {B}")


def training_captions(scene: Scene, count: int = CAPTIONS) -> tuple[str, ...]:
    """Captions of the scene in training's wordings; some may be the same."""
    draw = random.Random(scene.wording_seed)
    return tuple(_caption(scene, draw, _TWO, _THREE) for _ in range(count))


def evaluation_caption(scene: Scene) -> str:
    """The scene's one caption in evaluation, sometimes in a wording not used in training."""
    draw = random.Random(scene.wording_seed)
    unseen = draw.random() < _UNSEEN_WORDING
    return _caption(scene, draw, *((_TWO_UNSEEN, _THREE_UNSEEN) if unseen else (_TWO, _THREE)))


def _caption(scene: Scene, draw: random.Random, two: Sequence[str], three: Sequence[str]) -> str:
    if len(scene.objects) == 2:
        return two_objects(scene, int(2 * draw.random()), draw, two)
    first, relation, second = pick(draw, scene.relations())
    third = 3 - first - second
    links = [(at, scene.objects[third].relation_to(scene.objects[at])) for at in (first, second)]
    other, second_relation = pick(draw, [link for link in links if link[1]])
    order = zip("ABC", (first, second, third), strict=True)
    parts = {name: _mention(scene.objects[at], draw) for name, at in order}
    relations = {"r": relation, "s": second_relation}
    return _filled(scene, draw, three, parts, relations, {"a": first, "b": second, "t": other})


def two_objects(scene: Scene, first: int, draw: random.Random, wordings: Sequence[str]) -> str:
    """A caption of a scene of two objects in one of the wordings, whose A is object `first`."""
    second, mentions = 1 - first, [_mention(thing, draw) for thing in scene.objects]
    parts = {"A": mentions[first], "B": mentions[second]}
    relations = {"r": scene.objects[first].relation_to(scene.objects[second])}
    return _filled(scene, draw, wordings, parts, relations, {"a": first, "b": second})


def _filled(
    scene: Scene,
    draw: random.Random,
    wordings: Sequence[str],
    mentions: Mapping[str, str],
    relations: Mapping[str, str],
    objects: Mapping[str, int],
) -> str:
    """A wording filled in and shortened, with an opening and the background where they fit."""
    said = {name: pick(draw, RELATION_WORDS[relation]) for name, relation in relations.items()}
    parts = {**mentions, **said, **{name: _short(at, scene) for name, at in objects.items()}}
    wording, opening, ending = pick(draw, wordings), pick(draw, _OPENINGS), ""
    if draw.random() < _BACKGROUND_WORDS:
        word = scene.background.texture if draw.random() < 0.7 else scene.background.tone
        ending = f" on a {word} background"
    caption = wording.format(**parts)
    while len(caption.split()) > MOST_WORDS:
        longest = max(parts, key=lambda name: len(parts[name].split()))
        parts[longest] = _shorter(parts[longest])
        caption = wording.format(**parts)
    opens = bool(opening) and wording.startswith("{A}") and " is " not in wording
    for before, after in ((f"{opening} " * opens, ""), ("", ending)):
        longer = f"{before}{caption}{after}"
        caption = longer if len(longer.split()) <= MOST_WORDS else caption
    return caption


def _shorter(words: str) -> str:
    """A shorter form of a relation or a mention, which says the same or less."""
    if words.startswith("to the "):
        return words.removeprefix("to the ")
    article, _, *noun = words.split()  # without the size
    return " ".join(("the", *noun)) if article == "the" else with_article(" ".join(noun))


def _mention(thing: SceneObject, draw: random.Random) -> str:
    words, size = f"{thing.colour} {thing.shape}", pick(draw, SIZE_WORDS[thing.size])
    return with_article(f"{size} {words}" if draw.random() < _SIZE_WORD else words)


def _short(at: int, scene: Scene) -> str:
    """Object `at` in the fewest words that distinguish it from the scene's others."""
    thing = scene.objects[at]
    alike = sum(other.shape == thing.shape for other in scene.objects)
    return f"the {thing.shape}" if alike == 1 else f"the {thing.colour} {thing.shape}"


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
