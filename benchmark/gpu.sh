#!/usr/bin/env bash
# Speed and memory on this machine's CUDA card: a table for docs/performance.md.
#   bash benchmark/gpu.sh
#   bash benchmark/gpu.sh --device cpu --shape tiny      # that the script itself works; no measurement of anything
set -euo pipefail
cd "$(dirname "$0")/.."
exec python benchmark/gpu.py "$@"
