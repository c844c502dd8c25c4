"""Findings of a check of the data: on every source, and between training and evaluation.

Three kinds of evidence show that two pictures are the same: the same content (the bytes of the
files or, without decoding, their path), the same look (perceptual hashes that differ in few bits),
and the same file name. Names such as COCO_val2014_000000391895 are telling; names such as 1 or
img_00001 are not. So a name counts if it has at least eight characters, or six that are all digits,
unless it is a running number: at least 20 names in its source differ only in their last number, and
over half of them follow another by one or two.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.sources import Source
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.tools.check_data.captions import repeated_captions
from codebook_jax.tools.check_data.inspection import Images, Status

EVIDENCE = ("content", "look", "name")  # the strongest first
_HASH_BITS = 64
_LEAST_STEM, _LEAST_DIGITS = 8, 6  # characters
_LEAST_SERIES, _NEXT = 20, 2
_NUMBER = re.compile(r"(\d+)\D*$")


class Part(NamedTuple):
    """The findings on one source, or on a mixture."""

    label: str  # "training", "training 1" of a mixture, "validation", "test"
    source: Source
    images: Images
    captions: np.ndarray  # as `read_captions` returns them
    repeated: int  # captions that more than one picture has
    most_repeated: list[dict[str, Any]]  # {"caption", "images"}
    copies: np.ndarray  # int64 [images], the first earlier picture with the same content; -1: none
    twins: np.ndarray  # the same for one that looks the same but is not a copy
    max_tokens: int  # that the model reads

    def name(self, image: int) -> str:
        """The source's name for a picture."""
        return self.source.name(int(self.images.first[image]))

    @property
    def silent(self) -> np.ndarray:
        """bool [records]: no caption gives a token."""
        return np.bincount(self.captions["record"], minlength=len(self.source)) == 0

    @property
    def usable_records(self) -> np.ndarray:
        """bool [records]"""
        return self.images.usable[self.images.which] & ~self.silent

    def counts(self) -> dict[str, int]:
        """{name in COUNTS: number}"""
        return {name: int(count(self)) for name, (_, count) in COUNTS.items()}


def _with_status(status: Status) -> Callable[[Part], int]:
    return lambda part: (part.images.found["status"] == status).sum()


COUNTS: dict[str, tuple[str, Callable[[Part], int]]] = {  # name in check.json: (label, number)
    "listed": ("listed records", lambda part: part.source.listed),
    "without_caption": (
        "without a picture or caption",
        lambda part: len(part.source.left_out) + part.silent.sum(),
    ),
    "usable": ("usable", lambda part: part.usable_records.sum()),
    "images": ("distinct pictures", lambda part: len(part.images.first)),
    "missing": ("missing", _with_status(Status.MISSING)),
    "empty": ("empty files", _with_status(Status.EMPTY)),
    "undecodable": ("cannot be decoded", _with_status(Status.UNDECODABLE)),
    "tiny": ("tiny", _with_status(Status.TINY)),
    "copies": ("same as another", lambda part: (part.copies >= 0).sum()),
    "near_duplicates": ("look like another", lambda part: (part.twins >= 0).sum()),
    "captions": ("captions", lambda part: len(part.captions)),
    "truncated": (
        "longer than the limit",
        lambda part: (part.captions["tokens"] > part.max_tokens).sum(),
    ),
    "repeated": ("shared by several pictures", lambda part: part.repeated),
    "tokens": ("tokens", lambda part: (part.captions["tokens"] - 2).sum()),
    "unknown_tokens": ("unknown tokens", lambda part: part.captions["unknown"].sum()),
}


def find(
    label: str, source: Source, images: Images, captions: np.ndarray, bits: int, max_tokens: int
) -> Part:
    """Copies and repeated captions among what was read of a source; `bits` is near_bits."""
    repeated = repeated_captions(captions, source, images.which)
    copies, look = (
        earlier_twin(_one_per_id(images.found[name], images.found["image_id"]), most)
        for name, most in (("content", 0), ("look", bits))
    )
    twins = np.where(copies >= 0, -1, look)
    return Part(label, source, images, captions, *repeated, copies, twins, max_tokens)


