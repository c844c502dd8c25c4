"""What all lists of examples share: text, answers, names, identity, refusals, memory, mixtures."""

import json
import pickle
import re
import tracemalloc

import pytest
from example_files import (
    ALBEF_QUESTIONS,
    ALBEF_SENTENCES,
    ALBEF_STATEMENTS,
    ANNOTATIONS,
    EXPRESSIONS,
    QUESTIONS,
    SENTENCES,
    STATEMENTS,
    lines,
    write_all,
)
from list_files import captions, ids, open_it, records, refusal, write

from codebook_jax.data.sources import KINDS, source_of
from codebook_jax.errors import UserError
from configs import base


def question(**changes):
    return ALBEF_QUESTIONS[0] | changes


def vqa(tmp_path, *rows):
    return write(tmp_path / "vqa.json", list(rows))


def test_every_format_is_a_source_that_crosses_to_another_process(tmp_path):
    for kind, specs in write_all(tmp_path).items():
        for role in ("train", "validation", "test"):
            for source in (open_it(spec, role) for spec in specs):
                other = pickle.loads(pickle.dumps(source))
                assert records(other) == records(source) and source.kind == kind in KINDS
                assert other.fingerprint() == source.fingerprint()
                assert [source.name(i) for i in range(len(source))] == [
                    other.name(i) for i in range(len(other))
                ]
                for index in (-1, len(source)):
                    for read in (source.__getitem__, source.captions, source.name, source.pictures):
                        with pytest.raises(IndexError):
                            read(index)


def test_captions_are_the_text_and_each_distinct_answer_with_words(tmp_path):
    path = vqa(tmp_path, question(answer=["a", "b", "a", "", " ", 7]), question(answer=[]))
    source = open_it(f"vqa:{path}", "test")
    assert captions(source) == [("What colour?", "a", "b", "7"), ("What colour?",)]
    assert source[0].answers == ("a", "b", "a", "", " ", "7")  # each counts where ten are compared


def test_a_text_without_words_is_left_out_in_every_role_and_counted(tmp_path):
    path = vqa(tmp_path, question(question=""), question(), question(question=" ?", question_id=9))
    for role in ("train", "test"):
        source = open_it(f"vqa:{path}", role)
        assert len(source) == 1 and source.listed == 3
        assert [name for name, _ in source.left_out] == ["7 val2014/a.jpg", "9 val2014/a.jpg"]
        assert source.left_out[1][1] == f"{path}[2] has no text with words"
    assert "[0] has no text with words" in refusal(f"vqa:{vqa(tmp_path, question(question='?'))}")


def test_a_name_is_the_key_and_the_pictures(tmp_path):
    specs = write_all(tmp_path)
    source = open_it(specs["questions"][1])
    assert source.name(0) == "7 val2014/a.jpg" and source.pictures(0) == ("val2014/a.jpg",)
    source = open_it(specs["comparisons"][0])
    pair = tuple(f"images/train/53/train-10-0-img{side}.png" for side in (0, 1))
    assert source.pictures(0) == pair and source.name(0) == " ".join(("train-10-0-0", *pair))


def test_equal_first_pictures_have_equal_ids(tmp_path):
    images = ("b.jpg", "a.jpg", "./b.jpg", "c.jpg", "a.jpg")
    path = vqa(tmp_path, *(question(image=image) for image in images))
    assert ids(open_it(f"vqa:{path}")) == [0, 1, 0, 2, 1]


def test_a_fingerprint_is_of_all_content_and_of_no_path(tmp_path):
    entry = EXPRESSIONS[0]
    prints = []
    for changes in (
        *({}, {"text": "x"}, {"image": "y.jpg"}, {"ref_id": "3"}, {"bbox": [1, 2.5, 10, 9]}),
    ):
        path = write(tmp_path / "refs.json", [entry | changes])
        prints.append(open_it(f"grounding:{path}").fingerprint())
    for answer in ("a", "b"):
        prints.append(open_it(f"vqa:{vqa(tmp_path, question(answer=answer))}").fingerprint())
    prints.append(open_it(f"vqa:{vqa(tmp_path, question(answer='b', dataset='vg'))}").fingerprint())
    assert len(set(prints)) == len(prints)
    moved = write(tmp_path / "other" / "list.json", [entry])
    assert open_it(f"grounding:{moved}", image_root="/data").fingerprint() == prints[0]


