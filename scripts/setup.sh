#!/usr/bin/env bash
# Makes the Python environment that every other script uses. Does nothing, in milliseconds, when it is up to date.
# Usage: bash scripts/setup.sh [--dev | --with-offload]
#   (none)          requirements.txt and, without what it asks for in its turn, requirements-colossalai.txt
#   --dev           also what the tests need (requirements-dev.txt)
#   --with-offload  also compile what DeepSpeed's YAMLs would compile at their first use: minutes, and a C++ compiler
#   FRUGAL_VENV     where the environment is, relative to the repository (default: .venv)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${FRUGAL_VENV:-.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
log=$venv/setup.log
alone=requirements-colossalai.txt # whose own requirements would take other versions of what is installed
unfinished=$venv.unfinished # exists while the environment is being changed: found at the start, it was interrupted

case "$*" in
    "") requirements=(requirements.txt) ;;
    --dev) requirements=(requirements.txt requirements-dev.txt) ;;
    --with-offload) requirements=(requirements.txt) ;;
    *) echo "setup: unknown argument '$*'. Usage: bash scripts/setup.sh [--dev | --with-offload]" >&2 && exit 2 ;;
esac

# What the environment was made from, its place and interpreter included: an environment that was moved, or whose Python
# a system upgrade has replaced, does not work.
stamp() { echo "$venv $(readlink -f "$venv/bin/python")" && cat "$venv/pyvenv.cfg" "$1"; }

up_to_date() {
    local file
    for file in "${requirements[@]}" "$alone"; do
        [[ -x $venv/bin/python && -f $venv/installed-$file ]] || return 1
        [[ $(stamp "$file") == "$(<"$venv/installed-$file")" ]] || return 1
    done
}

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
            echo "$candidate" && return
        fi
    done 2>/dev/null
    return 1
}

# Whether what is there can be completed: made for this place, by a Python that still is there and is new enough.
usable() {
    [[ -f $venv/pyvenv.cfg && "$(<"$venv/pyvenv.cfg")"$'\n' == *" $venv"$'\n'* ]] &&
        "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    if [[ -n $(ls -A "$venv" 2>/dev/null) && ! -f $venv/pyvenv.cfg && ! -e $unfinished ]]; then
        echo "setup: $venv is not empty and not a Python environment: move it, or set FRUGAL_VENV" >&2
        exit 2
    fi
    touch "$unfinished" && rm -rf "$venv" && mkdir -p "$venv" && "$python" -m venv "$venv" >"$log" 2>&1 || fail
}

install() {
    local file
    touch "$unfinished" && rm -f "$venv"/installed-*
    PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        "${requirements[@]/#/-r}" >>"$log" 2>&1 || fail
    PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps \
        -r "$alone" >>"$log" 2>&1 || fail
    for file in "${requirements[@]}" "$alone"; do
        stamp "$file" >"$venv/installed-$file"
    done
    rm -f "$unfinished"
}

fail() {
    tail -n 15 "$log" >&2 || true
    echo "setup: failed; the end of $log is above. Check network and free disk (2 GB), then run it again" >&2
    exit 1
}

finish() {
    [[ $1 != --with-offload ]] || exec "$venv/bin/python" -m common.parallel.extensions
    exit
}

up_to_date && finish "${1:-}"

python=$(find_python) || {
    echo "setup: needs Python 3.11 to 3.14 with its venv module on PATH (Debian: python3 and python3-venv)" >&2
    exit 2
}
trap 'echo "setup: interrupted; the next run starts it again" >&2; exit 130' INT
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock" # pip inherits it, so a run beside an orphaned pip waits too; Python locks it as macOS has no flock
"$python" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another setup of the same environment", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)'
up_to_date && finish "${1:-}" # the one we waited for did it

echo "setup: installing into $venv, once: about 3 minutes and 2 GB, more where pip picks a CUDA build" >&2
command -v cc gcc clang >/dev/null || echo "setup: warning: no C compiler found; torch.compile and DeepSpeed need one" >&2
if [[ -e $unfinished ]] || ! usable; then
    make_venv
fi
install
echo "setup: done in $SECONDS s" >&2
finish "${1:-}"
