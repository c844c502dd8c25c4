"""Left and right in the caption of a mirrored picture."""

import pytest

from codebook_jax.data.mirror import mirrored


@pytest.mark.parametrize(
    ("caption", "other"),
    [
        ("a dog left of a cat", "a dog right of a cat"),
        ("a red ring to the left of a blue star", "a red ring to the right of a blue star"),
        ("Left of it, RIGHT of her", "Right of it, LEFT of her"),
        ("the leftmost and the rightmost", "the rightmost and the leftmost"),
        ("turning leftward, on his right", "turning rightward, on his left"),
        ("lefthanded, right-handed", "righthanded, left-handed"),
        ("the man's left hand and right foot", "the man's right hand and left foot"),
        ("the bottom right corner, top-left", "the bottom left corner, top-right"),
        ("from left to right", "from right to left"),
        ("left and right sides", "right and left sides"),
        ("a cat (left) and a dog (right)", "a cat (right) and a dog (left)"),
        ("a bus turns left", "a bus turns right"),
        ("facing right, looking to the left", "facing left, looking to the right"),
        ("on the right next to a bus", "on the left next to a bus"),
        ("at left behind a tree", "at right behind a tree"),
        ("it is on the left.", "it is on the right."),
    ],
)
def test_places_change_and_change_back(caption, other):
    assert mirrored(caption) == other
    assert mirrored(other) == caption


def test_left_before_what_it_describes_is_a_place():
    assert mirrored("the left dog") == "the right dog"
    assert mirrored("to the left a dog sleeps") == "to the right a dog sleeps"
    assert mirrored("cars turn left at the corner") == "cars turn right at the corner"


@pytest.mark.parametrize(
    "caption",
    [
        "no side at all",
        "all right, he left the room",
        "right now a train has left the station",
        "leftovers, left over pizza and left-over cake",
        "the child was left alone",
        "a dog left behind the tree",
        "a bright upright copyright, leftover",
        "human rights, all rights reserved",
        "a right angle, the right answer, the right way",
        "a right-wing and a left-wing rally",
        "right before the house, right next to a cat",
        "a man left his bag",
        "he left front door open",
        "right side up",
    ],
)
def test_what_is_no_place_stays(caption):
    assert mirrored(caption) == caption


@pytest.mark.parametrize(
    "caption",
    [
        *("left", "right", "right?", "she was right", "the last one left", "lefts and rights"),
        *("the right dog", "the right place", "the left wing", "a far-right party"),
        *("what is left of the cake", "the man in the middle left the room"),
        *("looks right at the camera", "a bus turned right at the light"),
        *("un perro a la izquierda", "左の犬", "собака слева", "à droite", "links ein Hund", "bên tra\u0301i"),
        "on the left, the right dog",
    ],
)
def test_what_may_be_a_place_is_not_mirrored(caption):
    assert mirrored(caption) is None
