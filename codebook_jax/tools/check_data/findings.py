"""Findings of a check of the data: on every source, and between training and evaluation.

Pictures are the same by content (the bytes of the files or, without decoding, their path), look
(perceptual hashes that differ in few bits), or file name: one of at least eight characters, or six
digits, that is no running number (img_00001). It is one if at least 20 names in its source differ
only in their last number, and over half of them follow another by one or two.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.console import Progress
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.data.text import LONGEST, Tokenizer, clean
from codebook_jax.tools.check_data.inspection import Status

_AT_ONCE = 1024  # records whose captions are read
_EXAMPLES = 10  # repeated captions that are named
_HASH_BITS = 64
_LEAST_STEM, _LEAST_DIGITS = 8, 6  # characters
_LEAST_SERIES, _NEXT = 20, 2
_NUMBER = re.compile(r"(\d+)\D*$")
# per caption: the hash of its text, its record, its tokens with [CLS] and [SEP], unknown ones
_CAPTION = np.dtype([("key", "u8"), ("record", "i4"), ("tokens", "i2"), ("unknown", "i2")])


class Part(NamedTuple):
    """The findings on one source, or on a mixture."""

    label: str  # "training", "training 1" of a mixture, "validation", "test"
    source: Source
    found: np.ndarray  # [records] as `inspect` returns it
    captions: np.ndarray  # as `read_captions` returns them
    usable: np.ndarray  # bool [records]; of examples, a record is a picture: see `as_pairs`
    copies: np.ndarray  # int64 [records], the first earlier one with the same content; -1: none
    twins: np.ndarray  # the same for one that looks the same but is not a copy
    numbers: dict[str, tuple[str, int]]  # name in check.json: (label in the tables, number)
    most_repeated: list[dict[str, Any]]  # {"caption", "images"}
    max_tokens: int  # that the model reads
    # of evaluation data, by evidence: int64 [records], the same picture's in training; -1: none
    matches: dict[str, np.ndarray] | None = None
    leak: dict[str, Any] | None = None  # its entry in check.json

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of check.json, by name."""
        return {name: number for name, (_, number) in self.numbers.items()}


def read_captions(source: Source, tokenizer: Tokenizer) -> np.ndarray:
    """_CAPTION of every caption."""
    unknown = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
    columns = [np.empty(0, _CAPTION)]
    with Progress("read captions of", "records", len(source)) as progress:
        for start in range(0, len(source), _AT_ONCE):
            records = range(start, min(start + _AT_ONCE, len(source)))
            pairs = [(caption, record) for record in records for caption in source.captions(record)]
            texts = [caption for caption, _ in pairs]
            read = np.empty(len(pairs), _CAPTION)
            read["key"] = [short_hash(clean(text)) for text in texts]
            read["record"] = [record for _, record in pairs]
            tokens, read["tokens"], _ = tokenizer.encode(texts, LONGEST)
            read["unknown"] = (tokens == unknown).sum(axis=1)
            columns.append(read)
            progress.advance(len(records))
    return np.concatenate(columns)


def find(
    label: str, source: Source, found: np.ndarray, captions: np.ndarray, bits: int, max_tokens: int
) -> Part:
    """What the pictures and captions that were read of a source show; `bits` is near_bits."""
    each = source.pictures_each
    silent = np.bincount(captions["record"], minlength=len(source)) == 0
    silent = silent.reshape(-1, each).all(axis=1)  # a second picture has no captions of its own
    usable = (found["status"] == Status.USABLE) & ~silent.repeat(each)
    copies, look = (
        earlier_twin(_one_per_id(found[name], found["image_id"]), most)
        for name, most in (("content", 0), ("look", bits))
    )
    twins = np.where(copies >= 0, -1, look)
    repeated, most_repeated = _repeated_captions(captions, source, found["first"])
    pictures, tokens = pictures_of(found), captions["tokens"]
    statuses = np.bincount(found["status"][pictures], minlength=len(Status))
    numbers = {
        "listed": ("listed records", source.listed),
        "without_caption": ("without a picture or caption", len(source.left_out) + silent.sum()),
        "usable": ("usable", usable.reshape(-1, each).all(axis=1).sum()),
        "images": ("distinct pictures", len(pictures)),
        "missing": ("missing", statuses[Status.MISSING]),
        "empty": ("empty files", statuses[Status.EMPTY]),
        "undecodable": ("cannot be decoded", statuses[Status.UNDECODABLE]),
        "tiny": ("tiny", statuses[Status.TINY]),
        "copies": ("same as another", (copies >= 0).sum()),
        "near_duplicates": ("look like another", (twins >= 0).sum()),
        "captions": ("captions", len(captions)),
        "truncated": ("longer than the limit", (tokens > max_tokens).sum()),
        "repeated": ("shared by several pictures", repeated),
        "tokens": ("tokens", (tokens - 2).sum()),
        "unknown_tokens": ("unknown tokens", captions["unknown"].sum()),
    }
    numbers = {name: (text, int(number)) for name, (text, number) in numbers.items()}
    return Part(
        label, source, found, captions, usable, copies, twins, numbers, most_repeated, max_tokens
    )


def pictures_of(found: np.ndarray) -> np.ndarray:
    """int64 [pictures]: the first record of each."""
    return np.flatnonzero(found["first"] == np.arange(len(found)))


