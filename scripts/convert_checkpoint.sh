#!/usr/bin/env bash
# Makes a Hugging Face folder of a checkpoint in training, whatever strategy has written it.
# Usage: bash scripts/convert_checkpoint.sh <checkpoint> <output-folder> [max-shard-size] [dtype]
#   checkpoint       a step_N folder, or the run's folder for its newest whole checkpoint
#   output-folder    weights, configuration and tokenizer for from_pretrained; new or empty
#   max-shard-size   of a file of weights, as 500MB   (default: 5GB)
#   dtype            float32, bfloat16 or float16 (default: float32, that of checkpoints)
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/launch_env.sh"
PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m common.convert_checkpoint "$@"
