#!/bin/bash
# Runs on every worker of a TPU slice: tpu_pod.sh copies this file there. Everything is kept in ~/codebook_run.
#
#   install TAR|git+URL[@REF]   the checkout, and a virtual environment with the extra [tpu]
#   mount bucket:NAME|nfs:HOST:/SHARE FOLDER
#   start ARGUMENT...           codebook_jax.main with these arguments, in the background, detached from this connection
#   state                       one line "state: W"; W is none, running, stopped CODE or ended CODE
#   follow WATCHER              the log of this start until the run ends; a watcher that has seen it before gets only the
#                               last lines, because gcloud repeats a command when the connection drops
#   last LINES                  the last lines of the log
#   stop                        makes the run save and exit

set -euo pipefail

readonly PREEMPTED=75 # the exit code of a run that a signal ended before its last step
readonly KILLED=137   # assumed for a run that left no code: the machine or the kernel killed it
readonly RUN=$HOME/codebook_run SELF=$HOME/tpu_worker.sh

install() {
    local source=$1 python
    if is_running; then
        echo "error: a run is active here: stop it before installing again" >&2
        exit 1
    fi
    rm -rf "$RUN/checkout"
    mkdir -p "$RUN/checkout"
    if [[ $source == git+* ]]; then
        source=${source#git+}
        local reference=HEAD
        if [[ $source =~ ^([a-z]+://([^/@]*@)?[^@]+)@(.+)$ ]]; then
            source=${BASH_REMATCH[1]} reference=${BASH_REMATCH[3]}
        fi
        git clone --quiet "$source" "$RUN/checkout"
        git -C "$RUN/checkout" checkout --quiet "$reference"
    else
        tar -xzf "$source" -C "$RUN/checkout"
    fi
    cd "$RUN/checkout"
    if [[ ! -x $RUN/venv/bin/python ]]; then
        for python in python3.13 python3.12 python3.11 none; do
            ! "$python" -c 'import ensurepip, venv' 2>/dev/null || break
        done
        if [[ $python != none ]]; then
            "$python" -m venv "$RUN/venv"
        else # the Cloud TPU images have an older Python
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --seed --python 3.12 "$RUN/venv"
        fi
    fi
    "$RUN/venv/bin/python" -m pip install --quiet -e '.[tpu]'
}

mount_workdir() {
    local source=$1 folder=$2
    ! mountpoint -q "$folder" || return 0
    sudo mkdir -p "$folder"
    if [[ $source == nfs:* ]]; then
        command -v mount.nfs >/dev/null || apt_install nfs-common
        sudo mount -t nfs "${source#nfs:}" "$folder"
        return
    fi
    if ! command -v gcsfuse >/dev/null; then
        curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
            sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
        echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        apt_install gcsfuse
    fi
    sudo chown "$(id -u):$(id -g)" "$folder"
    gcsfuse --implicit-dirs "${source#bucket:}" "$folder"
}

apt_install() {
    # A fresh machine often holds the lock because it is updating itself.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y "$1"
}

is_running() { [[ -e $RUN/pid && ! -e $RUN/code ]] && kill -0 "$(<"$RUN/pid")" 2>/dev/null; }

start() {
    if is_running; then
        echo "the run is already active"
        return
    fi
    mkdir -p "$RUN"
    cd "$RUN/checkout"
    rm -f "$RUN/code" "$RUN/stopped" "$RUN/pid" "$RUN/watcher"
    echo "=== $(date -Is) on $(hostname): codebook_jax.main $(printf '%q ' "$@")" >>"$RUN/log"
    wc -l <"$RUN/log" >"$RUN/log_start"
    # A session of its own, so that the run survives the connection.
    setsid nohup bash "$SELF" run "$@" >>"$RUN/log" 2>&1 </dev/null &
    while [[ ! -e $RUN/pid ]]; do sleep 0.05; done
}

run() {
    local code=0
    "$RUN/venv/bin/python" -m codebook_jax.main "--preempted_exit_code=$PREEMPTED" "$@" &
    echo $! >"$RUN/pid.new"
    mv "$RUN/pid.new" "$RUN/pid"
    wait $! || code=$?
    echo "$code" >"$RUN/code.new"
    mv "$RUN/code.new" "$RUN/code"
}

state() {
    local ended=ended
    [[ ! -e $RUN/stopped ]] || ended=stopped
    if [[ ! -e $RUN/pid ]]; then
        echo "state: none"
    elif is_running; then
        echo "state: running"
    else
        sleep 0.2 # the code is written just after the process ends
        if [[ -e $RUN/code ]]; then echo "state: $ended $(<"$RUN/code")"; else echo "state: $ended $KILLED"; fi
    fi
}

follow() {
    local from=20
    if [[ ! -e $RUN/watcher || $(<"$RUN/watcher") != "$1" ]]; then
        from=+$(<"$RUN/log_start")
        echo "$1" >"$RUN/watcher"
    fi
    tail -n "$from" -F --pid="$(<"$RUN/pid")" --sleep-interval=0.5 "$RUN/log"
}

last() { tail -n "$1" "$RUN/log"; }

stop() {
    is_running || return 0
    touch "$RUN/stopped"
    kill -TERM "$(<"$RUN/pid")"
}

case ${1:-} in
    install | start | run | state | follow | last | stop) "$@" ;;
    mount) mount_workdir "$2" "$3" ;;
    *)
        echo "error: '${1:-}' is not a command of tpu_worker.sh: give install, mount, start, state, follow, last or stop" >&2
        exit 2
        ;;
esac
