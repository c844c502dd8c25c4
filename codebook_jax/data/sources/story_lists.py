"""Stories listed in a JSON file: {"frames": [paths below the image root], "captions": [sentences],
"id": optional int or text}, frames and sentences in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from codebook_jax.data.sources.listed import Folders, shown
from codebook_jax.data.sources.record import Request, Source, Story, checked
from codebook_jax.data.sources.rows import names_in
from codebook_jax.data.sources.texts import TextLists, Texts
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

FRAMES, CAPTIONS, ID = "frames", "captions", "id"
_EXPECTED = (
    'every entry of a file of stories is {"frames": [PATHS], "captions": [TEXTS]}; "id" is optional'
)


class ListedStories(Source):
    """The stories of a list; sentences without words are dropped from a story, and a story without
    a frame or without a sentence left is left out and counted.
    """

    kind = "stories"

    def __init__(self, request: Request, entries: Iterable[tuple[str, Any]]) -> None:
        """`entries` are ("file[3]", object); raises UserError if one is no story, or all are left
        out.
        """
        self.form, self.place, self._folders = request.scheme, request.place, Folders(request)
        if named := [f"?{part}_key=" for part, key in request.keys.items() if key is not None]:
            cure = f'the keys of a story are always "{FRAMES}", "{CAPTIONS}" and "{ID}"'
            raise UserError(f"{self.place} lists stories, so leave out {', '.join(named)}: {cure}")
        self.left_out: list[tuple[str, str]] = []
        self._names, self._frames, self._captions = Texts(), TextLists(), TextLists()
        content = hashlib.sha256(f"{self.form} stories 1".encode())
        for where, entry in entries:
            listed, sentences = (_texts(where, entry, key) for key in (FRAMES, CAPTIONS))
            frames = [self._folders.check(where, frame, FRAMES) for frame in listed]
            captions, own = list(filter(has_words, sentences)), _id(where, entry)
            name = own or (frames or [where])[0]
            if frames and captions:
                self._names.append(name)
                self._frames.append(frames)
                self._captions.append(captions)
                content.update(repr((frames, captions, own)).encode("utf-8", "surrogatepass"))
            else:
                lacks = f"has no {'sentence with words' if frames else 'frames'}"
                self.left_out.append((name, f"{where} {lacks}"))
        if not len(self):
            without = f" ({self.left_out[0][1]}, ...)" if self.left_out else ""
            raise UserError(f"{self.place} lists no story to read{without}: {_EXPECTED}")
        self._fingerprint = content.hexdigest()
        self.listed = len(self) + len(self.left_out)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Story:
        frames = map(self._folders.locate, self._frames[checked(index, len(self))])
        return Story(tuple(frames), self.captions(index), index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[checked(index, len(self))]

    def name(self, index: int) -> str:
        """The story's id, or its first frame if it has none."""
        return self._names[checked(index, len(self))]


def _texts(where: str, entry: Any, key: str) -> list[str]:
    """The list of texts at a key; raises UserError, naming the entry at `where`, if it is none."""
    if not isinstance(entry, dict) or key not in entry:
        held = (
            f"its keys: {names_in(entry)}" if isinstance(entry, dict) else f"it is {shown(entry)}"
        )
        raise UserError(f'{where} has no key "{key}" ({held}): {_EXPECTED}')
    texts = entry[key]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}, key "{key}": {shown(texts)} is not a list of texts: {_EXPECTED}')
    return texts


def _id(where: str, entry: dict[str, Any]) -> str:
    """The id of a story, empty without one; raises UserError if it is neither text nor number."""
    own = entry.get(ID)
    if isinstance(own, bool) or not isinstance(own, int | str | None):
        raise UserError(
            f'{where}, key "{ID}": {shown(own)} is not an id: give a text or an integer'
        )
    return "" if own is None else str(own)
