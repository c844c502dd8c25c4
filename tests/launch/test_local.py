"""launch/local.py with small programs as processes: what each is told, how one failure ends all,
and restarts.
"""

import re
import signal
import subprocess
import sys
import time

import pytest
from small_run import ROOT, ran

LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]


def started(*options, code, words=(), environment=None):
    command = [*LOCAL, *options, "--", sys.executable, "-c", code, *words]
    return ran(command, environment, timeout=60)


def test_each_process_is_told_its_number_the_coordinator_and_its_devices():
    code = (
        "import os; print(*(os.environ.get(n) for n in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', "
        "'JAX_LOCAL_DEVICE_IDS', 'XLA_FLAGS', 'JAX_COORDINATOR_ADDRESS')), flush=True)"
    )
    options = ("--processes=2", "--gpus=4", "--devices=3", "--port=1234")
    done = started(*options, code=code, environment={"XLA_FLAGS": "--a"})
    assert done.returncode == 0
    first, last = (
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "force_host_platform_device_count",
    )
    flags = f"{first} --a --xla_{last}=3"
    assert sorted(done.stdout.splitlines()) == [
        f"[0] 0 2 0,1 {flags} 127.0.0.1:1234",
        f"[1] 1 2 2,3 {flags} 127.0.0.1:1234",
    ]


def test_xla_knows_every_flag_that_the_launch_files_set():
    """XLA ends a process that is given a flag it does not know."""
    folder = ROOT / "launch"
    found = {
        path.name: set(re.findall(r"--xla_gpu_[\w=]+", path.read_text()))
        for path in folder.iterdir()
        if path.suffix != ".md"
    }
    with_gpus = {name for name, flags in found.items() if flags}
    skypilot = {"sky_gpu.yaml", "sky_kubernetes.yaml"}
    assert with_gpus == {"local.py", "slurm.sbatch", "gke_jobset.yaml"} | skypilot
    program = [sys.executable, "-c", "import jax; print(len(jax.devices()))"]
    for flags, known in ((" ".join(set.union(*found.values())), True), ("--xla_gpu_none=1", False)):
        settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        assert (ran(program, settings, timeout=120).returncode == 0) == known


def test_arguments_reach_the_command_as_they_are():
    words = ["a b", "--processes=7", "--", "'"]
    done = started("--processes=1", code="import sys; print(sys.argv[1:])", words=words)
    assert done.stdout == f"[0] {words}\n"


def test_one_that_fails_ends_the_others_after_the_grace_and_its_code_is_given_back():
    code = (
        "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(3)\ntime.sleep(60)"
    )
    began = time.monotonic()
    done = started("--processes=2", "--grace=0.5", code=code)
    assert done.returncode == 3 and time.monotonic() - began < 20
    assert "local.py: process 1 ended with exit code 3" in done.stdout
    assert "are killed" in done.stdout


@pytest.mark.parametrize(
    ("last", "restarts", "starts", "ends"),
    [(0, 5, 3, 0), (0, 1, 2, 128 + signal.SIGKILL), (2, 5, 3, 2)],
)
def test_all_are_started_again_as_often_as_asked_but_not_after_a_users_mistake(
    last, restarts, starts, ends, tmp_path
):
    code = (
        "import os, signal, sys; path = os.environ['COUNT']\n"
        "open(path, 'a').write('.'); n = len(open(path).read())\n"
        "os.kill(os.getpid(), signal.SIGKILL) if n < 3 else sys.exit(int(os.environ['LAST']))"
    )
    count = tmp_path / "count"
    environment = {"COUNT": str(count), "LAST": str(last)}
    options = ("--processes=1", f"--restarts={restarts}")
    done = started(*options, code=code, environment=environment)
    assert done.returncode == ends and count.read_text() == "." * starts
    assert "was ended by SIGKILL" in done.stdout and f"(1 of {restarts})" in done.stdout


def test_a_signal_reaches_all_and_nothing_is_started_again():
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [*LOCAL, "--processes=2", "--restarts=3", "--", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 5 and "again" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--processes=2", "a command is missing"),
        ("--processes=0 -- true", "give at least 1"),
        ("--processes=2 --gpus=3 -- true", "does not divide"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    done = ran([*LOCAL, *options.split()], timeout=60)
    assert done.returncode == 2 and words in done.stderr


def test_a_reader_that_is_gone_does_not_hold_the_processes_up(tmp_path):
    code = (
        f"[print('x' * 99, flush=True) for _ in range(3000)]; open({str(tmp_path / 'done')!r}, 'w')"
    )
    command = [*LOCAL, "--processes=1", "--", sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # as head does
    assert process.wait(timeout=60) == 0 and (tmp_path / "done").exists()
    assert process.stderr.read() == b""
