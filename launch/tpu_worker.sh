#!/usr/bin/env bash
# Run by tpu_vm.sh on each worker of a TPU VM, in the copied code:
#   setup             Python and packages, in .venv
#   start COMMAND...  starts a command that outlives the connection
#   follow LINES      shows its log, as `tail -n LINES -f`, and ends with its status

set -euo pipefail
cd "$(dirname "$0")/.."

case $1 in
    setup)
        # The images come with Python 3.10. Where there is no 3.12, uv puts one into the
        # home directory: unlike apt, without root, without questions, and without
        # waiting for the lock that a new VM's own upgrades hold.
        export PATH="$HOME/.local/bin:$PATH"
        command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
        [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
        uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt
        ;;
    start)
        shift
        printf -v command '%q ' "$@"
        # The running command holds the lock; its end, or the VM's, frees it. So a second
        # start, after a lost connection, finds the first one's training.
        exec 9> run.lock
        if flock -n 9; then
            echo "$command" > run.command
            rm -f run.status
            : > run.log # there for `follow`, however soon it comes
            # The trap keeps bash there when a shutdown sends SIGTERM to all processes,
            # until the training has saved.
            # shellcheck disable=SC2016  # for the inner bash
            PYTHONUNBUFFERED=1 PATH="$PWD/.venv/bin:$PATH" setsid bash -c \
                'trap : TERM; "$@"; echo "$?" > run.status' bash "$@" \
                >> run.log 2>&1 < /dev/null &
        elif [[ $command != "$(< run.command)" ]]; then
            echo "error: another command is running on this VM ($(< run.command)): wait for it, or give another --name" >&2
            exit 2
        fi
        ;;
    follow)
        # Ends with the command. What a broken connection leaves of it blocks nothing.
        flock -s run.lock true > /dev/null 2>&1 < /dev/null &
        tail -n "$2" -s 0.2 --pid="$!" -f run.log
        # No status: the VM went down meanwhile. 255 is what ssh says then.
        exit "$(cat run.status 2> /dev/null || echo 255)"
        ;;
esac
