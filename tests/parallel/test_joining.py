"""How a process finds the others: from flags, and from each launcher's environment variables."""

import subprocess
import sys
import time

import pytest

from codebook_jax.errors import UserError
from codebook_jax.parallel.processes.joining import Joining, find, join

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7\n",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
FLAGS = {"coordinator": "b:2", "count": 4, "own": 1}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


ALONE_ON_NODE = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
FOUR = {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "flags", "found"),
    [
        ({}, {}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, {}, None),  # sbatch without srun starts one
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, {}, None),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1"}, {}, None),
        (KUBERNETES, {"has_kubernetes": True}, None),
        (JAX | SLURM, FLAGS, Joining("--coordinator", "b:2", 4, 1)),
        (JAX | SLURM, {}, Joining("JAX", "a:1", 3, 2)),
        (SLURM, {}, Joining("SLURM", None, 16, 11, (3,), "slurm")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, {}, Joining("SLURM", None, 16, 11, (0,), "slurm")),
        (SLURM | ALONE_ON_NODE, {}, Joining("SLURM", None, 2, 1, tuple(range(8)), "slurm")),
        (SLURM | ALONE_ON_NODE | FOUR, {}, Joining("SLURM", None, 2, 1, (0, 1, 2, 3), "slurm")),
        (SLURM, {"coordinator": "c:3"}, Joining("SLURM", "c:3", 16, 11, (3,))),
        (MPI | ORTE, {}, Joining("Open MPI", None, 4, 2, (0,), "ompi")),
        (MPI, {"coordinator": "c:3"}, Joining("Open MPI", "c:3", 4, 2, (0,))),
        (SKYPILOT, {}, Joining("SkyPilot", "10.0.0.4:8476", 2, 1)),
        (SKYPILOT, {"on_a_tpu": True}, Joining("Cloud TPU", detection=None)),
        ({}, {"on_a_tpu": True}, Joining("Cloud TPU", detection=None)),
        (
            KUBERNETES | {"JOB_COMPLETION_INDEX": "1"},
            {"has_kubernetes": True},
            Joining("Kubernetes", detection="k8s"),
        ),
    ],
)
def test_a_process_finds_the_others_by_flags_before_launchers_and_by_any_of_these(
    environment, flags, found
):
    assert find(environment, **flags) == found


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        (JAX | {"JAX_PROCESS_ID": "x"}, {}, "set all of them, or none"),
        (JAX | {"JAX_NUM_PROCESSES": ""}, {}, "set all of them, or none"),
        (MPI, {}, "give --coordinator=HOST:PORT"),
        ({}, {"coordinator": "b:2"}, "--coordinator=b:2 .*give .*--processes=N"),
        ({}, {"count": 2}, "--processes=2 .*give --coordinator"),
        (
            {},
            {"coordinator": "b", "count": 2, "own": 0},
            "process 0 of 2, coordinator 'b': give HOST:PORT",
        ),
        ({}, {"coordinator": "b:2", "count": 2, "own": 2}, "process 2 of 2, .*0 to 1"),
    ],
)
def test_half_of_what_is_needed_is_refused(environment, flags, words):
    with pytest.raises(UserError, match=words):
        find(environment, **flags)


def test_a_tpu_machine_whose_surroundings_name_no_others_is_alone(monkeypatch):
    import jax

    def found_nothing(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", found_nothing)
    assert join(Joining("Cloud TPU", detection=None), timeout_s=60) is False
    with pytest.raises(UserError, match="could not join: coordinator_address should be defined"):
        join(Joining("SLURM", detection="slurm"), timeout_s=60)


def test_a_process_that_nobody_joins_ends_with_a_sentence_on_why():
    code = (
        "from codebook_jax.parallel.processes.joining import Joining, join\n"
        "join(Joining('--coordinator', '127.0.0.1:1', 2, 1), timeout_s=1)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and time.monotonic() - began < 50
    sentence = done.stderr.splitlines()[-1]
    for words in ("error: process 1 of 2 on ", "find the others in 1 s", "127.0.0.1:1 cannot be"):
        assert words in sentence
