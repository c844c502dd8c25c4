"""Stories listed in JSON files, mistakes in them, and runs of pairs that are given stories."""

import json
import re
import shutil
import tracemalloc

import pytest
from list_files import captions, check_source, open_it, picture, records, refusal, write

from codebook_jax.data.images import decode
from codebook_jax.data.sources import source_of
from codebook_jax.errors import UserError
from codebook_jax.tools.check_data import check_data
from codebook_jax.tools.prepare import prepare
from configs import base

STORY = {"frames": ["b.jpg", "sub/a.jpg", "b.jpg"], "captions": ["Two", "one", "Two"], "id": 7}
STORIES = [STORY, {"frames": ["c.jpg"], "captions": ["a", "b", "c"]}, STORY | {"id": "x"}]


def changed(**changes):
    return [STORY, STORY | changes]


def test_frames_and_sentences_keep_their_order_and_their_repetitions(tmp_path):
    path = write(tmp_path / "stories.json", STORIES)
    for role in ("train", "validation", "test"):
        source = open_it(f"json:{path}", role)
        assert source.kind == "stories" and len(source) == source.listed == 3
        assert captions(source) == [("Two", "one", "Two"), ("a", "b", "c"), ("Two", "one", "Two")]
        assert source[0].frames == tuple(f"{tmp_path}/{name}" for name in STORY["frames"])
        assert [story.story_id for story in records(source)] == [0, 1, 2]
        assert [source.name(index) for index in range(3)] == ["7", "c.jpg", "x"]
        check_source(source)
    assert repr(source) == f"json('{path}', stories=3)"


def test_one_object_a_line_is_the_same_as_a_list(tmp_path):
    in_list = open_it(f"json:{write(tmp_path / 'stories.json', STORIES)}")
    lines = "\n".join(map(json.dumps, STORIES))
    by_line = open_it(f"json:{write(tmp_path / 'stories.jsonl', lines)}")
    assert records(by_line) == records(in_list)
    assert by_line.fingerprint() == in_list.fingerprint()


def test_a_fingerprint_is_of_the_content_and_of_no_path(tmp_path):
    path = write(tmp_path / "stories.json", STORIES)
    prints = [open_it(f"json:{path}").fingerprint()]
    moved = shutil.copy(path, tmp_path / "other.json")
    assert open_it(f"json:{moved}", image_root="/data").fingerprint() == prints[0]
    for changes in (
        *({"frames": STORY["frames"][::-1][1:]}, {"captions": ["Two", "Two", "one"]}),
        *({"id": 8}, {"frames": [*STORY["frames"], "d.jpg"]}),
    ):
        path = write(path, [STORY | changes, *STORIES[1:]])
        prints.append(open_it(f"json:{path}").fingerprint())
    assert len(set(prints)) == 5


def test_frames_are_found_as_pictures_are(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "sub/a.jpg"):
        (tmp_path / name).write_bytes(picture(1))
    path = write(tmp_path / "lists" / "stories.json", [STORY])
    source = open_it(f"json:{path}?image_root={tmp_path}")
    assert all(decode(frame).shape == (20, 30, 3) for frame in source[0].frames)
    far = [{"frames": ["/export/a.jpg", "hdfs://x/b.jpg", "c.jpg"], "captions": ["x"]}]
    path = write(path, far)
    found = open_it(f"json:{path}", path_map="/export=/data,hdfs://x=", image_root="/pictures")
    assert found[0].frames == ("/data/a.jpg", "/pictures/b.jpg", "/pictures/c.jpg")
    said = refusal(f"json:{path}")
    assert '[0], key "frames"' in said and "/export/a.jpg" in said


def test_what_has_no_words_or_no_frames_is_left_out_and_counted(tmp_path):
    further = [
        *({"frames": [], "captions": ["x"]}, {"frames": ["d.jpg"], "captions": []}),
        *(
            {"frames": ["e.jpg"], "captions": [" ", "."], "id": 3},
            STORY | {"captions": ["", "six"]},
        ),
    ]
    path = write(tmp_path / "stories.json", [*STORIES, *further])
    source = open_it(f"json:{path}")
    assert [len(source), source.listed] == [4, 7] and source[3].captions == ("six",)
    assert source.left_out == [
        (f"{path}[3]", f"{path}[3] has no frames"),
        ("d.jpg", f"{path}[4] has no sentence with words"),
        ("3", f"{path}[5] has no sentence with words"),
    ]


