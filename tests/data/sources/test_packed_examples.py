"""Examples packed by --mode=prepare and read back by records:, of every format."""

import json
import re
import shutil

import msgpack
import pytest
from array_record.python import array_record_module
from example_files import ALBEF_QUESTIONS, EXPRESSIONS, QUESTIONS, write_all, write_pictures
from list_files import open_it, records, refusal, write
from small_packing import content, pack, picture, write_many

from codebook_jax.data.images import decode
from codebook_jax.data.sources.record import WithoutCaption


def packed(spec, folder, role="train", **changes):
    """The source that packs a list, and the folder that is read back."""
    assert pack("", folder, source=spec, role=role, side_px=0, **changes) == 0
    return open_it(spec, role), open_it(f"records:{folder}", role)


def index_of(folder):
    paths = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("role", ["train", "validation", "test"])
def test_what_is_packed_of_every_format_is_read_back_equal(tmp_path, role):
    for kind, specs in write_all(tmp_path / "files").items():
        for number, spec in enumerate(specs):
            listed, read = packed(spec, tmp_path / f"{kind}{number}", role)
            assert read.kind == listed.kind == kind
            assert len(read) == len(listed) > 0 and read.listed == listed.listed
            for index, example in enumerate(records(listed)):
                assert read[index]._replace(images=()) == example._replace(images=())
                files = [open(image, "rb").read() for image in example.images]
                assert list(read[index].images) == files  # small JPEGs keep their bytes
                for part in ("captions", "name", "pictures"):
                    assert getattr(read, part)(index) == getattr(listed, part)(index)
            assert re.fullmatch(rf"records\('.*', {read.evaluated}={len(read)}\)", repr(read))


def test_examples_of_one_picture_stay_apart_to_evaluate(tmp_path):
    spec = f"vqa:{write(tmp_path / 'vqa.json', [ALBEF_QUESTIONS[0]] * 3)}"
    write_pictures(tmp_path, ["val2014/a.jpg"])
    for role in ("train", "test"):
        _, read = packed(spec, tmp_path / role, role)
        assert [example.image_id for example in records(read)] == [0, 0, 0]


def test_the_index_has_all_but_pictures_and_the_manifest_the_kind(tmp_path):
    spec = write_all(tmp_path / "files")["comparisons"][0]
    packed(spec, tmp_path / "packed")
    entry = index_of(tmp_path / "packed")[0]
    assert entry["captions"] == ["There are two cups.", "true"] and entry["image_id"] == 0
    assert [entry[side] for side in ("height", "width")] == [[20, 20], [30, 30]]
    assert len(entry["sha256"]) == len(entry["bytes"]) == len(entry["pictures"]) == 2
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    assert manifest["source"]["kind"] == "comparisons" and manifest["captions"] == 6


def test_boxes_are_in_the_pixels_of_the_packed_picture(tmp_path):
    row = EXPRESSIONS[0] | {"image": "large.png", "bbox": [30, 10, 60, 40]}
    path = write(tmp_path / "refs.json", [row])
    found = write(tmp_path / "dets.json", {"3": [[0, 0, 300, 200]]})
    picture(0, 200, 300).save(tmp_path / "large.png")
    spec = f"grounding:{path}?detections={found}"
    assert pack("", tmp_path / "packed", source=spec, role="test", side_px=50) == 0
    [example] = records(open_it(f"records:{tmp_path}/packed", "test"))
    assert decode(example.images[0]).shape == (50, 75, 3)
    assert example.box == pytest.approx((7.5, 2.5, 15, 10))
    assert example.proposals == (pytest.approx((0, 0, 75, 50)),)


def test_a_comparison_needs_both_pictures(tmp_path):
    spec = write_all(tmp_path / "files")["comparisons"][0]
    (tmp_path / "files/images/train/53/train-10-0-img1.png").unlink()
    listed, read = packed(spec, tmp_path / "packed")
    assert len(listed) == 3 and [example.key[-3:] for example in records(read)] == ["1-1", "1-0"]
    [line] = (tmp_path / "packed" / "skipped.tsv").read_text().splitlines()
    assert line.startswith("train-10-0-0 ") and "No such file" in line


def test_what_was_packed_without_answers_does_not_train(tmp_path):
    path = write(tmp_path / "questions.json", QUESTIONS)
    write_all(tmp_path)
    packed(f"vqa:{path}", tmp_path / "none", "test")
    assert "holds questions without answers" in refusal(f"records:{tmp_path}/none")
    spec = f"vqa:{path}?annotations={tmp_path}/annotations.json"
    _, read = packed(spec, tmp_path / "some", "validation")
    assert read[2].answers == ()
    train = open_it(f"records:{tmp_path}/some")
    with pytest.raises(WithoutCaption, match=r"record 2 has no answer to train on"):
        train[2]
    assert train[1] == read[1]


def test_a_mixture_of_examples_is_packed_as_one(tmp_path, capsys):
    specs = write_all(tmp_path / "files")["questions"]
    listed, read = packed(", ".join(specs), tmp_path / "packed")
    assert [example[1:] for example in records(read)] == [
        example[1:] for example in records(listed)
    ]
    assert read.pictures(3) == ("b.jpg",)
    assert "packed 4 of 5 listed questions into 1 shard" in capsys.readouterr().out


def test_packing_again_verifies_the_folder_and_refuses_another_list(tmp_path, capsys):
    specs = write_all(tmp_path / "files")["statements"]
    packed(specs[0], tmp_path / "packed")
    before = content(tmp_path / "packed")
    packed(specs[0], tmp_path / "packed")
    assert content(tmp_path / "packed") == before
    assert "already complete" in capsys.readouterr().out


def test_shards_are_named_after_what_they_hold_and_those_of_older_versions_are_read(tmp_path):
    spec = write_all(tmp_path / "files")["statements"][0]
    _, now = packed(spec, tmp_path / "packed")
    names = {f"examples-00000-of-00001.{end}" for end in ("array_record", "jsonl")}
    assert content(tmp_path / "packed").keys() == names | {"manifest.json", "skipped.tsv"}
    older, manifest = tmp_path / "older", tmp_path / "older" / "manifest.json"
    shutil.copytree(tmp_path / "packed", older)
    for name in names:
        (older / name).rename(older / name.replace("examples", "pairs"))
    manifest.write_text(manifest.read_text().replace('"examples-', '"pairs-'))
    before = content(older)
    _, then = packed(spec, older)  # verifies it
    assert content(older) == before and records(then) == records(now)
    assert then.fingerprint() == now.fingerprint()
    next(older.glob("pairs-*.jsonl")).write_text("damaged")
    packed(spec, older)
    assert content(older) == content(tmp_path / "packed")


def test_pairs_are_packed_as_they_always_were(tmp_path):
    """Folders that were packed before examples are still complete, to the byte."""
    path = write_many(tmp_path / "pictures", 2)
    assert pack(path, tmp_path / "packed") == 0
    [shard] = (tmp_path / "packed").glob("*.array_record")
    found = array_record_module.ArrayRecordReader(str(shard)).read_all()
    for number, own in enumerate(found):
        jpeg = (tmp_path / "pictures" / f"{number}.jpg").read_bytes()
        told = {"captions": [f"picture {number}"], "image_id": number, "name": f"{number}.jpg"}
        assert own == msgpack.packb({"image": jpeg, **told})
    line = index_of(tmp_path / "packed")[0]
    assert list(line) == [*("name", "image_id", "captions", "height", "width", "bytes", "sha256")]
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert list(manifest["source"]) == ["repr", "fingerprint", "records"]
