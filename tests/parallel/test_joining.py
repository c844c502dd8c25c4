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
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


def test_a_process_without_a_sign_of_others_is_alone():
    assert find({}) is None
    assert (
        find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}) is None
    )  # sbatch without srun starts one
    assert find(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert find({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, has_kubernetes=True) is None


def test_flags_come_before_the_environment():
    found = find(JAX | SLURM, coordinator="b:2", count=4, own=1)
    assert found == Joining("--coordinator", "b:2", 4, 1)


def test_jax_variables_are_taken_all_three_or_none():
    assert find(JAX | SLURM) == Joining("JAX_COORDINATOR_ADDRESS", "a:1", 3, 2)
    for broken in ({"JAX_PROCESS_ID": "x"}, {"JAX_NUM_PROCESSES": ""}):
        with pytest.raises(UserError, match="set all three, or none"):
            find(JAX | broken)


def test_slurm_has_one_gpu_a_task_or_all_of_a_node():
    one_each = find(SLURM)
    assert one_each == Joining("SLURM", None, 16, 11, (3,), "slurm")
    alone = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"}
    assert find(alone).devices == tuple(range(8))
    no_variable = {name: value for name, value in alone.items() if name != "CUDA_VISIBLE_DEVICES"}
    assert find(no_variable | {"SLURM_GPUS_ON_NODE": "4"}).devices == (0, 1, 2, 3)
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "3"}).devices == (0,)  # --gpus-per-task=1
    assert find(
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8,1", "SLURM_LOCALID": "0"}
    ).devices == tuple(range(8))


def test_open_mpi_names_its_first_host_up_to_version_4():
    assert find(MPI | ORTE) == Joining("Open MPI", None, 4, 2, (0,), "ompi")
    with pytest.raises(UserError, match="give --coordinator=HOST:PORT"):
        find(MPI)
    assert find(MPI, coordinator="c:3") == Joining("Open MPI", "c:3", 4, 2, (0,))


def test_kubernetes_and_cloud_tpus_are_left_to_jax():
    indexed = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    assert find(indexed, has_kubernetes=True).detection == "k8s"
    assert find({}, on_a_tpu=True) == Joining("Cloud TPU", detection=None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "b:2"}, "without --processes=N and --process=I"),
        ({"count": 2}, "need --coordinator"),
        ({"coordinator": "b", "count": 2, "own": 0}, "'b' is not HOST:PORT"),
        ({"coordinator": "b:2", "count": 2, "own": 2}, "process 2 of 2: .*0 to 1"),
    ],
)
def test_half_given_flags_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        find({}, **given)


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
        "from codebook_jax.processes.joining import Joining, join; join(Joining('--coordinator', "
        "'127.0.0.1:1', 2, 1), timeout_s=1)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and time.monotonic() - began < 50
    sentence = done.stderr.splitlines()[-1]
    assert (
        sentence.startswith("error: process 1 of 2 on ")
        and "did not find the others in 1 s" in sentence
    )
    assert "the coordinator 127.0.0.1:1 (that is this machine itself) cannot be reached" in sentence
