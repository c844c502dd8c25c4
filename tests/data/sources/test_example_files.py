"""The published files of other tasks and their quirks, each as the examples that it lists."""

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from example_files import (
    ALBEF_QUESTIONS,
    ALBEF_SENTENCES,
    ALBEF_STATEMENTS,
    ANNOTATIONS,
    BY_IMAGE,
    DETECTIONS,
    EXPRESSIONS,
    QUESTIONS,
    SENTENCES,
    STATEMENTS,
    TEN,
    lines,
    write_pictures,
)
from list_files import ids, open_it, records, refusal, write

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.data.sources import Example


def column(source, name):
    return [getattr(example, name) for example in records(source)]


def paths(folder, source):
    """The pictures of each example, below the folder."""
    return [
        tuple(str(Path(image).relative_to(folder)) for image in example.images)
        for example in records(source)
    ]


# Questions


def test_albefs_questions_have_the_answers_of_all_annotators_and_half_weight_in_visual_genome(
    tmp_path,
):
    source = open_it(f"vqa:{write(tmp_path / 'vqa.json', ALBEF_QUESTIONS)}")
    image = f"{tmp_path}/val2014/a.jpg"
    assert source[0] == Example((image,), "What colour?", tuple(TEN), 7, 0)
    assert source[1][1:6] == ("Where is it?", ("on a table",), "8", 1, 0.5)
    assert source.kind == "questions" and repr(source).endswith("vqa.json', questions=2)")


def official(tmp_path, role="train", options="", questions=QUESTIONS, annotations=ANNOTATIONS):
    path = write(tmp_path / "questions.json", questions)
    answers = write(tmp_path / "annotations.json", annotations)
    return open_it(f"vqa:{path}?annotations={answers}{options}", role)


def test_official_questions_are_joined_to_their_answers_and_name_cocos_pictures(tmp_path):
    source = official(tmp_path, "validation")
    assert column(source, "answers") == [tuple(TEN), ("2",) * 10, ()]
    assert column(source, "key") == [420000, 420001, 730000]
    images = [(f"COCO_val2014_0000000000{number}.jpg",) for number in (42, 42, 73)]
    assert paths(tmp_path, source) == images and ids(source) == [0, 0, 1]


def test_a_question_without_an_annotation_is_left_out_of_training_and_counted(tmp_path):
    source = official(tmp_path)
    assert len(source) == 2 and source.listed == 3
    [(name, why)] = source.left_out
    assert name == "730000 COCO_val2014_000000000073.jpg"
    assert why.endswith("questions.json questions[2] has no answer to train on")


@pytest.mark.parametrize(("asked", "answered"), [(str, int), (int, str), (str, str)])
def test_question_ids_join_whether_texts_or_numbers_and_keep_the_type_of_the_question(
    tmp_path, asked, answered
):
    questions, annotations = json.loads(json.dumps([QUESTIONS, ANNOTATIONS]))
    for row in questions["questions"]:
        row.update(question_id=asked(row["question_id"]), image_id=asked(row["image_id"]))
    for row in annotations["annotations"]:
        row["question_id"] = answered(row["question_id"])
    source = official(tmp_path, questions=questions, annotations=annotations)
    assert column(source, "answers") == [tuple(TEN), ("2",) * 10]
    assert column(source, "key") == [asked(420000), asked(420001)]


def test_the_split_of_a_question_file_names_its_pictures(tmp_path):
    for subtype, option, part in (
        ("val2014", "", "val2014"),
        ("test-dev2015", "", "test2015"),
        (None, "&split=train2014", "train2014"),
        ("abstract_v002_val2015", "&split=val2014", "val2014"),
    ):
        questions = QUESTIONS | {"data_subtype": subtype}
        source = official(tmp_path, "test", option, questions)
        assert paths(tmp_path, source)[0] == (f"COCO_{part}_000000000042.jpg",)
    path = write(tmp_path / "questions.json", QUESTIONS | {"data_subtype": "abstract_v002_val2015"})
    said = refusal(f"vqa:{path}", "test")
    assert "abstract_v002_val2015" in said and "give ?split=train2014 or val2014" in said
    assert "split=val is not valid" in refusal(f"vqa:{path}?split=val")


def test_pictures_of_questions_are_found_in_a_folder_of_their_split_too(tmp_path):
    alone = official(tmp_path).fingerprint()
    write_pictures(tmp_path, ["val2014/COCO_val2014_000000000042.jpg"])
    source = official(tmp_path)
    assert decode(source[0].images[0]).shape == (20, 30, 3)
    assert source.fingerprint() == alone  # it is of the content, not of where pictures are


