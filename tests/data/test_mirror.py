"""Left and right in the caption of a mirrored picture."""

import re

import pytest

from codebook_jax.data.mirror import mirrored

OPPOSITE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
OPPOSITE |= {other: one for one, other in OPPOSITE.items()}


@pytest.mark.parametrize(
    "caption",
    [
        *("a dog left of a cat", "a red ring to the left of a blue star"),
        *("Left of it, RIGHT of her", "the leftmost and the rightmost"),
        *("turning leftward, on his right", "lefthanded, right-handed"),
        *("the man's left hand and right foot", "the bottom right corner, top-left"),
        *("from left to right", "left and right sides", "a cat (left) and a dog (right)"),
        *("a bus turns left", "facing right, looking to the left", "on the right next to a bus"),
        *("at left behind a tree", "it is on the left.", "The left dog chases the right dog"),
        "the left person is by the right person",
        *("the left track is empty, the right track full", "a dog facing left and a cat"),
        *("left turn lane", "no left turn sign", "a sign says keep right"),
        *("Left: a cat. Right: a dog.", "seated left is Bob", "Ann, pictured right"),
        *("A cat, left, and a dog", "back row left", "left-most zebra"),
        *("Two Dogs on the Left Side", "Two sausage links on the left"),
    ],
)
def test_places_change_and_change_back(caption):
    other = re.sub("left|right", lambda found: OPPOSITE[found[0]], caption, flags=re.IGNORECASE)
    assert mirrored(caption) == other != caption
    assert mirrored(other) == caption


@pytest.mark.parametrize(
    "caption", ["the left dog", "to the left a dog sleeps", "cars turn left at the corner"]
)
def test_left_before_what_it_describes_is_a_place(caption):
    assert mirrored(caption) == caption.replace("left", "right")


@pytest.mark.parametrize(
    "caption",
    [
        *("no side at all", "all right, he left the room", "right next to a cat, right away"),
        *("right now a train has left the station", "the child was left alone", "right side up"),
        *("leftovers, left over pizza and left-over cake", "the dog was left behind"),
        *("a bright upright copyright, leftover", "human rights, all rights reserved"),
        *("a right angle, the right answer", "a man left his bag", "he left front door open"),
        *("Two sausage links on a plate", "golf links at sunset"),
    ],
)
def test_what_is_no_place_stays(caption):
    assert mirrored(caption) == caption


@pytest.mark.parametrize(
    "caption",
    [
        *("left", "right", "right?", "she was right", "the last one left", "lefts and rights"),
        *("the right dog", "the right place", "the left wing", "a far-right party"),
        *("the right track", "the right size", "the right way", "on the right track"),
        *("what is left of the cake", "the man in the middle left the room"),
        *("a slice is left of the pizza", "a dog left behind the tree", "someone left hand soap"),
        *("looks right at the camera", "a bus turned right at the light", "right before the house"),
        *("on the left, the right dog", "left over right shoulder"),
        *("Bob (L) and Ann (R)", "from L to R: Bob, Ann", "Bob, Ann (l-r)", "Bob, Ann L-R"),
        *("a far left protester", "right-wing rally", "a politician on the far right"),
        *("a left footed kicker", "right-footed", "lefty", "a lefthander", "left-hander"),
        *("the Left Bank of Paris", "Right Said Fred", "the Left Door in the north"),
        *("he is in the right.", "it looks right.", "the one on the right now", "right of way"),
        *("the one on the left left", "walks right away from us", "left of the right size"),
        *("facing right next to a cat", "the drawer at bottom left open"),
        *("a dog \u2190 a cat", "a clock runs counter-clockwise", "starboard", "right of passage"),
        *("a dog on the Left Coast", "on the right side of the law"),
        *("my right hand man", "bottom_left", "topleft corner", "the left luggage"),
    ],
)
def test_what_may_be_a_place_is_not_mirrored(caption):
    assert mirrored(caption) is None


@pytest.mark.parametrize(
    "caption",
    [
        *("un perro a la izquierda", "o gato direito", "gauche", "sulla destra", "rechts"),
        *("左の犬", "собака слева", "à droite", "bên tra\u0301i", "chỗ phải"),
        *("links ein Hund", "Hund und Katze links", "de linker hond", "links van een boom"),
        *("pies po lewej", "vlevo pes", "pas lijevo", "solda kedi", "koira vasemmalla", "oikealla"),
        *("kutya a bal oldalon", "balra", "anjing di kiri", "kanan", "mbwa kushoto"),
    ],
)
def test_a_caption_in_another_language_is_not_mirrored(caption):
    assert mirrored(caption) is None
