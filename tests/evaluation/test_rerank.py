"""Retrieval on a whole source: re-ranking against an oracle, and no number changed by padding or
chunking.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_gallery import TOKENS, Digits, Numbers, Oracle, config_of, evaluate

from codebook_jax.errors import UserError
from codebook_jax.evaluation import recall, retrieval
from codebook_jax.evaluation.encoding import encode_source
from codebook_jax.evaluation.rerank import Scoring, pair_rows, promoted
from codebook_jax.parallel import sharding


def recalls(values):
    return {name: value for name, value in values.items() if name[-2:] in ("r1", "r5", "10")}


def test_an_oracle_that_matches_finds_every_pair_among_enough_candidates():
    results = evaluate(Numbers(37), **{"evaluation.rerank_top_k": 100})
    assert set(results) == {"student/dual", "teacher/dual", "student/reranked"}
    reranked = results["student/reranked"]
    assert all(reranked[f"{side}_r{k}"] == 100 for side in ("txt", "img") for k in (1, 5, 10))
    assert results["student/dual"]["txt_r1"] < 60
    assert results["student/dual"]["images"] == 37 and results["student/dual"]["texts"] == 37 + 18


def test_the_weight_of_the_cosine_decides_between_the_head_and_the_dual_encoder():
    by_weight = [
        evaluate(Numbers(37), cosine_weight=weight)["student/reranked"] for weight in (0.0, 1e6)
    ]
    dual = evaluate(Numbers(37))["student/dual"]
    assert recalls(by_weight[1]) == recalls(dual) != recalls(by_weight[0])


def test_re_ranking_cannot_find_what_is_not_among_the_candidates():
    """Re-ranking the top k keeps R@k of the dual encoder, and an oracle moves all of it to R@1."""
    results = evaluate(Numbers(37), **{"evaluation.rerank_top_k": 5})
    dual, reranked = results["student/dual"], results["student/reranked"]
    for side in ("txt", "img"):
        assert reranked[f"{side}_r5"] == pytest.approx(dual[f"{side}_r5"])
        assert reranked[f"{side}_r1"] == pytest.approx(dual[f"{side}_r5"])
        assert dual[f"{side}_r1"] < reranked[f"{side}_r1"] < 100


def test_the_rest_keeps_the_order_of_the_dual_encoder_below_the_candidates():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32)
    result = promoted(scores, np.array([[0, 2]]), np.array([[-3.0, 5.0]]))
    assert np.argsort(-result[0]).tolist() == [2, 0, 1, 3, 4]
    tied = promoted(scores, np.array([[0, 2]]), np.array([[1.0, 1.0]]))
    assert tied[0, 0] == tied[0, 2] > tied[0, 1]


@pytest.mark.parametrize("batch", [3, 8, 50])
def test_no_number_depends_on_how_the_source_is_cut_into_batches(batch):
    expected = evaluate(Numbers(37))
    assert evaluate(Numbers(37), **{"evaluation.batch": batch}) == expected


def test_no_number_depends_on_how_many_scores_are_compared_at_once(monkeypatch):
    expected = evaluate(Numbers(37))
    monkeypatch.setattr(recall, "CELLS_AT_ONCE", 128)
    assert evaluate(Numbers(37)) == expected


def test_pairs_are_scored_one_by_one_whatever_row_they_stand_in():
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(0, 9, 70))
    texts = rng.integers(0, 30, 70)
    rows, row_texts, places = pair_rows(images, texts, 4)
    assert (np.repeat(rows, 4)[places] == images).all() and (
        row_texts.ravel()[places] == texts
    ).all()
    assert len(np.unique(places)) == 70


def test_unreadable_images_are_left_out_with_their_captions_and_said(capsys):
    whole, holed = Numbers(20), Numbers(21, broken=(20,))
    expected, results = evaluate(whole), evaluate(holed)
    assert recalls(results["student/dual"]) == recalls(expected["student/dual"])
    assert results["student/dual"]["left_out"] == 1
    assert "1 of 21 images could not be read" in capsys.readouterr().out
    with pytest.raises(UserError, match="0 of 3 could be read"):
        evaluate(Numbers(3, broken=(0, 1, 2)))


def test_weights_that_are_not_finite_are_refused():
    mesh = sharding.make_mesh(-1, 1, 1)
    with pytest.raises(UserError, match=r"student's features of .* are not finite"):
        towers = Oracle(mesh, float("nan")), {"student": 0.0}
        encode_source(*towers, Numbers(9), Digits(), config_of(), images=0)


def test_the_table_says_what_is_at_chance(capsys):
    results = evaluate(Numbers(37), rerank=False)
    table = retrieval.format_table(results)
    assert (
        "student/dual" in table
        and "37 images, 55 texts" in table
        and "better than chance" not in table
    )
    constant = evaluate(Numbers(37), noise=1e3, rerank=False)
    low = {
        name: dict(values, **{k: 0.0 for k in recalls(values) if "chance" not in k})
        for name, values in constant.items()
    }
    assert "student/dual is no better than chance" in retrieval.format_table(low)


def test_only_as_many_images_as_asked_are_read():
    results = evaluate(Numbers(37), rerank=False, images=10)
    values = results["student/dual"]
    assert (values["images"], values["images_listed"]) == (10, 37)
    assert retrieval.format_table(results).startswith("10 of 37 images")
    assert jax.device_count() == 8  # rows were padded over eight devices all along


class Table:
    """Features and tokens from tables of random numbers; pairs are scored by a bilinear form."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        self.mesh = sharding.make_mesh(-1, 1, 1)
        shapes = {"image": (count, 7), "text": (count, 7), "patches": (count, 3, 5)}
        shapes |= {"states": (count, TOKENS, 5), "form": (5, 5)}
        self.of = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        for side in ("image", "text"):
            self.of[side] /= np.linalg.norm(self.of[side], axis=1, keepdims=True)
        self.of["text"] = 0.3 * self.of["image"] + 0.7 * self.of["text"]
        self.single = {name: jnp.float32(array) for name, array in self.of.items()}

    def encode_images(self, towers, images):
        number = images[:, 0, 0, 0].astype(int)
        return self.single["image"][number], self.single["patches"][number]

    def encode_texts(self, towers, tokens, lengths):
        return self.single["text"][tokens[:, 0]], self.single["states"][tokens[:, 0]]

    def match(self, tokens, states, lengths):
        products = (tokens.mean(axis=1), self.single["form"], states.mean(axis=2))
        return jnp.einsum("rw,wv,rtv->rt", *products, precision="highest")

    def scores(self, cosine_weight):
        """Of all images and texts, in float64, and the cosines alone."""
        image, text = self.of["patches"].mean(axis=1), self.of["states"].mean(axis=1)
        cosines = self.of["image"] @ self.of["text"].T
        return image @ self.of["form"] @ text.T + cosine_weight * cosines, cosines


def test_all_pairs_re_ranked_are_those_that_float64_sorts():
    source, table = Numbers(41, broken=(3, 40)), Table(41)
    results = retrieval.evaluate(
        table,
        {"student": 0.0},
        source,
        Digits(),
        config_of(**{"evaluation.rerank_top_k": 1000}),
        images=0,
        scoring=Scoring(table.match, 0.5),
    )
    images = [at for at in range(41) if at not in source.broken]
    texts = [at for at in images for _ in range(1 + at % 2)]
    for protocol, scores in zip(("reranked", "dual"), table.scores(0.5), strict=True):
        scores, found = scores[np.ix_(images, texts)], results[f"student/{protocol}"]
        own = np.array(images)[:, None] == np.array(texts)
        for side, ranked, right in (("txt", scores, own), ("img", scores.T, own.T)):
            best = np.where(right, ranked, -np.inf).max(axis=1, keepdims=True)
            above = (ranked > best).sum(axis=1)
            for k in (1, 5, 10):
                assert found[f"{side}_r{k}"] == pytest.approx(100 * np.mean(above < k))
    assert recalls(results["student/reranked"]) != recalls(results["student/dual"])
