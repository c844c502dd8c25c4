"""What is true of a scene, found from the words of a text and the coordinates of the objects."""

import re

from codebook_jax.data.scenes.world import COLOURS, SHAPES

SIZE_OF = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_SIDES = {"left of": (-1, 0), "right of": (1, 0)}
_SIDES |= {"above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1)}
_SIDE = rf"(?:to the )?({'|'.join(_SIDES)})"


def fitting(scene, words):
    """The objects that a description such as "a small red object" fits."""
    parts = [SIZE_OF.get(word, word) for word in words.split() if word not in ("a", "an", "the")]
    assert parts and set(parts) <= {*COLOURS, *SHAPES, *SIZE_OF, "object"}, words
    return [t for t in scene.objects if set(parts) <= {t.colour, t.shape, t.size, "object"}]


def only(things):
    assert len(things) == 1, things
    return things[0]


def along(first, side, second):
    """How far the first object is on that side of the second, and how far off the axis."""
    (right, down), x, y = _SIDES[side], first.x - second.x, first.y - second.y
    return right * x + down * y, abs(down * x + right * y)


def clearly(first, side, second):
    on, off = along(first, side, second)
    return on >= 0.2 and off <= 0.61 * on


def split_at_side(words):
    """("a b", "left of", "c") of "a b to the left of c"; the words alone if no side is named."""
    found = re.fullmatch(rf"(.+?) {_SIDE} (.+)", words)
    return found.groups() if found else (words, None, None)


def referent(scene, words):
    """The only object that "the circle left of the red square" can mean."""
    head, side, anchor = split_at_side(words)
    things = fitting(scene, head)
    if side:
        anchor = only(fitting(scene, anchor))
        things = [thing for thing in things if along(thing, side, anchor)[0] > 0]
        assert clearly(only(things), side, anchor), words
    return only(things)


def shows(scene, words):
    """Whether a picture shows "a circle", or "a circle left of a square"."""
    head, side, anchor = split_at_side(words)
    if not side:
        return all(fitting(scene, each) for each in head.split(" and "))
    pairs = [(a, b) for a in fitting(scene, head) for b in fitting(scene, anchor)]
    if any(clearly(a, side, b) for a, b in pairs):
        return True
    assert not any(along(a, side, b)[0] > 0 for a, b in pairs), f"unclear: {words}"
    return False


def answer(scene, question):
    words = question.removesuffix("?")
    if found := re.fullmatch(r"what (colour|shape|size) is (the .+)", words):
        return getattr(referent(scene, found[2]), found[1])
    if found := re.fullmatch(r"how many (.+) are there", words):
        singular = re.sub("s$", "", found[1].replace("crosses", "cross!")).replace("!", "")
        return str(len(fitting(scene, singular)))
    if found := re.fullmatch(r"is there (.+)", words):
        return "yes" if shows(scene, found[1]) else "no"
    if words == "is the background dark or light":
        return scene.background.tone
    assert words == "what pattern does the background have", question
    return scene.background.texture


def label(scene, statement):
    """entailment, contradiction, or neutral: an object that is spoken of is not there."""
    subject, stated = re.fullmatch(r"(the .+?) is (.+)", statement).groups()
    things = fitting(scene, subject)
    found = re.fullmatch(rf"{_SIDE} (the .+)", stated)
    others = fitting(scene, found[2]) if found else [None]
    if not things or not others:
        return "neutral"
    thing, other = only(things), only(others)
    if not found:
        return "entailment" if thing in fitting(scene, stated) else "contradiction"
    on, off = along(thing, found[1], other)
    assert abs(on) >= 0.2 and off <= 0.61 * abs(on), f"unclear: {statement}"
    return "entailment" if on > 0 else "contradiction"


def holds(left, right, sentence):
    """Whether a sentence about two pictures is true."""
    counts = [len(scene.objects) for scene in (left, right)]
    if found := re.fullmatch(r"there are (\w+) objects in the two pictures", sentence):
        return sum(counts) == NUMBERS[found[1]]
    if found := re.fullmatch(r"both pictures show (two|three) objects", sentence):
        return counts == [NUMBERS[found[1]]] * 2
    if sentence == "one picture shows two objects and the other three":
        return sorted(counts) == [2, 3]
    if found := re.fullmatch(r"the (\w+) picture shows more objects than the (\w+)", sentence):
        assert {found[1], found[2]} == {"left", "right"}
        return counts[found[1] == "right"] > counts[found[1] == "left"]
    which, what = re.fullmatch(r"(.+?) pictures? shows? (.+)", sentence).groups()
    if which in ("the left", "the right"):
        return shows((left, right)[which == "the right"], what)
    shown = [shows(scene, what) for scene in (left, right)]
    wanted = {"both": ([True, True],), "exactly one": ([True, False], [False, True])}
    wanted |= {"at least one": ([True, True], *wanted["exactly one"]), "neither": ([False, False],)}
    wanted |= {"only the left": ([True, False],), "only the right": ([False, True],)}
    return shown in wanted[which]
