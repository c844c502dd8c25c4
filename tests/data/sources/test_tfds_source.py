"""Prepared data sets of TensorFlow Datasets, with the parts that coco_captions has, read without
TensorFlow.
"""

import io
import json
import pickle
import re
import shutil
import sys

import list_files
import numpy as np
import pytest
from list_files import check_source, refusal
from PIL import Image

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.errors import UserError

IMAGES = 9


def picture(number):
    """Noise, so that the file is too large for a shard's examples to fit one block."""
    pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def captions(number):
    """Image 4 has none."""
    texts = [f"caption {text} of {number} é" for text in range(1 + number % 3)]
    return [] if number == 4 else texts


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder in which two configs of a data set are prepared, each with two splits; another has a
    third.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tfds")

    class TinyCoco(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.1.0")
        BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=n) for n in ("2014", "2017"))
        pkg_dir_path = folder  # where it would look for citations

        def _info(self):
            parts = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
                "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
                "alt": tfds.features.Sequence(tfds.features.Text()),
                "title": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(parts))

        def _split_generators(self, _):
            return {"train": self._generate_examples(IMAGES), "val": self._generate_examples(2)}

        def _generate_examples(self, count):
            for number in range(count):
                texts = [{"id": n, "text": text} for n, text in enumerate(captions(number))]
                example = {"image": io.BytesIO(picture(number)), "captions": texts}
                example |= {"image/filename": f"{number:04d}.jpg", "image/id": 1000 + number}
                example |= {"objects": [{"bbox": tfds.features.BBox(0.0, 0.0, 0.5, 1.0)}]}
                example |= {"alt": ["first", " ", f"alt {number}"], "title": f"title {number}\n"}
                yield number, example

    for config in ("2014", "2017"):
        TinyCoco(data_dir=folder, config=config, file_format="array_record").download_and_prepare()
    return folder


def open_it(place, role="train"):
    return list_files.open_it(f"tfds:{place}", role)


def number_of(source, index):
    """The number of a record's image, since data sets have their own order."""
    return int(source.name(index)[:4])


def test_a_prepared_data_set_gives_the_files_of_its_images_and_their_captions(data_dir):
    source = open_it(f"tiny_coco/2014:train?data_dir={data_dir}")
    assert len(source) == source.listed == IMAGES
    seen = set()
    for index in range(IMAGES):
        number = number_of(source, index)
        seen.add(number)
        assert source.captions(index) == tuple(captions(number))
        if number != 4:
            assert source[index] == (picture(number), tuple(captions(number)), index)
            assert decode(source[index].image).shape == (40, 50, 3)
    assert seen == set(range(IMAGES))
    assert len(open_it(f"tiny_coco/2014:val?data_dir={data_dir}", "test")) == 2


def test_an_example_without_a_caption_gives_way_to_the_next(data_dir):
    source = open_it(f"tiny_coco/2014:train?data_dir={data_dir}")
    index = next(index for index in range(IMAGES) if number_of(source, index) == 4)
    with pytest.raises(UnreadableImage, match="train.* has no caption"):
        source[index]
    assert source.captions(index) == ()


def test_a_data_set_is_found_by_folder_and_a_split_can_be_sliced(data_dir):
    version = data_dir / "tiny_coco" / "2014" / "1.1.0"
    by_name = open_it(f"tiny_coco/2014:train?data_dir={data_dir}")
    for place in (version, version.parent):
        assert open_it(f"{place}:train").fingerprint() == by_name.fingerprint()
    names = [by_name.name(index) for index in range(IMAGES)]
    assert "tensorflow" not in sys.modules
    half = open_it(f"{version}:train[3:6]")
    assert [half.name(index) for index in range(len(half))] == names[3:6]
    both = open_it(f"{version}:train[:2]+val")
    assert len(both) == 4 and both.name(1) == names[1]
    assert len({source.fingerprint() for source in (by_name, half, both)}) == 3


def test_parts_with_other_names_are_named(data_dir):
    base = f"tiny_coco/2017:train?data_dir={data_dir}"
    by_alt, by_title = open_it(f"{base}&caption_key=alt"), open_it(f"{base}&caption_key=title")
    assert by_alt[0].captions == ("first", f"alt {number_of(by_alt, 0)}")
    assert by_title[0].captions == (f"title {number_of(by_title, 0)}",)
    assert by_alt.fingerprint() != by_title.fingerprint()
    assert open_it(f"{base}&id_key=image/id").name(0) == str(1000 + number_of(by_alt, 0))


def test_what_cannot_be_read_is_refused_with_a_cure(data_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    base, there = "tiny_coco/2014:train", f"?data_dir={data_dir}"
    for place, words in {
        f"tiny_coco/2014:test{there}": "Unknown split .*its splits are train, val",
        f"{base}[:5x]{there}": r"tiny_coco/2014:train\[:5x\] cannot be read",
        f"{base}[:0]{there}": "has no examples",
        f"tiny_coco/2014{there}": "has the splits train, val: name one",
        f"tiny_coco/2015:train{there}": "not prepared in .*tfds build tiny_coco/2015 --file",
        f"other:train{there}": "tfds build other --file",
        f"not a name:train{there}": "is not prepared in",
        f"{tmp_path}/gone:train": f"{tmp_path}/gone.* folder",
        f"{tmp_path}/empty:train": "is not prepared",
        f"{data_dir}/tiny_coco:train": "holds several data sets: give .*/2017/1.1.0",
        f"{base}{there}&image_key=photo": "has no 'photo' for [?]image_key, it has .*title",
        f"{base}{there}&image_key=title": "'title' is Text.*holds no images",
        f"{base}{there}&caption_key=objects": "'objects' is .*holds no captions",
    }.items():
        assert re.search(words, refusal(f"tfds:{place}")), place


def test_a_data_set_in_another_file_format_has_to_be_prepared_anew(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / "tiny_coco" / "2014" / "1.1.0", tmp_path / "1.1.0")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    said = refusal(f"tfds:{folder}:train")
    assert "prepared as tfrecord" in said and "--file_format=array_record" in said


def test_a_source_crosses_to_another_process_and_its_fingerprint_moves_with_the_files(
    data_dir, tmp_path
):
    source = open_it(f"tiny_coco/2014:train?data_dir={data_dir}")
    check_source(source)
    shutil.copytree(data_dir / "tiny_coco", tmp_path / "tiny_coco")
    moved = open_it(f"tiny_coco/2014:train?data_dir={tmp_path}")
    assert moved.fingerprint() == source.fingerprint()
    other = open_it(f"tiny_coco/2017:train?data_dir={tmp_path}")
    assert other.fingerprint() != source.fingerprint()


def test_files_that_go_after_the_data_set_was_opened_are_named(data_dir, tmp_path):
    shutil.copytree(data_dir / "tiny_coco", tmp_path / "tiny_coco")
    source = pickle.loads(pickle.dumps(open_it(f"tiny_coco/2014:train?data_dir={tmp_path}")))
    [shard] = (tmp_path / "tiny_coco" / "2014" / "1.1.0").glob("*train*")
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UnreadableImage, match=r"tiny_coco/2014:train\[3\]: "):
        source[3]
    with pytest.raises(UserError, match="see that the files are there"):
        source.captions(3)
    assert source.name(3) == "tfds:tiny_coco/2014:train[3]"
    with pytest.raises(UserError, match="see that the files are there"):
        open_it(f"tiny_coco/2014:train?data_dir={tmp_path}")
