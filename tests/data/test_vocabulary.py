# ruff: noqa: RUF001
"""A trained vocabulary in any language: spellings stay distinct, nothing is unknown, and older
tokenizers still work.
"""

import itertools
import unicodedata

import numpy as np
import pytest
import tokenizers
from small_data import tokenizer_for_run
from transformers import PreTrainedTokenizerFast

from codebook_jax.data.text import UserError, said_unknown, train_vocabulary, unknown_in

# Letters of each language, the marks that tell its words apart, and what stands between words.
LANGUAGES = {
    "hindi": ("कखगचजतदनपफबमलसह", ("", "ा", "ि", "ी", "ु", "ू", "े", "ै", "ो", "ं", "ँ"), " "),
    "thai": ("กขคงจชดตทนบปพมรลว", ("", "่", "้", "๊", "ิ", "ี", "ึ", "ื", "ุ", "ู", "ั"), ""),
    "japanese": ("かきくけこさしすせそたてと", ("", "\u3099", "ー", "っ", "ん"), ""),
    "vietnamese": ("bcdghklmnpst", "a à á ả ã ạ ă ắ â ấ ơ ờ".split(), " "),
    "spanish": ("bcdfglmnprst", "a á e é i í o ó u ú ü añ an".split(), " "),
    "arabic": ("بتثجحخدذرزسشصضطظ", ("", "َ", "ُ", "ِ", "ّ", "ا", "أ", "إ", "آ"), " "),
}


