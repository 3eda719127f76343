#!/usr/bin/env bash
# Fine-tunes a checkpoint on MNLI by Megatron's recipe, once per seed, and shows the medians of both parts.
# Usage: bash scripts/finetune_bert_mnli.sh <checkpoint> <data-dir> [seeds] [accelerate-config] [extra flags...]
#   checkpoint          folder or hub name
#   data-dir            GLUE's files: the root, or MNLI's own folder (scripts/download_finetune_dataset.sh mnli gets them)
#   seeds               separated by commas                     (default: 1234,1235,1236,1237,1238)
#   accelerate-config   a name in accelerate_configs/, or a file   (default: what fits the machine)
#   extra flags         any flag of run_glue.py; the first argument that begins with - ends the positional ones
# Given again, it continues where it stopped. The output is runs/mnli-<checkpoint's name>, in the folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then usage && exit; fi
done
positional=()
while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
if ((${#positional[@]} < 2 || ${#positional[@]} > 4)); then
    echo "error: ${#positional[@]} arguments: give two to four" >&2
    usage >&2
    exit 2
fi
checkpoint=${positional[0]}
seeds=${positional[2]:-1234,1235,1236,1237,1238}
if [[ ! $seeds =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    echo "error: seeds '$seeds': give numbers, separated by commas" >&2
    exit 2
fi

source "$scripts/launch_env.sh"
resolve_config "${positional[3]:-}"
choose_precision "$@"
choose_threads
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

flags=(--model_name_or_path "$checkpoint" --task_name mnli --data_dir "${positional[1]}" --do_train --do_eval)
flags+=(--train_batch_size 128 --per_device_train_batch_size 16 --num_train_epochs 10 --learning_rate 1e-5)
flags+=(--warmup_ratio 0.065 --weight_decay 0.1 --max_seq_length 512 --checkpointing_steps 1000 --save_total_limit 1)
flags+=("$@")
out=runs/mnli-$(basename "$checkpoint")
command="$PWD: $(printf '%q ' "${flags[@]}")"
if [[ -f $out/command && ($(<"$out/command") != "$command" || $checkpoint/config.json -nt $out/command) ]]; then
    echo "error: $out holds runs of another checkpoint or with other flags: move it away, or go on with those" >&2
    exit 2
fi
check run_glue.py "${flags[@]}" --output_dir "$out/check"
mkdir -p "$out"
[[ -f $out/command ]] || echo "$command" >"$out/command"
for seed in ${seeds//,/ }; do
    folder=$out/finetuned-seed$seed
    [[ -f $folder/all_results.json ]] && continue
    launch run_glue.py "${flags[@]}" --seed "$seed" --output_dir "$folder" --resume_from_checkpoint latest
done
"$python" -m common.seed_table "$out"
