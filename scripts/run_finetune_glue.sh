#!/usr/bin/env bash
# Fine-tunes a checkpoint on a task, and the same model from random weights with the same seeds, and compares them.
# Usage: bash scripts/run_finetune_glue.sh [accelerate-config] [checkpoint] [task] [data-dir] [extra flags...]
#   accelerate-config   a name in accelerate_configs/, or a file   (default: what fits the machine)
#   checkpoint          folder or hub name      (default: the newest finished run of run_pretraining.py in runs/)
#   task                a GLUE task, or follows: does a text follow another in the documentation of the installed
#                       packages?               (default: mrpc with a data-dir, follows without, which needs no data)
#   data-dir            GLUE's files, as scripts/download_finetune_dataset.sh leaves them: the root, or the task's folder
#   extra flags         any flag of run_glue.py (--help lists them); the first argument that begins with - ends the
#                       positional ones
#   FRUGAL_SEEDS        seeds, in the environment               (default: "42 43 44")
#   FRUGAL_OUTPUT       where the runs go, in the environment; those that are there are continued
#                                                               (default: runs/finetune-<time>)
# GLUE tasks are trained by Colossal-AI's recipe for MRPC: global batch 128, 3 epochs, learning rate 2.4e-5.
# Relative paths, and the default output, are relative to the folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then usage && exit; fi
done
positional=()
while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
if ((${#positional[@]} > 4)); then
    echo "error: too many arguments: ${positional[4]}" >&2
    usage >&2
    exit 2
fi
checkpoint=${positional[1]:-}
data=${positional[3]:-}
task=${positional[2]:-$([[ -n $data ]] && echo mrpc || echo follows)}
if [[ $task != follows && -z $data ]]; then
    echo "error: task $task needs its data: bash scripts/download_finetune_dataset.sh $task glue_data gets them;" \
        "then name glue_data as the fourth argument" >&2
    exit 2
fi
if [[ -z $checkpoint ]]; then
    finished=()
    for config in runs/*/config.json; do
        folder=$(dirname "$config")
        [[ -f $folder/all_results.json ]] || continue
        # what run_pretraining.py leaves: with an objective beside masked tokens it is ...ForPreTraining
        if grep -qE '"[A-Za-z0-9]+For(MaskedLM|PreTraining)"' "$config"; then finished+=("$folder"); fi
    done
    if ((${#finished[@]} == 0)); then
        echo "error: no finished pretraining in runs/: run bash scripts/run_pretraining.sh first (five minutes), or" \
            "name a checkpoint as the second argument" >&2
        exit 2
    fi
    for folder in "${finished[@]}"; do
        [[ -n $checkpoint && $checkpoint/all_results.json -nt $folder/all_results.json ]] || checkpoint=$folder
    done
fi

source "$scripts/launch_env.sh"
resolve_config "${positional[0]:-}"
choose_precision "$@"
choose_threads
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

flags=(--model_name_or_path "$checkpoint" --do_train --do_eval)
if [[ $task == follows ]]; then
    data=$("$python" -m common.data.follows)
    flags+=(--train_file "$data/train.tsv" --validation_file "$data/validation.tsv")
    flags+=(--train_batch_size 32 --per_device_train_batch_size 32)
    flags+=(--max_train_samples 16000 --num_train_epochs 1 --learning_rate 3e-4 --warmup_ratio 0.1)
else
    flags+=(--task_name "$task" --data_dir "$data")
    flags+=(--train_batch_size 128 --per_device_train_batch_size 32)
    flags+=(--num_train_epochs 3 --learning_rate 2.4e-5 --warmup_ratio 0.1)
fi
flags+=("$@")
out=${FRUGAL_OUTPUT:-runs/finetune-$(date +%Y%m%d-%H%M%S)}
[[ -z ${FRUGAL_OUTPUT:-} ]] || flags+=(--checkpointing_steps 200 --save_total_limit 1 --resume_from_checkpoint latest)
check run_glue.py "${flags[@]}" --output_dir "$out/pretrained"
echo "checkpoint: $checkpoint; task: $task"
for seed in ${FRUGAL_SEEDS:-42 43 44}; do
    launch run_glue.py "${flags[@]}" --seed "$seed" --output_dir "$out/pretrained-seed$seed"
    launch run_glue.py "${flags[@]}" --seed "$seed" --random_weights --output_dir "$out/random-seed$seed"
done
"$python" -m common.seed_table "$out"
