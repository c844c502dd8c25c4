"""Shared by the launchers' tests: stand-ins for gcloud, srun and others that record their calls."""

import os

from small_run import ROOT, ran

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

# Its workers are two folders; ssh runs the command there.
GCLOUD = """
record "$WORLD/gcloud" "$@"
for word; do
    case $word in
        --command=*) command=${word#*=} ;;
    esac
done
code=0 all=()
case $4 in
    scp) for home in "$WORLD"/worker?; do cp "$5" "$home/${6#first:}"; done ;;
    ssh)
        for home in "$WORLD"/worker?; do
            (cd "$home" && HOME=$home bash -c "$command") &
            all+=($!)
        done
        for one in "${all[@]}"; do wait "$one" || code=$?; done
        exit "$code"
        ;;
esac
"""

# Makes environments of itself, and ends as the file `code` of its home says.
PYTHON = """
case "$1 $2" in
    "-m uv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip") record "$HOME/pip" "${@:3}" ;;
    "-m codebook_jax.main")
        record "$HOME/main" "${@:3}"
        echo "step 1 on ${HOME##*/}"
        [[ ! -e $HOME/code ]] || exit "$(<"$HOME/code")"
        trap 'kill $!; exit 0' TERM
        sleep 60 &
        touch "$HOME/waits"
        wait $!
        ;;
esac
"""


def make_world(tmp_path):
    """A folder with the stand-ins, two workers, and what they have recorded."""
    programs = {"gcloud": GCLOUD, "python3": PYTHON, "python3.13": PYTHON}
    noting = "srun", "scontrol", "sudo", "gcsfuse", "mountpoint"
    programs |= dict.fromkeys(noting, NOTE_AND_END)
    (tmp_path / "bin").mkdir()
    for name, program in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(RECORD + program)
        path.chmod(0o755)
    for worker in ("worker0", "worker1"):
        (tmp_path / worker).mkdir()
    return tmp_path


def environment(world, **changes):
    own = ("SLURM_", "PYTHON", "MAX_RESTARTS", "DRY_RUN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "PATH": f"{world}/bin:/usr/bin:/bin", "WORLD": str(world), **changes}


def launch(script, *words, world, **changes):
    """The finished process of a launcher."""
    return ran(["bash", str(script), *words], environment(world, **changes), timeout=60)


def recorded(path):
    """The arguments of each call that a stand-in recorded."""
    calls = path.read_text().split("\36\0")[:-1] if path.exists() else []
    return [call.split("\0")[:-1] for call in calls]
