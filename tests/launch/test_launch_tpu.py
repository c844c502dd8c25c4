"""Starting a run on a TPU slice, with a stand-in for gcloud whose workers are two folders."""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
from launched import HARD, LAUNCH, POD, environment, launch, make_world, recorded
from small_run import ROOT

SLICE = ["--name=first", "--zone=zone-a"]
NEW = [*SLICE, "--type=v5litepod-16", "--runtime=tpu-software"]


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def pod(command, *words, world):
    arguments = ["--", *HARD] if command == "run" else []
    source = f"--source={checkout(world)}"
    return launch(POD, command, *NEW, source, "--poll=0", *words, *arguments, world=world)


def checkout(world):
    """A small folder that passes for a checkout."""
    main = world / "source" / "codebook_jax" / "main.py"
    main.parent.mkdir(parents=True, exist_ok=True)
    main.touch()
    return world / "source"


def starts(world, worker):
    return recorded(world / worker / "main")


def actions(world):
    """What gcloud was asked to do with slices, except describing them."""
    return [words[3] for words in recorded(world / "gcloud") if words[3] in ("create", "delete")]


def test_a_run_on_a_new_slice_reaches_both_workers_unchanged_and_shows_the_log(world):
    done = pod("run", "--spot", "--create-flag=--network=a b", world=world)
    assert done.returncode == 0, done.stderr
    assert actions(world) == ["create"]
    (create,) = (words for words in recorded(world / "gcloud") if "create" in words)
    assert {"--accelerator-type=v5litepod-16", "--spot", "--network=a b"} <= set(create)
    for worker in ("worker0", "worker1"):
        assert starts(world, worker) == [["--preempted_exit_code=75", *HARD]]
        assert recorded(world / worker / "pip") == [["install", "--quiet", "-e", ".[tpu]"]]
    assert "step 1 on worker0" in done.stdout and "worker1" not in done.stdout


def test_a_preempted_slice_is_requested_again_and_the_same_command_started(world):
    # Seen: no slice; it is there; still there as the run is watched; gone; deleted; there again.
    (world / "states").write_text("NONE ACTIVE ACTIVE SUSPENDED NONE ACTIVE\n")
    for worker in ("worker0", "worker1"):
        (world / worker / "codes").write_text("75 0\n")
    done = pod("run", "--max-restarts=0", "--delete-when-done", world=world)
    assert done.returncode == 0, done.stderr
    assert actions(world) == ["create", "delete", "create", "delete"]
    assert starts(world, "worker1") == [["--preempted_exit_code=75", *HARD]] * 2


@pytest.mark.parametrize(
    ("codes", "code", "count"), [(("1", "2"), 2, 1), (("137", "1"), 1, 2), (("1 0", "0"), 0, 2)]
)
def test_a_failed_run_is_started_again_up_to_the_limit_and_a_mistaken_one_never(
    world, codes, code, count
):
    for worker, text in zip(("worker0", "worker1"), codes, strict=True):
        (world / worker / "codes").write_text(f"{text}\n")
    done = pod("run", "--max-restarts=1", world=world)
    assert done.returncode == code, done.stderr
    assert len(starts(world, "worker0")) == len(starts(world, "worker1")) == count
    assert actions(world) == ["create"]


def test_a_run_outlives_its_launcher_and_can_be_watched_and_stopped(world):
    for worker in ("worker0", "worker1"):
        (world / worker / "codes").write_text("wait\n")
    words = ["bash", POD, "run", *NEW, f"--source={checkout(world)}", "--poll=0", "--", *HARD]
    settings = dict(env=environment(world), cwd=ROOT, text=True, start_new_session=True)
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings)
    wait_for(world / "worker0" / "waits", world / "worker1" / "waits")
    os.killpg(first.pid, signal.SIGKILL)  # the laptop is closed
    first.communicate()
    status = pod("status", world=world)
    assert "the run is running (2 running)" in status.stderr, status.stderr
    (world / "drop").touch()  # and now its connection is lost
    again = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
    while (world / "drop").exists():
        time.sleep(0.02)
    stopped = pod("stop", world=world)
    assert stopped.returncode == 0 and "2 stopped 75" in stopped.stderr, stopped.stderr
    said = again.communicate(timeout=30)[0]
    assert again.returncode == 0 and "already active" in said and "was stopped" in said, said
    assert "step 1 on worker0" in said
    assert len(starts(world, "worker0")) == 1


