"""The caption files of COCO, Karpathy and Visual Genome, in the layouts that are published."""

import copy
import json
import re
import tracemalloc

import pytest
from list_files import below, captions, ids, open_it, records, refusal, write

COCO = {
    "info": {"year": 2014},
    "images": [
        {"license": 5, "file_name": f"COCO_val2014_0000000000{n}.jpg", "id": n, "height": 4}
        for n in (42, 73, 74)
    ],
    "annotations": [
        {"image_id": 73, "id": 1, "caption": "A motorcycle"},
        {"image_id": 42, "id": 2, "caption": "Shoes"},
        {"image_id": 73, "id": 3, "caption": "A bike\n"},
    ],
}
HOME = "https://cs.stanford.edu/people/rak248"
IMAGE_DATA = [
    {"width": 8, "url": f"{HOME}/VG_100K{folder}/{number}.jpg", "image_id": number}
    for number, folder in ((1, "_2"), (2, ""), (10, ""), (11, ""))
]


def region(number, image, phrase):
    return {"region_id": number, "width": 4, "image_id": image, "phrase": phrase, "x": 0}


REGIONS = [
    {
        "regions": [region(1, 1, "a clock"), region(2, 1, "a tree"), region(3, 1, "a clock")],
        "id": 1,
    },
    {"regions": [], "id": 2},
    {"regions": [region(4, 10, "a man")], "id": 10},
]


def karpathy(splits, **fields):
    """One of Karpathy's files with an image in each of the splits; fields are made by number."""
    images = []
    for number, split in enumerate(splits):
        sentences = [{"tokens": ["a"], "raw": f"{split} {number} {which}"} for which in "ab"]
        image = {"filename": f"{number}.jpg", "imgid": number, "split": split}
        image |= {"sentences": sentences, **{name: make(number) for name, make in fields.items()}}
        images.append(image)
    return {"images": images, "dataset": "coco"}


def changed(content, change):
    """The content (or another, if `change` is that) after a change to it."""
    if not callable(change):
        return change
    content = copy.deepcopy(content)
    change(content)
    return content


# COCO


def test_coco_has_a_record_an_image_with_all_its_captions(tmp_path):
    path = write(tmp_path / "annotations" / "captions_val2014.json", COCO)
    for role in ("train", "test"):
        source = open_it(f"coco:{path}?image_root={tmp_path}/val2014", role)
        assert captions(source) == [("Shoes",), ("A motorcycle", "A bike\n")]
        names = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]
        assert below(tmp_path, source) == [f"val2014/{name}" for name in names]
        why = f"{path} images[2] has no caption with words"
        assert source.left_out == [("COCO_val2014_000000000074.jpg", why)] and source.listed == 3
    assert open_it(f"coco:{path}")[0].image == str(path.parent / names[0])


def test_coco_has_a_record_a_caption_where_asked_and_merges_them_to_evaluate(tmp_path):
    path = write(tmp_path / "captions.json", COCO)
    source = open_it(f"coco:{path}?per=caption")
    assert captions(source) == [("Shoes",), ("A motorcycle",), ("A bike\n",)]
    assert ids(source) == [0, 1, 1] and source.listed == 4
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
    assert captions(spelled) == captions(plain) and len(spelled.left_out) == len(plain.left_out)


# Karpathy's splits


