"""Shared by the launchers' tests: stand-ins for gcloud, srun and others that record their calls."""

import os
import subprocess

from small_run import ROOT

LAUNCH = ROOT / "launch"
POD, BATCH, JOBSETS = (LAUNCH / n for n in ("tpu_pod.sh", "slurm.sbatch", "gke_jobset.yaml"))
HARD = [
    "--config=configs/base.py:tiny",
    '--workdir=/mnt/codebook/it\'s a "run"',
    "--config.data.train=json:a.json?weight=2, json:$HOME/*.json; `date` \\",
    "--config.data.eval=",
]

# Of bash, not Python, for the time that hundreds of starts take.
RECORD = r"""#!/bin/bash
record() { local file=$1; shift; { printf '%s\0' "$@"; printf '\036\0'; } >>"$file"; }
"""

NOTE_AND_END = """
name=${0##*/} code=CODE_OF_${0##*/}
record "$WORLD/$name" "$@"
exit "${!code:-0}"
"""

GCLOUD = """
record "$WORLD/gcloud" "$@"
homes=("$WORLD"/worker*) command='' code=0
for word; do
    case $word in
        --worker=all) ;;
        --worker=*) homes=("${homes[${word#*=}]}") ;;
        --command=*) command=${word#*=} ;;
    esac
done
case $4 in
    describe)
        read -r state later <"$WORLD/states"
        [[ -z $later ]] || echo "$later" >"$WORLD/states"
        [[ $state != NONE ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
        echo "$state"
        ;;
    scp) for home in "${homes[@]}"; do cp "$5" "$home/${6#first:}"; done ;;
    ssh)
        [[ $command != *follow* || ! -e $WORLD/drop ]] || { rm "$WORLD/drop"; exit 255; }
        for home in "${homes[@]}"; do
            (cd "$home" && HOME=$home bash -c "$command") || code=$?
        done
        exit "$code"
        ;;
esac
"""

# Takes itself for every Python: makes an environment of itself, and ends as the file `codes` of its
# home says.
PYTHON = """
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") record "$HOME/pip" "${@:3}" ;;
    "-m codebook_jax.main")
        record "$HOME/main" "${@:3}"
        echo "step 1 on ${HOME##*/}"
        read -r code later <"$HOME/codes"
        [[ -z $later ]] || echo "$later" >"$HOME/codes"
        [[ $code == wait ]] || exit "$code"
        trap 'kill $!; exit 75' TERM
        sleep 60 &
        touch "$HOME/waits"
        wait $!
        ;;
esac
"""


def make_world(tmp_path):
    """A folder with the stand-ins, two workers, and what they have recorded."""
    programs = {"gcloud": GCLOUD, "python3.13": PYTHON}
    noting = "srun", "scontrol", "sudo", "gcsfuse", "mountpoint"
    programs |= dict.fromkeys(noting, NOTE_AND_END)
    (tmp_path / "bin").mkdir()
    for name, program in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(RECORD + program)
        path.chmod(0o755)
    (tmp_path / "states").write_text("NONE ACTIVE\n")
    for worker in ("worker0", "worker1"):
        (tmp_path / worker).mkdir()
        (tmp_path / worker / "codes").write_text("0\n")
    return tmp_path


def environment(world, **changes):
    own = ("SLURM_", "PYTHON", "MAX_RESTARTS", "DRY_RUN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "PATH": f"{world}/bin:/usr/bin:/bin", "WORLD": str(world), **changes}


def launch(script, *words, world, **changes):
    """The finished process of a launcher."""
    return subprocess.run(
        ["bash", str(script), *words],
        env=environment(world, **changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def recorded(path):
    """The arguments of each call that a stand-in recorded."""
    calls = path.read_text().split("\36\0")[:-1] if path.exists() else []
    return [call.split("\0")[:-1] for call in calls]
