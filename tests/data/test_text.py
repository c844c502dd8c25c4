"""Cleaning and tokenising captions, and the tokenizer that a run keeps."""

import hashlib
import itertools
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from small_data import scenes_source, tokenizer_for_run, tokenizer_of

from codebook_jax.data import scenes
from codebook_jax.data.sources.record import sample_captions
from codebook_jax.data.text import clean, train_vocabulary
from codebook_jax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer_of(scenes_source(300), folder, 8192)
    return folder


@pytest.fixture(scope="module")
def tokenizer(workdir):
    return tokenizer_for_run("", workdir, None, 8192)


@pytest.fixture(scope="module")
def reference(workdir):
    """The same folder read by transformers itself."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(workdir / "tokenizer")


def test_captions_are_cleaned_as_albef_cleans_them():
    assert clean('A man\'s hat; (red), "old"!') == "a mans hat red old"
    assert clean("well-known black/white  <person>\n") == "well known black white person"
    assert clean("*#:;~?!.,'\"()") == ""


def test_half_a_character_costs_no_caption(tokenizer):
    halves = json.loads(r'"a red \ud83d square \ude00"')
    assert clean(halves) == "a red square"
    np.testing.assert_array_equal(
        tokenizer.encode([halves], 24)[0], tokenizer.encode(["a red square"], 24)[0]
    )
    assert train_vocabulary([halves] * 2, 400).get_vocab().keys() >= {"red", "square"}


def test_the_kept_tokenizer_is_read_by_transformers_and_gives_the_same_tokens(tokenizer, reference):
    captions = ["A small red circle!", 'A man\'s hat; (red), "old"!', "3:45 #1 ~ *", "", "???"]
    captions.append("étoile 東京, well-known black/white  <person>\n")
    tokens, lengths, truncated = tokenizer.encode(captions, 64)
    assert tokens.shape == (6, 64) and tokens.dtype == lengths.dtype == np.int32 and not truncated
    assert lengths[4] == 2
    for row, caption in enumerate(captions):
        for text in (caption, clean(caption)):  # a trained tokenizer cleans by itself
            assert tokens[row, : lengths[row]].tolist() == reference(text)["input_ids"]
        assert (tokens[row, lengths[row] :] == reference.pad_token_id).all()
    assert tokenizer.encode([], 8).tokens.shape == (0, 8)
    vocabulary = tokenizer.vocabulary
    assert vocabulary.size == len(reference)
    for name in ("pad", "cls", "sep", "mask"):
        assert getattr(vocabulary, f"{name}_id") == getattr(reference, f"{name}_token_id")
    assert set(vocabulary.special_ids) == set(reference.all_special_ids)


def test_a_special_token_in_a_caption_is_only_words(tokenizer):
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
            tokens, lengths, _ = one.encode([f"a {name} star", f"a {name.lower()} star"], 16)
            inside = tokens[0, 1 : lengths[0] - 1]
            assert not set(inside.tolist()) & set(one.vocabulary.special_ids)
            assert (tokens[0] == tokens[1]).all()


def test_a_long_caption_is_cut_and_counted_and_still_ends(tokenizer):
    captions = ["red " * 6, "red " * 7, "red " * 100]
    tokens, lengths, truncated = tokenizer.encode(captions, 8)
    assert truncated == 2 and lengths.tolist() == [8, 8, 8]
    assert (tokens[:, 7] == tokenizer.vocabulary.sep_id).all()
    assert len(set(map(tuple, tokens.tolist()))) == 1


def test_every_caption_of_the_scenes_fits_24_tokens_and_has_no_unknown_word(tokenizer, reference):
    captions = list(itertools.chain(*map(scenes_source(3000).captions, range(3000))))
    for split in ("validation", "test"):
        for listed in (scenes.evaluation_scenes(split), scenes.hard_scenes(split)):
            captions += [caption for _, caption in listed]
    tokens, lengths, truncated = tokenizer.encode(captions, 24)
    assert truncated == 0 and lengths.max() <= 24
    assert not (tokens == reference.unk_token_id).any()


def test_the_captions_of_the_scenes_have_the_tokens_that_recorded_figures_were_made_with(tokenizer):
    captions = list(sample_captions(scenes_source(300)))
    tokens, lengths, _ = tokenizer.encode(captions, 64)
    ids = [row[1 : length - 1].tolist() for row, length in zip(tokens, lengths, strict=True)]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert digest == "79a75dbc020ea3e58b160b9cee4303668d718c6785739548655efbad52b4e8c1"


def test_the_tokens_of_a_caption_belong_to_its_words(tokenizer):
    caption = "A zebra's  [MASK] left-hand; 東京 red!"
    words = tokenizer.words(caption, 64)
    spelled = ["A", "zebra's", "[", "MASK", "]", "left", "hand", "東京", "red"]
    assert [text for text, _ in words] == spelled
    (tokens,), (length,), _ = tokenizer.encode([caption], 64)
    places = [place for _, own in words for place in range(own.start, own.stop)]
    assert places == list(range(1, length - 1))  # all but [CLS] and [SEP]
    for text, own in words:
        assert tokenizer.decode(tokens[own]).replace(" ", "") == text.lower().replace("'", "")
    cut = tokenizer.words(caption, 4)
    assert max(own.stop for _, own in cut) == 3 and cut[0] == words[0]
    assert tokenizer.words("?!", 24) == []


def test_threads_and_pickling_change_no_token(tokenizer):
    captions = list(sample_captions(scenes_source(), 200))
    expected = tokenizer.encode(captions, 12)[0]
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.vocabulary == tokenizer.vocabulary
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(one.encode, captions, 12) for one in [tokenizer, other] * 8]
        for job in jobs:
            np.testing.assert_array_equal(job.result()[0], expected)


TRAIN = """
import json, sys
from codebook_jax.data.text import train_vocabulary
print(json.dumps(train_vocabulary(json.load(open(sys.argv[1])), 400).get_vocab()))
"""


def test_training_gives_the_same_vocabulary_in_every_process(tmp_path):
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyzåéß0123東京")
    words = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(500)]
    captions = [" ".join(rng.choice(words, 8)) for _ in range(500)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(captions))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(path)], capture_output=True, text=True, check=True
    )
    vocabulary = train_vocabulary(captions, 400).get_vocab()
    assert json.loads(done.stdout) == vocabulary
    assert sorted(vocabulary.values()) == list(range(400))


def test_frequent_words_become_whole_tokens_and_the_size_is_a_limit():
    captions = ["the elephant sleeps"] * 50 + ["a zebra runs"] * 20 + ["qwxyz"]
    large = train_vocabulary(captions, 8192)
    assert large.encode("elephant", add_special_tokens=False).tokens == ["elephant"]
    assert train_vocabulary(captions, 270).get_vocab_size() <= 270


def test_a_run_keeps_its_tokenizer_and_another_run_copies_it(workdir, tokenizer, tmp_path):
    again = tokenizer_for_run("", workdir, ["other"], 100)
    copied = tokenizer_for_run(str(workdir / "tokenizer"), tmp_path / "new" / "run", None, 1)
    assert again.vocabulary == copied.vocabulary == tokenizer.vocabulary
    assert [path.name for path in workdir.iterdir()] == ["tokenizer"]
    assert (tmp_path / "new" / "run" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("config", [None, '{"model_type": "bert"}'])
def test_a_list_of_word_pieces_is_read_as_berts(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s", "Red"]
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    if config:
        (tmp_path / "words" / "config.json").write_text(config)
    first = tokenizer_for_run("~/words", tmp_path / "run", None, 1)
    for tokenizer in (first, tokenizer_for_run("", tmp_path / "run", None, 1)):
        assert tokenizer.vocabulary == (9, 0, 2, 3, 4, (0, 1, 2, 3, 4))
        assert tokenizer.encode(["Red circles."], 8)[0][0].tolist() == [2, 5, 6, 7, 3, 0, 0, 0]
    with pytest.raises(UserError, match=r"vocab\.txt' cannot be loaded .*give a folder"):
        tokenizer_for_run(str(tmp_path / "words" / "vocab.txt"), tmp_path / "other", None, 1)


@pytest.mark.parametrize(
    "specials",
    [("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), ("<pad>", "<unk>", "<s>", "</s>", "<mask>")],
)
def test_a_tokenizer_json_alone_is_read_with_its_special_tokens(tmp_path, specials):
    words = {word: number for number, word in enumerate((*specials, "red", "circle"))}
    saved = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=specials[1]))
    saved.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "saved").mkdir()
    saved.save(str(tmp_path / "saved" / "tokenizer.json"))
    tokenizer = tokenizer_for_run(str(tmp_path / "saved"), tmp_path / "run", None, 1)
    kept = tokenizer_for_run("", tmp_path / "run", None, 1)
    for one in (tokenizer, kept):
        assert one.vocabulary == (7, 0, 2, 3, 4, (0, 1, 2, 3, 4))
        assert one.encode(["a red circle"], 6)[0].tolist() == [[2, 1, 5, 6, 3, 0]]
        tokens, lengths, _ = one.encode([" ".join(specials)], 20)
        assert not {0, 2, 3, 4} & set(tokens[0, 1 : lengths[0] - 1].tolist())


def test_a_tokenizer_that_cannot_be_had_is_refused_with_the_choices(tmp_path):
    with pytest.raises(UserError, match="config.data.tokenizer='no/such-tokenizer' .*hub"):
        tokenizer_for_run("no/such-tokenizer", tmp_path / "a", None, 100)
    with pytest.raises(UserError, match="b/tokenizer is missing"):
        tokenizer_for_run("", tmp_path / "b", None, 100)
    (tmp_path / "c" / "tokenizer").mkdir(parents=True)
    with pytest.raises(UserError, match="the run's tokenizer, cannot be loaded"):
        tokenizer_for_run("", tmp_path / "c", ["other"], 100)
    assert not (tmp_path / "a").exists()
