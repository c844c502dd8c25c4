"""Captions to tokens: cleaning, the tokenizer, and the run's own copy of it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_collections
import numpy as np
import tokenizers
from jaxtyping import Int

from codebook_jax.data.network import hub_reachable
from codebook_jax.data.vocabulary import CLS, MASK, PAD, SEP, UNKNOWN, train_vocabulary, whole
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources import Source

FOLDER = "tokenizer"  # in a workdir
MOST_CAPTIONS_READ = 200_000  # to train a vocabulary
SAMPLED = 2000  # captions from which the share of unknown tokens is estimated
MOST_UNKNOWN = 0.01  # share of tokens; a run warns above it
UNREAD = "has no caption that gives any token"
LONGEST = 512  # token counts above it are counted as one
WORDS = "vocab.txt"
SPECIALS = {  # their names in BERT and in RoBERTa
    "pad": (PAD, "<pad>"),
    "unk": (UNKNOWN, "<unk>"),
    "cls": (CLS, "<s>"),
    "sep": (SEP, "</s>"),
    "mask": (MASK, "<mask>"),
}

_PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
_LETTER = re.compile(
    r"[^\W_\u115F\u1160\u3164\uFFA0]"
)  # the four code points are invisible letters
_SHOWS_NOTHING = "\ufffd\u2800\u115f\u1160"  # the first marks characters lost by a wrong encoding
_NAMED = 5  # unknown words
# in tokenizer_config.json: our own tokenizers need no `clean`; older runs lack the key
_CLEANS = "cleans_captions"


class Vocabulary(NamedTuple):
    """What the model needs to know about the tokens."""

    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]


class Tokenizer:
    """Captions to tokens. It can be pickled and used from several threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        *,
        unknown_id: int | None = None,
        cleans: bool = False,
    ) -> None:
        """`unknown_id` (None: it has none) stands for unknown words; `cleans`: the tokenizer cleans
        captions itself.
        """
        self._tokenizer, self._cleans = tokenizer, cleans
        self._prepared = whole if cleans else clean
        self.vocabulary, self.unknown_id = vocabulary, unknown_id
        tokenizer.encode_special_tokens = (
            True  # a caption's "[MASK]" is a word, not the special token
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._tokenizer.encode_special_tokens = True  # which pickling loses

    def encode(
        self, captions: Sequence[str], max_tokens: int
    ) -> tuple[Int[np.ndarray, "captions tokens"], Int[np.ndarray, "captions"], int]:
        """Tokens ([CLS] words [SEP], padded), how many are not padding, and how many captions were
        truncated.
        """
        pad, cls, sep = self.vocabulary.pad_id, self.vocabulary.cls_id, self.vocabulary.sep_id
        texts = [self._prepared(caption) for caption in captions]
        # Truncated and padded here: the tokenizer's own setting belongs to an object that threads
        # share.
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens = np.full((len(captions), max_tokens), pad, np.int32)
        lengths = np.empty(len(captions), np.int32)
        truncated = 0
        for row, encoding in enumerate(encodings):
            words = encoding.ids
            truncated += len(words) > max_tokens - 2
            ids = [cls, *words[: max_tokens - 2], sep]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return tokens, lengths, truncated

    def readable(self, captions: Sequence[str]) -> Sequence[str]:
        """Those of these captions, all with words, that give at least one token."""
        if self._cleans:  # then every one does
            return captions
        texts = [self._prepared(caption) for caption in captions]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [caption for caption, found in zip(captions, encodings, strict=True) if found.ids]

    def unknown_words(self, captions: Iterable[str]) -> list[str]:
        """The words that it reads as the unknown token, each once."""
        found: dict[str, None] = {}
        for text in map(self._prepared, captions):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if number == self.unknown_id:
                    found[text[start:stop]] = None
        return list(found)

    def unknown(
        self, tokens: Int[np.ndarray, "captions tokens"], lengths: Int[np.ndarray, "captions"]
    ) -> Unknown:
        """How many of these tokens, from `encode`, are unknown."""
        ends = 2 * len(lengths)  # [CLS] and [SEP]
        found = 0 if self.unknown_id is None else int((tokens == self.unknown_id).sum())
        return Unknown(found, int(lengths.sum()) - ends)


class Unknown(NamedTuple):
    """How many of some tokens a tokenizer does not know."""

    count: int
    tokens: int

    @property
    def share(self) -> float:
        return self.count / max(1, self.tokens)


def has_words(caption: str) -> bool:
    """Whether cleaning leaves anything of a caption: a letter, a digit, or a symbol such as an
    emoji.

    Every source leaves out captions without words. Punctuation, spaces, control and zero-width
    characters do not count, nor does the replacement character of a lost encoding.
    """
    if _LETTER.search(caption):
        return True
    left = clean(unicodedata.normalize("NFKC", caption))
    return any(unicodedata.category(c)[0] in "LNS" and c not in _SHOWS_NOTHING for c in left)


def few_words(words: Sequence[str]) -> str:
    """The first of these words in quotes, and the number of the others."""
    more = f" and {len(words) - _NAMED:,} more" if len(words) > _NAMED else ""
    return ", ".join(map(repr, words[:_NAMED])) + more


def clean(caption: str) -> str:
    """The caption in lower case without punctuation; hyphens and slashes become spaces (ALBEF)."""
    caption = _PUNCTUATION.sub("", whole(caption).lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


class Opened(NamedTuple):
    """A tokenizer, and a function that saves it into the workdir."""

    tokenizer: Tokenizer
    keep: Callable[[], None]


def tokenizer_for_run(
    spec: str, workdir: Path | str, source: Source | None, vocabulary_size: int, **spelling: bool
) -> Tokenizer:
    """The tokenizer of a run, kept in its workdir: see `open_tokenizer`."""
    opened = open_tokenizer(spec, workdir, source, vocabulary_size, **spelling)
    opened.keep()
    return opened.tokenizer


def open_tokenizer(
    spec: str,
    workdir: Path | str,
    source: Source | None,
    vocabulary_size: int,
    *,
    lowercase: bool = True,
    strip_accents: bool = False,
) -> Opened:
    """The tokenizer of a run: the one in the workdir if there is one, else that of `spec`; writes
    nothing yet.

    `spec` is a folder or a name on the Hugging Face hub; if empty, one is trained on the captions
    of `source`;
    `lowercase` and `strip_accents` apply only then. Raises UserError if there is no usable
    tokenizer.
    """
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # the pipeline has its own threads and workers
    folder = Path(workdir) / FOLDER
    if folder.is_dir():
        own = _wrapped(_load(str(folder), f"{folder}, the run's tokenizer,"), str(folder))
        return Opened(own, lambda: None)
    if spec and (strip_accents or not lowercase):
        raise UserError(
            f"config.data.tokenizer={spec!r} has its own spelling rules: leave "
            "config.data.tokenizer_lowercase and config.data.tokenizer_strip_accents at their "
            "defaults, or config.data.tokenizer empty to train one"
        )
    if spec:
        loaded = _load(spec, f"config.data.tokenizer={spec!r}")
    elif source is None:
        raise UserError(
            f"{folder} is missing, and the run's tokens cannot be read without it: restore the "
            "folder"
        )
    else:
        spelling = {"lowercase": lowercase, "strip_accents": strip_accents}
        trained = train_vocabulary(captions_of(source), vocabulary_size, **spelling)
        loaded = _in_transformers(trained)
    tokenizer = _wrapped(loaded, spec or "the trained vocabulary")
    return Opened(tokenizer, lambda: _keep(loaded, folder))


def captions_of(source: Source, most: int = MOST_CAPTIONS_READ) -> Iterator[str]:
    """At most `most` captions, from records spread evenly over the source."""
    read = 0
    for record in _spread(source, most):
        for caption in source.captions(record):
            if read == most:
                return
            read += 1
            yield caption


def _spread(source: Source, most: int) -> list[int]:
    """Evenly spread records of the source that have about `most` captions in all."""
    records = min(len(source), max(1, most // max(1, len(source.captions(0)))))
    return [record * len(source) // records for record in range(records)]


def unknown_in(source: Source, tokenizer: Tokenizer) -> tuple[Unknown, int]:
    """(how many tokens of a sample of the captions are unknown, how many records that is)."""
    tokens, lengths, _ = tokenizer.encode([*captions_of(source, SAMPLED)], LONGEST)
    return tokenizer.unknown(tokens, lengths), len(_spread(source, SAMPLED))


def said_unknown(unknown: Unknown, captions: str) -> str:
    """A sentence on the share of unknown tokens in these `captions`; a warning with advice if it is
    large.
    """
    said = f"unknown tokens: {unknown.count:,} of {unknown.tokens:,} ({unknown.share:.2%}) in {captions}"
    if unknown.share <= MOST_UNKNOWN:
        return said
    return (
        f"warning: {said}: the model cannot tell these words apart; set config.data.tokenizer to a "
        "tokenizer of their language, or leave it empty to train one"
    )


def spelling(data: ml_collections.ConfigDict) -> dict[str, bool]:
    """The fields of config.data on how a trained vocabulary spells words."""
    return {"lowercase": data.tokenizer_lowercase, "strip_accents": data.tokenizer_strip_accents}


def _transformers() -> Any:
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # hides that torch is not installed
    import transformers  # takes a second to import, and workers never need it

    return transformers


def _in_transformers(tokenizer: tokenizers.Tokenizer) -> Any:
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
        **{_CLEANS: True},
    )


def _load(name: str, what: str) -> Any:
    """The tokenizer of a folder or of the hub; raises UserError, which begins with `what`."""
    name = os.path.expanduser(name)
    if os.path.isfile(name):
        raise UserError(f"{what} is a file: give its folder, {os.path.dirname(name) or '.'}")
    try:
        loaded = _in_any_form(name)
    except (
        Exception
    ) as failure:  # the library raises OSError, ValueError, KeyError, its hub's own errors, ...
        reason = str(failure).strip().split("\n")[0].rstrip(".") or type(failure).__name__
        if os.path.isdir(name):
            raise UserError(
                f"{what} cannot be loaded ({reason}): give a folder with tokenizer.json or "
                "vocab.txt"
            ) from failure
        raise UserError(
            f"{what} is not a folder here and could not be loaded from the Hugging Face hub "
            f"({reason}): give a folder, or a name on the hub with network access, or leave it "
            "empty to train one"
        ) from failure
    _name_specials(loaded)
    if _has_words_alone(name):
        listed = set((Path(name) / WORDS).read_text(encoding="utf-8").split("\n"))
        absent = {getattr(loaded, f"{kind}_token") for kind in SPECIALS} - listed
        if absent:  # transformers has appended them
            raise UserError(
                f"{what}: its {WORDS} has no {', '.join(map(str, sorted(absent)))}: use one like "
                "BERT's"
            )
    return loaded


def _in_any_form(name: str) -> Any:
    """The tokenizer as transformers reads it; for a folder with only word pieces, BERT's
    WordPiece.
    """
    library, here = _transformers(), os.path.isdir(name) or not hub_reachable()
    try:
        return library.AutoTokenizer.from_pretrained(name, local_files_only=here)
    except Exception:
        if not _has_words_alone(name):
            raise
        return library.BertTokenizerFast.from_pretrained(name, local_files_only=True)


def _has_words_alone(name: str) -> bool:
    """Whether a folder has a list of word pieces but no complete tokenizer saved by
    transformers.
    """
    return (Path(name) / WORDS).is_file() and not (Path(name) / "tokenizer.json").exists()


def _name_specials(loaded: Any) -> None:
    """Sets the special tokens by their usual names, for a tokenizer.json without a
    tokenizer_config.json.
    """
    vocabulary = loaded.get_vocab()
    for kind, usual in SPECIALS.items():
        token = next((token for token in usual if token in vocabulary), None)
        if token is not None and getattr(loaded, f"{kind}_token") is None:
            setattr(loaded, f"{kind}_token", token)


def _wrapped(loaded: Any, name: str) -> Tokenizer:
    """The parts of a transformers tokenizer that a run uses."""
    ids = {kind: getattr(loaded, f"{kind}_token_id") for kind in ("pad", "cls", "sep", "mask")}
    missing = [kind for kind, number in ids.items() if number is None]
    if missing or not getattr(loaded, "is_fast", False):
        lacks = f"has no {', '.join(missing)} token" if missing else "has no fast version"
        raise UserError(f"the tokenizer {name} {lacks}: use one like BERT's")
    backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(
        backend,
        Vocabulary(
            size=max(backend.get_vocab().values()) + 1,
            pad_id=ids["pad"],
            cls_id=ids["cls"],
            sep_id=ids["sep"],
            mask_id=ids["mask"],
            special_ids=tuple(sorted(set(loaded.all_special_ids))),
        ),
        unknown_id=loaded.unk_token_id,
        cleans=bool(getattr(loaded, "init_kwargs", {}).get(_CLEANS)),
    )


def _keep(loaded: Any, folder: Path) -> None:
    """Saves into `folder`, which appears complete or not at all; another process may have saved it
    first.
    """
    draft = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    loaded.save_pretrained(draft)
    with contextlib.suppress(OSError):
        draft.rename(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} cannot be written: use a writable --workdir")
    shutil.rmtree(draft, ignore_errors=True)
