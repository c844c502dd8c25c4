"""Starting a run on Kubernetes: the JobSets with their placeholders filled in."""

import json
import string

import pytest
import yaml
from launched import HARD, JOBSETS

FILLED = {
    "NAME": "first",
    "IMAGE": "registry/codebook_jax:1",
    "CLAIM": "runs",
    "HOSTS": "4",
    "ARGUMENTS": json.dumps(HARD),
    "TPU_ACCELERATOR": "tpu-v5-lite-podslice",
    "TPU_TOPOLOGY": "4x4",
    "CHIPS_PER_HOST": "4",
    "GPU_ACCELERATOR": "nvidia-h100-80gb",
    "GPUS_PER_HOST": "8",
}


@pytest.fixture(scope="module")
def jobsets():
    text = string.Template(JOBSETS.read_text()).substitute(FILLED)
    return {
        jobset["metadata"]["labels"]["accelerator"]: jobset for jobset in yaml.safe_load_all(text)
    }


def lost(given, kept, place=""):
    """The fields of one tree that another lacks."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [f for k in given for f in lost(given[k], kept.get(k), f"{place}/{k}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        given, kept = dict(enumerate(given)), dict(enumerate(kept))
        return lost(given, kept, place)
    return [] if given == kept else [place]


def test_the_fields_are_those_of_jobset_and_kubernetes(jobsets):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    assert set(jobsets) == {"tpu", "gpu"}
    for jobset in jobsets.values():
        # The models refuse wrong types and missing fields, and drop what they do not know.
        assert lost(jobset, JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == []


def test_the_top_of_the_file_names_what_has_to_be_filled_in():
    top, _, documents = JOBSETS.read_text().partition("# --- TPU")
    names = set(string.Template(documents).get_identifiers())
    assert names == set(FILLED)
    (command,) = (line for line in top.splitlines() if "envsubst" in line)
    assert set(string.Template(command.strip("# \\")).get_identifiers()) == names
    exported = "".join(line for line in top.splitlines() if "export " in line)
    assert all(f" {name}=" in exported for name in names)


def test_pods_are_all_started_again_but_for_a_mistake_and_have_time_to_save(jobsets):
    for jobset in jobsets.values():
        policy, job = jobset["spec"]["failurePolicy"], job_of(jobset)
        assert policy["maxRestarts"] > 0 and policy["restartStrategy"] == "BlockingRecreate"
        (rule,) = policy["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
        (failure,) = job["podFailurePolicy"]["rules"]
        assert failure["action"] == "FailJob" and failure["onExitCodes"]["values"] == [2]
        assert failure["onExitCodes"]["containerName"] == container_of(jobset)["name"]
        assert job["backoffLimit"] == 0 and job["completions"] == job["parallelism"] == 4
        pod_spec = job["template"]["spec"]
        assert pod_spec["terminationGracePeriodSeconds"] >= 120
        assert pod_spec["restartPolicy"] == "Never"  # podFailurePolicy asks for it
        assert {mount["name"] for mount in container_of(jobset)["volumeMounts"]} == {
            volume["name"] for volume in pod_spec["volumes"]
        }
        assert container_of(jobset)["args"] == HARD


def test_gpu_pods_name_their_coordinator_as_jobset_names_its_pods(jobsets):
    jobset = jobsets["gpu"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    pod_0 = f"{jobset['metadata']['name']}-{replicated['name']}-0-0"
    given = {entry["name"]: entry.get("value") for entry in container_of(jobset)["env"]}
    host, port = given["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{pod_0}.{jobset['spec']['network']['subdomain']}"
    assert int(port) in {entry["containerPort"] for entry in container_of(jobset)["ports"]}
    assert given["JAX_NUM_PROCESSES"] == str(job_of(jobset)["completions"])
    assert "JAX_LOCAL_DEVICE_IDS" not in given


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(jobset):
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container
