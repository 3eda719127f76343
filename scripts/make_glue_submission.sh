#!/usr/bin/env bash
# Makes the zip that gluebenchmark.com scores, and checks it.
# Usage: bash scripts/make_glue_submission.sh <runs-folder> [glue.zip] [--fill_missing]
#        bash scripts/make_glue_submission.sh --check <glue.zip>
#   runs-folder      of scripts/run_glue_all.sh, or one whose subfolders are output folders of run_glue.py --do_predict,
#                    one for each task
#   glue.zip         what is written                (default: glue.zip in the runs folder)
#   --fill_missing   answer tasks that have no predictions without a look, since the server wants every file
#   --check          check a zip; nothing is written
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/launch_env.sh"
PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m common.glue.submission "$@"
