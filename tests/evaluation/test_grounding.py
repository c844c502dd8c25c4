"""Grounding: overlap against counted pixels, scores against sums, and every edge of a picture."""

from __future__ import annotations

import numpy as np
import pytest

from codebook_jax.errors import UserError
from codebook_jax.evaluation.grounding import (
    box_overlaps,
    box_scores,
    evaluate,
    format_table,
    ground,
    resize_map,
)


def pixels(box: tuple[int, int, int, int], side: int = 40) -> np.ndarray:
    x, y, width, height = box
    grid = np.zeros((side, side), bool)
    grid[y : y + height, x : x + width] = True
    return grid


def overlap(box, other) -> float:
    return box_overlaps(np.array(box, float), np.array([other], float))[0]


def peak(row: int, column: int, rows: int = 20, columns: int = 30) -> np.ndarray:
    attention = np.zeros((rows, columns))
    attention[row, column] = 1
    return attention


def test_overlap_is_that_of_counted_pixels():
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(500):
        a, b = ((*rng.integers(0, 20, 2), *rng.integers(2, 20, 2)) for _ in range(2))
        shared = pixels(a) & pixels(b)
        if 1 in (shared.any(axis=0).sum(), shared.any(axis=1).sum()):
            continue  # a single row or column: the next test
        union = pixels(a) | pixels(b)
        assert overlap(a, b) == pytest.approx(shared.sum() / union.sum())
        assert overlap(a, b) == overlap(b, a)
        checked += shared.any()
    assert checked > 100


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((2, 3, 10, 10), (2, 3, 10, 10), 1),
        ((0, 0, 10, 10), (10, 0, 10, 10), 0),  # they touch
        ((0, 0, 10, 10), (20, 20, 5, 5), 0),
        ((0, 0, 10, 10), (9, 0, 10, 10), 0),  # a shared column of pixels counts as none
        ((0, 0, 10, 10), (8, 0, 10, 10), 20 / 180),
        ((0, 0, 40, 40), (10, 10, 20, 20), 0.25),
        ((0, 0, 1, 5), (0, 0, 1, 5), 0),  # so narrow that it does not even overlap itself
        ((0.5, 0.5, 10, 10), (0.5, 5.5, 10, 10), 50 / 150),
    ],
)
def test_overlap_at_the_edges(box, other, expected):
    assert overlap(box, other) == pytest.approx(expected)


def test_resizing_is_cubic_interpolation_between_pixel_centres():
    """Against sums in float64 over the kernel of Keys (1981) with a = -0.75."""

    def kernel(distance):
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        return np.where(distance <= 1, near, np.where(distance < 2, far, 0))

    def weights(before, after):
        table = np.zeros((after, before))
        for at in range(after):
            centre = (at + 0.5) * before / after - 0.5
            for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                table[at, np.clip(place, 0, before - 1)] += kernel(abs(centre - place))
        return table

    attention = np.random.default_rng(0).normal(size=(7, 5))
    for height, width in ((31, 23), (7, 5), (3, 17)):
        expected = weights(7, height) @ attention @ weights(5, width).T
        np.testing.assert_allclose(resize_map(attention, height, width), expected, atol=1e-5)
    assert resize_map(np.ones((3, 3), np.float16), 11, 13).shape == (11, 13)


def test_a_score_is_the_sum_over_the_root_of_the_area():
    attention = np.random.default_rng(0).random((20, 30))
    boxes = np.array([[3, 5, 7, 11], [0, 0, 30, 20], [3.9, 5.2, 7.5, 11.3], [29.2, 19, 0.7, 1]])
    expected = [
        attention[5:16, 3:10].sum() / 77**0.5,
        attention.sum() / 600**0.5,
        attention[5:16, 3:11].sum() / (7.5 * 11.3) ** 0.5,  # cut to whole pixels
        0,  # no whole pixel
    ]
    np.testing.assert_allclose(box_scores(attention, boxes), expected)


def test_the_box_around_the_peak_is_chosen():
    found = ground(
        7, peak(5, 8), 20, 30, (6, 3, 6, 6), [(20, 10, 5, 5), (0, 0, 30, 20), (6, 3, 5, 6)]
    )
    assert (found.chosen, found.scored, found.pointing) == (2, True, 1)
    np.testing.assert_allclose(found.overlaps, [0, 36 / 600, 30 / 36])
    assert found.pointing_chance == pytest.approx(36 / 600)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_the_first_box_is_taken_if_no_score_is_positive(value):
    boxes = [(0, 0, 10, 10), (0, 0, 2, 2), (10, 10, 5, 5)]
    found = ground(7, np.full((20, 30), value), 20, 30, boxes[0], boxes)
    assert (found.chosen, found.scored) == (0, False)
    assert found.pointing == pytest.approx(found.pointing_chance)  # every point is the highest
    assert evaluate([found])["unscored"] == 1
    assert evaluate([found])["accuracy"] == 100


