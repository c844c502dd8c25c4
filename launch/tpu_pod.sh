#!/bin/bash
# A run on a Cloud TPU slice: requests the slice, installs, starts on all workers, restarts after a preemption.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly HERE MISTAKE=2 PREEMPTED=75 # exit codes of main
readonly PATIENCE=20                 # how often in a row the workers may be unreachable

usage() {
    cat <<'TEXT'
bash launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- ARGUMENT OF codebook_jax.main ...]

  run      requests the slice (or uses the one of that name), installs, starts on all workers, and shows the log of
           worker 0 until the run ends. If the slice is preempted, requests it again and starts the same command,
           which continues from the newest checkpoint. If the run is still active, for example because this command
           was interrupted, only watches it.
  create   requests the slice and installs, but starts nothing
  attach   shows the log of an active run, and how it ended; starts nothing
  status   shows the state of the slice, and of the run on each worker
  stop     makes the run save and exit; the slice stays and costs money
  delete   deletes the slice and its request

  --project=ID            Google Cloud project (default: gcloud's)
  --type=TYPE             accelerator type, e.g. v5litepod-16 (run, create)
  --runtime=VERSION       software of the TPU machines, e.g. v2-alpha-tpuv5-lite (run, create)
  --spot                  a cheaper slice that may be preempted
  --create-flag=FLAG      another flag for `gcloud compute tpus queued-resources create`; may be repeated
  --source=SOURCE         a checkout, or git+https://HOST/REPOSITORY[@REF] (default: the checkout of this script)
  --mount=bucket:NAME     mounts a bucket with gcsfuse; --mount=nfs:HOST:/SHARE mounts an NFS share, e.g. Filestore
  --mount-at=FOLDER       where to mount it on all workers (default: /mnt/codebook); --workdir goes there
  --max-restarts=N        how often to restart a failed run, not counting preemptions (default: 5)
  --delete-when-done      deletes the slice after the last step
  --poll=SECONDS          seconds between two checks of the slice (default: 30)
  --dry-run               prints every command for a slice that does not exist yet, and runs none

  bash launch/tpu_pod.sh run --name=first --zone=us-west4-a --type=v5litepod-16 --runtime=v2-alpha-tpuv5-lite \
      --spot --mount=bucket:my-runs -- --config=configs/base.py --workdir=/mnt/codebook/first
TEXT
}

complain() {
    printf 'error: %s\n' "$1" >&2
    exit "$MISTAKE"
}

say() { [[ -n $DRY_RUN ]] || printf '%s: %s\n' "$NAME" "$1" >&2; }

give_up() {
    say "$1; the run may still be active: the same command watches it again"
    exit 1
}

# Runs the words as a command; in a dry run prints them, quoted for a shell.
act() {
    if [[ -n $DRY_RUN ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@" </dev/null # ssh would read what is typed here
    fi
}

tpus() {
    local words=(gcloud compute tpus "$@" "--zone=$ZONE")
    [[ -z $PROJECT ]] || words+=("--project=$PROJECT")
    act "${words[@]}"
}

copy_to_workers() { tpus tpu-vm scp "$1" "$NAME:$2" --worker=all; }

# on_worker WHICH COMMAND [ARGUMENT ...] of tpu_worker.sh; the remote shell removes one level of quotes.
on_worker() {
    local which=$1 command="bash tpu_worker.sh"
    shift
    command+=$(printf ' %q' "$@")
    tpus tpu-vm ssh "$NAME" "--worker=$which" "--command=$command"
}

# Sets SLICE: NONE, or Google's name for the state of the request. Fails if that cannot be found out.
look_at_slice() {
    local look=(queued-resources describe "$NAME" '--format=value(state.state)') said
    if [[ -n $DRY_RUN ]]; then
        tpus "${look[@]}"
        SLICE=$ASSUMED
    elif said=$(tpus "${look[@]}" 2>"$SCRATCH/said"); then
        SLICE=${said:-UNKNOWN}
    elif grep -qiE 'not[ _]found' "$SCRATCH/said"; then
        SLICE=NONE
    else
        cat "$SCRATCH/said" >&2
        return 1
    fi
}

create_slice() {
    local words=(queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
    [[ -z $SPOT ]] || words+=(--spot)
    tpus "${words[@]}" ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}
    ASSUMED=ACTIVE
}

delete_slice() { tpus queued-resources delete "$NAME" --force --quiet; }

# Returns when the slice is ready; requests it if necessary.
await_slice() {
    local before='' away=0
    while ((away < PATIENCE)); do
        if ! look_at_slice; then
            [[ -n $SLICE ]] || exit 1 # never succeeded: the zone, the project or the login is wrong
            away=$((away + 1))
            sleep "$POLL"
            continue
        fi
        away=0
        [[ $SLICE == "$before" ]] || say "the slice is $SLICE"
        before=$SLICE
        case $SLICE in
            ACTIVE) return ;;
            NONE) create_slice ;;
            SUSPENDED) delete_slice ;; # preempted; a request works only once
            FAILED)
                tpus queued-resources describe "$NAME" >&2 || true
                say "the request failed for the reason above; then delete it: bash launch/tpu_pod.sh delete --name=$NAME --zone=$ZONE"
                exit 1
                ;;
            *) sleep "$POLL" ;;
        esac
    done
    give_up "Google Cloud cannot be reached"
}

