"""Tables, and the caption files of COCO, Karpathy and Visual Genome, in the layouts that are published."""

import csv
import json
import pickle
import shutil
import tracemalloc

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


# Tables


ROWS = [
    ("a.jpg", "a dog, running"),
    ("b/c.jpg", 'the word "stop"'),
    ("a.jpg", "two\nlines"),
    ("d.jpg", " "),
    ("e.jpg", "ein Hündchen"),
]


def write_table(path, rows, separator=",", **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator, **options).writerows(rows)
    return path


@pytest.mark.parametrize(("form", "separator"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize(
    "header",
    [
        ("image", "caption"),
        ("filepath", "title"),
        ("file_name", "text"),
        ("Image_Path", "Captions"),
    ],
)
def test_a_table_is_read_by_the_names_its_first_row_has(tmp_path, form, separator, header):
    source = open_it(f"{form}:{write_table(tmp_path / 'pairs', [header, *ROWS], separator)}")
    assert below(tmp_path, source) == ["a.jpg", "b/c.jpg", "a.jpg", "e.jpg"]
    assert captions(source) == [(ROWS[n][1],) for n in (0, 1, 2, 4)]
    assert [record.image_id for record in records(source)] == [0, 1, 0, 2]
    assert source.listed == 5 and [name for name, _ in source.left_out] == ["d.jpg"]
    assert source.left_out[0][1].endswith("line 6 has no caption")  # one row before it takes two


def test_rows_of_one_image_are_one_record_to_evaluate(tmp_path):
    path = write_table(tmp_path / "pairs.csv", [("image", "caption"), *ROWS])
    source = open_it(f"csv:{path}", role="test")
    assert captions(source) == [("a dog, running", "two\nlines"), (ROWS[1][1],), (ROWS[4][1],)]


def test_columns_can_be_named_and_an_id_joins_pictures(tmp_path):
    rows = [
        ("n", "who", "img", "de", "image"),
        (1, "x", "a.jpg", "eins", "?"),
        (2, "x", "b.jpg", "zwei", "?"),
    ]
    path = write_table(tmp_path / "pairs.csv", rows)
    source = open_it(f"csv:{path}?image_key=img&caption_key=de&id_key=who")
    assert below(tmp_path, source) == ["a.jpg", "b.jpg"] and captions(source) == [
        ("eins",),
        ("zwei",),
    ]
    assert [record.image_id for record in records(source)] == [0, 0]
    plain = [("id", "image", "caption"), (1, "a.jpg", "one"), (2, "a.jpg", "two")]
    source = open_it(f"csv:{write_table(tmp_path / 'numbered.csv', plain)}", role="test")
    assert captions(source) == [("one", "two")]  # a column "id" numbers the rows


def test_a_table_without_a_first_row_of_names_is_read_by_numbers(tmp_path):
    path = write(tmp_path / "pairs.tsv", "a dog\ta.jpg\r\na cat\tb.jpg")
    source = open_it(f"tsv:{path}?caption_key=0&image_key=1")
    assert below(tmp_path, source) == ["a.jpg", "b.jpg"] and captions(source) == [
        ("a dog",),
        ("a cat",),
    ]
    named = write(tmp_path / "named.tsv", "title\tfilepath\na dog\ta.jpg\n")
    assert len(open_it(f"tsv:{named}?caption_key=0&image_key=1")) == 1
    said = refusal(f"tsv:{path}")
    assert "names no column of images" in said and "(a dog, a.jpg)" in said
    assert "?image_key=0&caption_key=1" in said
    assert "no column '2' for ?image_key" in refusal(f"tsv:{path}?caption_key=0&image_key=2")


def test_urls_of_conceptual_captions_are_refused_with_the_way_to_get_the_images(tmp_path):
    lines = "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/bus.jpg\n" * 2
    path = write(tmp_path / "Train_GCC-training.tsv", lines)
    said = refusal(f"tsv:{path}?caption_key=0&image_key=1")
    assert "line 1" in said and "is a URL" in said
    assert "img2dataset" in said and "webdataset:" in said
    headed = write(tmp_path / "cc3m.tsv", f"caption\turl\n{lines}")
    assert "cc3m.tsv line 2" in refusal(f"tsv:{headed}")


TABLES = {
    "short row": (
        "image,caption\na.jpg,one\nb.jpg\n",
        "line 3 has 1 cell, the first row 2: one is missing",
    ),
    "comma": (
        "image,caption\na.jpg,one, two\n",
        "line 2 has 3 cells, the first row 2: a separator too many",
    ),
    "open quote": (
        'image,caption\na.jpg,"one\nb.jpg,two\n',
        "line 2 is no row of a table .unexpected end",
    ),
    "stray quote": ('image,caption\na.jpg,"one" two\n', "line 2 is no row of a table.*quotes=none"),
    "swallowed": ('image,caption\nx,y\na.jpg,"one\nb.jpg,"two" \n', "line 3 is no row"),
    "huge field": (
        f'image,caption\na.jpg,"{"x" * 200_000}"\n',
        "line 2 is no row.*field larger than",
    ),
    "no image": ("image,caption\n ,one\n", "line 2 names no image"),
    "names": (
        "picture,words\na.jpg,one\n",
        r"no column of images .image, .*first row .picture, words",
    ),
    "no captions": ("image,words\na.jpg,one\n", "no column of captions .caption, text, title"),
    "tabs": ("image\tcaption\na.jpg\tone\n", "has tabs between its columns: read it with tsv:"),
    "empty": ("\n \n", "is empty"),
    "only names": ("image,caption\n", "lists no pairs"),
    "outside": ("image,caption\n../a.jpg,one\n", "line 2.*outside the image root"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_a_mistake_is_refused_with_its_line(tmp_path, name):
    content, words = TABLES[name]
    path = write(tmp_path / "pairs.csv", content)
    with pytest.raises(UserError, match=words) as raised:
        open_it(f"csv:{path}")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_tables_that_cannot_be_read_or_asked_so_are_refused(tmp_path):
    assert "cannot be read" in refusal(f"csv:{tmp_path}/gone.csv")
    (tmp_path / "latin.csv").write_bytes("image,caption\na.jpg,café\n".encode("latin-1"))
    said = refusal(f"csv:{tmp_path}/latin.csv")
    assert "latin.csv is not UTF-8 text (byte e9 after " in said and "caf'" in said
    path = write(tmp_path / "pairs.csv", "image,caption\na.jpg,one\n")
    assert "no column 'img' for ?image_key" in refusal(f"csv:{path}?image_key=img")
    assert "quotes=maybe" in refusal(f"csv:{path}?quotes=maybe")
    assert "did you mean caption_key" in refusal(f"csv:{path}?captionkey=caption")


def test_quotes_can_mean_nothing_and_a_byte_order_mark_is_no_name(tmp_path):
    path = write(tmp_path / "pairs.tsv", '\ufeffimage\tcaption\na.jpg\t"one" two\nb.jpg\t"three\n')
    assert captions(open_it(f"tsv:{path}?quotes=none")) == [('"one" two',), ('"three',)]


def test_a_table_is_the_same_under_another_path_and_takes_no_object_a_row(tmp_path):
    path = tmp_path / "large.csv"
    write_table(
        path, [("image", "caption"), *((f"{n % 500}.jpg", f"number {n}") for n in range(20_000))]
    )
    tracemalloc.start()
    source = open_it(f"csv:{path}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 20_000 and held / len(source) < 100
    (tmp_path / "moved").mkdir()
    moved = open_it(f"csv:{shutil.copy(path, tmp_path / 'moved' / 'other.csv')}")
    assert moved.fingerprint() == source.fingerprint()
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


# COCO, as published


COCO = {
    "info": {"year": 2014},
    "images": [
        {
            "license": 5,
            "file_name": "COCO_val2014_000000000042.jpg",
            "id": 42,
            "height": 4,
            "width": 5,
        },
        {
            "license": 5,
            "file_name": "COCO_val2014_000000000073.jpg",
            "id": 73,
            "height": 4,
            "width": 5,
        },
        {
            "license": 5,
            "file_name": "COCO_val2014_000000000074.jpg",
            "id": 74,
            "height": 4,
            "width": 5,
        },
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 73, "id": 1, "caption": "A motorcycle"},
        {"image_id": 42, "id": 2, "caption": "Shoes"},
        {"image_id": 73, "id": 3, "caption": "A bike\n"},
    ],
}


def changed(content, change):
    copy = json.loads(json.dumps(content))
    change(copy)
    return copy


def test_coco_has_a_record_an_image_with_all_its_captions(tmp_path):
    path = write(tmp_path / "annotations" / "captions_val2014.json", COCO)
    for role in ("train", "test"):
        source = open_it(f"coco:{path}?image_root={tmp_path}/val2014", role)
        assert captions(source) == [("Shoes",), ("A motorcycle", "A bike\n")]
        assert below(tmp_path, source) == [
            "val2014/COCO_val2014_000000000042.jpg",
            "val2014/COCO_val2014_000000000073.jpg",
        ]
        assert source.listed == 3
        assert source.left_out == [
            ("COCO_val2014_000000000074.jpg", f"{path} images[2] has no caption")
        ]
    assert open_it(f"coco:{path}")[0].image == str(path.parent / "COCO_val2014_000000000042.jpg")


def test_coco_has_a_record_a_caption_where_asked_and_merges_them_to_evaluate(tmp_path):
    path = write(tmp_path / "captions.json", COCO)
    source = open_it(f"coco:{path}?per=caption")
    assert captions(source) == [("Shoes",), ("A motorcycle",), ("A bike\n",)]
    assert [record.image_id for record in records(source)] == [0, 1, 1] and source.listed == 4
    merged = open_it(f"coco:{path}?per=caption", "validation")
    assert captions(merged) == [("Shoes",), ("A motorcycle", "A bike\n")]
    assert "per=word is neither image nor caption" in refusal(f"coco:{path}?per=word")


COCO_BROKEN = {
    "unknown image": (
        lambda c: c["annotations"][1].update(image_id=9),
        r"annotations\[1\] is of image 9",
    ),
    "boxes": (
        lambda c: c["annotations"].insert(0, {"image_id": 42, "bbox": [0, 0, 1, 1]}),
        r"annotations\[0\] has no caption .*captions_train2014.json, not one of boxes",
    ),
    "image info alone": (lambda c: c.pop("annotations"), 'no list "annotations".*karpathy:'),
    "no images": (lambda c: c.pop("images"), 'has no list "images"'),
    "no file name": (
        lambda c: c["images"][1].pop("file_name"),
        r'images\[1\] has no key "file_name"',
    ),
    "image twice": (
        lambda c: c["images"][1].update(id=42),
        r"images\[1\] has the id 42 of .*images\[0\]",
    ),
    "caption type": (
        lambda c: c["annotations"][0].update(caption=3),
        r'annotations\[0\], key "caption"',
    ),
    "id type": (
        lambda c: c["images"][0].update(id=1.5),
        r'images\[0\], key "id": 1.5 is not an id',
    ),
    "number": (lambda c: c["images"].insert(0, 3), r"images\[0\] is a number, not an object"),
}


@pytest.mark.parametrize("name", COCO_BROKEN)
def test_a_coco_file_that_does_not_fit_together_is_refused_with_the_place(tmp_path, name):
    change, words = COCO_BROKEN[name]
    path = write(tmp_path / "captions.json", changed(COCO, change))
    with pytest.raises(UserError, match=words) as raised:
        open_it(f"coco:{path}")
    assert str(path) in str(raised.value)


# Karpathy's splits


def karpathy(splits, **fields):
    images = [
        {
            "filename": f"{number}.jpg",
            "imgid": number,
            "split": split,
            "sentids": [2 * number, 2 * number + 1],
            "sentences": [
                {"tokens": ["a"], "raw": f"{split} {number} {which}", "imgid": number}
                for which in "ab"
            ],
        }
        | {name: make(number) for name, make in fields.items()}
        for number, split in enumerate(splits)
    ]
    return {"images": images, "dataset": "coco"}


COCO_SPLITS = ("test", "train", "restval", "val", "restval", "train")


def test_karpathys_splits_are_those_of_the_role_unless_named(tmp_path):
    content = karpathy(
        COCO_SPLITS,
        filepath=lambda number: "val2014" if number % 2 else "train2014",
        cocoid=lambda number: 100 + number // 4,
    )
    path = write(tmp_path / "dataset_coco.json", content)

    def chosen(options="", role="train"):
        return below(tmp_path, open_it(f"karpathy:{path}{options}", role))

    assert chosen() == ["val2014/1.jpg", "train2014/2.jpg", "train2014/4.jpg", "val2014/5.jpg"]
    assert chosen(role="validation") == ["val2014/3.jpg"]
    assert chosen(role="test") == ["train2014/0.jpg"]
    assert chosen("?split=restval") == ["train2014/2.jpg", "train2014/4.jpg"]
    assert (
        chosen("?split=val+test", "test")
        == chosen("?split=val,test")
        == ["train2014/0.jpg", "val2014/3.jpg"]
    )
    source = open_it(f"karpathy:{path}")
    assert source.captions(0) == ("train 1 a", "train 1 b") and source.listed == 4
    assert [record.image_id for record in records(source)] == [0, 0, 1, 1]  # of cocoid
    assert len(open_it(f"karpathy:{path}?per=caption")) == 8


def test_karpathys_flickr30k_has_neither_folders_nor_ids_of_coco(tmp_path):
    content = karpathy(("train", "val", "train"))
    content["images"][2]["sentences"] = []
    path = write(tmp_path / "dataset_flickr30k.json", content)
    source = open_it(f"karpathy:{path}", image_root="/data/flickr30k-images")
    assert records(source)[0].image == "/data/flickr30k-images/0.jpg"
    assert source.listed == 2 and [name for name, _ in source.left_out] == ["2.jpg"]
    said = refusal(f"karpathy:{path}", "test")
    assert "has no split 'test' (it has 2 of train, 1 of val)" in said and "?split=" in said
    assert "no split 'vla'" in refusal(f"karpathy:{path}?split=train+vla")


KARPATHY_BROKEN = {
    "no split": (lambda c: c["images"][1].pop("split"), r'images\[1\] has no key "split"'),
    "no sentences": (
        lambda c: c["images"][0].pop("sentences"),
        r'images\[0\] has no list "sentences"',
    ),
    "no raw": (
        lambda c: c["images"][0]["sentences"][1].pop("raw"),
        r'images\[0\] sentences\[1\] has no key "raw"',
    ),
    "folder type": (lambda c: c["images"][0].update(filepath=3), 'key "filepath": 3 is no folder'),
    "others": (
        lambda c: c.pop("images"),
        "is no split of Karpathy .its keys: dataset.: give dataset_coco",
    ),
}


@pytest.mark.parametrize("name", KARPATHY_BROKEN)
def test_a_file_of_karpathy_with_a_mistake_is_refused_with_the_place(tmp_path, name):
    change, words = KARPATHY_BROKEN[name]
    path = write(tmp_path / "dataset.json", changed(karpathy(("train", "train")), change))
    with pytest.raises(UserError, match=words):
        open_it(f"karpathy:{path}")


def test_a_file_given_to_another_scheme_is_sent_to_its_own(tmp_path):
    coco = write(tmp_path / "captions.json", COCO)
    split = write(tmp_path / "dataset.json", karpathy(("train",)))
    pretty = write(tmp_path / "pretty.json", json.dumps(COCO, indent=1))
    regions = write(tmp_path / "regions.json", REGIONS)
    pairs = write(tmp_path / "pairs.json", [{"image": "a.jpg", "caption": "one"}])
    for path in (coco, pretty):
        assert f"is read with coco:{path}" in refusal(f"json:{path}")
    assert f"is read with karpathy:{split}" in refusal(f"json:{split}")
    assert f"is read with vg:{regions}" in refusal(f"json:{regions}")
    assert f"karpathy:{split} reads" in refusal(f"coco:{split}")
    assert f"coco:{coco} reads" in refusal(f"karpathy:{coco}")
    for scheme in ("coco", "karpathy"):
        said = refusal(f"{scheme}:{pairs}")
        assert "holds a JSON list, not an object" in said and f"json:{pairs}" in said
    assert 'pairs.json[0] has no list "regions" (its keys: image, caption)' in refusal(
        f"vg:{pairs}"
    )
    assert "not a list as vg: reads" in refusal(f"vg:{coco}")
    assert "after coco:" in refusal(f"coco:{tmp_path}/gone.json")
    assert "line 2 is not JSON" in refusal(f"coco:{write(tmp_path / 'cut.json', chr(10) + '{')}")


# Visual Genome


def region(number, image, phrase):
    return {
        "region_id": number,
        "width": 4,
        "height": 3,
        "image_id": image,
        "phrase": phrase,
        "x": 0,
        "y": 0,
    }


REGIONS = [
    {
        "regions": [region(1, 1, "a clock"), region(2, 1, "a tree"), region(3, 1, "a clock")],
        "id": 1,
    },
    {"regions": [], "id": 2},
    {"regions": [region(4, 10, "a man")], "id": 10},
]
HOME = "https://cs.stanford.edu/people/rak248"
IMAGE_DATA = [
    {
        "width": 8,
        "url": f"{HOME}/VG_100K{folder}/{number}.jpg",
        "height": 6,
        "image_id": number,
        "coco_id": None,
    }
    for number, folder in ((1, "_2"), (2, ""), (10, ""), (11, ""))
]


@pytest.mark.parametrize("beside", [True, False])
def test_visual_genome_finds_the_folder_of_an_image(tmp_path, beside):
    path = write(tmp_path / "region_descriptions.json", REGIONS)
    if beside:
        write(tmp_path / "image_data.json", IMAGE_DATA)
    else:
        for name in (
            "VG_100K_2/1.jpg",
            "VG_100K/2.jpg",
            "VG_100K/10.jpg",
            "VG_100K/._10.jpg",
            "VG_100K/cover.jpg",
        ):
            write(tmp_path / name, "")
    source = open_it(f"vg:{path}")
    assert below(tmp_path, source) == ["VG_100K_2/1.jpg", "VG_100K/10.jpg"]
    assert captions(source) == [("a clock", "a tree"), ("a man",)]
    assert source.listed == 3 and [name for name, _ in source.left_out] == ["VG_100K/2.jpg"]
    one_each = open_it(f"vg:{path}?per=caption")
    assert captions(one_each) == [("a clock",), ("a tree",), ("a man",)]
    assert [record.image_id for record in records(one_each)] == [0, 0, 1]


def test_visual_genome_with_its_images_elsewhere(tmp_path):
    path = write(tmp_path / "lists" / "region_descriptions.json", REGIONS)
    said = refusal(f"vg:{path}")
    assert "VG_100K and VG_100K_2" in said and "image_data.json" in said and "image_root" in said
    for number in (1, 2, 10):
        write(tmp_path / "images" / "VG_100K" / f"{number}.jpg", "")
    source = open_it(f"vg:{path}?image_root={tmp_path}/images")
    assert below(tmp_path / "images", source) == ["VG_100K/1.jpg", "VG_100K/10.jpg"]
    (tmp_path / "images" / "VG_100K" / "10.jpg").unlink()
    assert "[2] is of image 10, which is neither in" in refusal(
        f"vg:{path}", image_root=f"{tmp_path}/images"
    )


REGIONS_BROKEN = {
    "no phrase": (
        [{"id": 1, "regions": [{"region_id": 3}]}],
        r'\[0\] regions\[0\] has no key "phrase"',
    ),
    "phrase type": (
        [{"id": 1, "regions": [{"phrase": 3}]}],
        r'regions\[0\], key "phrase": 3 is neither',
    ),
    "no id": ([{"regions": []}], r'\[0\] has no key "image_id"'),
    "cut short": ('[{"id": 1, "regions": []},\n {"id"', "line 2 is not JSON"),
    "no comma": ('[{"id": 1, "regions": []}\n {"id": 2}]', "line 2 is not JSON .expecting ','"),
    "more": ("[]\n[]", "line 2 is not JSON .extra data"),
    "open list": ('[{"id": 1, "regions": []},\n', "line 2 is not JSON"),
    "none": ("[ ]", "lists no pairs"),
}


@pytest.mark.parametrize("name", REGIONS_BROKEN)
def test_a_file_of_regions_with_a_mistake_is_refused_with_the_place(tmp_path, name):
    content, words = REGIONS_BROKEN[name]
    path = write(tmp_path / "region_descriptions.json", content)
    write(tmp_path / "image_data.json", IMAGE_DATA)
    with pytest.raises(UserError, match=words):
        open_it(f"vg:{path}")
    write(tmp_path / "image_data.json", [{"image_id": 1, "url": "https://a.org/1.jpg"}])
    write(tmp_path / "whole.json", REGIONS)
    assert 'image_data.json[0], key "url"' in refusal(f"vg:{tmp_path}/whole.json")


def test_a_long_list_is_parsed_an_image_at_a_time(tmp_path):
    regions = [
        {"id": n, "regions": [region(k, n, f"thing {k} of {n}") for k in range(20)]}
        for n in range(300)
    ]
    path = write(tmp_path / "region_descriptions.json", regions)
    data = [{"image_id": n, "url": f"{HOME}/VG_100K/{n}.jpg"} for n in range(300)]
    write(tmp_path / "image_data.json", data)
    tracemalloc.start()
    source = open_it(f"vg:{path}")
    held, most = tracemalloc.get_traced_memory()
    json.loads(path.read_text())
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 300 and held < path.stat().st_size
    assert most < whole / 2


# Paths of another machine


SALESFORCE = "/export/home/project/VL/dataset"
REMOTE = [
    {
        "image": f"{SALESFORCE}/coco/images/train2014/COCO_train2014_000000000009.jpg",
        "caption": "one",
    },
    {"image": f"{SALESFORCE}/vg/1.jpg", "caption": "two"},
    {"image": "hdfs://haruna/home/byte/coco/images/val2014/2.jpg", "caption": "three"},
    {"image": "local/3.jpg", "caption": "four"},
]


def test_the_longest_rule_that_fits_says_where_a_listed_path_is(tmp_path):
    path = write(tmp_path / "pretrain.json", REMOTE)
    rules = (
        f"{SALESFORCE}=/data/other, {SALESFORCE}/coco/images=/data/coco/,"
        "hdfs://haruna/home/byte/coco=/mnt/coco"
    )
    for path_map in (rules, ",".join(rules.split(",")[::-1])):
        source = open_it(f"json:{path}", path_map=path_map)
        assert [record.image for record in records(source)] == [
            "/data/coco/train2014/COCO_train2014_000000000009.jpg",
            "/data/other/vg/1.jpg",
            "/mnt/coco/images/val2014/2.jpg",
            str(tmp_path / "local/3.jpg"),
        ]
        assert source.name(1) == f"{SALESFORCE}/vg/1.jpg"


def test_a_rule_fits_whole_folders_and_may_lead_to_the_image_root(tmp_path, monkeypatch):
    path = write(tmp_path / "pairs.json", [{"image": "/export/cocoa/1.jpg", "caption": "one"}])
    assert "outside the image root" in refusal(f"json:{path}", path_map="/export/coco=/data")
    to_root = open_it(f"json:{path}?image_root=/pictures", path_map="/export/=")
    assert to_root[0].image == "/pictures/cocoa/1.jpg"
    monkeypatch.chdir(tmp_path)
    relative = open_it("json:pairs.json", path_map="/export=images", image_root="elsewhere")
    assert relative[0].image == str(tmp_path / "images" / "cocoa" / "1.jpg")
    everything = open_it(f"json:{path}", path_map="/=/mnt")
    assert everything[0].image == "/mnt/export/cocoa/1.jpg"


def test_a_fingerprint_does_not_know_where_the_images_are(tmp_path):
    path = write(tmp_path / "pretrain.json", REMOTE[:2])
    prints = {
        open_it(f"json:{path}", path_map=f"{SALESFORCE}={place}").fingerprint()
        for place in ("/data", "/mnt/a/", "here")
    }
    assert len(prints) == 1


def test_paths_that_no_rule_fits_are_refused_with_what_to_give(tmp_path):
    path = write(tmp_path / "pretrain.json", REMOTE)
    said = refusal(f"json:{path}")
    assert "[0]" in said and "image_root" in said and "path_map" in said
    said = refusal(f"json:{path}", path_map=f"{SALESFORCE}=/data")
    assert "[2]" in said and "path_map=hdfs://PLACE=/data" in said
    url = write(tmp_path / "url.json", [{"image": "https://a.org/1.jpg", "caption": "one"}])
    assert "[0]" in refusal(f"json:{url}") and "img2dataset" in refusal(f"json:{url}")
    assert "is not OLD=NEW" in refusal(f"json:{path}", path_map="/data")
    escaping = write(tmp_path / "up.json", [{"image": "/export/../etc/passwd", "caption": "one"}])
    assert "may lead out" in refusal(f"json:{escaping}", path_map="/export=/data")


# What a check of the data left


def test_the_usable_pairs_beside_a_check_know_of_how_many_they_are_and_where(tmp_path):
    pairs = '{"image": "a.jpg", "caption": "one"}\n'
    usable, other = (write(tmp_path / name, pairs) for name in ("usable.jsonl", "other.jsonl"))
    write(tmp_path / "check.json", {"listed": 7, "image_root": "/pictures"})
    source = open_it(f"json:{usable}", image_root="/lists")
    assert source.listed == 7 and source[0].image == "/pictures/a.jpg"
    assert open_it(f"json:{usable}?image_root=/moved")[0].image == "/moved/a.jpg"
    source = open_it(f"json:{other}")
    assert source.listed == 1 and source[0].image == str(tmp_path / "a.jpg")
    for content in ("[]", "{", {"unusable": 3}, {"listed": None, "image_root": "/pictures"}):
        write(tmp_path / "check.json", content)
        source = open_it(f"json:{usable}")
        assert source.listed == 1 and source[0].image == str(tmp_path / "a.jpg")
