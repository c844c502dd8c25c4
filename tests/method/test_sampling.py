"""What a step draws, by counting: rates against the stated probabilities, and that forbidden
choices never occur.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from codebook_jax.data.text import Vocabulary
from codebook_jax.method.masking import Masking, mask_words
from codebook_jax.method.matching import draw_negatives, may_be_negatives

SPECIAL = (0, 1, 2, 3, 4)
VOCABULARY = Vocabulary(size=47, pad_id=0, cls_id=2, sep_id=3, mask_id=4, special_ids=SPECIAL)
BERT = dict(probability=0.15, mask_share=0.8, random_share=0.1)


def texts(count, tokens, seed=0):
    """[CLS] words [SEP], then padding, of different lengths."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(5, VOCABULARY.size, (count, tokens))
    lengths = rng.integers(3, tokens + 1, count)
    place = np.arange(tokens)[None, :]
    rows = np.where(place == lengths[:, None] - 1, VOCABULARY.sep_id, rows)
    rows = np.where(place >= lengths[:, None], VOCABULARY.pad_id, rows)
    rows[:, 0] = VOCABULARY.cls_id
    return rows.astype(np.int32)


def masked(tokens, *, slots, seed=0, **changes):
    ids = dict(special_ids=SPECIAL, mask_id=VOCABULARY.mask_id, vocabulary_size=VOCABULARY.size)
    hide = jax.jit(lambda k, t: mask_words(k, t, Masking(slots=slots, **(BERT | changes)), **ids))
    return jax.tree.map(np.asarray, hide(jax.random.key(seed), tokens))


def assert_within(count, total, probability, sigmas=4.5):
    """A count of independent draws lies where a binomial one does."""
    spread = np.sqrt(total * probability * (1 - probability))
    assert abs(count - total * probability) < sigmas * spread, (count / total, probability)


def test_fifteen_of_a_hundred_words_are_hidden_and_those_by_eighty_ten_ten():
    tokens = texts(8000, 23)
    found = masked(tokens, slots=23)  # as many slots as tokens: nothing is left over
    words = ~np.isin(tokens, SPECIAL)
    hidden = found.used.sum()
    assert_within(hidden, words.sum(), 0.15)
    shown = np.take_along_axis(found.tokens, found.positions, axis=1)[found.used]
    true = found.words[found.used]
    plain = VOCABULARY.size - len(SPECIAL)
    assert_within((shown == VOCABULARY.mask_id).sum(), hidden, 0.8)
    assert_within((shown == true).sum(), hidden, 0.1 + 0.1 / plain)
    other = shown[(shown != VOCABULARY.mask_id) & (shown != true)]
    assert_within(len(other), hidden, 0.1 * (1 - 1 / plain))
    assert not np.isin(shown[shown != VOCABULARY.mask_id], SPECIAL).any()


def test_random_words_are_uniform_over_the_words_that_are_not_special():
    tokens = np.full((3000, 11), 5, np.int32)
    found = masked(tokens, slots=11, probability=1.0, mask_share=0.0, random_share=1.0)
    counts = np.bincount(found.tokens.ravel(), minlength=VOCABULARY.size)
    assert counts[list(SPECIAL)].sum() == 0
    assert chisquare(counts[len(SPECIAL) :]).pvalue > 1e-4


def test_special_tokens_and_padding_are_never_hidden_even_when_every_word_is():
    tokens = texts(300, 23, seed=1)
    found = masked(tokens, slots=23, probability=1.0, mask_share=1.0, random_share=0.0)
    special = np.isin(tokens, SPECIAL)
    np.testing.assert_array_equal(found.tokens, np.where(special, tokens, VOCABULARY.mask_id))
    np.testing.assert_array_equal(found.used.sum(axis=1), (~special).sum(axis=1))


def test_slots_say_where_what_stood_and_all_else_is_as_it_was():
    tokens = texts(500, 23, seed=2)
    found = masked(tokens, slots=5, probability=0.3)
    rebuilt = found.tokens.copy()
    for row in range(len(tokens)):
        places = found.positions[row][found.used[row]]
        assert len(set(places)) == len(places) <= 5
        np.testing.assert_array_equal(tokens[row, places], found.words[row][found.used[row]])
        rebuilt[row, places] = found.words[row][found.used[row]]
    np.testing.assert_array_equal(rebuilt, tokens)
    assert (found.positions[~found.used] == 0).all()
    assert found.used.any() and not found.used.all()


def test_excess_words_stay_by_lot_so_that_no_place_is_favoured():
    tokens = np.full((12_000, 14), 5, np.int32)
    tokens[:, 0], tokens[:, -1] = VOCABULARY.cls_id, VOCABULARY.sep_id
    found = masked(tokens, slots=3, probability=1.0)
    assert found.used.all()  # twelve words chosen, three slots
    counts = np.bincount(found.positions.ravel(), minlength=14)
    assert counts[0] == counts[-1] == 0
    for count in counts[1:-1]:
        assert_within(count, 12_000, 3 / 12)


