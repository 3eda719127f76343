#!/usr/bin/env bash
# Predicts the memory of each device under each YAML in accelerate_configs/, says what fits, and prints the command for
# the first that does. Nothing is trained and no GPU is needed.
# Usage: bash scripts/plan.sh <model> <devices> <memory-per-device> [batch] [seq]
#   model               125m 350m 1.3b 2.7b 6.7b 13b 30b 66b 175b of OPT, a preset of BERT (tiny mini small medium base
#                       large), or weights: folder or hub name
#   devices             GPUs, one process on each
#   memory-per-device   GB of 1e9 bytes that a process may use
#   batch               sequences a process sees at once (default: 16)
#   seq                 tokens in a sequence             (default: 1024, or the model's positions where these are fewer)
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then usage && exit; fi
done
if (($# < 3 || $# > 5)); then
    echo "error: $# arguments: give model, devices and memory-per-device, then batch and seq if you like" >&2
    usage >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/launch_env.sh"
PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m common.plan "$@"