def test_the_first_of_equal_scores_is_chosen():
    boxes = [(0, 0, 3, 3), (6, 3, 5, 5), (6, 3, 5, 5)]
    assert ground(7, peak(5, 8), 20, 30, boxes[0], boxes).chosen == 1


def test_a_box_as_large_as_the_picture_is_always_pointed_at():
    found = ground(7, peak(19, 29), 20, 30, (0, 0, 30, 20), [(0, 0, 30, 20)])
    assert (found.overlaps.tolist(), found.pointing, found.pointing_chance) == ([1], 1, 1)


def test_the_point_is_in_the_box_up_to_its_last_pixel():
    for column, inside in ((5, 0), (6, 1), (11, 1), (12, 0)):
        found = ground(7, peak(5, column), 20, 30, (6, 3, 6, 6), [(6, 3, 6, 6)])
        assert found.pointing == inside


def test_a_map_of_patches_is_resized_to_the_picture():
    attention = np.array([[0, 0, 1], [0, 0, 0]])
    proposals = [(0, 0, 100, 100), (100, 0, 100, 100), (200, 0, 100, 100), (200, 100, 100, 100)]
    found = ground(7, attention, 200, 300, proposals[2], proposals)
    assert (found.chosen, found.pointing) == (2, 1)
    assert found.pointing_chance == pytest.approx(1 / 6)


def test_shares_over_expressions():
    boxes = [(0, 0, 10, 10), (15, 5, 10, 10), (0, 0, 9, 10)]
    right = ground(1, peak(5, 5), 20, 30, boxes[0], boxes)
    wrong = ground(2, peak(10, 20), 20, 30, boxes[0], boxes)
    hopeless = ground("c", peak(10, 20), 20, 30, (20, 15, 10, 5), boxes)
    found = evaluate([right, wrong, hopeless])
    assert found == {
        "accuracy": pytest.approx(100 / 3),
        "chance": pytest.approx(100 * (2 / 3 + 2 / 3) / 3),
        "ceiling": pytest.approx(200 / 3),
        "pointing": pytest.approx(100 / 3),
        "pointing_chance": pytest.approx(100 * 250 / 600 / 3),
        "expressions": 3,
        "unscored": 0,
    }
    assert "33.33 %" in format_table(found) and "3 expressions" in format_table(found)


def test_an_overlap_of_one_half_is_right():
    found = ground(1, peak(2, 2), 20, 30, (0, 0, 10, 10), [(0, 0, 10, 5), (0, 0, 7, 7)])
    np.testing.assert_allclose(found.overlaps, [0.5, 0.49])
    assert evaluate([found._replace(chosen=0)])["accuracy"] == 100
    assert evaluate([found._replace(chosen=1)])["accuracy"] == 0


@pytest.mark.parametrize(
    "box", [(25, 5, 10, 5), (5, 15, 5, 10), (-3, 0, 9, 9), (5, 5, 0, 5), (5, 5, 5, float("nan"))]
)
def test_a_box_that_is_not_in_its_picture_is_refused(box):
    good = (0, 0, 10, 10)
    with pytest.raises(UserError, match=r"'ref 7': box 2 of 2, \[.*30 x 20"):
        ground("ref 7", peak(5, 5), 20, 30, good, [good, box])
    with pytest.raises(UserError, match=r"'ref 7': the true box, \[.*30 x 20"):
        ground("ref 7", peak(5, 5), 20, 30, box, [good])


def test_a_box_that_sticks_out_by_rounding_is_cut():
    box = (-0.4, -1, 30.9, 21.5)
    found = ground(7, peak(0, 0), 20, 30, box, [box])
    assert (found.pointing, found.pointing_chance) == (1, 1)


def test_without_boxes_to_choose_from_the_map_only_points():
    bare = ground(7, peak(5, 5), 20, 30, (0, 0, 5, 5), [])
    found = evaluate([bare])
    assert "accuracy" not in found and found["expressions"] == 1
    assert "box" in format_table(found) and "IoU" not in format_table(found)
    whole = ground(8, peak(5, 5), 20, 30, (0, 0, 5, 5), [(0, 0, 5, 5)])
    with pytest.raises(UserError, match="1 of 2 expressions have no boxes"):
        evaluate([bare, whole])


def test_expressions_with_nan_and_no_expressions_are_refused():
    with pytest.raises(ValueError, match="expression 7 holds NaN"):
        ground(7, np.full((5, 5), np.nan), 20, 30, (0, 0, 5, 5), [(0, 0, 5, 5)])
    with pytest.raises(UserError, match="no expression"):
        evaluate([])