def test_a_test_set_has_no_answers_and_does_not_train(tmp_path):
    path = write(tmp_path / "questions.json", QUESTIONS)
    assert column(open_it(f"vqa:{path}", "test"), "answers") == [(), (), ()]
    said = refusal(f"vqa:{path}")
    assert "lists no questions about images to read" in said and "?annotations=FILE" in said
    entries = [{"question_id": 1, "question": "Why?", "image": "a.jpg", "dataset": "vqa"}]
    path = write(tmp_path / "albef.json", entries)
    assert open_it(f"vqa:{path}", "test")[0].answers == ()
    assert "has no answer to train on" in refusal(f"vqa:{path}")


def test_annotations_that_belong_to_other_questions_are_refused(tmp_path):
    others = {"annotations": [row | {"question_id": 1} for row in ANNOTATIONS["annotations"]]}
    path = write(tmp_path / "questions.json", QUESTIONS)
    other = write(tmp_path / "others.json", others)
    said = refusal(f"vqa:{path}?annotations={other}", "test")
    assert f"{other} has no answer to any question of {path}" in said
    assert "others.json annotations[0]" in refusal(
        f"vqa:{path}?annotations={write(other, {'annotations': [{'answers': []}]})}"
    )
    said = refusal(f"vqa:{path}?annotations={path}")
    assert 'no list at a key "annotations"' in said
    listed = write(tmp_path / "albef.json", ALBEF_QUESTIONS)
    assert "leave out ?annotations=" in refusal(f"vqa:{listed}?annotations={other}")


# Comparisons

NAMES = [(f"train-10-{pair}-img0.png", f"train-10-{pair}-img1.png") for pair in (0, 1, 1)]


def test_nlvr2_in_both_formats_has_two_pictures_a_truth_and_its_identifier(tmp_path):
    rows = [lines(SENTENCES), ALBEF_SENTENCES]
    for number, content in enumerate(rows):
        source = open_it(f"nlvr2:{write(tmp_path / f'{number}.json', content)}")
        assert source.kind == "comparisons" and ids(source) == [0, 1, 1]
        assert paths(tmp_path / "images/train/53", source) == NAMES
        assert column(source, "answers") == [("true",), ("false",), ("false",)]
        assert column(source, "text")[0] == "There are two cups."
        # ALBEF's list has no identifiers: sentences are numbered as they come in a set
        assert column(source, "key") == ["train-10-0-0", "train-10-1-1", "train-10-1-0"]


@pytest.mark.parametrize(
    "folder", ["images/train/53", "train/53", "53", "images/train", "train", ""]
)
def test_official_pictures_are_found_however_they_were_unpacked(tmp_path, folder):
    write_pictures(tmp_path / folder, dict.fromkeys(name for pair in NAMES for name in pair))
    source = open_it(f"nlvr2:{write(tmp_path / 'train.json', lines(SENTENCES))}")
    assert paths(tmp_path / folder, source) == NAMES
    for example in records(source):  # JPEGs in files called .png
        assert [decode(image).shape for image in example.images] == [(20, 30, 3)] * 2
    prints = {source.fingerprint()}
    moved = write(tmp_path / "elsewhere" / "train.json", lines(SENTENCES))
    assert prints == {open_it(f"nlvr2:{moved}").fingerprint()}


def test_splits_without_folders_of_their_own_need_no_directory(tmp_path):
    rows = [{"sentence": "Two.", "identifier": "test1-0-1-0", "label": "True"}]
    write_pictures(tmp_path, ["test1/test1-0-1-img0.png"])
    source = open_it(f"nlvr2:{write(tmp_path / 'test1.json', lines(rows))}", "test")
    assert paths(tmp_path, source) == [("test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png")]


def test_truths_are_texts_or_bare_and_absent_in_a_test_set(tmp_path):
    pair = {"images": ["a.jpg", "b.jpg"], "sentence": "Two."}
    rows = [pair | {"label": label} for label in ("TRUE", False, 1)] + [pair]
    path = write(tmp_path / "pairs.json", rows)
    source = open_it(f"nlvr2:{path}", "test")
    assert column(source, "answers") == [("true",), ("false",), ("true",), ()]
    assert column(source, "key") == [0, 1, 2, 3]  # names without a pattern are no identifiers
    assert len(open_it(f"nlvr2:{path}")) == 3


# Statements


def test_snli_ve_has_the_image_under_either_spelling_and_drops_what_is_undecided(tmp_path):
    source = open_it(f"entailment:{write(tmp_path / 'snli_ve_dev.jsonl', lines(STATEMENTS))}")
    assert paths(tmp_path, source) == [("123.jpg",), ("45.jpg",)]
    assert column(source, "answers") == [("neutral",), ("entailment",)]
    assert column(source, "text") == ["A tall man.", "A woman."]
    assert column(source, "key") == ["123.jpg#0r1n", "45.jpg#1r1e"]
    assert source.kind == "statements" and source.listed == 3
    [(name, why)] = source.left_out
    assert name == "45.jpg#1r1c 45.jpg" and why.endswith('line 3 is labelled "-", undecided')


