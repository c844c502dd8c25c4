"""Packing: which bytes are kept, what is left out and why, and which settings are refused."""

import io
import json
import os

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from small_packing import (
    BAD,
    KINDS,
    SIDE_PX,
    content,
    jpeg,
    pack,
    packing_of,
    write_kinds,
    write_many,
)

from codebook_jax import main
from codebook_jax.data import packing, progress
from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.data.manifest import verify
from codebook_jax.errors import UserError
from codebook_jax.tools import prepare


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Pictures of every kind, and the folder they are packed into."""
    folder = tmp_path_factory.mktemp("kinds")
    path = write_kinds(folder / "pictures")
    assert pack(path, folder / "packed") == 0
    return path, folder / "packed"


def records_in(folder):
    """The records that ArrayRecord reads from the shards, in order."""
    records = []
    for path in sorted(folder.glob("*.array_record")):
        reader = array_record_module.ArrayRecordReader(str(path))
        records += [msgpack.unpackb(content) for content in reader.read_all()]
    return records


def index_of(folder):
    paths = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def pixels(content):
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        return np.asarray(image).astype(int)


def test_small_jpegs_keep_their_bytes_and_all_else_becomes_a_jpeg_that_looks_the_same(kinds):
    path, folder = kinds
    packed = {record["name"]: record for record in records_in(folder)}
    assert list(packed) == list(KINDS)
    for name, kept in KINDS.items():
        before, after = (path.parent / name).read_bytes(), packed[name]["image"]
        assert (before == after) == kept, name
        assert packed[name]["captions"] == [f"a {name}", f"the {name}"]
        if not kept and name != "large.jpg":
            assert np.abs(pixels(after) - decode(before)).mean() < 4, name


def test_a_large_picture_gets_the_shorter_side_that_is_asked_for(kinds):
    path, folder = kinds
    large = next(record for record in records_in(folder) if record["name"] == "large.jpg")
    with Image.open(path.parent / "large.jpg") as image:
        expected = np.asarray(image.resize((72, SIDE_PX), Image.Resampling.BICUBIC)).astype(int)
    assert pixels(large["image"]).shape == expected.shape
    assert np.abs(pixels(large["image"]) - expected).mean() < 2
    kept = packing.packed_picture(os.fspath(path.parent / "large.jpg"), 0, 95)
    assert kept == ((path.parent / "large.jpg").read_bytes(), 200, 300)


def test_turned_and_clear_pictures_are_upright_and_on_white(kinds):
    packed = {record["name"]: pixels(record["image"]) for record in records_in(kinds[1])}
    assert packed["turned.jpg"].shape == (60, 40, 3)  # 40 x 60 on its side
    assert (packed["clear.png"][:, :24] > 250).all()
    greys = packed["deep.png"].mean(axis=(1, 2))
    assert greys[0] < 5 and greys[-1] > 250 and abs(greys[20] - 128) < 6


def test_a_picture_too_long_for_a_jpeg_is_no_picture_to_pack():
    file = io.BytesIO()
    Image.new("L", (70_000, 2)).save(file, "PNG")
    with pytest.raises(UnreadableImage, match="70,000 x 2 pixels .*JPEG"):
        packing.packed_picture(file.getvalue(), 512, 95)


def test_pictures_that_cannot_be_read_are_skipped_each_with_its_reason(kinds):
    _, folder = kinds
    first, *rows = [line.split("\t") for line in (folder / "skipped.tsv").read_text().splitlines()]
    assert first[0] == "plain.jpg" and "pairs.json[3] has no caption" in first[1]
    assert [name for name, _ in rows] == list(BAD)
    for name, why in rows:
        assert BAD[name] in why, (name, why)


def test_the_index_says_what_is_in_each_record(kinds):
    path, folder = kinds
    index, records = index_of(folder), records_in(folder)
    assert len(index) == len(records) == len(KINDS)
    for entry, record in zip(index, records, strict=True):
        for key in ("name", "captions", "image_id"):
            assert entry[key] == record[key]
        size = [*decode(record["image"]).shape[:2], len(record["image"])]
        assert [entry[key] for key in ("height", "width", "bytes")] == size
    listed = [entry["image"] for entry in json.loads(path.read_text()) if entry["caption"] != " "]
    assert [entry["image_id"] for entry in index] == [listed.index(name) for name in KINDS]


def test_the_manifest_counts_everything_and_no_time_place_or_path_is_in_it(kinds):
    _, folder = kinds
    manifest = json.loads((folder / "manifest.json").read_text())
    total = len(KINDS) + len(BAD)
    counts = [manifest[name] for name in ("records", "captions", "listed", "skipped")]
    assert counts == [len(KINDS), 2 * len(KINDS), total + 1, len(BAD) + 1]
    assert [shard["records"] + shard["skipped"] for shard in manifest["shards"]] == [4, 4, 4, 4]
    assert manifest["source"]["repr"] == f"json('pairs.json', images={total})"
    assert "/" not in (folder / "manifest.json").read_text()
    files = {f"pairs-0000{n}-of-00004.{end}" for n in range(4) for end in ("array_record", "jsonl")}
    assert set(content(folder)) == files | {"manifest.json", "skipped.tsv"}
    assert verify(folder) == []


def test_packing_the_same_from_elsewhere_leaves_the_same_bytes(kinds, tmp_path, capsys):
    again = write_kinds(tmp_path / "elsewhere")
    assert pack(again, tmp_path / "packed") == 0
    mine, theirs = content(tmp_path / "packed"), content(kinds[1])
    for files in (mine, theirs):
        lines = files["skipped.tsv"].split(b"\n")
        files["skipped.tsv"] = lines[1:]  # the first is the source's own, and names its list
        files["manifest.json"] = json.loads(files["manifest.json"])
        del files["manifest.json"]["skipped_sha256"]
    assert mine == theirs
    said = capsys.readouterr().out
    assert "packed 10 of 17 listed pairs into 4 shards" in said and "7 skipped" in said
    assert f"train with --config.data.train=records:{tmp_path}/packed" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "holds a training run"),
        ("notes.txt", r"holds other files \(notes.txt\)"),
        ("pairs-00000-of-00001.jsonl", "holds shards .* without manifest.json"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(name, words, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        pack("pairs.json", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(UserError, match="is a file"):
        pack("pairs.json", tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beam_options": "--project=a"}, "beam_options='--project=a' .*beam_runner"),
        ({"source": "scenes?weight=1,scenes?weight=2"}, "weight=1.*weights"),
        ({"source": "json:gone.json"}, "gone.json cannot be read"),
        ({"source": "gone.json"}, "did you mean json:gone.json"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, words):
    config = packing_of("pairs.json", **changes)
    with pytest.raises(UserError, match=words):
        prepare.prepare(config, tmp_path / "packed")


def test_scenes_and_mixtures_are_packed_and_the_training_data_where_no_source_is_named(tmp_path):
    source = write_many(tmp_path / "pictures", 3)
    changes = {"data.train": f"scenes,json:{source}", "data.scenes_examples": 5}
    config = packing_of(source, **changes, source="")
    assert main.run(main.Flags(mode="prepare", config=config, workdir=tmp_path / "packed")) == 0
    records = records_in(tmp_path / "packed")
    assert [len(record["captions"]) for record in records] == [4, 4, 4, 4, 4, 1, 1, 1]
    assert records[5]["image"] == jpeg(0) and records[5]["name"] == "0.jpg"
    assert len({record["image_id"] for record in records}) == 8


def test_an_evaluation_role_packs_an_image_once_with_all_its_captions(tmp_path):
    source = write_many(tmp_path / "pictures", 3)
    entries = json.loads(source.read_text())
    source.write_text(json.dumps([*entries, entries[1] | {"caption": "again"}]))
    assert pack(source, tmp_path / "test", role="test") == 0
    assert pack(source, tmp_path / "train") == 0
    captions = [record["captions"] for record in records_in(tmp_path / "test")]
    assert captions == [["picture 0"], ["picture 1", "again"], ["picture 2"]]
    assert len(records_in(tmp_path / "train")) == 4


def test_without_a_terminal_lines_report_progress(tmp_path, monkeypatch, capsys):
    source = write_many(tmp_path / "pictures", 12)
    (tmp_path / "pictures" / "5.jpg").unlink()
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    assert pack(source, tmp_path / "packed") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"packed {n}/12" for n in range(1, 13)]
    assert "pairs/s  1 skipped  0 s left" in lines[-1] and "skipped" not in lines[0]
