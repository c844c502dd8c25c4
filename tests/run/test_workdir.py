"""What a run's folder records, and which changes a restart may make."""

import json
import os
import subprocess

import jax
import pytest

from codebook_jax.config import flat, with_fields
from codebook_jax.errors import UserError
from codebook_jax.run import record as records
from codebook_jax.tasks import limits
from configs import base, sequences


def resolved(config, record, *, shards):
    before = None if record is None else records.recorded_config(record)
    found = limits.resolve(config, before, shards=shards, examples=1000)
    return with_fields(config, {"itm.groups": found.itm.groups, "queue.ids": found.queue.ids})


def config_of(size="tiny", **changes):
    config = base.paper(size)
    config.update_from_flattened_dict(changes)
    return resolved(config, None, shards=1)


def start(workdir, config, *, fingerprint="data-1", previous=None, changes=None, step=0):
    data = {"train": "scenes/train", "examples": 20_000, "fingerprint": fingerprint}
    facts = {"config": config.to_dict(), "data": data, "devices": {}}
    records.write_record(workdir, previous, facts, changes=changes or {}, step=step)
    return records.read_record(workdir)


def restart(workdir, record, config, *, fingerprint="data-1", has_checkpoint=True):
    given = (workdir, record, config, fingerprint)
    return records.check_restart(*given, has_checkpoint=has_checkpoint)


def test_the_record_holds_the_config_the_data_and_the_versions(tmp_path):
    config = config_of()
    record = start(tmp_path, config)
    assert records.recorded_config(record).to_dict() == config.to_dict()  # tuples too
    assert record["data"] == {"train": "scenes/train", "examples": 20_000, "fingerprint": "data-1"}
    assert record["versions"]["jax"] == jax.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_same_config_starts_again_without_a_word(tmp_path, capsys):
    record = start(tmp_path, config_of())
    assert restart(tmp_path, record, config_of()) == {} and capsys.readouterr().out == ""


def test_a_run_older_than_the_fields_of_learning_goes_on_with_the_same_command(tmp_path):
    record = start(tmp_path, config_of())
    for section, names in {
        "queue": ["ids"],
        "optimizer": ["name", "muon_learning_rate"],
        "data": ["alike", "alike_window"],
    }.items():
        for name in names:
            del record["config"][section][name]
    del record["config"]["model"]["pool"], record["config"]["model"]["image"]["stem"]
    del record["config"]["model"]["text"]["position_std"]
    config = resolved(base.paper("tiny"), record, shards=1)
    assert config.queue.ids is False and config_of().queue.ids is True
    assert restart(tmp_path, record, config).keys() <= {"model.text.position_std"}


def test_what_an_older_run_lacks_is_added_to_no_section_that_its_task_has_not(tmp_path):
    record = start(tmp_path, sequences.get_config("tiny"))
    assert "queue" not in records.recorded_config(record)


@pytest.mark.parametrize(
    "name, new",
    [
        ("seed", 1),
        ("data.global_batch", 32),
        ("data.scenes_examples", 10),
        ("data.tokenizer", "bert-base-uncased"),
        ("data.tokenizer_vocabulary", 100),
        ("model.image.width", 64),
        ("model.text.max_tokens", 30),
        ("model.dtype", "bfloat16"),
        ("codebook.size", 128),
        ("queue.size", 256),
        ("itm.groups", 4),
        ("task", "retrieval"),
    ],
)
def test_what_breaks_the_data_or_the_shapes_is_refused_with_both_values(name, new, tmp_path):
    record = start(tmp_path, config_of())
    old = flat(record["config"])[name]
    with pytest.raises(UserError) as refusal:
        restart(tmp_path, record, config_of(**{name: new}))
    assert f"{name}={json.dumps(old)}, now {json.dumps(new)}" in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_every_refused_field_is_named_at_once(tmp_path):
    record = start(tmp_path, config_of())
    with pytest.raises(UserError, match=r'size="tiny", now "small"; .*and \d+ more'):
        restart(tmp_path, record, config_of("small"))


@pytest.mark.parametrize("named", ["scenes", "json:other.json"])
def test_data_whose_content_changed_is_refused(named, tmp_path):
    record = start(tmp_path, config_of())
    with pytest.raises(UserError, match=f"data.*{named}"):
        restart(tmp_path, record, config_of(**{"data.train": named}), fingerprint="data-2")


def test_the_same_data_under_another_path_is_accepted(tmp_path, capsys):
    record = start(tmp_path, config_of(**{"data.train": "json:/old/pairs.json"}))
    restart(tmp_path, record, config_of(**{"data.train": "json:/new/pairs.json"}))
    (said,) = capsys.readouterr().out.splitlines()
    assert "data.train=" in said and "the same data by its fingerprint" in said