def test_albefs_statements_name_numbers_of_flickr30k(tmp_path):
    path = write(tmp_path / "ve_train.json", ALBEF_STATEMENTS)
    source = open_it(f"entailment:{path}?image_root={tmp_path}/flickr30k-images")
    assert paths(tmp_path / "flickr30k-images", source) == [("123.jpg",), ("45.jpg",)]
    assert column(source, "answers") == [("contradiction",), ("entailment",)]
    assert column(source, "key") == [0, 1]


# Expressions


def test_expressions_have_the_box_and_the_detections_of_their_reference(tmp_path):
    path = write(tmp_path / "refs.json", EXPRESSIONS)
    found = write(tmp_path / "dets.json", DETECTIONS)
    source = open_it(f"grounding:{path}?detections={found}", "test")
    box, proposals = (1.0, 2.5, 10.0, 8.0), ((0.0, 0.0, 5.0, 5.0), (4.0, 4.0, 10.5, 3.0))
    assert column(source, "box") == [box, box, None]
    assert column(source, "proposals") == [proposals, proposals, ()]
    assert column(source, "key") == [3, "3", 4] and ids(source) == [0, 0, 1]
    assert source.kind == "expressions" and source.captions(0) == ("left cup",)
    assert column(open_it(f"grounding:{path}"), "proposals") == [(), (), ()]
    unnamed = [{"image": "a.jpg", "text": "one"}] * 4 + EXPRESSIONS[:1]  # the fourth is none of 3
    source = open_it(f"grounding:{write(path, unnamed)}?detections={found}")
    assert column(source, "proposals") == [(), (), (), (), proposals]


def test_one_reference_without_detections_does_not_make_their_keys_those_of_images(tmp_path):
    rows = [{"image": f"{1 + at % 3}.jpg", "text": "it", "ref_id": at} for at in range(1, 10)]
    boxes = {str(at): [[at, 0, 5, 5]] for at in range(1, 9)}
    path, found = write(tmp_path / "refs.json", rows), write(tmp_path / "dets.json", boxes)
    source = open_it(f"grounding:{path}?detections={found}", "test")
    given = [tuple(map(tuple, boxes.get(str(at), []))) for at in range(1, 10)]
    assert column(source, "proposals") == given


@pytest.mark.parametrize("change", [{"image": "other.jpg"}, {"bbox": [1, 2, 3, 4]}])
def test_one_reference_of_two_pictures_or_boxes_is_refused(tmp_path, change):
    path = write(tmp_path / "refs.json", [EXPRESSIONS[0], EXPRESSIONS[0] | change])
    said = refusal(f"grounding:{path}")
    assert 'refs.json[1], key "ref_id": 3 is also the ref_id of another picture or box' in said


def test_detections_may_be_listed_by_image(tmp_path):
    path = write(tmp_path / "refs.json", EXPRESSIONS)
    found = write(tmp_path / "dets.json", BY_IMAGE)  # its "4" is an image, not the reference 4
    source = open_it(f"grounding:{path}?detections={found}", "test")
    assert column(source, "proposals")[2] == ((2.0, 2.0, 2.0, 2.0),)
    assert len(source[1].proposals) == 2
    other = write(tmp_path / "others.json", {"777": [[0, 0, 1, 1]]})
    assert "has boxes for none" in refusal(f"grounding:{path}?detections={other}")


BOXES = [
    ([1, 2, 3], "is not four numbers"),
    ([], "is not four numbers"),
    ([1, 2, 3, "4"], "is not four numbers"),
    ([1, 2, True, 4], "is not four numbers"),
    ({"x": 1}, "is not four numbers"),
    ([1, 2, float("nan"), 4], "is not four numbers"),
    ([1, 2, 0, 4], "has no size"),
    ([1, 2, 3, -4], "has no size"),
]


@pytest.mark.parametrize(("box", "why"), BOXES, ids=range(len(BOXES)))
def test_a_box_of_another_form_is_refused_with_its_place(tmp_path, box, why):
    good = write(tmp_path / "good.json", EXPRESSIONS)
    bad = write(tmp_path / "bad.json", [EXPRESSIONS[0], EXPRESSIONS[1] | {"box": box}])
    said = refusal(f"grounding:{bad}")
    assert f'{bad}[1], key "box"' in said and why in said and "[x, y, width, height]" in said
    found = write(tmp_path / "dets.json", {"3": [[0, 0, 1, 1], box], "4": []})
    said = refusal(f"grounding:{good}?detections={found}")
    assert f'{found}, key "3"[1]' in said and why in said


