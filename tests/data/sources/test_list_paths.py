"""Where the images of a list are: image roots, path maps, and the files of check-data."""

import pytest
from list_files import open_it, records, refusal, write

SALESFORCE = "/export/home/project/VL/dataset"
REMOTE = [
    {"image": f"{SALESFORCE}/coco/images/train2014/9.jpg", "caption": "one"},
    {"image": f"{SALESFORCE}/vg/1.jpg", "caption": "two"},
    {"image": "hdfs://haruna/home/byte/coco/images/val2014/2.jpg", "caption": "three"},
    {"image": "local/3.jpg", "caption": "four"},
]


def listing(path, *images):
    return write(path, [{"image": image, "caption": "x"} for image in images])


def test_the_image_root_is_the_files_folder_unless_given(tmp_path):
    path = listing(tmp_path / "pairs.json", "a.jpg")
    assert open_it(f"json:{path}")[0].image == f"{tmp_path}/a.jpg"
    assert open_it(f"json:{path}", image_root="/data/coco")[0].image == "/data/coco/a.jpg"
    path = listing(path, "/data/coco/sub/./a.jpg")
    assert open_it(f"json:{path}", image_root="/data/coco/")[0].image == "/data/coco/sub/a.jpg"


@pytest.mark.parametrize(
    "image",
    [
        *("/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "a/b/../../../x.jpg", "..", "."),
        *("a\x00.jpg", "/export/home/coco/train2014/1.jpg", "SIBLING/a.jpg"),
    ],
)
def test_a_path_that_leaves_the_image_root_is_refused_at_load(tmp_path, image):
    sibling = f"{tmp_path}/root2"  # begins like the root
    path = listing(tmp_path / "root" / "pairs.json", "a.jpg", image.replace("SIBLING", sibling))
    said = refusal(f"json:{path}")
    assert "[1]" in said and "outside the image root" in said and "config.data.image_root" in said


def test_the_longest_rule_that_fits_says_where_a_listed_path_is(tmp_path):
    path = write(tmp_path / "pretrain.json", REMOTE)
    rules = [
        *(f"{SALESFORCE}=/data/other", f"{SALESFORCE}/coco/images=/data/coco/"),
        "hdfs://haruna/home/byte/coco=/mnt/coco",
    ]
    for path_map in (", ".join(rules), ",".join(rules[::-1])):
        source = open_it(f"json:{path}", path_map=path_map)
        assert [record.image for record in records(source)] == [
            "/data/coco/train2014/9.jpg",
            "/data/other/vg/1.jpg",
            "/mnt/coco/images/val2014/2.jpg",
            str(tmp_path / "local/3.jpg"),
        ]
        assert source.name(1) == f"{SALESFORCE}/vg/1.jpg"


def test_a_rule_fits_whole_folders_and_may_lead_to_the_image_root(tmp_path, monkeypatch):
    path = listing(tmp_path / "pairs.json", "/export/cocoa/1.jpg")
    assert "outside the image root" in refusal(f"json:{path}", path_map="/export/coco=/data")
    monkeypatch.chdir(tmp_path)
    for spec, path_map, image in (
        (f"json:{path}?image_root=/pictures", "/export/=", "/pictures/cocoa/1.jpg"),
        ("json:pairs.json", "/export=images", f"{tmp_path}/images/cocoa/1.jpg"),
        (f"json:{path}", "/=/mnt", "/mnt/export/cocoa/1.jpg"),
    ):
        assert open_it(spec, path_map=path_map, image_root="elsewhere")[0].image == image


def test_a_fingerprint_does_not_know_where_the_images_are(tmp_path):
    path = write(tmp_path / "pretrain.json", REMOTE[:2])
    maps = [f"{SALESFORCE}={place}" for place in ("/data", "/mnt/a/", "here")]
    assert len({open_it(f"json:{path}", path_map=each).fingerprint() for each in maps}) == 1


def test_paths_that_no_rule_fits_are_refused_with_what_to_give(tmp_path):
    path = write(tmp_path / "pretrain.json", REMOTE)
    url = listing(tmp_path / "url.json", "https://a.org/1.jpg")
    escaping = listing(tmp_path / "up.json", "/export/../etc/passwd")
    for place, path_map, words in (
        (path, "", ("[0]", "image_root", "path_map")),
        (path, f"{SALESFORCE}=/data", ("[2]", "path_map=hdfs://PLACE=/data")),
        (path, "/data", ("is not OLD=NEW",)),
        (url, "", ("[0]", "img2dataset")),
        (escaping, "/export=/data", ("[0]", "/data")),
    ):
        said = refusal(f"json:{place}", path_map=path_map)
        assert all(word in said for word in words), said


def test_the_home_folder_may_be_written_as_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    listing(tmp_path / "pairs.json", "a.jpg")
    write(tmp_path / "pairs.csv", "image,caption\na.jpg,one\n")
    for spec in ("json:~/pairs.json", "csv:~/pairs.csv", "json:~/pairs.json?image_root=~/"):
        assert open_it(spec)[0].image == str(tmp_path / "a.jpg")
    assert open_it("json:~/pairs.json", image_root="~/b")[0].image == str(tmp_path / "b/a.jpg")
    listing(tmp_path / "far.json", "/far/a.jpg")
    mapped = open_it("json:~/far.json", path_map="/far=~/near")
    assert mapped[0].image == str(tmp_path / "near/a.jpg")
    for spec in ("webdataset:~/none.tar", "records:~/none", "coco:~/none.json", "hf:~/none:train"):
        assert f"{tmp_path}/none" in refusal(spec)


def test_the_usable_pairs_beside_a_check_know_of_how_many_they_are_and_where(tmp_path):
    pairs = '{"image": "a.jpg", "caption": "one"}\n'
    usable, other = (write(tmp_path / name, pairs) for name in ("usable.jsonl", "other.jsonl"))
    write(tmp_path / "check.json", {"listed": 7, "image_root": "/pictures"})
    source = open_it(f"json:{usable}", image_root="/lists")
    assert source.listed == 7 and source[0].image == "/pictures/a.jpg"
    assert open_it(f"json:{usable}?image_root=/moved")[0].image == "/moved/a.jpg"
    sources = [open_it(f"json:{other}")]
    for content in ("[]", "{", {"unusable": 3}, {"listed": None, "image_root": "/pictures"}):
        write(tmp_path / "check.json", content)
        sources.append(open_it(f"json:{usable}"))
    for source in sources:
        assert source.listed == 1 and source[0].image == str(tmp_path / "a.jpg")