def test_paths_follow_the_rules_of_all_lists(tmp_path):
    far = vqa(tmp_path, question(image="/export/a.jpg"))
    assert open_it(f"vqa:{far}", path_map="/export=/data")[0].images == ("/data/a.jpg",)
    assert '[0], key "image"' in refusal(f"vqa:{far}")
    rows = [ALBEF_SENTENCES[0] | {"images": ["a.jpg", "../b.jpg"]}]
    path = write(tmp_path / "nlvr2.json", rows)
    assert "[0], key \"images\": '../b.jpg' is outside" in refusal(f"nlvr2:{path}")


CAPTIONS = [{"image": "a.jpg", "caption": "one"}]
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
FOREIGN = [  # (scheme, content, the key that is missing, the scheme that reads it)
    ("vqa", CAPTIONS, "question", "json"),
    ("vqa", ALBEF_SENTENCES, "question", "nlvr2"),
    ("vqa", lines(SENTENCES), "question", "nlvr2"),
    ("vqa", lines(STATEMENTS), "question", "entailment"),
    ("vqa", EXPRESSIONS, "question", "grounding"),
    ("vqa", COCO, "question", "coco"),
    ("nlvr2", ALBEF_QUESTIONS, "sentence", "vqa"),
    ("nlvr2", QUESTIONS, "sentence", "vqa"),
    ("nlvr2", ALBEF_STATEMENTS, "images", "entailment"),
    ("entailment", ALBEF_SENTENCES, "image", "nlvr2"),
    ("entailment", ALBEF_QUESTIONS, "sentence", "vqa"),
    ("entailment", CAPTIONS, "sentence", "json"),
    ("grounding", ALBEF_QUESTIONS, "text", "vqa"),
    ("grounding", CAPTIONS, "text", "json"),
    ("json", ALBEF_QUESTIONS, "caption", "vqa"),
    ("json", QUESTIONS, "image", "vqa"),
    ("json", ALBEF_SENTENCES, "image", "nlvr2"),
    ("json", ALBEF_STATEMENTS[:1], "caption", "entailment"),
    ("json", lines(STATEMENTS), "image", "entailment"),
    ("json", EXPRESSIONS, "caption", "grounding"),
]


@pytest.mark.parametrize(("scheme", "content", "key", "reader"), FOREIGN, ids=range(len(FOREIGN)))
def test_the_file_of_another_task_is_refused_by_what_it_lacks_with_the_scheme_that_reads_it(
    tmp_path, scheme, content, key, reader
):
    path = write(tmp_path / "list.json", content)
    said = refusal(f"{scheme}:{path}")
    assert f'has no key "{key}" (its keys: ' in said and str(path) in said
    assert f"read this file with {reader}:" in said and f"with {scheme}:" not in said


BROKEN = [
    ("vqa", [question(question=3)], r'\[0\], key "question": 3 is not a sentence: give entries'),
    ("vqa", [question(image="")], r'\[0\], key "image": "" is not the path'),
    ("vqa", [question(question_id=None)], r'\[0\], key "question_id": null is not an id'),
    ("vqa", [question(answer={"a": 1})], r'\[0\], key "answer": {"a": 1} is neither'),
    ("vqa", [question(answer=True)], r'\[0\], key "answer": true is neither'),
    ("vqa", [question(answer=["a", None])], r'\[0\], key "answer": .* is neither'),
    ("vqa", [{"question": "what?"}], r'has no key "image" \(its keys: question\): give entries'),
    ("vqa", [3], r'\[0\] has no key "question" \(it is 3\)'),
    ("vqa", ANNOTATIONS, r'line 1 has no key "question" .*\?annotations=FILE'),
    ("vqa", QUESTIONS | {"questions": [{"image_id": "a"}]}, r'questions\[0\], key "image_id": \'a'),
    ("vqa", QUESTIONS | {"questions": 3}, r'key "questions": 3 is not a list'),
    ("vqa", [question(answer=["", " "])], r"no questions .*\[0\] has no answer to train on"),
    ("vqa", [], "lists no questions about images to read: give entries"),
    ("nlvr2", [ALBEF_SENTENCES[0] | {"images": ["a"]}], r'key "images": \["a"\] is not .* two'),
    (
        "nlvr2",
        [ALBEF_SENTENCES[0] | {"label": "maybe"}],
        r'"maybe" is not a label: use true, false',
    ),
    ("nlvr2", [SENTENCES[0] | {"identifier": "a-1"}], r'key "identifier": "a-1" is not SPLIT-SET'),
    (
        "entailment",
        [ALBEF_STATEMENTS[0], ALBEF_STATEMENTS[0] | {"label": "maybe"}],
        r'\[1\], key "label": "maybe" is not a label: use entailment, neutral, contradiction',
    ),
    ("entailment", [ALBEF_STATEMENTS[0] | {"label": 3}], r'key "label": 3 is not a label'),
    ("entailment", lines(STATEMENTS[2:]), r'no statements .*labelled "-"'),
    ("grounding", [{"image": "a.jpg", "text": ["x"]}], r'key "text": \["x"\] is not a sentence'),
]