def _repeated_captions(
    captions: np.ndarray, source: Source, first: np.ndarray
) -> tuple[int, list[dict[str, Any]]]:
    """(how many captions more than one picture has, {"caption", "images"} of the most repeated);
    `first` [records] tells pictures apart.
    """
    pictures = first[captions["record"]]
    order = np.lexsort((pictures, captions["key"]))
    keys, pictures = captions["key"][order], pictures[order]
    new = np.append(True, (np.diff(keys) != 0) | (np.diff(pictures) != 0))[: len(keys)]
    texts, counts = np.unique(keys[new], return_counts=True)
    repeated = int(np.isin(captions["key"], texts[counts > 1]).sum())
    examples = []
    for at in np.argsort(-counts, kind="stable")[: min(_EXAMPLES, (counts > 1).sum())].tolist():
        place = np.argmax(captions["key"] == texts[at])
        cleaned = map(clean, source.captions(int(captions["record"][place])))
        caption = next(text for text in cleaned if short_hash(text) == texts[at])
        examples.append({"caption": caption, "images": int(counts[at])})
    return repeated, examples


def find_leak(evaluation: Part, training: Part, *, near_bits: int, decoded: bool) -> Part:
    """The evaluation, with its pictures that are also in training, by their strongest evidence; a
    name counts as a leak only without decoding.
    """
    ours, theirs = evaluation.found, training.found
    compared = {  # the strongest first
        "content": (ours["content"], theirs["content"], 0),
        "look": (ours["look"], theirs["look"], near_bits),
        "name": (_telling_names(evaluation), _telling_names(training), 0),
    }
    matches, matched = {}, np.zeros(len(ours), bool)
    for evidence, hashes in compared.items():
        matches[evidence] = np.where(matched, -1, first_match(*hashes))
        matched |= matches[evidence] >= 0
    pictures = [
        {
            "name": evaluation.source.name(record),
            "training": training.source.name(int(match[record])),
            "evidence": evidence,
        }
        for evidence, match in matches.items()
        for record in np.flatnonzero(match >= 0).tolist()
    ]
    same = {evidence: int((match >= 0).sum()) for evidence, match in matches.items()}
    leak = {
        "evaluation": evaluation.label,
        "images": len(pictures_of(ours)),
        "leaked": len(pictures) - decoded * same["name"],
        "same_content": same["content"],
        "same_look": same["look"],
        "same_name_alone": same["name"],
        "pictures": pictures,
    }
    return evaluation._replace(matches=matches, leak=leak)


def _one_per_id(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The known hashes, only the first of each image id: equal ids are known to be one image."""
    known = np.flatnonzero(hashes)
    first = known[np.unique(ids[known], return_index=True)[1]]
    return np.where(np.isin(np.arange(len(hashes)), first), hashes, np.uint64(0))


def _telling_names(part: Part) -> np.ndarray:
    """uint64 [records]: hashes of the names without folder and ending; 0: it is not telling, or
    that of an earlier record.
    """
    stems, series, numbers = np.zeros((3, len(part.found)), np.uint64)
    for record in pictures_of(part.found).tolist():
        stem = re.sub(r"\.\w{1,5}$", "", os.path.basename(part.source.name(record)))
        if len(stem) < (_LEAST_DIGITS if stem.isdecimal() else _LEAST_STEM):
            continue
        stems[record] = short_hash(stem)
        if number := _NUMBER.search(stem):
            digits = number.group(1)
            padded = len(digits) * (digits[0] == "0")  # 000000012 and 2333071 are not one series
            alike = f"{stem[: number.start(1)]}/{padded}/{stem[number.end(1) :]}"
            series[record], numbers[record] = short_hash(alike), int(digits[-18:])
    kinds, which, counts = np.unique(series, return_inverse=True, return_counts=True)
    order = np.lexsort((numbers, which))
    follows = (np.diff(which[order]) == 0) & (np.diff(numbers[order]) <= _NEXT)
    following = np.bincount(which[order][1:][follows], minlength=len(kinds))
    running = (counts >= _LEAST_SERIES) & (2 * following > counts) & (kinds != 0)
    return np.where(running[which], np.uint64(0), stems)


def first_match(queries: np.ndarray, base: np.ndarray, bits: int) -> np.ndarray:
    """int64 [queries]: the first hash of `base` that differs in at most `bits` bits, uint64 both;
    -1 if none does. A hash of 0 is unknown and matches nothing.

    Such a pair agrees in at least one of bits + 1 bands of the bits (the pigeonhole principle), so
    only hashes with an equal band are compared, and each distinct hash once.
    """
    values, which = np.unique(queries, return_inverse=True)
    base_values, first = np.unique(base, return_index=True)
    first = np.where(base_values == 0, len(base), first)
    found = np.full(len(values), len(base))
    edges = np.linspace(0, _HASH_BITS, bits + 2).round().astype(int).tolist()
    for low, high in itertools.pairwise(edges):
        band = np.uint64((1 << high) - (1 << low))
        order = np.argsort(base_values & band, kind="stable")
        ordered = (base_values & band)[order]
        place, end = (np.searchsorted(ordered, values & band, side) for side in ("left", "right"))
        rows = np.flatnonzero((place < end) & (values != 0))
        while len(rows):  # compares each with the next hash that has an equal band
            others = order[place[rows]]
            near = np.bitwise_count(values[rows] ^ base_values[others]) <= bits
            found[rows[near]] = np.minimum(found[rows[near]], first[others[near]])
            place[rows] += 1
            rows = rows[place[rows] < end[rows]]
    return np.where(found < len(base), found, -1)[which]


def earlier_twin(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64: for each hash the first earlier one that differs in at most `bits` bits; -1: none."""
    first = first_match(hashes, hashes, bits)
    return np.where(first < np.arange(len(hashes)), first, -1)
