"""What a check of the data found: of every source, and between training and evaluation."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.check_data.captions import Captions
from codebook_jax.check_data.inspection import Images, Status, short_hash
from codebook_jax.check_data.likeness import earlier_twin, first_match
from codebook_jax.data.sources import Source

_LEAST_STEM = 8  # characters: shorter names are running numbers, and everyone's


class Part(NamedTuple):
    """One source as it was found; of a mixture each source is one."""

    label: str  # "training", "validation", "test"
    source: Source
    images: Images
    captions: Captions
    copies: np.ndarray  # int64 [images], the first picture of the same content before it; -1: none
    twins: np.ndarray  # int64 [images], the first one before it that looks the same and is no copy; -1: none

    @property
    def usable_records(self) -> np.ndarray:
        """bool [records]"""
        return self.images.usable[self.images.which]

    def counts(self, max_tokens: int) -> dict[str, int]:
        """The numbers of the report, by name."""
        status = {kind: int((self.images.status == kind).sum()) for kind in Status}
        return {
            "listed": self.source.listed,
            "without_caption": len(self.source.left_out),
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
        }


class Leak(NamedTuple):
    """Pictures of an evaluation source that are in training too: for each of its pictures one in training, or -1.

    With the numbers of both pictures, in the order of trust: the same content, the same look, the same name alone.
    """

    evaluation: Part
    training: Part
    content: np.ndarray  # int64 [images of the evaluation]
    look: np.ndarray
    name: np.ndarray
    decoded: bool

    @property
    def leaked(self) -> np.ndarray:
        """bool [images]: by content or look; where nothing was decoded, by name."""
        by_sight = (self.content >= 0) | (self.look >= 0)
        return by_sight if self.decoded else self.name >= 0

    def counts(self) -> dict[str, Any]:
        """The numbers of the report, by name."""
        return {
            "evaluation": self.evaluation.label,
            "training": repr(self.training.source),
            "images": len(self.content),
            "leaked": int(self.leaked.sum()),
            "same_content": int((self.content >= 0).sum()),
            "same_look": int(((self.look >= 0) & (self.content < 0)).sum()),
            "same_name_alone": int(((self.name >= 0) & (self.content < 0) & (self.look < 0)).sum()),
        }


def same_pictures(images: Images, near_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(copies, twins) as of `Part`: among the pictures that were decoded."""
    decoded = np.flatnonzero(images.sides[:, 0] > 0)
    copies = _placed(earlier_twin(images.content[decoded], 0), decoded, len(images.first))
    comparable = np.flatnonzero(images.comparable)
    twins = _placed(earlier_twin(images.look[comparable], near_bits), comparable, len(images.first))
    return copies, np.where(copies >= 0, -1, twins)


def leak(evaluation: Part, training: Part, near_bits: int, decoded: bool) -> Leak:
    """Which pictures of the evaluation training has too."""
    ours, theirs = evaluation.images, training.images
    shown, seen = (np.flatnonzero(images.sides[:, 0] > 0) for images in (ours, theirs))
    content = _matched(ours.content, theirs.content, shown, seen, 0)
    comparable = (np.flatnonzero(images.comparable) for images in (ours, theirs))
    look = _matched(ours.look, theirs.look, *comparable, near_bits)
    names, other_names = _stems(evaluation), _stems(training)
    named, other_named = np.flatnonzero(names), np.flatnonzero(other_names)
    name = _matched(names, other_names, named, other_named, 0)
    return Leak(evaluation, training, content, look, name, decoded)


def _stems(part: Part) -> np.ndarray:
    """uint64 [images]: a hash of each file's name without its folder and ending; 0 for one that says too little."""
    return np.fromiter(
        (_stem_hash(part.source.name(int(record))) for record in part.images.first),
        np.uint64,
        len(part.images.first),
    )


def _stem_hash(name: str) -> int:
    stem = re.sub(r"\.\w{1,5}$", "", os.path.basename(name))
    return short_hash(stem) if len(stem) >= _LEAST_STEM else 0


def _matched(
    ours: np.ndarray, theirs: np.ndarray, of_ours: np.ndarray, of_theirs: np.ndarray, bits: int
) -> np.ndarray:
    """For each of ours the number of the first of theirs that matches, among the chosen ones; -1: none."""
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
