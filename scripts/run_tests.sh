#!/usr/bin/env bash
# Runs the tests on this machine's cores.
# Usage: bash scripts/run_tests.sh [fast|all] [pytest arguments...]
#   fast     leaves out what is marked slow or exhaustive
#   (none)   leaves out what is marked exhaustive
#   all      leaves out nothing
#   FRUGAL_TEST_DATA   folder with the real data sets (default: ../shared/data); without it their tests are skipped
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    fast) markers="not slow and not exhaustive" && shift ;;
    all) markers="" && shift ;;
    *) markers="not exhaustive" ;;
esac

bash scripts/setup.sh --dev
workers=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=1 # the workers share the cores
exec "${FRUGAL_VENV:-.venv}/bin/python" -m pytest -n "$((workers < 4 ? workers : 4))" --dist loadfile \
    -m "$markers" -rs "$@"
