"""Retrieval: recall against brute force and chance, re-ranking against an oracle, no number changed
by padding.
"""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from codebook_jax.evaluation.recall import chance_at_k, recall_at_k


def gallery_ids(
    rng: np.random.Generator, images: int, most_texts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of shuffled images, and of the texts (1 to `most_texts` per image) in another order."""
    image_ids = rng.permutation(10 * images)[:images]
    text_ids = np.repeat(image_ids, rng.integers(1, most_texts + 1, images))
    return image_ids, rng.permutation(text_ids)


def brute_force(
    scores: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray, k: int
) -> float:
    hits = 0
    for row, query in zip(scores, query_ids, strict=True):
        nearest = sorted(range(len(row)), key=lambda at: -row[at])[:k]
        hits += any(candidate_ids[at] == query for at in nearest)
    return 100 * hits / len(query_ids)


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_that_of_sorting_every_query(seed):
    rng = np.random.default_rng(seed)
    image_ids, text_ids = gallery_ids(rng, images=37, most_texts=5)
    scores = rng.normal(size=(len(image_ids), len(text_ids)))
    scores += 1.5 * (image_ids[:, None] == text_ids)
    recalls = recall_at_k(scores, image_ids, text_ids)
    for k in (1, 5, 10):
        assert recalls[f"txt_r{k}"] == pytest.approx(brute_force(scores, image_ids, text_ids, k))
        assert recalls[f"img_r{k}"] == pytest.approx(brute_force(scores.T, text_ids, image_ids, k))
    assert 0 < recalls["txt_r1"] < recalls["txt_r10"] < 100


def test_a_perfect_model_scores_one_hundred_and_the_opposite_one_nothing():
    image_ids = np.arange(23)
    scores = np.eye(23)
    assert set(recall_at_k(scores, image_ids, image_ids).values()) == {100.0}
    assert set(recall_at_k(-scores, image_ids, image_ids).values()) == {0.0}


def test_constant_scores_give_chance():
    image_ids, text_ids = gallery_ids(np.random.default_rng(0), images=31, most_texts=5)
    recalls = recall_at_k(np.full((len(image_ids), len(text_ids)), 0.3), image_ids, text_ids)
    chance = chance_at_k(image_ids, text_ids)
    for k in (1, 5, 10):
        assert recalls[f"txt_r{k}"] == pytest.approx(chance[f"txt_chance_r{k}"])
        assert recalls[f"img_r{k}"] == pytest.approx(chance[f"img_chance_r{k}"])


def test_equal_scores_count_as_the_mean_over_their_orders():
    rng = np.random.default_rng(1)
    image_ids, text_ids = gallery_ids(rng, images=13, most_texts=3)
    scores = rng.integers(0, 4, (len(image_ids), len(text_ids))).astype(float)
    shuffles = [
        recall_at_k(scores + 1e-3 * rng.random(scores.shape), image_ids, text_ids)
        for _ in range(2000)
    ]
    for name, value in recall_at_k(scores, image_ids, text_ids).items():
        drawn = [shuffle[name] for shuffle in shuffles]
        error = np.std(drawn) / np.sqrt(len(drawn))
        assert value == pytest.approx(np.mean(drawn), abs=4 * error + 1e-9)


def test_chance_is_hypergeometric():
    image_ids = np.arange(11)
    text_ids = np.repeat(image_ids, 5)
    chance = chance_at_k(image_ids, text_ids)
    for k in (1, 5, 10):
        texts = 100 * (1 - comb(50, k) / comb(55, k))
        images = 100 * k / 11
        assert chance[f"txt_chance_r{k}"] == pytest.approx(texts)
        assert chance[f"img_chance_r{k}"] == pytest.approx(images)
        assert chance[f"chance_r{k}"] == pytest.approx((texts + images) / 2)
    one_text_each = chance_at_k(np.arange(1000), np.arange(1000))
    assert one_text_each["chance_r1"] == pytest.approx(0.1)


def test_scores_that_are_nan_are_refused():
    scores = np.eye(5)
    scores[2, 3] = np.nan
    with pytest.raises(ValueError, match="1 of 5 queries .* NaN"):
        recall_at_k(scores, np.arange(5), np.arange(5))


def test_a_text_without_its_image_is_refused():
    with pytest.raises(ValueError, match="1 queries have no matching candidate"):
        recall_at_k(np.ones((3, 4)), np.arange(3), np.arange(4))
    with pytest.raises(ValueError, match="no matching candidate"):
        chance_at_k(np.arange(3), np.arange(4))