pack_source() {
    [[ ! -e $SCRATCH/source.tar.gz ]] || return 0 # a restart uses the code of the first start
    local tar_it=(tar -czf "$SCRATCH/source.tar.gz" -C "$SOURCE")
    if [[ -n $DRY_RUN ]]; then
        act "${tar_it[@]}" .
    elif [[ -d $SOURCE/.git ]]; then # all files that git does not ignore, and .git for the commit
        git -C "$SOURCE" ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' file; do
                [[ ! -e $SOURCE/$file ]] || printf '%s\0' "$file"
            done >"$SCRATCH/files"
        printf '.git\0' >>"$SCRATCH/files"
        "${tar_it[@]}" --null -T "$SCRATCH/files"
    else
        "${tar_it[@]}" --exclude=.venv --exclude=__pycache__ .
    fi
}

install() {
    local source=$SOURCE
    if [[ $SOURCE != git+* ]]; then
        source=codebook_source.tar.gz
        pack_source && copy_to_workers "$SCRATCH/source.tar.gz" "$source" || return
    fi
    on_worker all install "$source" || return
    [[ -z $MOUNT ]] || on_worker all mount "$MOUNT" "$MOUNT_AT"
}

# Sets RUN to what the workers report: none, running, finished, mistake, stopped, preempted or failed.
look_at_run() {
    local said states
    if [[ -n $DRY_RUN ]]; then
        on_worker all state
        RUN=$ASSUMED_RUN
        return
    fi
    said=$(on_worker all state 2>"$SCRATCH/said") || { tail -n 3 "$SCRATCH/said" >&2 && return 1; }
    states=$(sed -n 's/^.*state: //p' <<<"$said")
    [[ -n $states ]] || return 1
    if grep -q '^running$' <<<"$states"; then
        RUN=running
    elif grep -q " $MISTAKE\$" <<<"$states"; then
        RUN=mistake
    elif ! grep -qv ' 0$' <<<"$states"; then
        RUN=finished
    elif grep -q '^stopped' <<<"$states"; then
        RUN=stopped
    elif grep -q " $PREEMPTED\$" <<<"$states"; then
        RUN=preempted
    elif ! grep -qv '^none$' <<<"$states"; then
        RUN=none
    else
        RUN=failed
    fi
    STATES=$(sort <<<"$states" | uniq -c | sed 's/^ *//' | paste -sd, -)
}

# Shows the log until the run ends or the slice is gone, across lost connections; sets RUN.
watch_run() {
    local shown='' away=0
    while ((away < PATIENCE)); do
        if look_at_slice && [[ $SLICE != ACTIVE ]]; then
            RUN=preempted STATES="the slice is $SLICE"
            return
        fi
        [[ -n $shown ]] || ! on_worker 0 follow "watcher$$" || shown=yes
        if look_at_run; then
            away=0
            if [[ $RUN != running ]]; then
                # Log lines from while the connection was lost; the error may be on another worker.
                [[ -n $shown ]] || on_worker 0 last 20 || true
                [[ $RUN != mistake && $RUN != failed ]] || on_worker all last 5 || true
                return
            fi
        else
            away=$((away + 1))
            say "the workers cannot be reached"
        fi
        sleep "$POLL"
    done
    give_up "the workers have been out of reach $PATIENCE times"
}

# Prints how the run ended and exits with the matching code, unless the run must be restarted.
conclude() {
    case $RUN in
        finished)
            say "the run has done its last step"
            if [[ -n $DELETE_WHEN_DONE ]]; then delete_slice; else say "the slice still exists and costs money"; fi
            exit 0
            ;;
        stopped)
            say "the run was stopped (${STATES:-}); the same command continues it"
            exit 0
            ;;
        mistake)
            say "the run ended with a user error (exit code $MISTAKE), shown above"
            exit "$MISTAKE"
            ;;
    esac
}

supervise() {
    local restarts=0 away=0
    while ((away < PATIENCE)); do
        await_slice
        if ! { copy_to_workers "$HERE/tpu_worker.sh" tpu_worker.sh && look_at_run; }; then
            away=$((away + 1))
            say "the workers cannot be reached"
            sleep "$POLL"
            continue
        fi
        away=0
        if [[ $RUN == running ]]; then
            say "the run is already active"
            watch_run
        elif install && on_worker all start "$@"; then
            ASSUMED_RUN=finished
            watch_run
        else
            RUN=failed STATES="it could not be started"
        fi
        conclude
        if [[ $RUN == preempted ]]; then
            say "preempted (${STATES:-})"
        elif ((restarts < MAX_RESTARTS)); then
            restarts=$((restarts + 1))
            say "the run failed (${STATES:-}): restart $restarts of $MAX_RESTARTS"
        else
            say "the run failed (${STATES:-}) and is not restarted again: --max-restarts=$MAX_RESTARTS"
            exit 1
        fi
        sleep "$POLL"
    done
    give_up "the workers have been out of reach $PATIENCE times"
}

