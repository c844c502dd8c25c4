"""What every source has: the request that opens it, and records by index."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.errors import UserError

NO_CAPTION = "has no caption with words"
VOCABULARY_CAPTIONS = 200_000  # at most so many are read to train a vocabulary
ROLES = ("train", "validation", "test")
PARTS = ("image", "caption", "id")  # of a pair; `?image_key=` names the field that holds one


class WithoutCaption(UnreadableImage):
    """A record has no caption with words, which showed only when it was read."""


class Record(NamedTuple):
    """An image with all its captions."""

    image: np.ndarray | bytes | str  # uint8 RGB [H, W, 3], or the bytes of a file, or its path
    captions: tuple[str, ...]
    image_id: int  # equal for the same image; from 0, below the source's `listed`


class Story(NamedTuple):
    """Frames and the sentences that tell them, both in order; neither is empty."""

    frames: tuple[np.ndarray | bytes | str, ...]  # each as `Record.image`
    captions: tuple[str, ...]  # one sentence each
    story_id: int  # its index in the source


class Example(NamedTuple):
    """Pictures and a text, and what is to be answered: a question, a statement, an expression."""

    images: tuple[np.ndarray | bytes | str, ...]  # each as `Record.image`; two of a comparison
    text: str  # the question, statement or expression
    # All right answers, equal ones as often as they were given; the label as a text; ("left",)
    # for the first of two pictures. Empty: not known, as in a test set.
    answers: tuple[str, ...]
    key: int | str  # names it in a submission, as in its file
    image_id: int  # equal for the same (first) picture; from 0, below the source's `listed`
    weight: float = 1.0  # of its answers in training
    box: tuple[float, float, float, float] | None = None  # x, y, width, height in pixels
    proposals: tuple[tuple[float, float, float, float], ...] = ()  # boxes to choose from


# What the records of a source are, and what an evaluation counts, for messages.
KINDS = {
    "pairs": ("pairs of an image and a text", "images"),
    "stories": ("stories (frames and captions in order)", "stories"),
    "questions": ("questions about images", "questions"),
    "comparisons": ("statements about two images", "statements"),
    "statements": ("statements about an image", "statements"),
    "expressions": ("expressions for parts of images", "expressions"),
    "labels": ("images with a label each", "images"),
}


class Source(Protocol):
    """Records, stories or examples by index. It can be pickled and read from several threads."""

    kind: str = "pairs"  # one of KINDS; all but the first two have Examples
    form: str  # the scheme and place that name it
    place: str
    listed: int  # records, including those left out
    left_out: Sequence[tuple[str, str]] = ()  # (name or place, why) of records that it left out
    _fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | Story | Example:
        """Raises UnreadableImage if the source must read the image itself and cannot, and
        WithoutCaption if reading shows that there is no caption.
        """

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a record, the sentences of a story, or the text and the answers of an
        example, without making an image.
        """

    def name(self, index: int) -> str:
        """The name of a record in the source (path, key or id), without reading its image."""

    @property
    def pictures_each(self) -> int:
        """How many pictures a pair or an example has."""
        return 2 if self.kind == "comparisons" else 1

    def pictures(self, index: int) -> tuple[str, ...]:
        """The name of each picture of a pair or an example; one name is one picture."""
        name = self.name(index)
        return (name,) if self.pictures_each == 1 else (f"{name} left", f"{name} right")

    def fingerprint(self) -> str:
        """A hash of the content, equal in every process and wherever the files are."""
        return self._fingerprint

    def __repr__(self) -> str:
        """A description of the source, without memory addresses; packed folders compare it."""
        return f"{self.form}({self.place!r}, {self.evaluated}={len(self)})"

    @property
    def learned(self) -> str:
        """What training learns from, for messages."""
        return self.kind

    @property
    def evaluated(self) -> str:
        """What an evaluation counts, for messages."""
        return KINDS[self.kind][1]


def sample_captions(source: Source, most: int = VOCABULARY_CAPTIONS) -> Iterator[str]:
    """At most `most` captions, of records spread evenly over the source."""
    records = min(len(source), max(1, most // max(1, len(source.captions(0)))))
    spread = (record * len(source) // records for record in range(records))
    yield from itertools.islice(itertools.chain.from_iterable(map(source.captions, spread)), most)


class Settings(NamedTuple):
    """The settings shared by all sources."""

    size_px: int  # of scenes
    scenes_examples: int  # for training, as the seed is: scenes for evaluation are always the same
    seed: int
    image_root: str = ""
    path_map: str = ""
    damaged_shards: str = "refuse"  # or "skip"


class Request(NamedTuple):
    """`SCHEME:PLACE?OPTION=VALUE`, for a role."""

    scheme: str
    place: str  # the part after the scheme: a path or a name, with the home folder for "~"
    options: Mapping[str, str]  # those that the scheme allows
    role: str  # one of ROLES
    settings: Settings

    @property
    def merge(self) -> bool:
        """Whether an image is one record with all its captions: in evaluation, not in training."""
        return self.role != "train"

    @property
    def image_root(self) -> str:
        return os.path.expanduser(self.options.get("image_root", self.settings.image_root))

    @property
    def keys(self) -> dict[str, str | None]:
        """The names given for the parts of a pair; None for a part without one."""
        return {part: self.options.get(f"{part}_key") for part in PARTS}

    def choice(self, option: str, choices: Sequence[str]) -> str:
        """The value of an option, by default the first choice; raises UserError for another."""
        value = self.options.get(option, choices[0])
        if value not in choices:
            use = f"use {' or '.join(choices)}"
            raise UserError(f"{self.scheme}:{self.place}: {option}={value} is not valid: {use}")
        return value


def checked(index: int, length: int) -> int:
    """The index of a record that exists; raises IndexError if it does not, or is negative."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
    return index


def part_of(starts: np.ndarray, index: int) -> tuple[int, int]:
    """(which part, index within it) of record `index` of parts that begin at `starts`."""
    which = int(np.searchsorted(starts, checked(index, int(starts[-1])), side="right")) - 1
    return which, int(index - starts[which])


def digest(parts: Sequence[str]) -> str:
    """A hash of these texts, for fingerprints."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
