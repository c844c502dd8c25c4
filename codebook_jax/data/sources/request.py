"""What the opener of a source is given: the place, the options and the role."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from codebook_jax.errors import UserError

ROLES = ("train", "validation", "test")
DAMAGED = ("refuse", "skip")  # what to do about damaged shards
PARTS = ("image", "caption", "id")  # of a pair; `?image_key=` names the field that holds one


class Settings(NamedTuple):
    """The settings shared by all sources."""

    size_px: int  # of scenes
    scenes_examples: int  # for training, as the seed is: scenes for evaluation are always the same
    seed: int
    image_root: str = ""
    path_map: str = ""
    damaged_shards: str = "refuse"


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
            usable = " or ".join(f"{option}={choice}" for choice in choices)
            raise UserError(
                f"{self.scheme}:{self.place}: {option}={value} is not valid: use {usable}"
            )
        return value
