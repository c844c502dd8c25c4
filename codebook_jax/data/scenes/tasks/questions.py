"""Questions about a scene, each with one answer, as ten annotators give it."""

from __future__ import annotations

import random

from codebook_jax.data.scenes import world
from codebook_jax.data.scenes.captions import RELATION_WORDS
from codebook_jax.data.scenes.tasks.example import (
    Noun,
    SceneExample,
    beside,
    draw_pair,
    exchanged,
    is_beside,
    names,
    start,
)
from codebook_jax.data.scenes.world import Scene, pick

ANNOTATORS = 10
_VARIED = 0.5  # share of the questions, of those that can be, to which a few give a synonym
_SYNONYMS = {"small": "tiny", "large": "big"}
_SYNONYMS |= {"0": "none", "1": "one", "2": "two", "3": "three"}
_SYNONYMS |= {"striped": "stripes", "checked": "checks", "dotted": "dots"}

Asked = tuple[Scene, str, str]  # a scene, a question and its answer


def question(role: str, seed: int, index: int) -> SceneExample:
    """A question about one scene; the first answer is the commonest."""
    draw, split = start("questions", role, seed, index)
    ask, asked = pick(draw, (_attribute, _beside, _number, _presence, _relation, _background)), None
    while asked is None:
        asked = ask(draw, split)
    scene, text, answer = asked
    varied = answer in _SYNONYMS and draw.random() < _VARIED
    others = pick(draw, (1, 2, 3)) if varied else 0
    answers = (answer,) * (ANNOTATORS - others) + (_SYNONYMS.get(answer, ""),) * others
    return SceneExample((scene,), text, answers, index, index)


def _attribute(draw: random.Random, split: str | None) -> Asked | None:
    asked, scene = pick(draw, ("colour", "shape", "size")), world.draw_scene(draw, split)
    thing = pick(draw, scene.objects)
    nouns = names(scene, thing, without=asked)
    if not nouns:
        return None
    return scene, f"what {asked} is the {pick(draw, nouns)}?", getattr(thing, asked)


def _beside(draw: random.Random, split: str | None) -> Asked | None:
    asked, scene = pick(draw, ("colour", "shape")), world.draw_scene(draw, split)
    side, anchor = pick(draw, tuple(RELATION_WORDS)), pick(draw, scene.objects)
    thing = beside(scene, Noun(), side, anchor)
    if thing is None:
        return None
    where = f"{pick(draw, RELATION_WORDS[side])} the {pick(draw, names(scene, anchor))}"
    return scene, f"what {asked} is the object {where}?", getattr(thing, asked)


def _number(draw: random.Random, split: str | None) -> Asked:
    colours = tuple(world.COLOURS)
    nouns = Noun(), Noun(colour=pick(draw, colours)), Noun(shape=pick(draw, world.SHAPES))
    noun = pick(draw, nouns)
    number = pick(draw, (0, 1, 2) if any(noun) else (2, 3))
    while True:
        scene = world.draw_scene(draw, split)
        if len(noun.among(scene)) == number:
            return scene, f"how many {noun.plural} are there?", str(number)


def _presence(draw: random.Random, split: str | None) -> Asked:
    pair, answer = draw_pair(draw, split), pick(draw, ("yes", "no"))
    noun = Noun(None, *pair[0])
    while True:
        scene = world.draw_scene(draw, split, pair if answer == "yes" else exchanged(*pair))
        if bool(noun.among(scene)) == (answer == "yes"):
            return scene, f"is there {noun.with_article}?", answer


def _relation(draw: random.Random, split: str | None) -> Asked:
    pair, side = draw_pair(draw, split), pick(draw, tuple(RELATION_WORDS))
    first, second = (Noun(None, *kind) for kind in pair)
    where = f"{pick(draw, RELATION_WORDS[side])} {second.with_article}"
    answer = pick(draw, ("yes", "no"))
    shown = pair if answer == "yes" else pick(draw, (pair, exchanged(*pair)))
    while True:
        scene = world.draw_scene(draw, split, shown)
        if is_beside(scene, first, side, second) == (answer == "yes"):
            return scene, f"is there {first.with_article} {where}?", answer


def _background(draw: random.Random, split: str | None) -> Asked:
    scene = world.draw_scene(draw, split)
    if draw.random() < 0.5:
        return scene, "is the background dark or light?", scene.background.tone
    return scene, "what pattern does the background have?", scene.background.texture