def test_another_key_hides_other_words_and_the_same_key_the_same():
    tokens = texts(50, 23, seed=3)
    first, again, other = (masked(tokens, slots=5, seed=seed).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def drawn(queries, candidates, image_id, groups, *, temperature, seed, draws=1):
    allowed = may_be_negatives(image_id, groups)
    choose = jax.jit(
        jax.vmap(
            lambda noise: draw_negatives(
                queries, candidates, allowed, noise, groups, temperature=jnp.float32(temperature)
            )
        )
    )
    noise = jax.random.gumbel(jax.random.key(seed), (draws, *allowed.shape))
    return np.asarray(choose(noise))


def unit_rows(rng, rows, dim):
    x = rng.normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_negatives_come_in_proportion_to_the_softmax_over_the_others_of_their_group():
    rng = np.random.default_rng(0)
    queries, candidates = unit_rows(rng, 12, 6), unit_rows(rng, 12, 6)
    image_id = np.array([7, 1, 7, 2, 3, 4, 5, 5, 8, 9, 6, 0], np.int32)
    draws, groups, temperature = 40_000, 2, 0.4
    places = drawn(
        queries, candidates, image_id, groups, temperature=temperature, seed=0, draws=draws
    )
    for row in range(12):
        start = 6 * (row // 6)
        members = np.arange(start, start + 6)
        allowed = image_id[members] != image_id[row]
        logits = candidates[members].astype(np.float64) @ queries[row] / temperature
        expected = softmax(np.where(allowed, logits, -np.inf))
        counts = np.bincount(places[:, row], minlength=6)
        assert (counts[~allowed] == 0).all()
        fit = chisquare(counts[allowed], draws * expected[allowed])
        assert fit.pvalue > 1e-4, (row, counts / draws, expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_negatives_are_never_of_the_same_image_and_stay_in_the_group(groups):
    rng = np.random.default_rng(1)
    image_id = rng.integers(0, 9, 16).astype(np.int32)
    queries, candidates = unit_rows(rng, 16, 5), unit_rows(rng, 16, 5)
    places = drawn(queries, candidates, image_id, groups, temperature=0.07, seed=1, draws=64)
    size = 16 // groups
    assert ((places >= 0) & (places < size)).all()
    chosen = places + size * (np.arange(16) // size)
    some = np.array(
        [
            len({image_id[i] for i in range(size * (r // size), size * (r // size) + size)}) > 1
            for r in range(16)
        ]
    )
    assert some.sum() > 8
    assert (image_id[chosen] != image_id[None, :])[:, some].all()


def test_saturated_similarities_still_leave_the_pair_itself_out():
    # Cosine 1 at the coldest temperature against -1: a softmax first and a zeroed diagonal after
    # would leave nothing.
    queries = np.array([[1, 0], [1, 0], [-1, 0], [0, 1]], np.float32)
    candidates = np.array([[1, 0], [-1, 0], [-1, 0], [-1, 0]], np.float32)
    places = drawn(
        queries, candidates, np.arange(4, dtype=np.int32), 1, temperature=0.001, seed=2, draws=3000
    )
    counts = np.bincount(places[:, 0], minlength=4)
    assert counts[0] == 0 and chisquare(counts[1:]).pvalue > 1e-4  # equal among the three
    assert (places[:, 1] == 0).all()  # the only one that is near
    assert set(places[:, 2]) == {1, 3}


def test_a_row_whose_group_is_all_of_its_image_has_nobody_to_be_paired_with():
    image_id = np.array([5, 5, 5, 1, 2, 5], np.int32)
    allowed = np.asarray(may_be_negatives(image_id, 2))
    np.testing.assert_array_equal(allowed[:3], False)
    np.testing.assert_array_equal(
        allowed[3:], [[False, True, True], [True, False, True], [True, True, False]]
    )
    rng = np.random.default_rng(3)
    places = drawn(
        unit_rows(rng, 6, 4), unit_rows(rng, 6, 4), image_id, 2, temperature=0.07, seed=3
    )
    assert ((places >= 0) & (places < 3)).all()  # a place all the same: shapes do not change


def test_drawing_negatives_sends_no_gradient():
    rng = np.random.default_rng(4)
    queries, candidates = unit_rows(rng, 4, 3), unit_rows(rng, 4, 3)
    allowed = may_be_negatives(np.arange(4, dtype=np.int32), 1)

    def chosen_similarity(queries, temperature):
        noise = jax.random.gumbel(jax.random.key(0), (4, 4))
        place = draw_negatives(queries, candidates, allowed, noise, 1, temperature=temperature)
        return jnp.sum(jnp.asarray(candidates)[place])

    gradients = jax.grad(chosen_similarity, argnums=(0, 1))(queries, jnp.float32(0.07))
    assert all((np.asarray(g) == 0).all() for g in gradients)
