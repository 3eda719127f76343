#!/usr/bin/env bash
# Trains OPT from random weights on made-up tokens: needs no data and no network, to try a machine and a model's size.
# Usage: bash scripts/run_clm_synthetic.sh [batch-size-per-gpu] [mem-cap] [model] [gpu-num] [accelerate-config]
#                                          [extra flags...]
#   batch-size-per-gpu   sequences a process sees at once              (default: 16)
#   mem-cap              GB of memory a process may take, 0 for no cap (default: 0)
#   model                125m 350m 1.3b 2.7b 6.7b 13b 30b 66b 175b of OPT, or weights: folder or hub name
#                                                                      (default: an OPT that fits the machine)
#   gpu-num              processes, one on each GPU, or all on the CPU (default: 1)
#   accelerate-config    a name in accelerate_configs/, or a file      (default: what fits the machine)
#   extra flags          any flag of run_clm.py (--help lists them); the first argument that begins with - ends the
#                        positional ones
# On a CPU the default is --block_size 128. The default output runs/<time> is relative to the folder you stand in.
set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
source "$scripts/clm_arguments.sh"
read_arguments "$@"

[[ -z $size ]] || flags+=(--model_type opt --model_size "$size")
check_then_launch run_clm.py "${flags[@]}" --synthetic_data ${extra[@]+"${extra[@]}"}
