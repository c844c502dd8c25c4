"""Findings of a check of the data: on every source, and between training and evaluation.

Three kinds of evidence show that two pictures are the same: the same content (the bytes of the
files or, without decoding, their path), the same look (perceptual hashes that differ in few bits),
and the same file name. Names such as COCO_val2014_000000391895 are telling; names such as 1 or
img_00001 are not. So a name counts if it has at least eight
characters, or six that are all digits, unless it is a running number: at least 20 names in its
source differ only in their last number, and over half of them follow another by one or two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.sources import Source
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.tools.check_data.captions import (
    Captions,
    Said,
    compared_captions,
    joined_captions,
)
from codebook_jax.tools.check_data.inspection import Images, Status, joined
from codebook_jax.tools.check_data.likeness import earlier_twin, first_match

_EXAMPLES = 10  # repeated captions that are kept
_LEAST_STEM, _LEAST_DIGITS = 8, 6  # characters
_LEAST_SERIES, _NEXT = 20, 2
_NUMBER = re.compile(r"(\d+)\D*$")


class Part(NamedTuple):
    """The findings on one source, or on a mixture."""

    label: str  # "training", "training 1" of a mixture, "validation", "test"
    source: Source
    images: Images
    said: Said
    captions: Captions
    copies: np.ndarray  # int64 [images], the first earlier picture with the same content; -1: none
    twins: (
        np.ndarray
    )  # int64 [images], the first earlier one that looks the same but is not a copy; -1: none

    def name(self, image: int) -> str:
        """The source's name for a picture."""
        return self.source.name(int(self.images.first[image]))

    @property
    def usable_records(self) -> np.ndarray:
        """bool [records]"""
        return self.images.usable[self.images.which] & ~self.said.silent

    def counts(self, max_tokens: int) -> dict[str, int]:
        """The numbers of the report, by name."""
        status = {kind: int((self.images.status == kind).sum()) for kind in Status}
        return {
            "listed": self.source.listed,
            "without_caption": len(self.source.left_out) + int(self.said.silent.sum()),
            "usable": int(self.usable_records.sum()),
            "images": len(self.images.first),
            "missing": status[Status.MISSING],
            "empty": status[Status.EMPTY],
            "undecodable": status[Status.UNDECODABLE],
            "tiny": status[Status.TINY],
            "copies": int((self.copies >= 0).sum()),
            "near_duplicates": int((self.twins >= 0).sum()),
            "captions": self.captions.count,
            "truncated": self.captions.truncated(max_tokens),
            "repeated": self.captions.repeated,
            "tokens": self.captions.unknown.tokens,
            "unknown_tokens": self.captions.unknown.count,
        }


class Leak(NamedTuple):
    """Pictures of an evaluation source that are also in training: for each one its match in
    training, or -1.
    """

    evaluation: Part
    training: Part
    content: np.ndarray  # int64 [images of the evaluation], the number of the picture in training
    look: np.ndarray
    name: np.ndarray
    decoded: bool

    @property
    def leaked(self) -> np.ndarray:
        """bool [images]: same content or look; without decoding, also the same name."""
        sure = (self.content >= 0) | (self.look >= 0)
        return sure if self.decoded else sure | (self.name >= 0)

    @property
    def name_alone(self) -> np.ndarray:
        """bool [images]: only the name is the same."""
        return (self.name >= 0) & (self.content < 0) & (self.look < 0)

    def counts(self) -> dict[str, Any]:
        """The numbers of the report, by name."""
        return {
            "evaluation": self.evaluation.label,
            "images": len(self.content),
            "leaked": int(self.leaked.sum()),
            "same_content": int((self.content >= 0).sum()),
            "same_look": int(((self.look >= 0) & (self.content < 0)).sum()),
            "same_name_alone": int(self.name_alone.sum()),
        }

    def named(self) -> Iterator[dict[str, str]]:
        """{"name", "training", "evidence"} of each leaked or equally named picture, with the
        strongest evidence.
        """
        for at in np.flatnonzero(self.leaked | self.name_alone).tolist():
            evidence, other = next(
                (evidence, int(found[at]))
                for evidence, found in (
                    ("content", self.content),
                    ("look", self.look),
                    ("name", self.name),
                )
                if found[at] >= 0
            )
            names = self.evaluation.name(at), self.training.name(other)
            yield {"name": names[0], "training": names[1], "evidence": evidence}