def test_a_log_is_not_shown_anew_from_its_start_when_gcloud_connects_again(world):
    home = world / "worker0"
    run = home / "codebook_run"
    run.mkdir()
    (run / "log").write_text("".join(f"line {number}\n" for number in range(1000)))
    (run / "log_start").write_text("100\n")
    (run / "pid").write_text("999999999\n")

    def follow(watcher):
        words = ["bash", LAUNCH / "tpu_worker.sh", "follow", watcher]
        done = subprocess.run(words, env=environment(world, HOME=str(home)), capture_output=True)
        return done.stdout.decode().splitlines()

    assert follow("a")[0] == "line 99" and len(follow("a")) == 20
    assert follow("b")[0] == "line 99"


def wait_for(*paths):
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)


def test_a_dry_run_shows_the_commands_of_a_real_one_and_runs_none(world):
    mount = "--mount=bucket:my-runs"
    shown = pod("run", "--dry-run", mount, world=world)
    assert shown.returncode == 0 and not shown.stderr
    assert not (world / "gcloud").exists()
    assert pod("run", mount, world=world).returncode == 0
    ran = [["gcloud", *words] for words in recorded(world / "gcloud")]
    dry = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert [words[0] for words in dry].count("tar") == 1

    def known(commands):
        """The text without what differs each time: the archive's folder and the launcher's process
        number.
        """
        return [
            [re.sub(r"watcher\d+|^/.*/source.tar.gz", "", word) for word in words]
            for words in commands
        ]

    assert known(words for words in dry if words[0] != "tar") == known(ran)


def test_workers_mount_the_bucket_before_the_run_starts(world):
    source = {"CODE_OF_mountpoint": "1"}
    words = ["run", *NEW, f"--source={checkout(world)}", "--poll=0", "--mount=bucket:my-runs"]
    done = launch(POD, *words, "--mount-at=/mnt/a b", "--", *HARD, world=world, **source)
    assert done.returncode == 0, done.stderr
    assert recorded(world / "gcsfuse") == [["--implicit-dirs", "my-runs", "/mnt/a b"]] * 2
    verbs = [words[-2] for words in recorded(world / "gcloud") if words[3] == "ssh"]
    names = [verb.split()[2] for verb in verbs]
    assert names.index("mount") < names.index("start")


def test_the_code_can_come_from_a_revision_of_a_repository(world):
    folder = checkout(world)
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "-m", "one"],
        ["branch", "try/one"],
        ["rm", "--quiet", "-r", "codebook_jax"],
        ["commit", "--quiet", "-m", "two"],
    ):
        subprocess.run([*git, *words], check=True)
    source = f"--source=git+file://{folder}@try/one"
    done = launch(POD, "create", *NEW, source, "--poll=0", world=world)
    assert done.returncode == 0, done.stderr
    assert (world / "worker1" / "codebook_run" / "checkout" / "codebook_jax" / "main.py").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", *SLICE, "--", *HARD], "--type is missing"),
        (["run", *NEW], "after --"),
        (["run", *NEW, "--", "--workdir=runs/first"], "all share"),
        (["run", *NEW, "--", "--workdir=/a", "--preempted_exit_code=1"], "leave it out"),
        (["status", "--name=first"], "--zone is missing"),
        (["status", "--zone=a"], "--name="),
        (["status", *SLICE, "--", "--workdir=/a"], "no arguments"),
        (["stat", *SLICE], "no command stat"),
        (["status", "stop", *SLICE], "'stop'"),
        (["status", *SLICE, "--spott"], "no option --spott"),
        (["status", *SLICE, "--poll=soon"], "--poll=soon"),
        (["create", *NEW, "--source=/tmp/nothing"], "neither a checkout"),
        (["create", *NEW, "--mount=gs://runs"], "neither bucket:NAME"),
        ([*SLICE], "the command is missing"),
    ],
)
def test_a_mistaken_command_is_refused_in_a_sentence(world, words, said):
    done = launch(POD, *words, world=world)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (world / "gcloud").exists()
