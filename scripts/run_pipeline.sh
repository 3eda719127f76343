#!/usr/bin/env bash
# Everything from one YAML: environment, data, tokenizer, pretraining, fine-tuning on all tasks and seeds, collection,
# the zip for gluebenchmark.com, and a report.
# Usage: bash scripts/run_pipeline.sh <config.yaml> [stage...] [--dry_run] [--output_dir DIR] [--overwrite_output_dir]
#                                     [--compare_with DIR]
#   config.yaml              as in configs/, or one of ExtremeBERT's
#   stage                    environment data tokenizer pretrain finetune collect submission report   (default: all)
#   --dry_run                show every stage's command, its time and where it writes, and do nothing
#   --output_dir             where everything goes                          (default: runs/<name of the YAML>)
#   --overwrite_output_dir   make a stage whose settings have changed again, and what follows it
#   --compare_with           another pipeline's folder, with which the report compares this one
# The same command continues what was stopped. Relative paths are relative to the folder you stand in.
set -euo pipefail

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then
        sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
    fi
done
source "$(dirname "${BASH_SOURCE[0]}")/launch_env.sh"
PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m common.pipeline.run "$@"
