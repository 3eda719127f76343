#!/usr/bin/env bash
# Pretrains Megatron's BERT by the recipe of Megatron-DeepSpeed's ds_pretrain_bert.sh, on its models or others.
# Usage: bash scripts/pretrain_megatron_bert.sh size data [accelerate-config] [extra flags...]
#   size                110m 336m 1.3b 3.9b, with Megatron's initialisation; or a preset of run_pretraining.py
#   data                embedded (documentation of the installed Python packages), a text file, folder or quoted glob,
#                       prepared token files, or a dataset on the hub
#   accelerate-config   a name in accelerate_configs/, or a file   (default: what fits the machine)
#   extra flags         any flag of run_pretraining.py (--help lists them), also those that the recipe sets; the first
#                       argument that begins with - ends the positional ones
# The recipe: rows of 512 tokens, 1,024 in a batch, 2 million steps; AdamW 0.9/0.999 with weight decay 0.01, learning
# rate 1e-4 after 10,000 steps of warm-up, linearly down to 1e-5; gradients clipped at 1.0; dropout 0.1; 15 % of the
# tokens predicted, in n-grams of whole words. What a device takes at once is found out. The recipe's sentence order
# needs text prepared with --split_sentences: give --sentence_objective sop then.
# Relative paths, and the default output runs/<time>, are relative to the folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then usage && exit; fi
done
FRUGAL_COMMAND="bash scripts/pretrain_megatron_bert.sh${1+$(printf ' %q' "$@")}" # for the model card
export FRUGAL_COMMAND
positional=()
while (($#)) && [[ $1 != -* ]]; do positional+=("$1") && shift; done
if ((${#positional[@]} < 2 || ${#positional[@]} > 3)); then
    echo "error: ${#positional[@]} arguments: give two or three (is a glob not quoted?)" >&2
    usage >&2
    exit 2
fi

source "$scripts/launch_env.sh"
resolve_config "${positional[2]:-}"
choose_precision "$@"
choose_threads

flags=(--model_type megatron-bert --model_size "${positional[0]}" --init_output_bias zeros)
flags+=(--hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1)
flags+=(--max_seq_length 512 --mlm_probability 0.15 --masking ngram)
flags+=(--train_batch_size 1024 --auto_find_batch_size --max_train_steps 2000000)
flags+=(--optimizer_type adamw --adam_beta1 0.9 --adam_beta2 0.999 --adam_epsilon 1e-8 --weight_decay 0.01)
flags+=(--learning_rate 1e-4 --min_lr_ratio 0.1 --lr_scheduler_type linear --num_warmup_steps 10000 --max_grad_norm 1.0)
flags+=(--logging_steps 100 --eval_steps 1000 --checkpointing_steps 20000)
name_data "${positional[1]}"

check_then_launch run_pretraining.py "${flags[@]}" "$@"
