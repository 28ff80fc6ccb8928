#!/usr/bin/env bash
# Trains on a Cloud TPU VM or a pod slice: creates it, copies this code to it, runs a
# command on all its workers, shows worker 0's log, starts again after a preemption,
# fetches the results into ./runs, and deletes it.
#
#   launch/tpu_vm.sh --zone=us-central2-b --type=v4-8 -- \
#       python -m resnet_jax.main --config=configs/v2_56.py
#
# Options, before the -- and the command:
#   --zone=ZONE        of the VM, such as us-central2-b
#   --type=TYPE        accelerator type: v4-8, v5litepod-8, v5p-8, v6e-8, v4-32...
#   --name=NAME        of the VM; an existing one of this name is reused (resnet-jax)
#   --runtime=VERSION  of the VM's software (the one that goes with the type)
#   --project=PROJECT  (gcloud's default)
#   --spot             cheaper, but may be preempted: the command's --workdir=gs://...
#                      keeps the training's state
#   --restarts=N       how many times to start again (10)
#   --poll=SECONDS     between checks of the state (30)
#   --keep             do not delete the VM afterwards; one that was created by other
#                      means is never deleted
#   --dry-run          print every gcloud command and run none
#
# An interrupted launch leaves the training running: the same launch follows it again.
# The exit status is the command's; 2 for incorrect usage; 1 if gcloud fails.

set -euo pipefail

name=resnet-jax zone='' type='' runtime='' project='' restarts=10 poll=30
spot='' keep='' dry_run=''

say() { echo "launch: $*" >&2; }
fail() { echo "error: $*" >&2 && exit 1; }
refuse() { echo "error: $*" >&2 && exit 2; }
check() {
    [[ ${!1} ]] || refuse "--$1 is missing: give $3"
    [[ ${!1} =~ $2 ]] || refuse "--$1=${!1} is invalid: give $3"
}

while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --spot) spot=yes ;;
        --keep) keep=yes ;;
        --dry-run) dry_run=yes ;;
        --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --name=* | --zone=* | --type=* | --runtime=* | --project=* | --restarts=* | --poll=*)
            option=${1%%=*}
            printf -v "${option#--}" '%s' "${1#*=}"
            ;;
        *) refuse "$1 is not an option: write --OPTION=VALUE with an option that --help lists; the training's own options go after --" ;;
    esac
    shift