class Leak(NamedTuple):
    """Pictures of an evaluation source that are also in training."""

    evaluation: Part
    training: Part
    evidence: np.ndarray  # int8 [images of the evaluation], the strongest of EVIDENCE; -1: none
    match: np.ndarray  # int64 [images of the evaluation], the picture in training
    decoded: bool

    def shown_by(self, name: str) -> np.ndarray:
        """bool [images]: matched, and this is the strongest evidence."""
        return self.evidence == EVIDENCE.index(name)

    @property
    def leaked(self) -> np.ndarray:
        """bool [images]: same content or look; without decoding, also the same name."""
        return (self.evidence >= 0) & ~(self.decoded & self.shown_by("name"))

    def counts(self) -> dict[str, Any]:
        """The numbers of check.json, by name."""
        same = {"same_content": "content", "same_look": "look", "same_name_alone": "name"}
        return {
            "evaluation": self.evaluation.label,
            "images": len(self.match),
            "leaked": int(self.leaked.sum()),
            **{key: int(self.shown_by(name).sum()) for key, name in same.items()},
        }

    def pictures(self) -> list[dict[str, str]]:
        """{"name", "training", "evidence"} of every match."""
        return [
            {
                "name": self.evaluation.name(image),
                "training": self.training.name(int(self.match[image])),
                "evidence": EVIDENCE[self.evidence[image]],
            }
            for image in np.flatnonzero(self.evidence >= 0).tolist()
        ]


def find_leak(evaluation: Part, training: Part, *, near_bits: int, decoded: bool) -> Leak:
    """The pictures of the evaluation that are also in training."""
    ours, theirs = evaluation.images.found, training.images.found
    compared = (
        (ours["content"], theirs["content"], 0),
        (ours["look"], theirs["look"], near_bits),
        (_telling_names(evaluation), _telling_names(training), 0),
    )
    evidence, match = np.full(len(ours), -1, np.int8), np.full(len(ours), -1)
    for number, (queries, base, bits) in enumerate(compared):
        found = first_match(queries, base, bits)
        new = (found >= 0) & (match < 0)
        evidence[new], match[new] = number, found[new]
    return Leak(evaluation, training, evidence, match, decoded)


def _one_per_id(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The known hashes, only the first of each image id: equal ids are known to be one image."""
    known = np.flatnonzero(hashes)
    first = known[np.unique(ids[known], return_index=True)[1]]
    result = np.zeros_like(hashes)
    result[first] = hashes[first]
    return result


def _telling_names(part: Part) -> np.ndarray:
    """uint64 [images]: hashes of the names without folder and ending; 0: it is not telling."""
    count = len(part.images.first)
    stems, series = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    numbers = np.zeros(count, np.int64)
    for image in range(count):
        stem = re.sub(r"\.\w{1,5}$", "", os.path.basename(part.name(image)))
        if len(stem) < (_LEAST_DIGITS if stem.isdecimal() else _LEAST_STEM):
            continue
        stems[image] = short_hash(stem)
        if number := _NUMBER.search(stem):
            digits = number.group(1)
            padded = len(digits) * (digits[0] == "0")  # 000000012 and 2333071 are not one series
            alike = f"{stem[: number.start(1)]}/{padded}/{stem[number.end(1) :]}"
            series[image], numbers[image] = short_hash(alike), int(digits[-18:])
    kinds, which, counts = np.unique(series, return_inverse=True, return_counts=True)
    order = np.lexsort((numbers, which))
    follows = (np.diff(which[order]) == 0) & (np.diff(numbers[order]) <= _NEXT)
    following = np.bincount(which[order][1:][follows], minlength=len(kinds))
    running = (counts >= _LEAST_SERIES) & (2 * following > counts) & (kinds != 0)
    return np.where(running[which], np.uint64(0), stems)


def first_match(queries: np.ndarray, base: np.ndarray, bits: int) -> np.ndarray:
    """int64 [queries]: the first hash of `base` that differs in at most `bits` bits, uint64 both;
    -1 if none does. A hash of 0 is unknown and matches nothing.

    If the bits are split into bits + 1 bands, such a pair agrees in at least one (the pigeonhole
    principle), so only hashes with an equal band are compared, and each distinct hash once.
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
