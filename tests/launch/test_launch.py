"""Starting a run under SLURM, with stand-ins for srun and scontrol; and tests of all launchers."""

import shlex
import sys
from pathlib import Path

import pytest
from launched import BATCH, HARD, JOBSETS, LAUNCH, POD, launch, make_world, recorded
from small_run import ran


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = ran([shellcheck, "--shell=bash", POD, BATCH])
    assert done.returncode == 0, done.stdout + done.stderr


def test_launchers_that_restart_ask_for_the_same_exit_code_of_main():
    from codebook_jax import main

    assert "preempted_exit_code" in [name for _, name, *_ in main.OPTIONS]
    assert "PREEMPTED=75" in BATCH.read_text()
    assert JOBSETS.read_text().count("codebook_jax.main, --preempted_exit_code=75]") == 2
    for path in LAUNCH.glob("sky_*.yaml"):
        assert "codebook_jax.main --preempted_exit_code=75 " in path.read_text(), path


def batch(world, *words, **changes):
    job = {"SLURM_JOB_ID": "7", "PYTHON": "python3.13", **changes}
    return launch(BATCH, *words, world=world, **job)


def test_a_job_passes_its_arguments_on_unchanged_and_a_dry_one_shows_the_command(world):
    shown = batch(world, *HARD, DRY_RUN="1").stdout.splitlines()[0]
    assert not (world / "srun").exists() and not (world / "scontrol").exists()
    assert batch(world, *HARD).returncode == 0
    (words,) = recorded(world / "srun")
    program = ["python3.13", "-m", "codebook_jax.main", "--preempted_exit_code=75", *HARD]
    assert words[-len(program) :] == program
    assert all(word.startswith("--") for word in words[: -len(program)])
    assert shlex.split(shown) == ["srun", *words]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(75, 0, True), (75, 3, False), (134, 2, True), (1, 3, False), (2, 0, False), (0, 0, False)],
)
def test_a_job_goes_back_to_the_queue_unless_it_is_done_or_mistaken(
    world, code, restarts, requeued
):
    count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # not set on a first start
    done = batch(world, *HARD, CODE_OF_srun=str(code), MAX_RESTARTS="3", **count)
    assert done.returncode == code
    assert recorded(world / "scontrol") == ([["requeue", "7"]] if requeued else [])
    assert ("MAX_RESTARTS" in done.stderr) == (restarts == 3)


def test_a_job_that_slurm_does_not_take_back_says_so(world):
    done = batch(world, *HARD, CODE_OF_srun="75", CODE_OF_scontrol="1")
    assert done.returncode == 75 and "job 7" in done.stderr


def test_slurm_signals_the_tasks_and_gives_each_all_gpus_to_see():
    options = [line.split()[1] for line in BATCH.read_text().splitlines() if line[:8] == "#SBATCH "]
    assert {"--signal=USR1@120", "--requeue", "--ntasks-per-node=8", "--gres=gpu:8"} <= set(options)
    assert not any("gpus-per-task" in option for option in options)


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ([], {}, "no arguments"),
        (HARD, {"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many"),
        (HARD, {"PYTHON": "no/python"}, "no/python"),
        (HARD, {"SLURM_JOB_ID": ""}, "not a SLURM job"),
        ([*HARD, "--preempted_exit_code=3"], {}, "leave it out"),
    ],
)
def test_a_mistaken_job_is_refused_in_a_sentence(world, words, changes, said):
    done = batch(world, *words, **changes)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (world / "srun").exists()


def test_the_commands_of_the_page_are_accepted(world):
    page = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith(("bash", "sbatch", "DRY_RUN"))]
    assert len(lines) >= 8
    for words in map(shlex.split, lines):
        if "launch/tpu_pod.sh" in words:
            done = launch(POD, *words[2:], world=world, DRY_RUN="1", TMPDIR=str(world))
        else:
            own = words[words.index("launch/slurm.sbatch") + 1 :]
            done = launch(BATCH, *own, world=world, DRY_RUN="1")
        assert done.returncode == 0, (words, done.stderr)
