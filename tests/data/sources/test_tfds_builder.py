"""Sources as a data set of TensorFlow Datasets: written without TensorFlow, and read by its own
reader.
"""

import sys

import numpy as np
import pytest
from example_files import write_pictures
from small_packing import BAD, KINDS, write_kinds, write_many

from codebook_jax.data.images import decode
from codebook_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder of the pictures, data_dir) of two splits."""
    import codebook_jax.data.tfds_builder  # noqa: F401 (registers it)

    folder = tmp_path_factory.mktemp("tfds")
    kinds, many = write_kinds(folder / "kinds"), write_many(folder / "many", 3)
    sources = {"train": f"json:{kinds}", "validation": f"json:{many}"}
    builder = tfds.builder("codebook_pairs", data_dir=folder / "data", sources=sources, side_px=48)
    builder.download_and_prepare()
    assert "tensorflow" not in sys.modules
    return folder, folder / "data"


def test_the_pairs_are_read_in_their_order_with_their_captions(prepared):
    _, data_dir = prepared
    examples = list(tfds.data_source("codebook_pairs", split="train", data_dir=data_dir))
    assert [example["name"].decode() for example in examples] == list(KINDS)
    for example in examples:
        name = example["name"].decode()
        assert [text.decode() for text in example["captions"]] == [f"a {name}", f"the {name}"]
    assert len({int(example["image_id"]) for example in examples}) == len(KINDS)
    assert max(int(example["image_id"]) for example in examples) < len(KINDS) + len(BAD)


def test_small_jpegs_keep_their_bytes(prepared):
    folder, data_dir = prepared
    builder = tfds.builder_from_directory(data_dir / "codebook_pairs" / "1.0.0")
    plain = {"image": tfds.decode.SkipDecoding()}
    raw = builder.as_data_source("train", decoders=plain)
    seen = builder.as_data_source("train")
    for example, shown in zip(raw, seen, strict=True):
        name = example["name"].decode()
        before = (folder / "kinds" / name).read_bytes()
        assert (example["image"] == before) == KINDS[name]
        pixels = decode(example["image"])
        assert np.abs(pixels.astype(int) - shown["image"]).max() < 4  # two decoders
    assert len(builder.as_data_source("validation[:2]")) == 2


def test_what_lists_no_pairs_is_refused(tmp_path):
    import codebook_jax.data.tfds_builder  # noqa: F401

    write_pictures(tmp_path, ["classes/cup/1.jpg", "classes/plate/1.jpg"])
    sources = {"train": f"folders:{tmp_path}/classes"}
    builder = tfds.builder("codebook_pairs", data_dir=tmp_path / "data", sources=sources)
    with pytest.raises(UserError, match="classes lists images with a label each, not pairs"):
        builder.download_and_prepare()


def test_without_sources_it_says_what_to_name(tmp_path):
    import codebook_jax.data.tfds_builder  # noqa: F401

    with pytest.raises(UserError, match="codebook_pairs .*sources="):
        tfds.builder("codebook_pairs", data_dir=tmp_path).download_and_prepare()
