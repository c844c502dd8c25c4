"""The commands and code of the pages run, on a few pictures laid out as the data sets are."""

import dataclasses
import inspect
import json
import os
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from list_files import write
from small_packing import jpeg
from small_run import ROOT, SMALL
from tar_files import write as write_tar

from codebook_jax import build, main, method, summary
from codebook_jax.data.images import decode
from codebook_jax.data.sources import source_of
from codebook_jax.data.sources.opening import SCHEMES

README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "quickstart.md"
PAGE = ROOT / "docs" / "data.md"
BUILT = "runs/mine"
# Everything small, and nothing in further processes.
FEW = {name: value for name, value in SMALL.items() if name != "data.scenes_examples"}
FEW |= {"prepare.processes": 1, "check.processes": 1}


def blocks(kind, page=PAGE):
    """The fenced blocks of one kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page=PAGE):
    """The arguments of every command of the page, in order."""
    lines = "".join(blocks("sh", page)).replace("\\\n", " ").splitlines()
    return [parts for line in lines if (parts := shlex.split(line, comments=True))]


def make_coco(folder):
    for part, numbers in (("train2014", range(6)), ("val2014", range(100, 105))):
        images = [{"id": n, "file_name": f"COCO_{part}_{n:012}.jpg"} for n in numbers]
        texts = [
            {"id": 2 * n + which, "image_id": n, "caption": f"caption {which} of {n}"}
            for n in numbers
            for which in (0, 1)
        ]
        for image in images:
            write(folder / part / image["file_name"], jpeg(image["id"]))
        content = {"info": {}, "images": images, "licenses": [], "annotations": texts}
        write(folder / "annotations" / f"captions_{part}.json", content)
    splits = ["train"] * 6 + ["restval", "restval", "val", "val", "test"]
    names = sorted(path.relative_to(folder) for path in folder.glob("*/*.jpg"))
    write_splits(folder / "dataset_coco.json", names, splits)


def write_splits(path, names, splits):
    images = []
    for number, (name, split) in enumerate(zip(names, splits, strict=True)):
        image = {"filename": name.name, "split": split, "imgid": number, "cocoid": 7 * number}
        image |= {"filepath": name.parent.name} if name.parent.name else {}
        images.append(image | {"sentences": [{"raw": f"one {number}"}, {"raw": f"two {number}"}]})
    write(path, {"images": images, "dataset": path.stem})


def make_flickr30k(folder):
    names = [Path(f"{number}.jpg") for number in range(1000, 1006)]
    for number, name in enumerate(names):
        write(folder / "flickr30k-images" / name, jpeg(1000 + number))
    write_splits(folder / "dataset_flickr30k.json", names, ["train"] * 3 + ["val", "test", "test"])


def make_visual_genome(folder):
    places = {1: "VG_100K_2", 2: "VG_100K", 3: "VG_100K"}
    for number, place in places.items():
        write(folder / place / f"{number}.jpg", jpeg(2000 + number))
    regions = [
        {"regions": [{"phrase": f"thing {k} of {n}", "image_id": n} for k in range(3)], "id": n}
        for n in places
    ]
    urls = [{"image_id": n, "url": f"https://a.org/{p}/{n}.jpg"} for n, p in places.items()]
    write(folder / "region_descriptions.json", regions)
    write(folder / "image_data.json", urls)


def make_shards(folder, seed):
    folder.mkdir(parents=True)
    for shard in range(2):
        members = []
        for number in range(3):
            key = f"{shard:05}{number:04}"
            words = json.dumps({"caption": f"picture {key}", "key": key})
            members.append((f"{key}.jpg", jpeg(seed + 10 * shard + number)))
            members += [(f"{key}.json", words), (f"{key}.txt", f"picture {key}")]
        write_tar(folder / f"{shard:05}.tar", members)


def make_albef_lists(folder):
    remote = "/export/home/project/VL/dataset"
    image = f"{remote}/coco/images/train2014/COCO_train2014_000000000000.jpg"
    write(folder / "coco.json", [{"image": image, "caption": "one"}])
    write(folder / "vg.json", [{"image": f"{remote}/vg/VG_100K/2.jpg", "caption": "two"}])
    image = "hdfs://cluster/coco/val2014/COCO_val2014_000000000100.jpg"
    write(folder / "coco_val.json", [{"image": image, "caption": ["three", "four"]}])


def make_own(folder, table, lines):
    """The lists that a page shows, and the pictures they name."""
    write(folder / "train.csv", table)
    write(folder / "val.csv", table)
    write(folder / "val.jsonl", lines)
    for number, name in enumerate(re.findall(r"photos/\w+\.jpg", table + lines)):
        write(folder / name, jpeg(3000 + number))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with a little of everything, to run commands in."""
    make_coco(tmp_path / "data" / "coco")
    make_flickr30k(tmp_path / "data" / "flickr30k")
    make_visual_genome(tmp_path / "data" / "vg")
    make_shards(tmp_path / "data" / "cc3m", 4000)
    make_shards(tmp_path / "data" / "sbu", 5000)
    make_albef_lists(tmp_path / "data" / "albef")
    make_own(tmp_path / "data" / "mine", *(text for text in blocks("") if "photos/" in text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(arguments, changes):
    """The flags of a command line of the page, with further settings after them."""
    values = flags.FlagValues()
    argv = [argument.replace("=configs/", f"={ROOT}/configs/") for argument in arguments]
    argv += [f"--config.{name}={value}" for name, value in changes.items()]
    main.define_flags(values, argv)
    main.parse(argv, values)
    return values


def read_all(config):
    """The number of records that each role of a config has; every picture of them is decoded."""
    counts = {}
    for role, field in (("train", "train"), ("validation", "eval"), ("test", "test")):
        if not config.data[field]:
            continue
        source = source_of(config, config.data[field], role)
        for index in range(len(source)):
            record = source[index]
            assert decode(record.image).ndim == 3 and all(record.captions)
        counts[role] = len(source)
    return counts


def first_batch(config, workdir):
    """Everything that training does before it compiles its first step."""
    parts = build.build_training(config, workdir, steps_saved=[])
    summary.announce(parts)
    with build.batches(parts, start_step=0) as stream:
        batch = next(stream)
    assert batch.skipped.sum() == 0 and (batch.text_length > 2).all()


def run(arguments):
    """Runs a command of the page; of training, it reads all there is, and once goes as far as the
    first batch.
    """
    assert arguments[:3] == ["python", "-m", "codebook_jax.main"], arguments
    values = parsed(arguments[2:], FEW)
    workdir = Path(values.workdir)
    if values.mode == "train":
        if values.workdir == BUILT:
            first_batch(values.config, workdir)
        return read_all(values.config)
    assert main.run(values.mode, values.config, workdir) == 0
    return os.listdir(workdir)


def test_every_command_of_the_page_runs(data, one_device):
    done = {}
    for arguments in commands():
        try:
            done[shlex.join(arguments)] = run(arguments)
        except BaseException as error:
            error.add_note(f"in {shlex.join(arguments)}")
            raise
    results = {
        re.search(r"--workdir=(\S+)", command).group(1): made for command, made in done.items()
    }
    assert len(results) == len(commands())  # a workdir each
    assert results["runs/coco"] == {"train": 6, "validation": 5}
    assert results["runs/coco_karpathy"] == {"train": 8, "validation": 2}
    assert results["runs/mixed"] == {"train": 6 + 3 + 6, "validation": 2}
    assert results["runs/vg"] == {"train": 9, "validation": 2}
    assert results["runs/albef_lists"] == {"train": 2, "validation": 1}
    assert results["runs/coco_packed"] == {"train": 8, "validation": 2, "test": 1}
    for made in ("runs/mine_usable", "runs/mine_packed"):
        assert results[made] == {"train": 2, "validation": 1}
    for workdir, made in results.items():
        if workdir.startswith("checks/"):
            assert {"check.json", "skipped.tsv", "report.html"} <= set(made)


@pytest.mark.parametrize("page", [README, QUICKSTART], ids=["README", "quickstart"])
def test_every_command_of_the_first_pages_is_accepted_and_finds_its_data(
    page, tmp_path, monkeypatch, one_device
):
    make_own(tmp_path / "pairs", *blocks("csv", page), "".join(blocks("json", page)))
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        config = parsed(arguments[2:], {}).config
        if config is not None and not config.data.train.startswith("scenes"):
            assert run([argument.replace(BUILT, "runs/others") for argument in arguments])


def test_the_page_names_every_scheme_with_its_options():
    told = {}
    table = PAGE.read_text().partition("\n### ")[0]
    for row in re.findall(r"^\| `.*\|$", table, re.MULTILINE):
        _, names, _, options, _ = row.split("|")
        options = options.replace("the three keys", "`image_key`, `caption_key`, `id_key`")
        known = set(re.findall(r"`(\w+)`", options))
        if "those of `json:`" in options:
            known |= set(SCHEMES["json"].options)
        told |= dict.fromkeys(re.findall(r"`(\w+)", names), known)
    assert told == {name: set(scheme.options) for name, scheme in SCHEMES.items()}


def test_every_public_function_of_the_method_has_an_example_and_names_its_source():
    lacking = {}
    for name in method.__all__:
        public = getattr(method, name)
        struct = dataclasses.is_dataclass(public) or hasattr(public, "_fields")
        if struct or not (inspect.isfunction(public) or inspect.isclass(public)):
            continue
        text = inspect.getdoc(public) or ""
        needed = {"an example": ">>> ", "a source": r"\bSource\b|\bet al\.|\bours\b"}
        lacking[name] = [what for what, sign in needed.items() if not re.search(sign, text)]
    assert {"align_steps", "CodebookAlignment", "unit"} <= lacking.keys()
    assert not {name: parts for name, parts in lacking.items() if parts}


def test_the_table_of_faults_is_that_of_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fault_table

    rows = fault_table.read(fault_table.RESULTS)
    assert fault_table.table(list(rows.values())) in (ROOT / "docs" / "faults.md").read_text()