BROKEN = [
    (changed(frames="a.jpg"), r'\[1\], key "frames": "a.jpg" is not a list of texts: .*\[PATHS\]'),
    (changed(frames=["a.jpg", 3]), r'\[1\], key "frames": \["a.jpg", 3\] is not a list of texts'),
    (changed(captions="one"), r'\[1\], key "captions": "one" is not a list of texts: .*\[TEXTS\]'),
    (changed(captions=None), r'\[1\], key "captions": null is not a list'),
    (changed(frames=["a.jpg", ""]), r"\[1\], .*'' is outside the image root"),
    (changed(frames=["../a.jpg"]), r"'../a.jpg' is outside the image root"),
    (changed(id=1.5), r'\[1\], key "id": 1.5 is not an id'),
    ([{"frames": ["a.jpg"]}], r'\[0\] has no key "captions" \(its keys: frames\).*\[TEXTS\]'),
    ([STORY, {"image": "a", "caption": "x"}], r'\[1\] has no key "frames" .*every entry'),
    ([{"image": "a", "caption": "x"}, STORY], r'\[1\] has no key "image" \(its keys: frames'),
    ([STORY, 3], r'\[1\] has no key "frames" \(it is 3\)'),
    ([STORY | {"frames": []}], r"no story to read \(.*\[0\] has no frames, \.\.\.\): .*\[PATHS\]"),
    ([STORY | {"captions": ["-"]}], r"no story to read \(.*\[0\] has no sentence with words"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_with_the_place_and_what_is_expected(tmp_path, content, words):
    path = write(tmp_path / "stories.json", content)
    said = refusal(f"json:{path}")
    assert re.search(words, said) and str(path) in said


def test_options_of_pairs_and_mixtures_are_refused(tmp_path):
    path = write(tmp_path / "stories.json", STORIES)
    assert "leave out ?caption_key=" in refusal(f"json:{path}?caption_key=captions")
    for spec in (f"json:{path}, json:{path}", f"scenes, json:{path}", "scenes:stories, scenes"):
        assert "stories are read from one source alone" in refusal(spec)


def test_pairs_with_a_field_called_frames_stay_pairs(tmp_path):
    pairs = [{"image": "a.jpg", "caption": "one", "frames": 12}]
    source = open_it(f"json:{write(tmp_path / 'pairs.json', pairs)}")
    assert source.kind == "pairs" and source[0].captions == ("one",)


@pytest.mark.parametrize("spec", ["json:FILE", "scenes:stories"])
def test_runs_of_pairs_refuse_stories_and_runs_of_stories_pairs(tmp_path, spec):
    spec = spec.replace("FILE", str(write(tmp_path / "stories.json", STORIES)))
    config = base.paper("tiny")
    config.data.train = spec
    assert source_of(config, spec, "train", kind="stories").kind == "stories"
    refusals = (
        lambda: source_of(config, spec, "train"),
        lambda: prepare(config, tmp_path / "packed"),
        lambda: check_data(config, tmp_path / "check"),
    )
    for refused in refusals:
        with pytest.raises(UserError, match=r"lists stories .*configs/sequences.py") as raised:
            refused()
        assert spec in str(raised.value) and "\n" not in str(raised.value)
    pairs = write(tmp_path / "pairs.json", [{"image": "a.jpg", "caption": "one"}])
    for other in (f"json:{pairs}", "scenes"):
        with pytest.raises(UserError, match=r"lists pairs .*scenes:stories"):
            source_of(config, other, "train", kind="stories")
    others = write(tmp_path / "others.json", [{"images": ["a.jpg"], "sentences": ["one"]}])
    with pytest.raises(UserError, match=r'no key "image" .* a story is {"frames": '):
        source_of(config, f"json:{others}", "train", kind="stories")


def test_a_large_file_is_held_without_an_object_a_story(tmp_path):
    stories = (
        {
            "frames": [f"train/{(n + f) % 5000:06d}.jpg" for f in range(5)],
            "captions": [f"sentence {f} of story {n}" for f in range(4)],
        }
        for n in range(5000)
    )
    path = write(tmp_path / "large.jsonl", "\n".join(map(json.dumps, stories)))
    tracemalloc.start()
    source = open_it(f"json:{path}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 5000
    assert held / len(source) < 500  # 205 bytes of text; a list of nine texts takes over 700
