#!/usr/bin/env bash
# Prepares books for pretraining: token files for run_pretraining.py --dataset_path. BookCorpus itself is no longer
# given away; any books as plain text do, one in a file.
# Usage: bash scripts/prepare_bookcorpus.sh [output-dir] [source] [tokenizer] [extra flags...]
#   output-dir    where the token files go                        (default: books)
#   source        a folder, a quoted glob or an address of text files, or a dataset on the hub with the column text
#                                                                 (default: lucadiliello/bookcorpusopen)
#   tokenizer     hub name, folder, tokenizer.json, vocab.txt, or "train"    (default: train a WordPiece)
#   extra flags   any flag of prepare_pile_data.py (--help lists them), such as --document_separator blank_line, which
#                 makes a document of every paragraph
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
source "$scripts/prepare_arguments.sh"
read_arguments 3 "$@"
text=${positional[1]:-lucadiliello/bookcorpusopen}
arguments=(--output_dir "${positional[0]:-books}" --document_separator file)
if looks_like_files "$text"; then arguments+=(--input "$text"); else arguments+=(--dataset_name "$text"); fi
[[ ${positional[2]:-train} == train ]] || arguments+=(--tokenizer_name "${positional[2]}")
run_prepare "${arguments[@]}"
