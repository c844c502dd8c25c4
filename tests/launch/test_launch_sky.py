"""The task files of SkyPilot, read by its own loader, and their commands run with a stand-in for
Python.

SkyPilot needs an environment of its own, see launch/README.md; without it most tests are skipped.
"""

import os
import shlex
import subprocess

import pytest
import yaml
from launched import HARD, LAUNCH, NOTE_AND_END, RECORD, recorded

FILES = [LAUNCH / f"sky_{kind}.yaml" for kind in ("gpu", "kubernetes", "tpu")]
GIVEN = {"BUCKET": "my-runs", "VOLUME": "runs", "IMAGE": "registry/codebook_jax:1"}


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # it keeps files there
        patch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
        yield pytest.importorskip("sky")


def task_of(sky, path, **changes):
    config = yaml.safe_load(path.read_text()) | changes
    given = {"ARGUMENTS": shlex.join(HARD), **GIVEN}
    asked = [(name, given[name]) for name in config["envs"]]
    return sky.Task.from_yaml_config(config, env_overrides=asked)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_skypilot_accepts_the_file_which_restarts_a_saved_run_and_shares_the_workdir(path, sky):
    task = task_of(sky, path)
    for resources in task.resources:
        recovery = resources.job_recovery
        assert recovery["recover_on_exit_codes"] == [75] and recovery["max_restarts_on_errors"] > 0
        assert resources.use_spot == (path.stem != "sky_kubernetes")
    if path.stem == "sky_kubernetes":
        assert task.volumes == {"/mnt/codebook": "runs"}
    else:
        assert task.storage_mounts["/mnt/codebook"].name == "my-runs"
    accelerators = {name for resources in task.resources for name in resources.accelerators}
    nodes = {"sky_gpu": (2, {"H100", "H200"}), "sky_tpu": (1, {"tpu-v5litepod-16"})}
    expected = nodes.get(path.stem, (2, {"H100"}))
    assert (task.num_nodes, accelerators) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_value_that_is_missing_or_a_misspelt_field_is_refused_by_name(path, sky):
    with pytest.raises(ValueError, match="Environment variable '(BUCKET|IMAGE)' is None. Please"):
        sky.Task.from_yaml(str(path))
    with pytest.raises(ValueError, match="Instead of 'num_node', did you mean 'num_nodes'"):
        task_of(sky, path, num_node=2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_arguments_reach_the_program_unchanged(path, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "recorded").mkdir()
    for place in (".venv/bin/python", "python"):
        (tmp_path / place).write_text(RECORD + NOTE_AND_END)
        (tmp_path / place).chmod(0o755)
    told = {"WORLD": str(tmp_path / "recorded"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = yaml.safe_load(path.read_text())["run"].replace("cd /app", "cd .")
    environment = {"ARGUMENTS": shlex.join(HARD), **GIVEN, **told}
    subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=True)
    (words,) = recorded(tmp_path / "recorded" / "python")
    assert words == ["-m", "codebook_jax.main", "--preempted_exit_code=75", *HARD]
