#!/usr/bin/env bash
# Prepares the Pile for pretraining, shard by shard: token files for run_pretraining.py --dataset_path.
# Usage: bash scripts/prepare_pile.sh [output-dir] [shards] [tokenizer] [source] [extra flags...]
#   output-dir    where downloads and token files go              (default: pile)
#   shards        all, or some of the 30: "0 4" (first and last), "0,7,9"; merge puts finished ones together
#                                                                 (default: all, and merge)
#   tokenizer     hub name, folder, tokenizer.json, vocab.txt, or "train"    (default: train a WordPiece)
#   source        files of your own in the Pile's format (a quoted glob), or pile: its copy on the hub without the
#                 parts that were taken down, monology/pile-uncopyrighted    (default: pile)
#   extra flags   any flag of prepare_pile_data.py (--help lists them), such as --remove_downloads
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
source "$scripts/prepare_arguments.sh"
read_arguments 4 "$@"
case "${positional[1]:-all}" in
    all) command=() ;;
    merge) command=(merge) ;;
    *) read -ra chosen <<<"${positional[1]}" && command=(tokenize "${chosen[@]}") ;;
esac
arguments=(--output_dir "${positional[0]:-pile}" --input "${positional[3]:-pile}")
[[ ${positional[2]:-train} == train ]] || arguments+=(--tokenizer_name "${positional[2]}")
run_prepare ${command[@]+"${command[@]}"} "${arguments[@]}"
