"""Where the images of a list are: path maps, and the files of check-data."""

from list_files import open_it, records, refusal, write

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
        f"{SALESFORCE}=/data/other, "
        f"{SALESFORCE}/coco/images=/data/coco/,hdfs://haruna/home/byte/coco=/mnt/coco"
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


def test_the_home_folder_may_be_written_as_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pairs.json", [{"image": "a.jpg", "caption": "one"}])
    write(tmp_path / "pairs.csv", "image,caption\na.jpg,one\n")
    for spec in ("json:~/pairs.json", "csv:~/pairs.csv", "json:~/pairs.json?image_root=~/"):
        assert open_it(spec)[0].image == str(tmp_path / "a.jpg")
    assert open_it("json:~/pairs.json", image_root="~/b")[0].image == str(tmp_path / "b/a.jpg")
    write(tmp_path / "far.json", [{"image": "/far/a.jpg", "caption": "one"}])
    mapped = open_it("json:~/far.json", path_map="/far=~/near")
    assert mapped[0].image == str(tmp_path / "near/a.jpg")
    for spec in ("webdataset:~/none.tar", "records:~/none", "coco:~/none.json", "hf:~/none:train"):
        assert f"{tmp_path}/none" in refusal(spec)


# The files of check-data


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
