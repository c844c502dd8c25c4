"""What the tests of lists of files share: to write one, to open it, and what is said where it
cannot be.
"""

import json

import pytest

from codebook_jax.data.sources import open_source
from codebook_jax.errors import UserError


def open_it(spec, role="train", **changes):
    return open_source(spec, role=role, **dict(size_px=32, scenes_examples=50, seed=0) | changes)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline=""
    )
    return path


def records(source):
    return [source[index] for index in range(len(source))]


def captions(source):
    return [source.captions(index) for index in range(len(source))]


def below(folder, source):
    """The paths of the source's images as they are below a folder."""
    return [record.image.removeprefix(f"{folder}/") for record in records(source)]


def refusal(spec, role="train", **changes):
    """What is said of a source that cannot be opened: one line."""
    with pytest.raises(UserError) as raised:
        open_it(spec, role, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)
