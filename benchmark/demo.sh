#!/usr/bin/env bash
# The demo: SFT, SPIN (T = 1) and IRFT (T = 5) from the same model, on the same demonstrations, with the same number of
# updates. Finished runs are reused; one that was cut off is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
once() { # once NAME SCRIPT FLAGS...
  local name=$1 script=$2
  shift 2
  if [ -f "$out/$name/final/manifest.json" ]; then
    echo "$out/$name is there: reused"
  elif [ -f "$out/$name/args.json" ]; then
    python "$script" --resume "$out/$name"
  else
    python "$script" --output-dir "$out/$name" "$@"
  fi
}
python irft.py --T 5 --dry-run # makes the embedded model on first use, and prints the plan
export OMP_NUM_THREADS=$(( ($(nproc) + 1) / 2 )) # two lanes, half of the cores each
(once sft sft.py && once spin irft.py --T 1) 2>&1 | sed -u 's/^/[sft, spin] /' &
lane=$!
once irft irft.py --T 5 2>&1 | sed -u 's/^/[irft] /'
wait "$lane"
python benchmark/compare.py --runs "SFT=$out/sft" "SPIN=$out/spin" "IRFT=$out/irft" --output "$out"
