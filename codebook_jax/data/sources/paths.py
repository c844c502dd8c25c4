"""Where the images of a list are: below the image root, or where the path map leads."""

from __future__ import annotations

import os
from typing import NamedTuple

from codebook_jax.data.sources.request import Request
from codebook_jax.errors import UserError


class Folders(NamedTuple):
    root: str  # absolute
    path_map: tuple[tuple[str, str], ...] = ()  # (OLD, folder here), longest OLD first

    @classmethod
    def of(cls, request: Request) -> Folders:
        """The image root (by default the folder of the list) and the rules of "OLD=NEW,OLD=NEW".

        If several rules match a path, the longest OLD wins. An empty NEW is the image root. Raises
        UserError for a malformed rule.
        """
        root = os.path.abspath(request.image_root or os.path.dirname(request.place))
        path_map, pairs = request.settings.path_map, []
        for rule in filter(None, (part.strip() for part in path_map.split(","))):
            old, equals, new = rule.rpartition("=")
            if not equals or not old:
                raise UserError(
                    f"config.data.path_map={path_map!r}: {rule!r} is not OLD=NEW: give the "
                    "beginning of the listed paths and the folder here, as in /export/vl=/data"
                )
            new = os.path.abspath(os.path.expanduser(new)) if new else root
            pairs.append((old.rstrip("/"), new))
        return cls(root, tuple(sorted(pairs, key=lambda pair: -len(pair[0]))))

    def locate(self, image: str) -> str:
        """The path on this machine of an image that `check` has let through."""
        mapped = self._mapped(image)
        return os.path.join(self.root, image if mapped is None else mapped)

    def check(self, where: str, image: str) -> str:
        """A listed path as it is if a rule of the map matches, else relative to the root.

        Raises UserError, naming the entry at `where`, for a path that leads out of the folder.
        """
        parts, entry = image.split("/"), f'{where}, key "image": {image!r}'
        if self._mapped(image) is not None:
            if ".." in parts or "\0" in image:
                folder = "the folder that config.data.path_map gives"
                raise UserError(f'{entry} may lead out of {folder}: give paths without ".."')
            return image
        if not os.path.isabs(image) and "." not in parts and ".." not in parts:
            if "//" not in image and "\0" not in image:
                return image
        scheme, is_address, _ = image.partition("://")
        if is_address and scheme.lower() in ("http", "https"):
            raise UserError(
                f"{entry} is a URL, not a file: download the images with img2dataset and read its "
                "shards with webdataset:SHARDS.tar, or name the column of paths with ?image_key="
            )
        if is_address:
            raise UserError(
                f"{entry} is not a path on this machine: map its beginning to a folder here, for "
                f"example --config.data.path_map={scheme}://PLACE=/data"
            )
        path = os.path.normpath(os.path.join(self.root, image))
        if "\0" in path or not path.startswith(self.root.rstrip(os.sep) + os.sep):
            raise UserError(
                f"{entry} is outside the image root {self.root}: set config.data.image_root to the "
                "folder that holds the images, or map the beginning of the paths to a folder here, "
                "for example --config.data.path_map=/export/home=/data"
            )
        return os.path.relpath(path, self.root)

    def _mapped(self, image: str) -> str | None:
        """The path with its beginning replaced; None if no rule of the map matches."""
        for old, new in self.path_map:
            if image.startswith(f"{old}/"):
                return os.path.join(new, image[len(old) :].lstrip("/"))
        return None
