#!/usr/bin/env bash
# The demo: SFT, SPIN (T = 1), IRFT (T = 5) and RFT learn from an expert whose reward is known: "the answer begins with Return".
#   bash benchmark/demo.sh [OUT]
#   SEEDS="1 2 3" bash benchmark/demo.sh [OUT]       # the figure of docs/index.md
# Finished runs are reused; one that was cut off is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/demo}
seeds=${SEEDS:-1}
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) # two runs at a time

experts=() sft= spin= irft= rft=
for seed in $seeds; do
  to=$out/$seed
  if [ ! -f "$to/expert/expert.json" ]; then
    rm -rf "$to/expert" # it cannot be resumed
    python benchmark/best_of.py --seed "$seed" --output-dir "$to/expert"
  fi
  data=(--dataset "$to/expert/train.jsonl" --eval-dataset "$to/expert/held_out.jsonl" --max-samples 0 --eval-samples 400
    --learning-rate 2e-4 --seed "$seed")
  (once "$to" sft sft.py --num-train-epochs 3 "${data[@]}" && once "$to" spin irft.py --T 1 --num-train-epochs 3 "${data[@]}" &&
    once "$to" irft irft.py --T 5 --num-train-epochs 3 "${data[@]}") 2>&1 | sed -u 's/^/[sft, spin, irft] /' &
  lane=$!
  once "$to" rft rft.py --sft-epochs 0 "${data[@]}" 2>&1 | sed -u 's/^/[rft] /'
  wait "$lane"
  experts+=("$to/expert") sft+=${sft:+,}$to/sft spin+=${spin:+,}$to/spin irft+=${irft:+,}$to/irft rft+=${rft:+,}$to/rft
done
python benchmark/demo.py --expert "${experts[@]}" --output "$out" \
  --runs "SFT=$sft" "SPIN=$spin" "IRFT=$irft" "RFT=$rft"
