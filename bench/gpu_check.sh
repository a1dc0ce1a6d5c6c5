#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command, in under nine minutes: bash bench/gpu_check.sh
# Writes bench/gpu_check/results/<date>-<commit>.json and exits non-zero where anything failed. See bench/gpu_check/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
