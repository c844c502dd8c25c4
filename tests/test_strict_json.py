"""JSON that Python's own reader mishandles, in every file that is read."""

import json

import pytest

from codebook_jax.data.manifest import read_manifest
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json
from codebook_jax.run.checkpoint import Checkpoints
from codebook_jax.run.record import read_record
from codebook_jax.tasks.pretrain import Pretraining

DEEP = "[" * 100_000
ITEMS = Pretraining.checkpoint_items().alone


def test_whole_json_is_what_pythons_reader_reads():
    for value in ({"a": [1, -2.5e3, "é\ud800", None, True, {}], "b": {"a": []}}, [], "x", 7):
        text = json.dumps(value)
        for form in (text, text.encode(), text.encode("utf-16")):
            assert parse_json(form) == value
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('[{"b": 1, "a": 1, "a": 1}]', "the key 'a' twice"),
        ("[1, 2", "Expecting"),
        (b"\xff\xff\x00", "decode"),
        ("", "Expecting value"),
        ("7" * 5000, "5000 digits"),
    ],
)
def test_what_is_not_json_is_a_value_error_of_one_line(text, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_json(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_record),
        ("manifest.json", read_manifest),
        ("best.json", lambda folder: Checkpoints(folder, ITEMS, keep=1)),
    ],
)
@pytest.mark.parametrize(
    "content", [DEEP, "[]", '{"scores": {"x": 1}}', '{"a": 1, "a": 1}', "{", ""]
)
def test_a_file_of_a_run_that_was_spoiled_is_refused_by_its_name(tmp_path, name, read, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)
