"""Trains a vocabulary on captions of any language, in which no word is unknown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT
_INSIDE = "##"  # before the tokens inside a word; BERT
_MOST_COUNTED = 10_000  # a word counts at most this often
_LEAST_PAIRS = 2  # a pair must occur this often to become a token: rarer ones teach nothing
_LONGEST = 48  # bytes of a token, 16 Thai letters: whole captions without spaces would become one

# Replaced by spaces, since they separate words: the zero width space, and punctuation that is not
# ASCII. Not the apostrophes of man’s and צה״ל, nor the dot of Catalan's col·legi.
_BETWEEN = r"[\u200B\uFF5E]|[\p{P}&&[^\x00-\x7F\u2018\u2019\u05F3\u05F4\u00B7]]"
# Removed: ALBEF's punctuation, those apostrophes, control characters, and marks of direction and
# order. Kept: the joiners, which Hindi, Persian and emoji need, and the keycaps # and *.
_LEFT_OUT = (
    r"""[,.'!?"():;~\u2018\u2019\u05F3\u05F4]|[*#](?!\uFE0F?\u20E3)|[\p{Cc}&&[^\s]]"""
    r"|[\u00AD\u061C\u200E\u200F\u202A-\u202E\u2060-\u2064\u2066-\u206F\uFEFF]"
)


def whole(caption: str) -> str:
    """The caption without lone surrogates, which JSON can hold and tokenizers refuse."""
    return caption.encode("utf-8", "ignore").decode("utf-8")


def train_vocabulary(
    captions: Iterable[str], size: int, *, lowercase: bool = True, strip_accents: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most `size` entries, or as many as the bytes alone need.

    Letters that no caption has still get different tokens. Entries inside a word begin with ##, as
    in BERT. The same captions give the same entries in the same order: the library's trainer
    numbers the letters inside words in hash-table order, so all letters are numbered before it
    starts; those missing from the captions come last and change no other number.
    """
    normalizer = _normalizer(lowercase=lowercase, strip_accents=strip_accents)
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counts = Counter(
        word for caption in captions for word in normalizer.normalize_str(whole(caption)).split()
    )
    words = sorted(counts)
    held = sorted(set("".join(piece for word in words for piece, _ in cut.pre_tokenize_str(word))))
    base = [*held, *(f"{_INSIDE}{letter}" for letter in held)]
    others = [letter for letter in _byte_letters(cut, normalizer) if letter not in set(base)]

    trained = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix=_INSIDE))
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), cut])
    trainer = trainers.BpeTrainer(
        vocab_size=max(1, size - len(others)),
        min_frequency=_LEAST_PAIRS,
        show_progress=False,
        special_tokens=[*SPECIALS, *base],
        limit_alphabet=len(held),
        initial_alphabet=held,
        continuing_subword_prefix=_INSIDE,
        max_token_length=_LONGEST,
    )
    repeated = (" ".join([word] * min(counts[word], _MOST_COUNTED)) for word in words)
    trained.train_from_iterator(repeated, trainer)
    vocabulary = trained.get_vocab()
    vocabulary |= {letter: len(vocabulary) + at for at, letter in enumerate(others)}
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    # Another tokenizer: in this one, all letters are special tokens.
    _, unknown, begin, end, _ = SPECIALS
    model = models.BPE(vocabulary, merges, unk_token=unknown, continuing_subword_prefix=_INSIDE)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, trained.pre_tokenizer
    starts = decoders.Replace(Regex(f"^(?!{_INSIDE})"), "Ġ")  # the byte level's space
    joins = decoders.Replace(Regex(f"^{_INSIDE}"), "")
    parts = [starts, joins, decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])],
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def _normalizer(*, lowercase: bool, strip_accents: bool) -> normalizers.Normalizer:
    """Cleans captions of every script as ALBEF's clean-up does English.

    NFKC, not NFC, also unifies full and half width, ligatures and presentation forms.
    """
    accents = [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]
    steps = [
        normalizers.Replace(Regex(_BETWEEN), " "),
        normalizers.NFKC(),
        *([normalizers.Lowercase()] if lowercase else []),
        *(accents if strip_accents else []),
        normalizers.Replace(Regex(_LEFT_OUT), ""),
        normalizers.Replace(Regex("[-/]"), " "),  # ALBEF
        normalizers.Replace("<person>", "person"),  # ALBEF
    ]
    return normalizers.Sequence(steps)


def _byte_letters(cut: pre_tokenizers.ByteLevel, normalizer: normalizers.Normalizer) -> list[str]:
    """Every byte of UTF-8 text as the byte level writes it, wherever in a word it can occur."""
    ascii = map(chr, range(0x21, 0x7F))
    plain = [c for c in ascii if normalizer.normalize_str(c) == c or c in "#*"]
    leading = [chr(byte) for byte in range(0xC2, 0xF5)]
    following = [cut.pre_tokenize_str(chr(code))[0][0][1] for code in range(0x80, 0xC0)]
    inside = [*filter(str.isalnum, plain), *leading, *following]  # punctuation is a word of its own
    return [*plain, *leading, *(f"{_INSIDE}{letter}" for letter in inside)]