def test_karpathys_splits_are_those_of_the_role_unless_named(tmp_path):
    folders = {"filepath": lambda n: f"f{n % 2}", "cocoid": lambda n: 100 + n // 4}
    splits = ("test", "train", "restval", "val", "restval", "train")
    path = write(tmp_path / "dataset_coco.json", karpathy(splits, **folders))
    for options, role, numbers in (
        ("", "train", (1, 2, 4, 5)),
        ("", "validation", (3,)),
        ("", "test", (0,)),
        ("?split=restval", "train", (2, 4)),
        ("?split=val+test", "test", (0, 3)),
        ("?split=val,test", "train", (0, 3)),
    ):
        source = open_it(f"karpathy:{path}{options}", role)
        assert below(tmp_path, source) == [f"f{n % 2}/{n}.jpg" for n in numbers]
    source = open_it(f"karpathy:{path}")
    assert source.captions(0) == ("train 1 a", "train 1 b") and source.listed == 4
    assert ids(source) == [0, 0, 1, 1]  # of cocoid
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


# Visual Genome


@pytest.mark.parametrize("beside", [True, False])
def test_visual_genome_finds_the_folder_of_an_image(tmp_path, beside):
    path = write(tmp_path / "region_descriptions.json", REGIONS)
    if beside:
        write(tmp_path / "image_data.json", IMAGE_DATA)
    else:
        for name in ("_2/1.jpg", "/2.jpg", "/10.jpg", "/._10.jpg", "/cover.jpg"):
            write(tmp_path / f"VG_100K{name}", "")
    source = open_it(f"vg:{path}")
    assert below(tmp_path, source) == ["VG_100K_2/1.jpg", "VG_100K/10.jpg"]
    assert captions(source) == [("a clock", "a tree"), ("a man",)]
    assert source.listed == 3 and [name for name, _ in source.left_out] == ["VG_100K/2.jpg"]
    one_each = open_it(f"vg:{path}?per=caption")
    assert captions(one_each) == [("a clock",), ("a tree",), ("a man",)]
    assert ids(one_each) == [0, 0, 1]
    write(path, [image | {"id": str(image["id"])} for image in REGIONS])
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
    write(tmp_path / "lists" / "image_data.json", [{"image_id": 1, "url": "https://a.org/1.jpg"}])
    assert "image_data.json[0] has the url https" in refusal(f"vg:{path}")


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


# Mistakes

CONTENTS = {"coco": COCO, "karpathy": karpathy(("train", "train")), "vg": REGIONS}
LONG = f'{{"images": [{{"id": {"9" * 5000}, "file_name": "a"}}], "annotations": []}}'
BROKEN = [  # (scheme, a change or another content, the refusal)
    ("coco", LONG, "coco.json line 1 cannot be read .*5000 digits"),
    ("coco", lambda c: c["annotations"][1].update(image_id=9), r"annotations\[1\] .*image 9\b"),
    ("coco", lambda c: c["annotations"][1].pop("caption"), r'\[1\] has no key "caption" .*coco:'),
    ("coco", lambda c: c["images"][1].update(id=42), r"images\[1\] .*id 42 .*images\[0\]"),
    ("coco", lambda c: c["annotations"][0].update(caption=3), r'annotations\[0\], key "caption"'),
    ("coco", lambda c: c["images"].insert(0, 3), r'images\[0\] has no key "id" \(it is 3\)'),
    ("coco", CONTENTS["karpathy"], 'no key "annotations" .*karpathy:'),
    ("karpathy", COCO, r'images\[0\] has no key "split" .*coco:'),
    ("karpathy", [{"image": "a", "caption": "b"}] * 2, r'no key "images" \(it is \[{'),
    (
        "karpathy",
        lambda c: c["images"][0]["sentences"][1].pop("raw"),
        r'images\[0\] sentences\[1\] has no key "raw"',
    ),
    ("karpathy", lambda c: c["images"][0].update(filepath=3), 'key "filepath": 3 '),
    ("vg", lambda c: c[0]["regions"][0].pop("phrase"), r'\[0\] regions\[0\] has no key "phrase"'),
    ("vg", lambda c: c[0].pop("id"), r'\[0\] has no key "image_id"'),
    ("vg", '[{"id": 1, "regions": []},\n {"id"', "JSON .*line 2"),
    ("json", json.dumps(COCO, indent=1), "coco:.* karpathy:.* vg:"),
]


@pytest.mark.parametrize(("scheme", "change", "words"), BROKEN)
def test_a_file_that_does_not_fit_together_is_refused_with_the_place(
    tmp_path, scheme, change, words
):
    write(tmp_path / "image_data.json", IMAGE_DATA)
    path = write(tmp_path / f"{scheme}.json", changed(CONTENTS.get(scheme), change))
    said = refusal(f"{scheme}:{path}")
    assert re.search(words, said) and str(path) in said
