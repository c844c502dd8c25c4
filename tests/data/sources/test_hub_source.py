"""Tables of Hugging Face's `datasets`, in each form on disk: pictures, captions, ids, and
incomplete rows.
"""

import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import list_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from list_files import captions, check_source, ids, picture, records

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.data.sources import hub


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """The library, with its cache in a folder of the tests."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield datasets
    patch.undo()


def table(datasets, texts, **columns):
    """One picture per caption, with columns of the library's own types."""
    pictures = [{"bytes": picture(number), "path": None} for number in range(len(texts))]
    made = datasets.Dataset.from_dict({"image": pictures, "caption": texts, **columns})
    return made.cast_column("image", datasets.Image())


def parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def open_it(place, role="train"):
    return list_files.open_it(f"hf:{place}", role)


def refusal(place):
    return list_files.refusal(f"hf:{place}")


def test_a_table_is_the_same_in_every_form_on_disk(datasets, tmp_path):
    made = table(datasets, [f"caption {number} é" for number in range(7)])
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    made.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    plain = {"image": [picture(number) for number in range(7)], "caption": made["caption"]}
    parquet(tmp_path / "plain" / "pairs.parquet", plain)
    prints = set()
    for place in (
        *("parquet:train", "parquet", "parquet/data/train-00000-of-00001.parquet", "saved"),
        *("saved:train", "splits:train", "plain:train", "plain/pairs.parquet:train"),
    ):
        source = open_it(f"{tmp_path}/{place}")
        expected = [(picture(number), (f"caption {number} é",), number) for number in range(7)]
        assert records(source) == expected
        assert source.captions(3) == ("caption 3 é",) and source.listed == 7
        prints.add(source.fingerprint())
    assert len(prints) == 1
    assert decode(source[2].image).shape == (20, 30, 3)
    assert open_it(f"{tmp_path}/parquet:train[2:5]").captions(0) == ("caption 2 é",)