def part_of(label: str, source: Source, images: Images, said: Said, near_bits: int) -> Part:
    """The findings on a source: repeated pictures and captions."""
    captions = compared_captions(said, source, images.which, examples=_EXAMPLES)
    return Part(label, source, images, said, captions, *same_pictures(images, near_bits))


def joined_part(label: str, mixture: Mixture, parts: Sequence[Part], near_bits: int) -> Part:
    """The sources of a mixture as one: pictures and captions are compared across them."""
    starts = mixture.starts[:-1].tolist()
    images = joined([part.images for part in parts], starts)
    said = joined_captions([part.said for part in parts], starts)
    return part_of(label, mixture, images, said, near_bits)


def same_pictures(images: Images, near_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(copies, twins) as in `Part`, among pictures with different ids: equal ids are known to be
    one image.
    """
    count = len(images.first)
    known = _one_an_id(images, images.content != 0)
    copies = _placed(earlier_twin(images.content[known], 0), known, count)
    comparable = _one_an_id(images, images.comparable)
    twins = _placed(earlier_twin(images.look[comparable], near_bits), comparable, count)
    return copies, np.where(copies >= 0, -1, twins)


def leak(evaluation: Part, training: Part, near_bits: int, decoded: bool) -> Leak:
    """The pictures of the evaluation that are also in training."""
    ours, theirs = evaluation.images, training.images
    known = (np.flatnonzero(images.content) for images in (ours, theirs))
    content = _matched(ours.content, theirs.content, *known, 0)
    comparable = (np.flatnonzero(images.comparable) for images in (ours, theirs))
    look = _matched(ours.look, theirs.look, *comparable, near_bits)
    names, other_names = _stems(evaluation), _stems(training)
    name = _matched(names, other_names, np.flatnonzero(names), np.flatnonzero(other_names), 0)
    return Leak(evaluation, training, content, look, name, decoded)


def _one_an_id(images: Images, chosen: np.ndarray) -> np.ndarray:
    """The numbers of the chosen pictures, only the first of each id."""
    numbers = np.flatnonzero(chosen)
    _, first = np.unique(images.ids[numbers], return_index=True)
    return numbers[np.sort(first)]


def _stems(part: Part) -> np.ndarray:
    """uint64 [images]: a hash of each file's name without its folder and ending; 0 for a name that
    is not telling.
    """
    count = len(part.images.first)
    stems, series = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    numbers = np.zeros(count, np.int64)
    for at in range(count):
        stem = re.sub(r"\.\w{1,5}$", "", os.path.basename(part.name(at)))
        if len(stem) < (_LEAST_DIGITS if stem.isdecimal() else _LEAST_STEM):
            continue
        stems[at] = short_hash(stem)
        number = _NUMBER.search(stem)
        if number:
            digits = number.group(1)
            padded = (
                len(digits) if digits[0] == "0" else 0
            )  # 000000012 and 2333071 are not one series
            alike = f"{stem[: number.start(1)]}/{padded}/{stem[number.end(1) :]}"
            series[at], numbers[at] = short_hash(alike), int(digits[-18:])
    stems[_running(series, numbers)] = 0
    return stems


def _running(series: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """bool: whether each is one of its series' running numbers; series 0 means none."""
    kinds, which, counts = np.unique(series, return_inverse=True, return_counts=True)
    order = np.lexsort((numbers, which))
    follows = (np.diff(which[order]) == 0) & (np.diff(numbers[order]) <= _NEXT)
    following = np.bincount(which[order][1:][follows], minlength=len(kinds))
    dense = (counts >= _LEAST_SERIES) & (2 * following > counts) & (kinds != 0)
    return dense[which]


def _matched(
    ours: np.ndarray, theirs: np.ndarray, of_ours: np.ndarray, of_theirs: np.ndarray, bits: int
) -> np.ndarray:
    """For each of ours the number of the first of theirs that matches, among the chosen ones; -1:
    none.
    """
    result = np.full(len(ours), -1)
    if len(of_ours) and len(of_theirs):
        found = first_match(ours[of_ours], theirs[of_theirs], bits)
        result[of_ours] = np.where(found >= 0, of_theirs[found], -1)
    return result


def _placed(twin: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """Numbers among the chosen ones as numbers among all."""
    result = np.full(count, -1)
    result[chosen] = np.where(twin >= 0, chosen[twin], -1)
    return result
