"""Captions as tokens: the clean-up, the tokenizer, and a run's own copy of it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from codebook_jax.errors import UserError
from codebook_jax.network import hub_reachable

if TYPE_CHECKING:
    from codebook_jax.data.sources import Source

FOLDER = "tokenizer"  # in a workdir
MOST_CAPTIONS_READ = 200_000  # to train a vocabulary
MOST_LETTERS = 1000  # of a trained vocabulary
PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"  # BERT
WORDS = "vocab.txt"
SPECIALS = {  # what they are called in BERT's and in RoBERTa's
    "pad": (PAD, "<pad>"),
    "unk": (UNKNOWN, "<unk>"),
    "cls": (CLS, "<s>"),
    "sep": (SEP, "</s>"),
    "mask": (MASK, "<mask>"),
}

_PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
_SIDE = re.compile(r"\b(left|right)(?=(?:s|most|ward|wards|hand|handed|side)?\b)", re.IGNORECASE)


class Vocabulary(NamedTuple):
    """What the model has to know of the tokens."""

    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]


class Tokenizer:
    """Captions to tokens. It can be pickled, and used from several threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary

    def encode(
        self, captions: Sequence[str], max_tokens: int
    ) -> tuple[Int[np.ndarray, "captions tokens"], Int[np.ndarray, "captions"], int]:
        """Tokens ([CLS] words [SEP], padded), how many are not padding, and how many captions lost their end."""
        pad, cls, sep = self.vocabulary.pad_id, self.vocabulary.cls_id, self.vocabulary.sep_id
        texts = [clean(caption) for caption in captions]
        # Cut and padded here: the tokenizer's own way is a setting of an object that threads share.
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


def clean(caption: str) -> str:
    """The caption in lower case without punctuation; hyphens and slashes become spaces (ALBEF).

    Halves of characters, which JSON can hold and tokenizers refuse, are left out.
    """
    caption = caption.encode("utf-8", "ignore").decode("utf-8")
    caption = _PUNCTUATION.sub("", caption.lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


def swap_left_right(caption: str) -> str:
    """The caption of the mirrored image: left and right change places, as words of their own, in their case.

    Also in leftmost, left-hand, leftward and the like; not in bright, upright or copyright.
    """

    def swapped(match: re.Match) -> str:
        word = match.group()
        other = "right" if word.lower() == "left" else "left"
        if word.isupper():
            return other.upper()
        return other.capitalize() if word[0].isupper() else other

    return _SIDE.sub(swapped, caption)


class Opened(NamedTuple):
    """A tokenizer, and what puts a copy of it into the workdir, once."""

    tokenizer: Tokenizer
    keep: Callable[[], None]


def tokenizer_for_run(
    spec: str, workdir: Path | str, source: Source | None, vocabulary_size: int
) -> Tokenizer:
    """The tokenizer of a run, kept in its workdir: see `open_tokenizer`."""
    opened = open_tokenizer(spec, workdir, source, vocabulary_size)
    opened.keep()
    return opened.tokenizer


def open_tokenizer(
    spec: str, workdir: Path | str, source: Source | None, vocabulary_size: int
) -> Opened:
    """The tokenizer of a run: the workdir's own where it has one, else that of `spec`; nothing is written yet.

    `spec` is a folder or a name on the Hugging Face hub; empty, a WordPiece vocabulary of at most `vocabulary_size`
    entries is trained on the captions of `source`. Raises UserError where none can be had.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads and workers are ours
    folder = Path(workdir) / FOLDER
    if folder.is_dir():
        own = _wrapped(_load(str(folder), f"{folder}, the run's tokenizer,"), str(folder))
        return Opened(own, lambda: None)
    if spec:
        loaded = _load(spec, f"config.data.tokenizer={spec!r}")
    elif source is None:
        raise UserError(
            f"{folder} is missing, and without it the run's tokens have no meaning: put the folder back"
        )
    else:
        loaded = _in_transformers(train_vocabulary(captions_of(source), vocabulary_size))
    tokenizer = _wrapped(loaded, spec or "the trained vocabulary")
    return Opened(tokenizer, lambda: _keep(loaded, folder))


def captions_of(source: Source, most: int = MOST_CAPTIONS_READ) -> Iterator[str]:
    """At most `most` captions, from records spread evenly over the source."""
    each = max(1, len(source.captions(0)))
    records = min(len(source), max(1, most // each))
    read = 0
    for record in range(records):
        for caption in source.captions(record * len(source) // records):
            if read == most:
                return
            read += 1
            yield caption


def train_vocabulary(captions: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer of at most `size` entries (more only where the letters alone are more).

    The same captions give the same entries in the same order. The library's trainer alone does not: it numbers the
    letters inside words as a hash table happens to hold them. Here all letters are numbered before it starts.
    """
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    specials = [PAD, UNKNOWN, CLS, SEP, MASK]
    counts = Counter(word for caption in captions for word in clean(caption).split())
    words = sorted(counts)
    normalizer = normalizers.BertNormalizer()
    letters = Counter()
    for word in words:
        for letter in normalizer.normalize_str(word):
            letters[letter] += counts[word]
    letters.pop(" ", None)  # the normalizer sets Chinese characters apart
    most = min(MOST_LETTERS, max(1, (size - len(specials)) // 3))
    kept = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:most])

    trained = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[*specials, *kept, *(f"##{letter}" for letter in kept)],
        limit_alphabet=len(kept),
        initial_alphabet=kept,
    )
    repeated = (" ".join([word] * min(counts[word], 10_000)) for word in words)
    trained.train_from_iterator(repeated, trainer)

    vocabulary = trained.get_vocab()
    wordpiece = tokenizers.Tokenizer(
        models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100)
    )
    wordpiece.normalizer = normalizer
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = tokenizers.decoders.WordPiece()
    wordpiece.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
    )
    wordpiece.add_special_tokens(specials)
    return wordpiece


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not installed
    import transformers  # a second to import, and workers never need it

    return transformers


