#!/usr/bin/env bash
# Prepares Wikipedia for pretraining: token files for run_pretraining.py --dataset_path.
# Usage: bash scripts/prepare_wikipedia.sh [output-dir] [source] [tokenizer] [extra flags...]
#   output-dir    where the token files go                        (default: wikipedia)
#   source        a pages-articles dump, files of WikiExtractor, a quoted glob or an address of them;
#                 or a date and language of wikimedia/wikipedia on the hub   (default: 20231101.en)
#   tokenizer     hub name, folder, tokenizer.json, vocab.txt, or "train"    (default: train a WordPiece)
#   extra flags   any flag of prepare_pile_data.py (--help lists them)
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
source "$scripts/prepare_arguments.sh"
read_arguments 3 "$@"
text=${positional[1]:-20231101.en}
arguments=(--output_dir "${positional[0]:-wikipedia}")
if looks_like_files "$text" && ! [[ $text =~ ^[0-9]{8}\.[a-z-]+$ ]]; then
    arguments+=(--input "$text")
else
    arguments+=(--dataset_name wikimedia/wikipedia --dataset_config_name "$text")
fi
[[ ${positional[2]:-train} == train ]] || arguments+=(--tokenizer_name "${positional[2]}")
run_prepare "${arguments[@]}"
