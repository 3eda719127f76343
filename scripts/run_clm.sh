#!/usr/bin/env bash
# Trains a causal language model, OPT where nothing else is named, and shows its perplexity and samples of its text.
# Usage: bash scripts/run_clm.sh [batch-size-per-gpu] [mem-cap] [model] [gpu-num] [accelerate-config] [extra flags...]
#   batch-size-per-gpu   sequences a process sees at once              (default: 16)
#   mem-cap              GB of memory a process may take, 0 for no cap (default: 0)
#   model                125m 350m 1.3b 2.7b 6.7b 13b 30b 66b 175b of OPT, or weights: folder or hub name
#                                                                      (default: an OPT that fits the machine)
#   gpu-num              processes, one on each GPU, or all on the CPU (default: 1)
#   accelerate-config    a name in accelerate_configs/, or a file      (default: what fits the machine)
#   extra flags          any flag of run_clm.py (--help lists them); the first argument that begins with - ends the
#                        positional ones
# OPT's weights and the data, WikiText-2, come from the hub; without it, weights are random and the data is the
# documentation of the installed Python packages. --train_file, --dataset_name or --dataset_path name other data.
# On a CPU the default is --block_size 128. Relative paths, and the default output runs/<time>, are relative to the
# folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
source "$scripts/clm_arguments.sh"
read_arguments "$@"

published="125m 350m 1.3b 2.7b 6.7b 13b 30b 66b"
if [[ -n $size ]]; then
    if [[ " $published " == *" $size "* ]] && can_be_had "facebook/opt-$size"; then
        echo "weights: facebook/opt-$size"
        flags+=(--model_name_or_path "facebook/opt-$size")
    else
        echo "weights: random, as facebook/opt-$size is not in the hub's cache and cannot be fetched"
        flags+=(--model_type opt --model_size "$size")
    fi
fi
if ! given --train_file --dataset_name --dataset_path --synthetic_data; then
    if can_be_had Salesforce/wikitext wikitext-2-raw-v1; then
        echo "data: WikiText-2 (Salesforce/wikitext on the hub); --train_file names another"
        flags+=(--dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1)
    else
        echo "data: the documentation of the installed Python packages, as WikiText-2 is not in the hub's cache and" \
            "cannot be fetched; --train_file names another"
    fi
fi

check_then_launch run_clm.py "${flags[@]}" ${extra[@]+"${extra[@]}"}
