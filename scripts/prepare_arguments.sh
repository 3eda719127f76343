# Sourced by the prepare_*.sh scripts: their positional arguments, and the call of prepare_pile_data.py.
# Usage: source scripts/prepare_arguments.sh

# read_arguments most arguments...   Sets positional, and flags from the first argument that begins with - on.
read_arguments() {
    local most=$1 word
    shift
    for word in "$@"; do
        if [[ $word == --help || $word == -h ]]; then
            usage
            source "$scripts/launch_env.sh"
            exec "$python" "$repo/prepare_pile_data.py" --help
        fi
    done
    positional=()
    while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
    if ((${#positional[@]} > most)); then
        echo "error: too many arguments: ${positional[most]} (is a glob not quoted?)" >&2
        usage >&2
        exit 2
    fi
    flags=("$@")
}

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

# looks_like_files word   Whether it names text rather than a dataset on the hub.
looks_like_files() { [[ -e $1 || $1 == *://* || $1 =~ [*?[] || $1 =~ ^\.{0,2}/ || $1 =~ \.[a-z0-9]+$ ]]; }

# run_prepare arguments...
run_prepare() {
    source "$scripts/launch_env.sh"
    exec "$python" "$repo/prepare_pile_data.py" "$@" ${flags[@]+"${flags[@]}"}
}