@pytest.mark.parametrize(("scheme", "content", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_entry_is_refused_with_its_place(tmp_path, scheme, content, words):
    path = write(tmp_path / "list.json", content)
    said = refusal(f"{scheme}:{path}")
    assert re.search(words, said) and str(path) in said


def test_ids_are_needed_to_evaluate_and_not_to_train(tmp_path):
    rows = [{name: value for name, value in question().items() if name != "question_id"}]
    path = vqa(tmp_path, *rows)
    assert open_it(f"vqa:{path}")[0].key == 0
    assert 'no key "question_id"' in refusal(f"vqa:{path}", "validation")
    refs = write(tmp_path / "refs.json", [{"image": "a.jpg", "text": "left cup"}])
    assert open_it(f"grounding:{refs}")[0].key == 0
    assert 'no key "ref_id"' in refusal(f"grounding:{refs}", "test")


def test_sources_of_one_kind_mix_and_of_two_do_not(tmp_path):
    specs = write_all(tmp_path)
    mixed = open_it(", ".join(specs["questions"]))
    assert mixed.kind == "questions" and len(mixed) == 4
    assert ids(mixed) == [0, 0, 3, 4] and mixed.pictures(3) == ("b.jpg",)
    assert mixed.name(2) == "7 val2014/a.jpg" and mixed.captions(3)[1] == "on a table"
    said = refusal(f"{specs['questions'][1]}, {specs['labels'][0]}")
    assert "mixes images with a label each and questions about images" in said


def test_a_run_of_another_kind_names_what_it_was_given_and_what_it_reads(tmp_path):
    config = base.get_config("tiny")
    for kind, (spec, *_) in write_all(tmp_path).items():
        assert source_of(config, spec, "train", kind=kind).kind == kind
        assert source_of(config, spec, "train", kind=None).kind == kind
        with pytest.raises(UserError, match=f"lists {KINDS[kind][0]}, not pairs"):
            source_of(config, spec, "train")


def test_a_large_list_is_held_without_an_object_an_entry(tmp_path):
    rows = (
        {"image": f"train2014/COCO_train2014_{n:012}.jpg", "question": f"What is {n}?"}
        | {"question_id": n, "answer": ["yes"] * 5 + [f"answer {n}"] * 5}
        for n in range(5000)
    )
    path = write(tmp_path / "large.jsonl", lines(rows))
    tracemalloc.start()
    source = open_it(f"vqa:{path}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 5000
    assert held / len(source) < 400  # 250 bytes of text; a list of ten answers takes over 700


def test_annotations_are_parsed_one_at_a_time(tmp_path):
    rows = [ANNOTATIONS["annotations"][0] | {"question_id": n} for n in range(2000)]
    answers = write(tmp_path / "annotations.json", ANNOTATIONS | {"annotations": rows})
    asked = [QUESTIONS["questions"][0] | {"question_id": n} for n in range(2000)]
    path = write(tmp_path / "questions.json", QUESTIONS | {"questions": asked})
    tracemalloc.start()
    source = open_it(f"vqa:{path}?annotations={answers}")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    json.loads(answers.read_text())
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 2000 and source[7].answers == ("2",) * 10
    assert most < 0.7 * whole  # it is above if all are parsed at once