done
(($# > 1)) ||
    refuse "no command was given: end with -- python -m resnet_jax.main --config=configs/v2_56.py"
shift
check name '^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$' 'lower-case letters, digits and hyphens, such as resnet-jax'
check zone '^[a-z]+(-[a-z]+)+[0-9]+-[a-z]$' 'a zone, such as --zone=us-central2-b'
check type '^v[0-9][a-z]*-[1-9][0-9]{0,4}$' 'an accelerator type, such as v4-8, v5litepod-8 or v6e-8'
check restarts '^(0|[1-9][0-9]{0,3})$' 'a number, such as 10'
check poll '^[0-9]+(\.[0-9]+)?$' 'seconds, such as 30'
# The pairs that Google's page on TPU software versions gives for JAX.
if [[ -z $runtime ]]; then
    case $type in
        v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) refuse "--type=$type is not one of v2, v3, v4, v5litepod, v5p and v6e: give --runtime=VERSION too" ;;
    esac
fi

workdir='' previous=''
for argument; do
    [[ $argument != -workdir* ]] || argument=-$argument # one dash is as good as two
    [[ $previous$argument != --workdir?* ]] || workdir=${argument#--workdir=}
    if [[ $argument == --workdir ]]; then previous=--workdir; else previous=''; fi
done
if [[ $workdir != gs://?* ]]; then
    # One host has at most 8 chips, or 4 that the type counts as 8 cores.
    ((${type##*-} <= 8)) ||
        refuse "--type=$type has several hosts, which share no disk: give the command --workdir=gs://BUCKET/DIR (it has '$workdir')"
    [[ -z $spot ]] || ((restarts == 0)) ||
        refuse "--spot can lose the VM's disk, and its checkpoints with it: give the command --workdir=gs://BUCKET/DIR (it has '$workdir'), or --restarts=0 to risk it"
fi
[[ $dry_run ]] || command -v gcloud > /dev/null ||
    refuse "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"

root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
where=(--zone="$zone" --quiet)
[[ -z $project ]] || where+=(--project="$project")
label=launcher=resnet_jax
made='' begun='' asked='' left=() # left: gcloud's arguments to delete what is there
exec 3>&1 # --dry-run's commands, also from within $(...)
trap 'rm -rf "$scratch"
    [[ ${#left[@]} == 0 || $dry_run ]] ||
        say "$name may still exist and cost money; the same launch continues with it; this deletes it: gcloud compute tpus ${left[*]} ${where[*]}"' EXIT
trap 'exit 130' INT TERM

call() { # ARGUMENTS: runs gcloud
    if [[ -z $dry_run ]]; then gcloud "$@" 3>&-; else printf 'gcloud%s\n' "$(printf ' %q' "$@")" >&3; fi
}

look() { # KIND FIELDS: prints them; nothing where there is none of this name
    local query=(compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)")
    if [[ $dry_run ]]; then # as if there were none before, and it were ready at once
        call "${query[@]}"
        case $1/$made in
            queued-resources/queued-resources) echo ACTIVE ;;
            tpu-vm/?*) echo "READY ${label#*=}" ;;
        esac
    elif ! gcloud "${query[@]}" 2> "$scratch/error" 3>&-; then
        # Any other error says nothing about the VM, which must not be replaced then.
        grep -q NOT_FOUND "$scratch/error" || { cat "$scratch/error" >&2 && exit 1; }
    fi
}

survey() { # sets queued (its state), node (its state) and owner; empty where absent
    local answer
    queued=$(look queued-resources state.state) || exit
    answer=$(look tpu-vm state,labels.launcher) || exit
    read -r node owner <<< "$answer"
    left=()
    [[ -z $node ]] || left=(tpu-vm delete "$name")
    [[ -z $queued ]] || left=(queued-resources delete "$name" --force)
}

create() {
    [[ -z $begun || $workdir == gs://* ]] ||
        fail "$name is gone, and the training with it: --workdir=gs://BUCKET/DIR keeps it"
    asked=yes
    local options=("${where[@]}" --accelerator-type="$type" --labels="$label")
    if [[ $spot ]]; then
        made='queued-resources' left=(queued-resources delete "$name" --force)
        options+=(--node-id="$name" --runtime-version="$runtime" --spot)
    else
        made='tpu-vm' left=(tpu-vm delete "$name")
        options+=(--version="$runtime")
    fi
    say "creating $name: $type in $zone"
    call compute tpus "$made" create "$name" "${options[@]}"
}

remove() { call compute tpus "${left[@]}" "${where[@]}" && left=(); }

spend_restart() { # WHY
    ((restarts > 0)) ||
        fail "$1, and no restart is left: --restarts=N allows more; the same launch resumes from the last checkpoint"
    restarts=$((restarts - 1))
    say "$1: starting again ($restarts more times at most)"
}

provide() { # returns when the VM is ready
    local shown=''
    asked=''
    while survey; do
        case ${queued:-none}/${node:-none} in
            none/READY | ACTIVE/READY) return ;;
            none/none) create ;;
            FAILED/* | SUSPENDED/* | */PREEMPTED | */TERMINATED)
                if [[ $asked ]]; then
                    call compute tpus queued-resources describe "$name" "${where[@]}" \
                        --format='value(state.failedData.error.message)' >&2 || true
                    spend_restart "$name entered the state ${queued:-$node}"
                    sleep "$poll"
                fi
                remove
                ;;
            none/STOPPED) call compute tpus tpu-vm start "$name" "${where[@]}" ;;
            *)
                [[ $shown == "$queued$node" ]] || say "waiting: ${queued:-$node}"
                shown=$queued$node
                sleep "$poll"
                ;;
        esac
    done
}

on() { # WORKER COMMAND: by ssh, which notices within minutes that the VM is gone
    call compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" \
        --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

train() { # COMMAND...
    local command
    command=$(printf ' %q' "$@") # the shell at the other end removes the quotes again
    # While a training runs, it holds the lock, and its code is left alone.
    call compute tpus tpu-vm scp "$scratch/resnet_jax.tgz" "$name:" "${where[@]}" --worker=all &&
        on all 'mkdir -p resnet_jax && cd resnet_jax && if flock -n run.lock true; then tar -xzf ../resnet_jax.tgz && bash launch/tpu_worker.sh setup; fi' &&
        on all "bash resnet_jax/launch/tpu_worker.sh start$command" &&
        begun=yes &&
        on 0 "bash resnet_jax/launch/tpu_worker.sh follow $lines"
}

lasting() { # whether the VM is still ready; the news that it is not can take a while
    local looks=1
    [[ -z $spot ]] || looks=4
    while survey && [[ ${queued:-ACTIVE}/$node == ACTIVE/READY ]]; do
        ((--looks)) || return 0
        sleep "$poll"
    done
    return 1
}

fetch() {
    local scp=(compute tpus tpu-vm scp --recurse "${where[@]}" --worker=0)
    [[ $dry_run ]] || mkdir -p runs
    case $workdir in
        gs://*) call storage cp --recursive "${workdir%/}" runs/ ;;
        /*) call "${scp[@]}" "$name:$workdir" runs/ ;;
        \~/*) call "${scp[@]}" "$name:${workdir#\~/}" runs/ ;; # scp begins at home
        '' | runs | runs/*) call "${scp[@]}" "$name:resnet_jax/runs" . ;;
        *) call "${scp[@]}" "$name:resnet_jax/$workdir" runs/ ;;
    esac
}

# Packed once: a restart runs the same code. With .git, for the commit in summary.json.
# `find` excludes the directories at the top, since macOS's tar would take ./data for any
# data.
[[ $dry_run ]] || (
    cd "$root"
    find . -mindepth 1 -maxdepth 1 ! -name '.venv*' ! -name runs ! -name data -print0 |
        tar -czf "$scratch/resnet_jax.tgz" --exclude=__pycache__ --exclude=.pytest_cache \
            --exclude=.ruff_cache --null -T -
)

lines=+1
while :; do
    provide
    status=0
    train "$@" || status=$?
    # 2 is a mistake in the command, which no VM fixes.
    ((status != 0 && status != 2)) || break
    say "the command ended with status $status"
    if ! lasting; then
        spend_restart "$name was taken away"
        lines=+1
    elif ((status == 255)); then # ssh's own; the training goes on without it
        spend_restart "the connection was lost"
        lines=10
    else
        break
    fi
done

if [[ $begun ]] && ((status != 2)) && ! fetch; then
    say "the results could not be fetched"
    keep=yes
    ((status)) || status=1
fi
# A stopped training can resume only where its checkpoints are.
[[ $workdir == gs://* ]] || ((status != 130 && status != 143)) || keep=yes
# A VM that was there before may be working for another launch until this one's command
# has begun.
if [[ -z $keep && $owner == "${label#*=}" && $made$begun ]]; then remove; fi
exit "$status"