def _in_transformers(tokenizer: tokenizers.Tokenizer) -> Any:
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
    )


def _load(name: str, what: str) -> Any:
    """The tokenizer of a folder or of the hub; raises UserError beginning with `what`."""
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
                f"{what} cannot be loaded ({reason}): give a folder with tokenizer.json or vocab.txt"
            ) from failure
        raise UserError(
            f"{what} is no folder here, and could not be had from the Hugging Face hub ({reason}): "
            "give a folder, or a name on the hub and a network, or leave it empty to train one"
        ) from failure
    _name_specials(loaded)
    if _has_words_alone(name):
        listed = set((Path(name) / WORDS).read_text(encoding="utf-8").split("\n"))
        absent = {getattr(loaded, f"{kind}_token") for kind in SPECIALS} - listed
        if absent:  # transformers has added them behind the others
            raise UserError(
                f"{what}: its {WORDS} has no {', '.join(map(str, sorted(absent)))}: give one as BERT's"
            )
    return loaded


def _in_any_form(name: str) -> Any:
    """What transformers reads; where there is nothing but word pieces, BERT's way to cut words into them."""
    library, here = _transformers(), os.path.isdir(name) or not hub_reachable()
    try:
        return library.AutoTokenizer.from_pretrained(name, local_files_only=here)
    except Exception:
        if not _has_words_alone(name):
            raise
        return library.BertTokenizerFast.from_pretrained(name, local_files_only=True)


def _has_words_alone(name: str) -> bool:
    """Whether a folder has a list of word pieces, and no tokenizer that transformers has saved whole."""
    return (Path(name) / WORDS).is_file() and not (Path(name) / "tokenizer.json").exists()


def _name_specials(loaded: Any) -> None:
    """Finds by their usual names the special tokens of a tokenizer.json that no tokenizer_config.json is beside."""
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
    )


def _keep(loaded: Any, folder: Path) -> None:
    """Saves into `folder`, which is there whole or not at all; another process may have been first."""
    draft = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    loaded.save_pretrained(draft)
    with contextlib.suppress(OSError):
        draft.rename(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} cannot be written: give a --workdir that can")
    shutil.rmtree(draft, ignore_errors=True)