@pytest.mark.parametrize(
    "name, new, noted",
    [
        ("train.steps", 900, True),
        ("optimizer.learning_rate", 1e-3, True),
        ("losses.codebook", 0.0, True),
        ("data.crop_scale", (0.5, 1.0), True),
        ("data.workers", 2, False),
        ("data.threads", 8, False),
        ("data.prefetch", 8, False),
        ("log_every_steps", 7, False),
        ("checkpoint.keep", 9, False),
        ("evaluation.images", 9, False),
        ("mesh.fsdp", 2, False),
        ("model.remat", "blocks", False),
    ],
)
def test_what_changes_only_learning_or_computing_is_accepted_and_said(
    name, new, noted, tmp_path, capsys
):
    record = start(tmp_path, config_of())
    assert list(restart(tmp_path, record, config_of(**{name: new}))) == [name]
    (said,) = capsys.readouterr().out.splitlines()
    assert f" {name}=" in said and ("changes what is learned from here on" in said) == noted


def test_before_the_first_checkpoint_only_the_tokenizer_is_fixed(tmp_path):
    record = start(tmp_path, config_of())
    changes = restart(
        tmp_path, record, config_of(**{"data.global_batch": 32, "seed": 1}), has_checkpoint=False
    )
    assert changes == {"data.global_batch": [64, 32], "seed": [0, 1]}
    with pytest.raises(UserError, match="data.tokenizer_vocabulary"):
        restart(
            tmp_path, record, config_of(**{"data.tokenizer_vocabulary": 99}), has_checkpoint=False
        )


def test_accepted_changes_are_kept_with_their_step(tmp_path):
    record = start(tmp_path, config_of())
    longer = config_of(**{"train.steps": 900})
    changes = restart(tmp_path, record, longer)
    record = start(tmp_path, longer, previous=record, changes=changes, step=200)
    changed = {"train.steps": [config_of().train.steps, 900]}
    assert record["changes"] == [{"step": 200, "fields": changed}]
    assert record["config"]["train"]["steps"] == 900


def test_another_version_of_a_package_is_said(tmp_path, capsys):
    record = start(tmp_path, config_of())
    record["versions"]["jax"] = "0.1.0"
    restart(tmp_path, record, config_of())
    said = f'versions.jax="0.1.0", now "{jax.__version__}": results may differ'
    assert said in capsys.readouterr().out


def test_groups_are_data_shards_times_accumulation_and_stay_those_of_the_run(tmp_path):
    config = base.paper("tiny")
    config.optimizer.accumulation = 2
    first = resolved(config, None, shards=4)
    assert first.itm.groups == 8 and config.itm.groups == 0
    record = start(tmp_path, first)
    assert resolved(config, record, shards=1).itm.groups == 8
    assert restart(tmp_path, record, resolved(config, record, shards=1)) == {}
    config.itm.groups = 5
    with pytest.raises(UserError, match=r"itm.groups=5 .*data.global_batch=64"):
        resolved(config, None, shards=1)


def test_a_trained_run_is_used_with_its_own_config_but_for_its_use(tmp_path, capsys):
    record = start(tmp_path, config_of(**{"model.image.width": 64, "seed": 3}))
    assert records.trained_config(tmp_path, record, None).model.image.width == 64
    other = {"evaluation.images": 5, "data.test": "json:t.json", "data.eval": "json:e.json"}
    given = config_of(**{"model.image.width": 64, **other})
    used = records.trained_config(tmp_path, record, given)
    assert (used.evaluation.images, used.data.test, used.seed) == (5, "json:t.json", 3)
    used = records.trained_config(tmp_path, record, given, flags=("data.test",))
    assert (used.evaluation.images, used.data.test) == (5, "json:t.json")
    assert used.data.eval == "scenes" and "config.data.eval=scenes" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another model: model.image.width=64, now 128"):
        records.trained_config(tmp_path, record, config_of())


def test_the_layer_norms_of_imported_weights_stay(tmp_path):
    own = {"model.image.layer_norm_eps": 1e-12}
    record = start(tmp_path, config_of(init="model:a.pth", **own))
    used = records.trained_config(tmp_path, record, config_of())
    assert used.model.image.layer_norm_eps == 1e-12
    record = start(tmp_path, config_of(**own))
    with pytest.raises(UserError, match="model.image.layer_norm_eps=1e-12, now 1e-06"):
        records.trained_config(tmp_path, record, config_of())


def test_a_run_from_before_a_field_continues_with_what_it_did(tmp_path):
    record = start(tmp_path, config_of())
    del record["config"]["init"], record["config"]["data"]["patience_s"]
    assert records.recorded_config(record).data.patience_s == 600.0
    assert restart(tmp_path, record, config_of()) == {}
    with pytest.raises(UserError, match='init="random", now "model:a"'):
        restart(tmp_path, record, config_of(init="model:a"))


def test_the_commit_is_that_of_the_checkout_and_none_in_a_stranger_s(tmp_path, monkeypatch):
    def git(*arguments):
        me = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *me, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    (tmp_path / "other").write_text("1")
    monkeypatch.setattr(records, "PACKAGE", package)
    assert records.git_commit() is None
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "another project")
    assert records.git_commit() is None  # a virtual environment inside someone's repository
    git("add", ".")
    git("commit", "-qm", "the package")
    os.utime(package / "a.py", (1, 1))  # `git status` would put this down
    index = (tmp_path / ".git" / "index").read_bytes()
    assert records.git_commit() == git("rev-parse", "HEAD")
    assert (tmp_path / ".git" / "index").read_bytes() == index  # someone may be packing it
    (package / "a.py").write_text("2")
    assert records.git_commit() == git("rev-parse", "HEAD") + "-dirty"
