#!/usr/bin/env bash
# Predicts the memory of each device under each YAML in accelerate_configs/, says what fits, and prints the command for
# the first that does; with --train_batch_size, which pipelines are fastest. Nothing is trained and no GPU is needed.
# Usage: bash scripts/plan.sh <model> <devices> <memory-per-device> [batch] [seq]
#        bash scripts/plan.sh <model> <devices> [memory-per-device] [batch] [seq] --train_batch_size N [flags...]
#   model               125m 350m 1.3b 2.7b 6.7b 13b 30b 66b 175b of OPT, a preset of BERT (tiny mini small medium base
#                       large), 110m 336m 2.2b 3.8b 3.9b of Megatron's BERT, or weights: folder or hub name
#   devices             GPUs, one process on each; of a CPU, cores
#   memory-per-device   GB of 1e9 bytes that a process may use; in a plan of pipelines the hardware table's by default
#   batch               sequences a process sees at once (default: 16); in a plan of pipelines the most that it may
#   seq                 tokens in a sequence             (default: 1024, or the model's positions where these are fewer)
#   --train_batch_size N   sequences in an optimizer step over all devices: which depth, width, micro-batch, accumulation
#                          and recomputation are fastest, and the command of the fastest
#   --hardware FILE        compute, memory and bandwidths, a YAML as in configs/hardware (default: what --profile wrote)
#   --profile              measure this machine with the model, half a minute, and write runs/cache/hardware.yaml or FILE
#   --verify               run the three fastest plans on this machine, ten steps each; measured beside predicted
#   --train_file FILE      their text (default: the embedded corpus)
#   --schedule S           2bw, 1f1b, gpipe or none (one stage works at a time) alone
#   --neighbours W         who share a machine: stages of a pipeline (default), or copies of a stage, as in PipeDream
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then usage && exit; fi
done
positional=0 least=3
for word in "$@"; do
    if [[ $word == -* && ! $word =~ ^-[0-9.]+$ ]]; then least=2 && break; fi
    positional=$((positional + 1))
done
if ((positional < least || positional > 5)); then
    echo "error: $positional arguments: give model, devices and memory-per-device, then batch and seq if you like" >&2
    usage >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/launch_env.sh"
PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m common.plan "$@"
