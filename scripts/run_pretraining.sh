#!/usr/bin/env bash
# Pretrains a BERT-family model under a wall-clock budget and shows what it has learned.
# Usage: bash scripts/run_pretraining.sh [accelerate-config] [hours] [model] [data] [extra flags...]
#   accelerate-config   a name in accelerate_configs/, or a file   (default: what fits the machine)
#   hours               the budget                                 (default: 0.0833, five minutes)
#   model               tiny mini small medium base large, or another size of its --model_type (xlarge, 1.3b ...), or
#                       weights to continue from: folder or hub name   (default: mini, 4 layers of 256)
#   data                embedded (documentation of the installed Python packages), a text file, folder or quoted glob,
#                       prepared token files, or a dataset on the hub   (default: embedded)
#   extra flags         any flag of run_pretraining.py (--help lists them); the first argument that begins with - ends
#                       the positional ones
# Relative paths, and the default output runs/<time>, are relative to the folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then
        usage
        source "$scripts/launch_env.sh"
        exec "$python" "$repo/run_pretraining.py" --help
    fi
done
FRUGAL_COMMAND="bash scripts/run_pretraining.sh${1+$(printf ' %q' "$@")}" # for the model card
export FRUGAL_COMMAND
positional=()
while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
if ((${#positional[@]} > 4)); then
    echo "error: too many arguments: ${positional[4]} (is a glob not quoted?)" >&2
    usage >&2
    exit 2
fi

source "$scripts/launch_env.sh"
resolve_config "${positional[0]:-}"
choose_precision "$@"
choose_threads

flags=()
[[ -n ${positional[1]:-} ]] && flags+=(--total_training_time "${positional[1]}")
model=${positional[2]:-}
if [[ $model =~ ^(tiny|mini|x?small|medium|base|(x{0,2})large|[0-9.]+[mb])$ ]]; then flags+=(--model_size "$model")
elif [[ -n $model ]]; then flags+=(--model_name_or_path "$model"); fi
name_data "${positional[3]:-embedded}"

check_then_launch run_pretraining.py ${flags[@]+"${flags[@]}"} "$@"
