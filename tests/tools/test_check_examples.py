"""check-data on lists of other tasks: it looks at every picture, and counts examples."""

import json

import pytest
from example_files import lines, write_all
from list_files import picture, write
from small_packing import pack

from codebook_jax.tools.check_data import check_data
from configs import base


def check(workdir, train, **changes):
    """(the exit code, what check.json holds)"""
    config = base.get_config("tiny")
    values = {"data.train": train, "data.tokenizer_vocabulary": 300, "check.processes": 1}
    values |= {"check.least_side_px": 8, "check.max_bad_share": 0.9}
    config.update_from_flattened_dict(values | changes)
    code = check_data(config, workdir)
    return code, json.loads((workdir / "check.json").read_text())


COUNTS = {  # of the training data: listed, without a text or answer, usable, distinct pictures
    "questions": [(3, 1, 2, 1), (2, 0, 2, 2)],
    "comparisons": [(3, 0, 3, 4), (3, 0, 3, 4)],
    "statements": [(3, 1, 2, 2), (2, 0, 2, 2)],
    "expressions": [(3, 0, 3, 2)],
    "labels": [(3, 0, 3, 3)],
}


@pytest.mark.parametrize("kind", COUNTS)
def test_every_format_is_checked_as_it_is_and_packed(tmp_path, kind, capsys):
    specs = write_all(tmp_path / "files")[kind]
    for number, (spec, expected) in enumerate(zip(specs, COUNTS[kind], strict=True)):
        folder = tmp_path / f"packed{number}"
        assert pack("", folder, source=spec, side_px=0) == 0
        for name, source in ((f"listed{number}", spec), (f"read{number}", f"records:{folder}")):
            code, found = check(tmp_path / name, source)
            of = found["sources"][0]
            counts = [of[name] for name in ("listed", "without_caption", "usable", "images")]
            left_out = expected[1] if source == spec else 0  # a folder has only the number listed
            assert code == 0 and counts == [expected[0], left_out, *expected[2:]], source
            assert found["image_root"] is None and not (tmp_path / name / "usable.jsonl").exists()
            assert (tmp_path / name / "report.html").exists()
            listed, _, usable, _ = expected
            said = capsys.readouterr().out
            assert f"training on {usable} of {listed} listed {kind}" in said
            assert "is written for pairs whose pictures are separate files" in said


def test_a_bad_second_picture_makes_a_comparison_unusable_and_is_the_one_that_is_named(tmp_path):
    spec = write_all(tmp_path / "files")["comparisons"][0]
    write(tmp_path / "files/images/train/53/train-10-0-img1.png", b"no picture")
    _, found = check(tmp_path / "out", spec)
    of = found["sources"][0]
    assert [of[name] for name in ("listed", "usable", "undecodable", "images")] == [3, 2, 1, 4]
    [row] = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert row.split("\t")[1] == "images/train/53/train-10-0-img1.png" and "not a picture" in row


def test_a_leak_of_either_picture_is_found_and_a_missing_one_counted(tmp_path):
    spec = write_all(tmp_path / "files")["comparisons"][0]
    test = [
        {"sentence": "x", "identifier": "dev-1-0-0"},
        {"sentence": "y", "identifier": "dev-2-0-0"},
    ]
    folder = tmp_path / "dev"
    for name, number in (("1-0-img0", 40), ("1-0-img1", 41), ("2-0-img0", 42)):
        write(folder / f"dev-{name}.png", picture(number))
    used = tmp_path / "files/images/train/53/train-10-1-img0.png"
    write(folder / "dev-1-0-img1.png", used.read_bytes())  # right here, left there
    write(folder / "dev.json", lines(test))
    changes = {"data.test": f"nlvr2:{folder}/dev.json", "check.near_bits": 0}
    _, found = check(tmp_path / "out", spec, **changes)
    [leak] = found["leaks"]
    assert leak["images"] == 4 and leak["same_content"] == 1
    assert leak["pictures"][0]["name"] == "dev-1-0-img1.png"
    assert [found["sources"][1][name] for name in ("usable", "missing")] == [1, 1]


def test_a_mixture_is_checked_source_by_source(tmp_path):
    specs = write_all(tmp_path / "files")["comparisons"]
    _, found = check(tmp_path / "out", ", ".join(specs))
    assert [of["label"] for of in found["sources"]] == ["training", "training 1", "training 2"]
    assert [of["usable"] for of in found["sources"]] == [6, 3, 3]
    assert [of["captions"] for of in found["sources"]] == [12, 6, 6]
