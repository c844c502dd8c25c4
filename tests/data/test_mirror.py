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
        ("The left dog chases the right dog", "The right dog chases the left dog"),
        ("the left person is by the right person", "the right person is by the left person"),
        (
            "the left track is empty, the right track full",
            "the right track is empty, the left track full",
        ),
        ("a dog facing left and a cat", "a dog facing right and a cat"),
        ("left turn lane", "right turn lane"),
        ("no left turn sign", "no right turn sign"),
        ("a sign says keep right", "a sign says keep left"),
        ("Left: a cat. Right: a dog.", "Right: a cat. Left: a dog."),
        ("seated left is Bob", "seated right is Bob"),
        ("Ann, pictured right", "Ann, pictured left"),
        ("A cat, left, and a dog", "A cat, right, and a dog"),
        ("back row left", "back row right"),
        ("left-most zebra", "right-most zebra"),
        ("Two Dogs on the Left Side", "Two Dogs on the Right Side"),
        ("Two sausage links on the left", "Two sausage links on the right"),
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
        "the dog was left behind",
        "a bright upright copyright, leftover",
        "human rights, all rights reserved",
        "a right angle, the right answer",
        "right next to a cat, right away",
        "a man left his bag",
        "he left front door open",
        "right side up",
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
        *(
            "a left footed kicker",
            "right-footed",
            "lefty",
            "a lefthander",
            "left-hander",
            "southpaw",
        ),
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
        *("un perro a la izquierda", "o gato direito", "gauche", "sulla destra", "un caf\u00e9"),
        *("左の犬", "собака слева", "à droite", "bên tra\u0301i", "chỗ phải"),
        *(
            "links ein Hund",
            "Hund und Katze links",
            "de linker hond",
            "links van een boom",
            "rechts",
        ),
        *("pies po lewej", "vlevo pes", "pas lijevo", "solda kedi", "koira vasemmalla", "oikealla"),
        *("kutya a bal oldalon", "balra", "anjing di kiri", "kanan", "mbwa kushoto"),
    ],
)
def test_a_caption_in_another_language_is_not_mirrored(caption):
    assert mirrored(caption) is None