def captions_in(language, count=500):
    """`count` distinct captions of words that differ in one mark."""
    letters, marks, space = LANGUAGES[language]
    words = [a + x + b + y for a, b in itertools.pairwise(letters) for x in marks for y in marks]
    words = list(dict.fromkeys(unicodedata.normalize("NFC", word) for word in words))
    rng = np.random.default_rng(0)
    return [
        space.join([words[at % len(words)], *rng.choice(words, 4), words[at // len(words)]])
        for at in range(count)
    ]


def tokens_of(trained, captions):
    return [tuple(found.ids) for found in trained.encode_batch(captions, add_special_tokens=False)]


@pytest.mark.parametrize("language", [*LANGUAGES, "all"])
def test_captions_that_differ_in_a_mark_have_different_tokens_and_none_unknown(language, tmp_path):
    names = LANGUAGES if language == "all" else [language]
    captions = list(itertools.chain(*map(captions_in, names)))
    words = {word for caption in captions for word in caption.split()}
    trained = train_vocabulary(captions, 8192)
    for texts in (captions, sorted(words)):
        assert len(set(tokens_of(trained, texts))) == len(set(texts)) >= 100
    unknown, tokens = unknown_in(captions, tokenizer_for_run("", tmp_path, captions, 8192))
    assert unknown == 0 and tokens > 1000
    sentence = said_unknown(unknown, tokens, "")
    assert "0 of" in sentence and "warning" not in sentence


@pytest.fixture(scope="module")
def english():
    return train_vocabulary(["a man and a dog in the park", "two dogs on grass"] * 10, 8192)


DIFFERENT = [
    *(("फूल", "फल"), ("ข้าว", "ข่าว"), ("bò", "bơ"), ("かぎ", "かき"), ("año", "ano")),
    *(("红", "绿"), ("🙂", "🙁"), ("👩\u200d👩\u200d👧", "👩👩👧"), ("🇫🇷", "🇩🇪")),
    *(("#\ufe0f\u20e3", "*\ufe0f\u20e3"), ("xylophone", "saxophone"), ("col·legi", "collegi")),
    *(("می\u200cخواهم", "میخواهم"), ("猫、犬", "猫犬")),
    *(("a" * 150, "a" * 149 + "b"), ("ก" * 150, "ก" * 149 + "ข")),
]
SAME = [
    ("Café", "cafe\u0301"),  # NFC and NFD
    *((word, unicodedata.normalize("NFD", word)) for word in ("한국", "bờ")),
    ("ＡＢＣ１２", "abc12"),  # full width
    ("ｶﾞ", "ガ"),  # half width
    *(("猫、犬。「走る」！", "猫 犬 走る"), ("¿Qué? «sí»", "qué sí"), ("हाँ। नहीं॥", "हाँ नहीं")),
    *(("نعم، لا؟", "نعم لا"), ("猫，犬", "猫 犬"), ("man’s", "man's"), ("3～5", "3 5")),
    *(("a\u200bb\ufeff\u00ad\x00c", "a bc"), ("black-white/red", "black white red")),
]


def test_letters_that_no_caption_has_are_told_apart_and_known(english):
    for pair in DIFFERENT:
        first, second = tokens_of(english, pair)
        assert first != second, pair
        assert english.token_to_id("[UNK]") not in (*first, *second), pair


def test_what_is_the_same_text_or_says_nothing_has_the_same_tokens(english):
    for pair in SAME:
        first, second = tokens_of(english, pair)
        assert first == second, pair


def test_no_text_is_unknown(english):
    rng = np.random.default_rng(0)
    codes = rng.integers(1, [[0x80], [0x2200], [0xD800], [0x30000]], (4, 10_000)).ravel()
    codes = rng.permutation(codes[(codes < 0xD800) | (codes >= 0xE000)]).tolist()
    texts = ["".join(map(chr, codes[at : at + 8])) for at in range(0, len(codes), 8)]
    unknown = english.token_to_id("[UNK]")
    assert not any(unknown in found for found in tokens_of(english, texts))


def test_what_was_cut_can_be_put_together_again(english):
    text = "two dogs 走る café 🙂"
    assert english.decode(english.encode(text).ids) == text


def test_case_and_accents_are_dropped_as_asked():
    captions = ["Año ano ANO"] * 3
    cased = train_vocabulary(captions, 8192, lowercase=False)
    assert len(set(tokens_of(cased, ["Ano", "ano", "año"]))) == 3
    plain = train_vocabulary(captions, 8192, strip_accents=True)
    assert len(set(tokens_of(plain, ["Año", "ano", "ANO"]))) == 1


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red circle ##s ano हल म ##ा".split()


@pytest.fixture
def earlier(tmp_path):
    """A workdir with a tokenizer as older runs trained it."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    trained = tokenizers.Tokenizer(model)
    trained.normalizer = tokenizers.normalizers.BertNormalizer()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trained.add_special_tokens(WORDS[:5])
    kinds = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    kept = PreTrainedTokenizerFast(tokenizer_object=trained, **kinds)
    kept.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_a_tokenizer_of_an_earlier_run_gives_the_tokens_that_it_gave(earlier):
    tokenizer = tokenizer_for_run("", earlier, ["new captions"], 8192)
    captions = ["A red-circles!", "año, ANO", "फूल a", "红 " + "a" * 101, "a—red", "हल।"]
    tokens, lengths, _ = tokenizer.encode(captions, 8)
    given = [tokens[row, 1 : length - 1].tolist() for row, length in enumerate(lengths)]
    assert given == [[5, 6, 7, 8], [9, 9], [1, 5], [1, 1], [5, 1, 6], [10, 1]]


def test_unknown_tokens_are_counted_warned_of_and_named(earlier):
    captions = ["a red circle"] * 8 + ["a xylophone 🙂"] * 2
    tokenizer = tokenizer_for_run("", earlier, None, 0)
    unknown = unknown_in(captions, tokenizer)
    assert unknown == (4, 30)
    sentence = said_unknown(*unknown, "10 captions")
    assert sentence.startswith("warning") and "4 of 30" in sentence and "13.33%" in sentence
    assert tokenizer.unknown_words(captions) == ["xylophone", "🙂"]


def test_spelling_is_for_a_trained_tokenizer_alone(earlier, tmp_path):
    given = str(earlier / "tokenizer")
    with pytest.raises(UserError, match="tokenizer_strip_accents"):
        tokenizer_for_run(given, tmp_path / "run", None, 100, strip_accents=True)
