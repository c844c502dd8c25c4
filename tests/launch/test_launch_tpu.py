"""A run on a TPU slice with plain gcloud, whose stand-in has two folders as workers."""

import subprocess
import threading
import time

import pytest
from launched import HARD, POD, environment, launch, make_world, recorded

PLACE = ["first", "--zone=zone-a"]


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def pod(command, *words, world, **changes):
    return launch(POD, command, *PLACE, *words, world=world, TMPDIR=str(world), **changes)


def test_a_slice_is_created_and_deleted_with_the_flags_given_to_gcloud(world):
    for command, words in (("create", ["--spot", "--network=a b"]), ("delete", [])):
        assert pod(command, *words, world=world).returncode == 0
    create, delete = recorded(world / "gcloud")
    assert create == [
        *("compute", "tpus", "queued-resources", "create", "first", "--node-id=first"),
        *("--zone=zone-a", "--spot", "--network=a b"),
    ]
    assert delete[2:5] == ["queued-resources", "delete", "first"]


def installed(world):
    done = pod("install", "--", "my-runs", world=world, CODE_OF_mountpoint="1")
    assert done.returncode == 0, done.stderr
    return done


def test_all_workers_get_the_checkout_an_environment_and_the_bucket(world):
    installed(world)
    for worker in ("worker0", "worker1"):
        assert (world / worker / "codebook" / "codebook_jax" / "main.py").exists()
        assert recorded(world / worker / "pip")[-1] == ["install", "--quiet", "-e", ".[tpu]"]
    assert recorded(world / "gcsfuse") == [["--implicit-dirs", "my-runs", "/mnt/codebook"]] * 2


def test_arguments_reach_all_workers_unchanged_and_a_failure_is_reported(world):
    installed(world)
    for worker, code in (("worker0", "0"), ("worker1", "3")):
        (world / worker / "code").write_text(code)
    done = pod("run", "--", *HARD, world=world)
    assert done.returncode == 3, done.stderr
    for worker in ("worker0", "worker1"):
        assert recorded(world / worker / "main") == [HARD]
        assert f"step 1 on {worker}" in done.stdout


def test_a_run_outlives_its_connection_can_be_watched_again_and_stopped(world):
    installed(world)
    words = ["bash", POD, "run", *PLACE, "--", *HARD]
    first = subprocess.Popen(
        words, env=environment(world), start_new_session=True, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 30
    while len(list(world.glob("worker?/waits"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    first.kill()  # the laptop is closed
    first.wait()
    watching = threading.Timer(1, lambda: pod("stop", world=world))
    watching.start()
    again = pod("run", "--", *HARD, world=world)
    watching.join()
    assert again.returncode == 0, again.stderr
    assert recorded(world / "worker0" / "main") == recorded(world / "worker1" / "main") == [HARD]


@pytest.mark.parametrize("words", [["create", "--spot"], ["run", "--", *HARD], ["stop"]])
def test_a_dry_run_shows_the_commands_of_a_real_one_and_runs_none(words, world):
    shown = pod(*words, world=world, DRY_RUN="1")
    assert shown.returncode == 0 and not (world / "gcloud").exists()
    for worker in ("worker0", "worker1"):
        (world / worker / "codebook").mkdir()
    pod(*words, world=world)
    (ran,) = recorded(world / "gcloud")
    read = ["bash", "-c", f"set -- {shown.stdout.strip()}; printf '%s\\0' \"$@\""]
    parsed = subprocess.run(read, capture_output=True, text=True, check=True)
    assert parsed.stdout.split("\0")[:-1] == ["gcloud", *ran]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a command"),
        (["status", "first"], "--zone is missing"),
        (["stat", *PLACE], "no command stat"),
        (["run", *PLACE], "arguments of codebook_jax.main"),
        (["install", *PLACE, "--"], "the name of a bucket"),
    ],
)
def test_a_mistaken_command_is_refused_in_a_sentence(world, words, said):
    done = launch(POD, *words, world=world)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (world / "gcloud").exists()
