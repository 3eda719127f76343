#!/usr/bin/env bash
# Fine-tunes a checkpoint on every GLUE task whose data is there, with several seeds, and shows one table.
# Usage: bash scripts/run_glue_all.sh <checkpoint> <data-dir> [seeds] [accelerate-config] [extra flags...]
#   checkpoint          a folder that run_pretraining.py wrote, or a hub name
#   data-dir            the GLUE root, with the folders CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI
#   seeds               how many, or the seeds themselves: 1234,1235   (default: 5; of --protocol grid 1)
#   accelerate-config   a name in accelerate_configs/, or a file, for each run; on GPUs several runs go on side by side
#                                                                      (default: single_gpu, or cpu)
#   extra flags         --protocol sane|grid, --tasks, --learning_rates, --num_train_epochs, --init_from_mnli,
#                       --do_predict, --output_dir; any other goes to every run_glue.py. The first argument that begins
#                       with - ends the positional ones
# The same command continues what was stopped. Relative paths are relative to the folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

positional=()
help=false
while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then help=true; fi
done
if $help; then
    usage
elif ((${#positional[@]} < 2 || ${#positional[@]} > 4)); then
    echo "error: ${#positional[@]} arguments before the flags instead of 2 to 4" >&2
    usage >&2
    exit 2
fi

source "$scripts/launch_env.sh"
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
if $help; then exec "$python" -m common.glue.sweep --help; fi

config_name=${positional[3]:-}
count_gpus
if [[ -z $config_name ]]; then
    if ((gpus > 0)); then config_name=single_gpu; else config_name=cpu; fi
fi
resolve_config "$config_name"
choose_precision "$@"

flags=(--model_name_or_path "${positional[0]}" --data_dir "${positional[1]}")
[[ -n ${positional[2]:-} ]] && flags+=(--seeds "${positional[2]}")
flags+=(--config_file "$config" --num_processes "$processes")
if ((gpus > 0)) && [[ $role != cpu ]]; then
    flags+=(--devices "${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}")
    if ((gpus > processes)); then processes=$gpus; fi # all of them share the cores
fi
choose_threads
exec "$python" -m common.glue.sweep "${flags[@]}" ${launch_flags[@]+"${launch_flags[@]}"} "$@"