stop_run() {
    on_worker all stop
    while look_at_run && [[ $RUN == running ]]; do sleep "$POLL"; done
    say "on the workers: ${STATES:-unknown}"
}

COMMAND='' NAME='' ZONE='' PROJECT='' TYPE='' RUNTIME='' SPOT='' CREATE_FLAGS=() DELETE_WHEN_DONE='' DRY_RUN=''
SOURCE=$(dirname "$HERE") MOUNT='' MOUNT_AT=/mnt/codebook MAX_RESTARTS=5 POLL=30
SLICE='' RUN='' STATES=''               # as last seen; STATES counts the states of the run on the workers
ASSUMED=ACTIVE ASSUMED_RUN=finished     # what a dry run assumes

[[ $# -gt 0 ]] || { usage >&2 && exit "$MISTAKE"; }
while (($#)); do
    case $1 in
        --) break ;;
        -h | --help) usage && exit 0 ;;
        --name=*) NAME=${1#*=} ;;
        --zone=*) ZONE=${1#*=} ;;
        --project=*) PROJECT=${1#*=} ;;
        --type=*) TYPE=${1#*=} ;;
        --runtime=*) RUNTIME=${1#*=} ;;
        --spot) SPOT=yes ;;
        --create-flag=*) CREATE_FLAGS+=("${1#*=}") ;;
        --source=*) SOURCE=${1#*=} ;;
        --mount=*) MOUNT=${1#*=} ;;
        --mount-at=*) MOUNT_AT=${1#*=} ;;
        --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
        --delete-when-done) DELETE_WHEN_DONE=yes ;;
        --poll=*) POLL=${1#*=} ;;
        --dry-run) DRY_RUN=yes ;;
        -*) complain "there is no option $1: --help lists the options, and arguments of codebook_jax.main come after --" ;;
        *)
            [[ -z $COMMAND ]] || complain "'$1' is a second command after $COMMAND: give only one"
            COMMAND=$1
            ;;
    esac
    shift
done

case $COMMAND in
    run | create | attach | status | stop | delete) ;;
    '') complain "the command is missing: give one of run, create, attach, status, stop, delete" ;;
    *) complain "there is no command $COMMAND: give one of run, create, attach, status, stop, delete" ;;
esac
[[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || complain "--name=$NAME is not a name for a slice: give lower-case letters, digits and hyphens, e.g. --name=first"
[[ -n $ZONE ]] || complain "--zone is missing: give the zone of the slice, e.g. --zone=us-west4-a"
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || complain "--max-restarts=$MAX_RESTARTS is not a whole number"
[[ $POLL =~ ^[0-9]+$ ]] || complain "--poll=$POLL is not a whole number of seconds"
[[ $SOURCE == git+* || -e $SOURCE/codebook_jax/main.py ]] || complain "--source=$SOURCE is neither a checkout of codebook_jax nor git+https://..."
[[ -z $MOUNT || $MOUNT == bucket:?* || $MOUNT == nfs:?*:/* ]] || complain "--mount=$MOUNT is neither bucket:NAME nor nfs:HOST:/SHARE"
[[ $COMMAND == run || $# -le 1 ]] || complain "$COMMAND takes no arguments after --"
if [[ $COMMAND == run || $COMMAND == create ]]; then
    [[ -n $TYPE ]] || complain "--type is missing: give the accelerator type of the slice, e.g. --type=v5litepod-16"
    [[ -n $RUNTIME ]] || complain "--runtime is missing: give the software of its machines, e.g. --runtime=v2-alpha-tpuv5-lite"
    ASSUMED=NONE ASSUMED_RUN=none
fi
if [[ $COMMAND == run ]]; then
    [[ $# -gt 1 ]] || complain "the arguments of codebook_jax.main are missing: give them after --, e.g. -- --config=configs/base.py --workdir=$MOUNT_AT/first"
    shift # the --
    for argument; do
        case $argument in
            --workdir=/* | --workdir=*://*) ;; # main refuses the second kind and explains why
            --workdir=*) complain "$argument would be a separate folder on each worker: give one that all share, e.g. --workdir=$MOUNT_AT/first" ;;
            --preempted_exit_code*) complain "$argument is set by this script: leave it out" ;;
        esac
    done
fi
command -v gcloud >/dev/null || [[ -n $DRY_RUN ]] || complain "gcloud was not found: install the Google Cloud CLI"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

case $COMMAND in
    run) supervise "$@" ;;
    create)
        await_slice
        copy_to_workers "$HERE/tpu_worker.sh" tpu_worker.sh
        install
        ;;
    attach)
        watch_run
        conclude
        say "the run is not active: $RUN (${STATES:-})"
        exit 1
        ;;
    status)
        look_at_slice
        [[ -n $DRY_RUN ]] || say "the slice is $SLICE"
        [[ $SLICE != ACTIVE ]] || { look_at_run && say "the run is $RUN (${STATES:-})"; }
        ;;
    stop) stop_run ;;
    delete) delete_slice ;;
esac
