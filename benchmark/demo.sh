#!/usr/bin/env bash
# The demo: SFT, SPIN (T = 1) and IRFT (T = 5) from the same model, on the same demonstrations, with the same number of
# updates. Finished runs are reused; one that was cut off is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/demo}
python irft.py --T 5 --dry-run # prints the plan
two_lanes "$out"
python benchmark/compare.py --runs "SFT=$out/sft" "SPIN=$out/spin" "IRFT=$out/irft" --output "$out"