def test_pictures_that_a_folder_lists_are_read_by_their_paths(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(2):
        (tmp_path / "train" / f"{number}.png").write_bytes(picture(number, "png"))
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n1.png,one\n0.png,zero\n")
    found = {record.captions: decode(record.image) for record in records(open_it(tmp_path))}
    assert sorted(found) == [("one",), ("zero",)]
    np.testing.assert_array_equal(found["one",], decode(picture(1, "png")))


def test_captions_are_texts_lists_of_texts_and_texts_with_ids_beside_them(datasets, tmp_path):
    texts = [["one", " two"], ["three", "", "three"]]
    sentences = [
        [{"raw": "four", "sentid": 1}, {"raw": "five", "sentid": 2}],
        [{"raw": "six", "sentid": 3}],
    ]
    made = table(datasets, texts, sentences=sentences, title=["seven", "eight"])
    made.save_to_disk(tmp_path / "t")
    for option, expected in {
        "": [("one", "two"), ("three",)],
        "?caption_key=sentences": [("four", "five"), ("six",)],
        "?caption_key=title": [("seven",), ("eight",)],
    }.items():
        source = open_it(f"{tmp_path}/t:train{option}")
        assert [record.captions for record in records(source)] == captions(source) == expected


def test_rows_without_a_picture_or_a_caption_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_ROWS_AT_ONCE", 4)  # so that there are several parts
    texts = ["zero", None, " \n", "three", "four", "five", "six", "seven", "eight", "nine"]
    pictures = [{"bytes": picture(number), "path": None} for number in range(10)]
    pictures[3], pictures[8] = None, {"bytes": None, "path": None}
    pictures[5] = {"bytes": None, "path": "/data/5.png"}
    path = parquet(tmp_path / "p" / "a.parquet", {"image": pictures, "caption": texts})
    source = open_it(path)
    assert captions(source) == [(texts[row],) for row in (0, 4, 5, 6, 7, 9)]
    assert [source[1].image, source[2].image] == [picture(4), "/data/5.png"]
    assert [len(source), source.listed] == [6, 10]
    why = {1: "has no caption with words", 2: "has no caption with words"}
    why |= {3: "has no image", 8: "has no image"}
    rows = [(f"hf:{path} row {row}", words) for row, words in why.items()]
    assert list(source.left_out) == [(name, f"{name} {words}") for name, words in rows]
    assert source.name(1) == f"hf:{path} row 4"
    plain = {"image": [picture(0), None, b"", b"?"], "caption": [b"one", b"two", b"x", b"caf\xe9"]}
    source = open_it(parquet(tmp_path / "q" / "a.parquet", plain))  # the last is not UTF-8
    assert [len(source), source.listed] == [2, 4]
    with pytest.raises(UnreadableImage, match="row 2: the image is empty"):
        source[1]


@pytest.mark.parametrize("kind", ["text", "number"])
def test_rows_of_one_id_are_one_image(datasets, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(hub, "_ROWS_AT_ONCE", 3)
    keys = [70, 5, None, 70, 5, 9, None, 70]
    keys = [key if key is None or kind == "number" else f"image {key}" for key in keys]
    texts = ["a", "b", "c", "d", "b", " ", "e", "f"]  # of 9 nothing is left
    table(datasets, texts, key=keys).save_to_disk(tmp_path / "t")
    train, test = (open_it(f"{tmp_path}/t:train?id_key=key", role) for role in ("train", "test"))
    assert captions(train) == [(text,) for text in "abcdbef"]
    assert ids(train) == [0, 1, 2, 0, 1, 3, 0]
    merged = [(0, ("a", "d", "f")), (1, ("b",)), (2, ("c",)), (6, ("e",))]
    assert records(test) == [
        (picture(row), expected, number) for number, (row, expected) in enumerate(merged)
    ]
    assert captions(test) == [expected for _, expected in merged]
    assert test.name(0) == str(keys[0]) and test.name(2).endswith("t:train row 2")
    assert len(open_it(f"{tmp_path}/t:train", "test")) == 7


def test_a_fingerprint_is_of_the_content_and_of_no_path(datasets, tmp_path):
    table(datasets, ["one", "two", "three"], key=[1, 2, 1]).save_to_disk(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    prints = {open_it(f"{tmp_path}/{place}").fingerprint() for place in ("a", "b", "a?id_key=key")}
    assert len(prints) == 2
    for texts in (["one", "two", "four"], ["one", "two"], ["two", "one", "three"]):
        table(datasets, texts).save_to_disk(tmp_path / texts[-1])
        prints.add(open_it(f"{tmp_path}/{texts[-1]}").fingerprint())
    assert len(prints) == 5


def test_a_source_crosses_to_another_process_and_is_read_by_several_threads(tmp_path, capfd):
    columns = {"image": list(map(picture, range(20))), "caption": list("abcdefghijklmnopqrst")}
    source = open_it(parquet(tmp_path / "p" / "a.parquet", columns).parent)
    assert capfd.readouterr() == ("", "")  # no progress bars
    check_source(source)
    packed = pickle.dumps(source)
    assert len(packed) < 20_000  # no pictures
    other = pickle.loads(packed)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(other.__getitem__, list(range(20)) * 10))
    assert found == records(source) * 10


def test_what_cannot_be_read_is_refused_with_a_cure(datasets, tmp_path):
    made = table(datasets, ["one", "two"], words=[["x"], ["y"]], url=["http://a/b.jpg", "c.jpg"])
    made.save_to_disk(tmp_path / "t")
    datasets.DatasetDict({"train": made, "val": made}).save_to_disk(tmp_path / "splits")
    parquet(tmp_path / "odd" / "a.parquet", {"picture": [b"x"], "title": ["y"], "n": [1]})
    parquet(tmp_path / "blank" / "a.parquet", {"image": [picture(0)], "caption": [""]})
    list_files.write(tmp_path / "bad" / "train.parquet", "no parquet" * 10)
    (tmp_path / "empty").mkdir()
    for place, words in {
        "t:test": "hf:.*/t .*split 'test'",
        "splits": "the splits train, val: .*hf:.*splits:SPLIT",
        "splits:test": "has no split 'test': its splits are train, val",
        "odd:train": "no image .*.image, .*it has picture, title, n: .*[?]image_key=NAME",
        "odd:train?image_key=picture": "no caption .*[?]caption_key=NAME",
        "odd:train?image_key=photo": "has no 'photo' for [?]image_key, it has picture",
        "odd:train?image_key=picture&caption_key=n": "'n' is Value.*holds no captions",
        "odd:train?image_key=n&caption_key=title": "'n' is Value.*.*holds no images",
        "blank:train": "'caption' is .*holds no captions",
        "t:train?image_key=url": "'url' is Value.*.*holds no images: .*img2dataset",
        "t:train?image_key=words": "'words' is List.*.*holds no images",
        "odd:test": "cannot be read .*test",
        "bad:train": "cannot be read",
        "empty:train": "cannot be read .*give a folder of Parquet files",
        "gone:train": f"hf:{tmp_path}/gone.* folder",
    }.items():
        assert re.search(words, refusal(f"{tmp_path}/{place}")), place


def test_an_exact_name_wins_and_a_picture_is_what_bytes_or_path_hold(tmp_path):
    absent = {"bytes": None, "path": None, "width": 5}
    columns = {
        "Image": [picture(1)] * 2,
        "image": [absent | {"bytes": picture(0)}, absent],
        "caption": ["one", "two"],
    }
    parquet(tmp_path / "pairs" / "a.parquet", columns)
    assert records(open_it(f"{tmp_path}/pairs:train")) == [(picture(0), ("one",), 0)]


def test_without_a_network_a_name_is_looked_for_in_the_cache_alone(datasets, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    load_dataset, asked = datasets.load_dataset, []

    def load(*args, **kwargs):
        asked.append(not (constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE))
        return load_dataset(*args, **kwargs) if not asked[-1] else None

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = refusal("someone/pairs:train")
    assert "hf:someone/pairs " in said
    parquet(tmp_path / "pairs" / "a.parquet", {"image": [picture(0)], "caption": ["one"]})
    cached = tmp_path / "cache"
    load_dataset(str(tmp_path / "pairs"), cache_dir=str(cached))
    (cached / "pairs").rename(cached / "someone___pairs")  # named like data from the hub
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cached))
    assert records(open_it("someone/pairs:train")) == [(picture(0), ("one",), 0)]
    assert asked == [False, False]


@pytest.mark.parametrize(
    ("library", "spec", "extra"),
    [("datasets", "hf:someone/pairs:train", "hf"), ("tensorflow_datasets", "tfds:x:train", "tfds")],
)
def test_without_the_library_the_extra_that_brings_it_is_named(monkeypatch, library, spec, extra):
    monkeypatch.setitem(sys.modules, library, None)
    assert f'pip install "codebook_jax[{extra}]"' in list_files.refusal(spec)
