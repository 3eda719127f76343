#!/usr/bin/env bash
# Pretrains a BERT-family model under a wall-clock budget and shows what it has learned.
# Usage: bash scripts/run_pretraining.sh [accelerate-config] [hours] [model] [data] [extra flags...]
#   accelerate-config   a name in accelerate_configs/, or a file   (default: what fits the machine)
#   hours               the budget                                 (default: 0.0833, five minutes)
#   model               tiny mini small medium base large, or weights to continue from: folder or hub name
#                                                                  (default: mini, 4 layers of 256)
#   data                embedded (documentation of the installed Python packages), a text file, folder or glob,
#                       prepared token files, or a dataset on the hub   (default: embedded)
#   extra flags         any flag of run_pretraining.py; the first argument that begins with - ends the positional ones
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
positional=()
while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
if ((${#positional[@]} > 4)); then
    echo "error: too many arguments: ${positional[4]}" >&2
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; fi

source scripts/launch_env.sh
launch_flags=()
resolve_config "${positional[0]:-}"
choose_cpu_precision
choose_threads

flags=()
[[ -n ${positional[1]:-} ]] && flags+=(--total_training_time "${positional[1]}")
case "${positional[2]:-}" in
    "") ;;
    tiny | mini | small | medium | base | large) flags+=(--model_size "${positional[2]}") ;;
    *) flags+=(--model_name_or_path "${positional[2]}") ;;
esac
data=${positional[3]:-embedded}
if [[ $data == embedded ]]; then :
elif [[ -f $data.bin || -f $data/train.bin ]]; then flags+=(--dataset_path "$data")
elif [[ -e $data ]] || compgen -G "$data" >/dev/null; then flags+=(--train_file "$data")
else flags+=(--dataset_name "$data"); fi

"$python" run_pretraining.py "${flags[@]}" "$@" --check_arguments # bad input ends here, with exit code 2
exec "$python" -m accelerate.commands.launch --config_file "$config" "${launch_flags[@]}" \
    run_pretraining.py "${flags[@]}" "$@"
