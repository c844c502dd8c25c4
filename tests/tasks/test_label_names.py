"""The labels that a classifier learns: all in training, and none that only other data have."""

import pytest
from example_files import write_pictures
from list_files import open_it
from small_finetune import config_of

from codebook_jax import build
from codebook_jax.errors import UserError
from codebook_jax.tasks.labels import Labelling
from codebook_jax.tools import evaluate


@pytest.fixture
def folders(tmp_path):
    """The specs of three folders of classes; the last two have one that the first lacks."""
    write_pictures(tmp_path / "train", ["cup/1.jpg", "plate/1.jpg"])
    write_pictures(tmp_path / "val", ["cup/1.jpg", "fork/1.jpg", "fork/2.jpg"])
    write_pictures(tmp_path / "test", ["cup/1.jpg", "spoon/1.jpg"])
    return {name: f"folders:{tmp_path / name}" for name in ("train", "val", "test")}


def of(folders, **changes):
    fields = {"data.train": folders["train"], "data.eval": folders["train"]}
    return config_of("labels", init="random", **fields | {"data.global_batch": 2} | changes)


def test_a_label_of_validation_that_training_lacks_is_refused_before_anything_is_made(
    folders, tmp_path, one_device
):
    config = of(folders, **{"data.eval": folders["val"]})
    with pytest.raises(UserError) as caught:
        build.build_training(config, tmp_path / "run", steps_saved=[])
    said = str(caught.value)
    assert f"{folders['val']} has labels that are none of the 2 in training" in said
    assert "'fork' (fork/1.jpg):" in said and "fork/2" not in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_label_of_the_test_data_that_training_lacks_is_refused_before_a_checkpoint_is_read(
    folders, tmp_path, one_device
):
    build.build_training(of(folders), tmp_path / "run", steps_saved=[], learns=False)
    config = of(folders, **{"data.test": folders["test"]})
    with pytest.raises(UserError, match=r"test has labels .* 'spoon' \(spoon/1.jpg\)"):
        evaluate.evaluate(config, tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint yet"):
        evaluate.evaluate(of(folders), tmp_path / "run")


def test_labels_given_by_name_must_have_those_of_training(folders):
    source = open_it(folders["train"])
    given = of(folders, **{"labels.names": ("cup", "plate", "fork")})
    assert Labelling.from_data(given, None, source).labels.names == ("cup", "plate", "fork")
    given = of(folders, **{"labels.names": ("cup", "fork")})
    with pytest.raises(UserError, match=r"train has labels .* 'plate' \(plate/1.jpg\)"):
        Labelling.from_data(given, None, source)


def test_a_label_without_words_is_refused_by_its_picture(tmp_path):
    write_pictures(tmp_path, ["-/1.jpg", "cup/1.jpg", "plate/1.jpg"])
    config, source = of({"train": "folders:"}), open_it(f"folders:{tmp_path}")
    with pytest.raises(UserError, match="-/1.jpg has a label without words"):
        Labelling.from_data(config, None, source)