PICKLE = """
import pickle, sys
told = [{"sent": "left cup", "raw": "Left cup"}, {"sent": "cup", "raw": "cup"}]
name = "COCO_train2014_000000000009_5.jpg"
ref = {"ref_id": 5, "ann_id": 50, "image_id": 9, "split": "val", "file_name": name}
other = {"ref_id": 6, "ann_id": 51, "image_id": 9, "split": "train", "sentences": told[:1]}
refs = [ref | {"sentences": told}, other]
pickle.dump(refs, open(sys.argv[1], "wb"), protocol=int(sys.argv[2]))
"""


@pytest.mark.parametrize(("name", "protocol"), [("refs(unc).p", 0), ("refs.json", 4)])
def test_refers_pickle_is_refused_with_a_command_that_converts_it(tmp_path, name, protocol):
    subprocess.run([sys.executable, "-c", PICKLE, tmp_path / name, str(protocol)], check=True)
    boxes = [{"id": 50, "bbox": [1, 2, 3, 4]}, {"id": 51, "bbox": [5, 6, 7, 8]}]
    write(tmp_path / "instances.json", {"annotations": boxes})
    said = refusal(f"grounding:{tmp_path / name}")
    assert f"{tmp_path / name} is a pickle" in said and "if you trust" in said
    _, *arguments = shlex.split(said[said.index("python -c") :])
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    source = open_it(f"grounding:{tmp_path / 'val.json'}", "test")
    assert column(source, "text") == ["left cup", "cup"] and column(source, "key") == [5, 5]
    assert source[0].box == (1.0, 2.0, 3.0, 4.0)
    assert paths(tmp_path, source)[0] == ("COCO_train2014_000000000009.jpg",)
    refs = write(tmp_path / "good.json", EXPRESSIONS)
    assert "is a pickle" in refusal(f"grounding:{refs}?detections={tmp_path / name}")


@pytest.mark.parametrize(("name", "protocol"), [("list.pkl", 0), ("list.json", 4)])
@pytest.mark.parametrize("scheme", ["json", "vqa", "nlvr2", "entailment", "coco"])
def test_any_pickle_is_refused_with_a_command_that_converts_it(tmp_path, scheme, name, protocol):
    entries = [{"image": "a.jpg", "caption": "a cup"}]
    write(tmp_path / name, pickle.dumps(entries, protocol=protocol))
    said = refusal(f"{scheme}:{tmp_path / name}")
    assert f"{tmp_path / name} is a pickle" in said and "if you trust" in said
    _, *arguments = shlex.split(said[said.index("python -c") :])
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "converted.json").read_text()) == entries


# Labels


def test_pictures_in_folders_of_classes_are_read_in_turn(tmp_path):
    write_pictures(tmp_path, ["b_2/1.png", "b_2/deep/0.jpg", "a/2.JPEG", "a/10.png"])
    for name in (".git/1.jpg", "a/.1.jpg", "classes.txt", "a/Thumbs.db", "lost.jpg"):
        write(tmp_path / name, "x")
    source = open_it(f"folders:{tmp_path}", "validation")
    assert column(source, "key") == ["a/10.png", "b_2/1.png", "a/2.JPEG", "b_2/deep/0.jpg"]
    assert column(source, "answers") == [("a",), ("b_2",)] * 2
    assert source.kind == "labels" and source[0].text == "" and source.captions(1) == ("b_2",)
    assert source.name(0) == "a/10.png" and decode(source[1].images[0]).shape == (20, 30, 3)
    assert len(source.left_out) == 3 and source.listed == 7
    why = {Path(name.split()[-1]).name: reason for name, reason in source.left_out}
    assert re.search("is not a picture", why["Thumbs.db"])
    assert "in no folder of a class" in why["lost.jpg"]


def test_what_has_no_folders_of_classes_is_refused(tmp_path):
    write_pictures(tmp_path, ["train/cup/1.jpg", "val/cup/1.jpg", "flat/1.jpg"])
    assert "is not a folder" in refusal(f"folders:{tmp_path}/gone")
    assert "is in no folder of a class" in refusal(f"folders:{tmp_path}/flat")
    (tmp_path / "flat" / "1.jpg").unlink()
    (tmp_path / "flat").rmdir()
    said = refusal(f"folders:{tmp_path}")
    assert "has train and val, not classes" in said and f"folders:{tmp_path}/train" in said


# Pictures


def test_a_picture_that_is_not_there_is_an_unreadable_image(tmp_path):
    source = open_it(f"vqa:{write(tmp_path / 'vqa.json', ALBEF_QUESTIONS)}")
    with pytest.raises(UnreadableImage, match=r"val2014/a\.jpg: No such file"):
        decode(source[0].images[0])
