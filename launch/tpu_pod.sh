#!/bin/bash
# A run on a Cloud TPU slice with gcloud alone; sky_tpu.yaml also restarts it after a preemption. From the checkout:
#
#   bash launch/tpu_pod.sh create  NAME --zone=ZONE --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite
#   bash launch/tpu_pod.sh status  NAME --zone=ZONE                   ACTIVE: the slice is there
#   bash launch/tpu_pod.sh install NAME --zone=ZONE -- BUCKET         this checkout, and the bucket at /mnt/codebook
#   bash launch/tpu_pod.sh run     NAME --zone=ZONE -- --config=configs/base.py --workdir=/mnt/codebook/first
#   bash launch/tpu_pod.sh stop    NAME --zone=ZONE                   makes the run save and exit
#   bash launch/tpu_pod.sh delete  NAME --zone=ZONE                   until then the slice costs money
#
# What stands before -- goes to gcloud (--spot, --project=ID ...). A run survives a lost connection: the same command
# watches it again. DRY_RUN=1 prints the commands and runs none.

# shellcheck disable=SC2016 # the workers expand what stands in single quotes
set -euo pipefail

complain() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

act() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' gcloud compute tpus "$@"
        echo
    else
        gcloud compute tpus "$@" </dev/null # ssh would read what is typed here
    fi
}

on_workers() { act tpu-vm ssh "$name" "${flags[@]}" --worker=all "--command=$1"; }

readonly INSTALL='set -e; mkdir -p codebook; tar -xzf codebook.tar.gz -C codebook; cd codebook
python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --seed --python 3.12 .venv
.venv/bin/python -m pip install --quiet -e ".[tpu]"
if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update; sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse
fi
sudo mkdir -p /mnt/codebook; sudo chown "$(id -u)" /mnt/codebook
mountpoint -q /mnt/codebook || gcsfuse --implicit-dirs'

readonly RUN='cd codebook; start() {
    rm -f ~/codebook.code
    setsid nohup bash -c '\''.venv/bin/python -m codebook_jax.main "$@"; echo $? >~/codebook.code'\'' run "$@" >>~/codebook.log 2>&1 &
    echo $! >~/codebook.pid
}
kill -0 "$(cat ~/codebook.pid 2>/dev/null)" 2>/dev/null || start'
readonly WATCH='tail -n 20 -F --pid="$(cat ~/codebook.pid)" ~/codebook.log; exit "$(cat ~/codebook.code)"'

[[ $# -ge 2 ]] || complain "give a command and the name of a slice: bash launch/tpu_pod.sh create|status|install|run|stop|delete NAME --zone=ZONE"
command=$1 name=$2 flags=() arguments=''
shift 2
while (($#)) && [[ $1 != -- ]]; do
    flags+=("$1")
    shift
done
[[ " ${flags[*]-}" == *" --zone="* ]] || complain "--zone is missing: give the zone of the slice $name, e.g. --zone=us-west4-a"
[[ $# -lt 2 ]] || arguments=$(printf ' %q' "${@:2}") # the remote shell removes one level of quotes
[[ -n $arguments || ($command != install && $command != run) ]] ||
    complain "$command needs more after --: install the name of a bucket, run the arguments of codebook_jax.main"

case $command in
    create) act queued-resources create "$name" "--node-id=$name" "${flags[@]}" ;;
    status) act queued-resources describe "$name" "${flags[@]}" '--format=value(state.state)' ;;
    install)
        tar -czf "${TMPDIR:-/tmp}/codebook.tar.gz" --exclude=.venv --exclude=runs .
        act tpu-vm scp "${TMPDIR:-/tmp}/codebook.tar.gz" "$name:codebook.tar.gz" "${flags[@]}" --worker=all
        on_workers "$INSTALL$arguments /mnt/codebook"
        ;;
    run) on_workers "$RUN$arguments; $WATCH" ;;
    stop) on_workers 'pkill -TERM -P "$(cat ~/codebook.pid)"' ;;
    delete) act queued-resources delete "$name" "${flags[@]}" --force --quiet ;;
    *) complain "there is no command $command: give create, status, install, run, stop or delete" ;;
esac
