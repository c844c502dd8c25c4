"""The caption files of COCO, Karpathy and Visual Genome, in the layouts that are published."""

import json
import tracemalloc

import pytest
from list_files import below, captions, open_it, records, refusal, write

from codebook_jax.errors import UserError

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
            ("COCO_val2014_000000000074.jpg", f"{path} images[2] has no caption with words")
        ]
    assert open_it(f"coco:{path}")[0].image == str(path.parent / "COCO_val2014_000000000042.jpg")


def test_coco_has_a_record_a_caption_where_asked_and_merges_them_to_evaluate(tmp_path):
    path = write(tmp_path / "captions.json", COCO)
    source = open_it(f"coco:{path}?per=caption")
    assert captions(source) == [("Shoes",), ("A motorcycle",), ("A bike\n",)]
    assert [record.image_id for record in records(source)] == [0, 1, 1] and source.listed == 4
    merged = open_it(f"coco:{path}?per=caption", "validation")
    assert captions(merged) == [("Shoes",), ("A motorcycle", "A bike\n")]
    assert "per=word " in refusal(f"coco:{path}?per=word")


@pytest.mark.parametrize(("listed", "named"), [(str, int), (int, str)])
def test_ids_match_whether_they_are_numbers_or_texts(tmp_path, listed, named):
    def spell(content):
        for image in content["images"]:
            image["id"] = listed(image["id"])
        for annotation in content["annotations"]:
            annotation["image_id"] = named(annotation["image_id"])

    plain = open_it(f"coco:{write(tmp_path / 'plain.json', COCO)}")
    spelled = open_it(f"coco:{write(tmp_path / 'spelled.json', changed(COCO, spell))}")
    assert captions(spelled) == captions(plain) and spelled.left_out == [
        (name, why.replace("plain", "spelled")) for name, why in plain.left_out
    ]


def test_a_number_and_a_text_that_both_are_ids_are_two_images(tmp_path):
    images = [{"id": key, "file_name": f"{n}.jpg"} for n, key in enumerate((7, "7", "07"))]
    said = [{"image_id": key, "caption": repr(key)} for key in (7, "7", "07")]
    path = write(tmp_path / "captions.json", {"images": images, "annotations": said})
    assert captions(open_it(f"coco:{path}", "test")) == [("7",), ("'7'",), ("'07'",)]


COCO_BROKEN = {
    "long id": (
        '{"images": [{"id": %s, "file_name": "a.jpg"}], "annotations": []}' % ("9" * 5000),
        r'images\[0\], key "id": .*5,000 digits',
    ),
    "deep": ('{"images": ' + "[" * 100_000, "captions.json cannot be read .*nested"),
    "key twice": ('{"images": [], "images": []}', "cannot be read .*'images' twice"),
    "unknown image": (
        lambda c: c["annotations"][1].update(image_id=9),
        r"annotations\[1\] .*image 9\b",
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
    "image twice": (lambda c: c["images"][1].update(id=42), r"images\[1\] .*id 42 .*images\[0\]"),
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
    content = change if isinstance(change, str) else changed(COCO, change)
    path = write(tmp_path / "captions.json", content)
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
    "folder type": (lambda c: c["images"][0].update(filepath=3), 'key "filepath": 3 '),
    "others": (lambda c: c.pop("images"), "its keys: dataset.*dataset_coco"),
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
        assert "a JSON list" in said and "object" in said and f"json:{pairs}" in said
    assert 'pairs.json[0] has no list "regions" (its keys: image, caption)' in refusal(
        f"vg:{pairs}"
    )
    assert "vg: reads" in refusal(f"vg:{coco}")
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


def test_visual_genome_matches_ids_that_are_texts(tmp_path):
    regions = [image | {"id": str(image["id"])} for image in REGIONS]
    path = write(tmp_path / "region_descriptions.json", regions)
    write(tmp_path / "image_data.json", IMAGE_DATA)
    assert below(tmp_path, open_it(f"vg:{path}")) == ["VG_100K_2/1.jpg", "VG_100K/10.jpg"]


def test_visual_genome_with_its_images_elsewhere(tmp_path):
    path = write(tmp_path / "lists" / "region_descriptions.json", REGIONS)
    said = refusal(f"vg:{path}")
    assert "VG_100K and VG_100K_2" in said and "image_data.json" in said and "image_root" in said
    for number in (1, 2, 10):
        write(tmp_path / "images" / "VG_100K" / f"{number}.jpg", "")
    source = open_it(f"vg:{path}?image_root={tmp_path}/images")
    assert below(tmp_path / "images", source) == ["VG_100K/1.jpg", "VG_100K/10.jpg"]
    (tmp_path / "images" / "VG_100K" / "10.jpg").unlink()
    assert "[2] names image 10, " in refusal(f"vg:{path}", image_root=f"{tmp_path}/images")


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
    "deep": ('[{"id": 1, "regions": []},' + "[" * 100_000, r"\[1\] cannot be read .*nested"),
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
