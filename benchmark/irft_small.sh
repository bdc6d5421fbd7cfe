#!/usr/bin/env bash
# SFT, SPIN and IRFT over several seeds; the tables stand in docs/irft.md. About 5 minutes a seed and data set on 2 cores.
#   SEEDS="1 2 3" bash benchmark/irft_small.sh [OUT [DATA]]
# DATA, a file of demonstrations, is learned from instead of pydoc, after a warm start of the embedded model on it by SFT. Prompts are
# cut, and families of them split, as in the other benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/irft_small}
data=${2:-}
seeds=${SEEDS:-1 2 3}
start=()
python irft.py --dry-run
if [ -n "$data" ]; then
  [ -f "$out/split/held_out.jsonl" ] || python benchmark/gold.py --dataset "$data" --split-only --output-dir "$out/split"
  split=(--dataset "$out/split/demonstrations.jsonl" --eval-dataset "$out/split/held_out.jsonl")
  once "$out" warm sft.py "${split[@]}" --max-samples 6400 --num-train-epochs 1 --learning-rate 5e-4
  start=(--model "$out/warm/final" "${split[@]}" --max-samples 1600 --eval-samples 200 --max-length 256
    --max-new-tokens 48 --batch-size 32 --per-device-train-batch-size 16 --per-device-eval-batch-size 64)
fi
sft= spin= irft=
for seed in $seeds; do
  two_lanes "$out/$seed" --seed "$seed" ${start[@]+"${start[@]}"}
  sft+=${sft:+,}$out/$seed/sft spin+=${spin:+,}$out/$seed/spin irft+=${irft:+,}$out/$seed/irft
done
python benchmark/compare.py --runs "SFT=$sft" "SPIN=$spin" "IRFT=$irft" --output "$out"
