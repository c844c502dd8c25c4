"""Several sources as one: each one's share of the stream, and that their images stay separate."""

import pickle

import numpy as np
import pytest
from list_files import check_source, ids, open_it, refusal, write

from codebook_jax.data.sources import Record
from codebook_jax.data.sources.mixture import Mixture, training_order
from codebook_jax.summary import amount

SIZES = (400, 300, 97)


@pytest.fixture
def specs(tmp_path):
    """Lists of 400, 300 and 97 pictures, which have the same names and ids in each."""
    made = []
    for which, size in enumerate(SIZES):
        entries = [
            {"image": f"{n}.jpg", "caption": f"list {which} caption {n}", "image_id": n}
            for n in range(size)
        ]
        path = write(tmp_path / f"{which}.json", entries)
        made.append(f"json:{path}?image_root=/pictures/{which}")
    return made


def mixed(specs, *weights):
    parts = zip(specs, weights, strict=True) if weights else ()
    return ",".join([f"{spec}&weight={weight}" for spec, weight in parts] or specs)


def order(source, count, seed=0, start=0):
    positions = training_order(source, seed)
    return np.array([positions[place] for place in range(start, start + count)])


def test_records_are_numbered_through_and_no_image_is_that_of_another_source(specs):
    source = open_it(mixed(specs))
    assert len(source) == source.listed == len(set(ids(source))) == 797
    assert max(ids(source)) < source.listed
    assert source[0].image == "/pictures/0/0.jpg" and source[700].image == "/pictures/2/0.jpg"
    assert source.captions(400) == source[400].captions == ("list 1 caption 0",)
    assert source.name(796) == "96.jpg"
    check_source(source)


def test_ids_stay_apart_where_a_source_has_fewer_records_than_it_lists():
    class Packed:
        """The last three of ten, with their ids, like packed records after skipped ones."""

        kind, listed, left_out = "pairs", 10, ()

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Record(b"", ("caption",), 7 + index)

    source = Mixture([Packed(), Packed()])
    assert len(set(ids(source))) == 6 and max(ids(source)) < source.listed


def test_what_each_source_left_out_is_told_of_all(specs, tmp_path):
    entries = [{"image": "x.jpg", "caption": ""}, {"image": "y.jpg", "caption": "y"}]
    path = write(tmp_path / "bare.json", entries)
    source = open_it(f"{specs[2]},json:{path},scenes", "validation")
    assert [len(source), source.listed] == [1098, 1099]
    assert [name for name, _ in source.left_out] == ["x.jpg"]
    assert source[97].captions == ("y",) and source[98].image.shape == (32, 32, 3)


def test_without_weights_every_record_comes_once_an_epoch(specs):
    drawn = order(open_it(mixed(specs)), 3 * 797).reshape(3, 797)
    assert (np.sort(drawn, axis=1) == np.arange(797)).all()
    assert not (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize("weights", [(5, 3, 2), (0.1, 0.1, 0.8), (1, 1, 1)])
def test_weights_are_shares_of_every_stretch_and_each_source_has_epochs_of_its_own(specs, weights):
    drawn = order(open_it(mixed(specs, *weights)), 1000)
    starts = np.cumsum([0, *SIZES])
    which = np.searchsorted(starts, drawn, side="right") - 1
    wanted = np.array(weights) / sum(weights)
    for stretch in which.reshape(-1, 100):
        assert np.abs(np.bincount(stretch, minlength=3) - 100 * wanted).max() <= 2
    assert np.abs(np.bincount(which) - 1000 * wanted).max() <= 1
    for number, size in enumerate(SIZES):
        own = drawn[which == number] - starts[number]
        for epoch in np.split(own, range(size, len(own), size)):
            assert len(set(epoch.tolist())) == len(epoch) <= size
    whole = own[: len(own) // size * size].reshape(-1, size)
    assert len(whole) and (np.sort(whole, axis=1) == np.arange(size)).all()


def test_it_is_said_what_an_epoch_has_of_each_source(specs):
    whole, *parts = amount(open_it(mixed(specs, 1, 1, 2)), global_batch=8, steps=100)
    assert whole == "797 pairs; an epoch is 99.6 steps, 100 steps are 1 epoch"
    assert [part.strip().split(" of every")[0] for part in parts] == ["25.0%", "25.0%", "50.0%"]
    assert parts[2].endswith("each of its pairs 4.11 times")  # 398.5 of 97
    by_size = amount(open_it(mixed(specs)), global_batch=8, steps=1000)
    assert by_size[0].endswith("1,000 steps are 10 epochs")
    assert all(part.endswith("each of its pairs 1 times") for part in by_size[1:])


def test_the_order_is_that_of_the_seed_from_any_position_and_in_any_process(specs):
    source = open_it(mixed(specs, 2, 1, 1))
    drawn = order(source, 200)
    assert (order(open_it(mixed(specs, 2, 1, 1)), 200) == drawn).all()
    assert (order(pickle.loads(pickle.dumps(source)), 50, start=150) == drawn[150:]).all()
    assert not (order(source, 200, seed=1) == drawn).all()


def test_sources_of_one_size_are_not_gone_through_in_step(specs):
    drawn = order(open_it(mixed([specs[0], specs[0]], 1, 1)), 200)
    first, second = drawn[drawn < 400], drawn[drawn >= 400] - 400
    assert len(first) == len(second) == 100 and not (first == second).all()


def test_a_fingerprint_is_of_the_sources_their_order_and_their_weights(specs):
    made = [mixed(specs), mixed(specs[::-1]), mixed(specs[:2])]
    made += [mixed(specs, 1, 1, 1), mixed(specs, 2, 1, 1)]
    prints = [open_it(spec).fingerprint() for spec in made]
    assert len(set(prints)) == len(prints)
    assert open_it(made[0].replace("/pictures/", "/elsewhere/")).fingerprint() == prints[0]
    assert "0x" not in repr(open_it(made[-1])) and "(2.0, 1.0, 1.0)" in repr(open_it(made[-1]))


def test_a_part_that_cannot_be_opened_is_named(specs, tmp_path):
    assert "gone.json cannot be read" in refusal(f"{specs[0]},json:{tmp_path}/gone.json")
    assert "weight=-1 is not a number above 0" in refusal(mixed(specs, 1, -1, 1))
