"""Captions to tokens: cleaning, the tokenizer, and the run's own copy of it."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_collections
import numpy as np
import tokenizers
from jaxtyping import Int32

from codebook_jax.data.network import hub_reachable
from codebook_jax.data.vocabulary import SPECIALS, train_vocabulary, whole
from codebook_jax.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "tokenizer"  # in a workdir
SAMPLED = 2000  # captions from which the share of unknown tokens is estimated
MOST_UNKNOWN = 0.01  # share of tokens; a run warns above it
LONGEST = 512  # token counts above it are counted as one

_WORDS = "vocab.txt"
_KINDS = ("pad", "unk", "cls", "sep", "mask")
_ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
_PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
_LETTER = re.compile(r"[^\W_\u115F\u1160\u3164\uFFA0]")  # not the four invisible letters
_SHOWS_NOTHING = "\ufffd\u2800\u115f\u1160"  # the first marks characters lost by a wrong encoding
_CLEANS = "cleans_captions"  # in tokenizer_config.json: needs no `clean`; older runs lack it


class Vocabulary(NamedTuple):
    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]


class Encoded(NamedTuple):
    tokens: Int32[np.ndarray, "captions tokens"]  # [CLS] words [SEP], padded on the right
    lengths: Int32[np.ndarray, " captions"]  # tokens before the padding
    truncated: int  # captions


@dataclasses.dataclass(eq=False)
class Tokenizer:
    """Captions to tokens. It can be pickled and used from several threads."""

    _tokenizer: tokenizers.Tokenizer
    vocabulary: Vocabulary
    unknown_id: int | None  # of unknown words
    _prepare: Callable[[str], str]  # `clean`, or `whole` for a tokenizer that cleans by itself

    def __post_init__(self) -> None:
        # A caption's "[MASK]" is a word, not the special token. Pickling loses this setting.
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._tokenizer, self.vocabulary, self.unknown_id, self._prepare)

    def _encodings(self, captions: Sequence[str]) -> list[tokenizers.Encoding]:
        """The tokens of each caption, without [CLS] and [SEP]."""
        texts = list(map(self._prepare, captions))
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def encode(self, captions: Sequence[str], max_tokens: int) -> Encoded:
        """The first `max_tokens` tokens of each caption, [CLS] and [SEP] included."""
        vocabulary = self.vocabulary
        tokens = np.full((len(captions), max_tokens), vocabulary.pad_id, np.int32)
        # Truncated here: the tokenizer's own setting belongs to an object that threads share.
        words = [encoding.ids for encoding in self._encodings(captions)]
        for row, ids in zip(tokens, words, strict=True):
            cut = [vocabulary.cls_id, *ids[: max_tokens - 2], vocabulary.sep_id]
            row[: len(cut)] = cut
        lengths = np.array([min(len(ids) + 2, max_tokens) for ids in words], np.int32)
        return Encoded(tokens, lengths, sum(len(ids) + 2 > max_tokens for ids in words))

    def words(self, caption: str, max_tokens: int) -> list[tuple[str, slice]]:
        """The words of a caption, and the places of each one's tokens in what `encode` returns."""
        (encoding,) = self._encodings([caption])
        text, found = self._prepare(caption), {}
        tokens = zip(encoding.word_ids, encoding.offsets, strict=True)
        for place, (word, (start, end)) in enumerate(list(tokens)[: max_tokens - 2], start=1):
            first, begin, *_ = found.get(word, (place, start))
            found[word] = first, begin, place + 1, end
        return [(text[begin:end], slice(at, stop)) for at, begin, stop, end in found.values()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of these tokens, without special ones."""
        return self._tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True).strip()

    def unknown_words(self, captions: Sequence[str]) -> list[str]:
        """The words that it reads as the unknown token, each once."""
        words = [
            self._prepare(caption)[slice(*place)]
            for caption, encoding in zip(captions, self._encodings(captions), strict=True)
            for number, place in zip(encoding.ids, encoding.offsets, strict=True)
            if number == self.unknown_id
        ]
        return list(dict.fromkeys(words))


def has_words(caption: str) -> bool:
    """Whether cleaning leaves a letter, digit or emoji; sources leave out other captions."""
    if _LETTER.search(caption):
        return True
    left = clean(unicodedata.normalize("NFKC", caption))
    return any(unicodedata.category(c)[0] in "LNS" and c not in _SHOWS_NOTHING for c in left)


def clean(caption: str) -> str:
    """The caption in lower case without punctuation; hyphens and slashes become spaces (ALBEF)."""
    caption = _PUNCTUATION.sub("", whole(caption).lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


def unknown_in(captions: Sequence[str], tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens of these captions are unknown, and how many they have."""
    tokens, lengths, _ = tokenizer.encode(captions, LONGEST)
    words = int(lengths.sum()) - 2 * len(lengths)  # without [CLS] and [SEP]
    return int(np.sum(tokens == tokenizer.unknown_id)), words


def said_unknown(unknown: int, tokens: int, captions: str) -> str:
    """A sentence on the unknown tokens in `captions`; a warning if they are many."""
    share = unknown / max(1, tokens)
    fact = f"unknown tokens: {unknown:,} of {tokens:,} ({share:.2%}) in {captions}"
    if share <= MOST_UNKNOWN:
        return fact
    return (
        f"warning: {fact}: the model cannot tell these words apart; set config.data.tokenizer to a "
        "tokenizer of their language, or leave it empty to train one"
    )


def spelling(data: ml_collections.ConfigDict) -> dict[str, bool]:
    """The fields of config.data on how a trained vocabulary spells words."""
    return {"lowercase": data.tokenizer_lowercase, "strip_accents": data.tokenizer_strip_accents}


def open_tokenizer(
    spec: str,
    workdir: Path | str,
    captions: Iterable[str] | None,
    vocabulary_size: int,
    *,
    lowercase: bool = True,
    strip_accents: bool = False,
) -> tuple[Tokenizer, Callable[[], None]]:
    """The workdir's tokenizer, if it has one, else that of `spec`, and a function that saves it.

    `spec` is a folder or a name on the Hugging Face hub; if empty, one is trained on `captions`.
    Raises UserError if there is no usable tokenizer.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the pipeline has its own threads
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed
    folder = Path(workdir) / FOLDER
    if folder.is_dir():
        what = f"{folder}, the run's tokenizer,"
        return _wrapped(_load(str(folder), what), what), lambda: None
    what = f"config.data.tokenizer={spec!r}"
    if spec and (strip_accents or not lowercase):
        raise UserError(
            f"{what} has its own spelling rules: leave config.data.tokenizer_lowercase and "
            "config.data.tokenizer_strip_accents at their defaults, or config.data.tokenizer empty "
            "to train one"
        )
    if spec:
        loaded = _load(spec, what)
    elif captions is None:
        raise UserError(
            f"{folder} is missing, and the run's tokens cannot be read without it: restore it"
        )
    else:
        import transformers  # takes a second, and workers never need it

        trained = train_vocabulary(
            captions, vocabulary_size, lowercase=lowercase, strip_accents=strip_accents
        )
        names = {f"{kind}_token": name for kind, name in zip(_KINDS, SPECIALS, strict=True)}
        options = names | {"tokenizer_object": trained, _CLEANS: True}
        loaded = transformers.PreTrainedTokenizerFast(**options)
    return _wrapped(loaded, what), lambda: _save(loaded, folder)


def _load(name: str, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of the hub; raises UserError, which begins with `what`."""
    import transformers

    name = os.path.expanduser(name)
    # A list of word pieces without the tokenizer that transformers saves is BERT's.
    words_alone = (Path(name) / _WORDS).is_file() and not (Path(name) / "tokenizer.json").exists()
    reader = transformers.BertTokenizerFast if words_alone else transformers.AutoTokenizer
    try:
        local = os.path.isdir(name) or not hub_reachable()
        loaded = reader.from_pretrained(name, local_files_only=local)
    except Exception as failure:  # OSError, ValueError, KeyError, the hub's own errors, ...
        raise UserError(
            f"{what} cannot be loaded ({reason(failure)}): give a folder with tokenizer.json or "
            f"{_WORDS}, a name on the Hugging Face hub with network access, or nothing to train one"
        ) from failure
    vocabulary = loaded.get_vocab()
    for kind, *names in zip(_KINDS, SPECIALS, _ROBERTA, strict=True):
        known = [name for name in names if name in vocabulary]
        if known and getattr(loaded, f"{kind}_token") is None:  # a tokenizer.json alone names none
            setattr(loaded, f"{kind}_token", known[0])
    return loaded


def _wrapped(loaded: PreTrainedTokenizerBase, what: str) -> Tokenizer:
    """The parts of a transformers tokenizer that a run uses; raises UserError, as `_load` does."""
    ids = {kind: getattr(loaded, f"{kind}_token_id") for kind in _KINDS if kind != "unk"}
    missing = [kind for kind, number in ids.items() if number is None]
    if missing or not getattr(loaded, "is_fast", False):
        lacks = f"has no {', '.join(missing)} token" if missing else "has no fast version"
        raise UserError(f"{what} {lacks}: use one like BERT's")
    backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    vocabulary = Vocabulary(
        size=max(backend.get_vocab().values()) + 1,
        special_ids=tuple(sorted(set(loaded.all_special_ids))),
        **{f"{kind}_id": number for kind, number in ids.items()},
    )
    prepare = whole if getattr(loaded, "init_kwargs", {}).get(_CLEANS) else clean
    return Tokenizer(backend, vocabulary, loaded.unk_token_id, prepare)


def _save(loaded: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves `folder` whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{FOLDER}.") as draft:
        loaded.save_pretrained(os.path.join(draft, FOLDER))
        try:
            os.rename(os.path.join(draft, FOLDER), folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
