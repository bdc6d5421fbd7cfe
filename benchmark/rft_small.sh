#!/usr/bin/env bash
# A scale model of the RFT paper's Fig. 2: gold reward, base = SFT on all demonstrations, then SFT and RFT on those the gold
# reward scores highest. Its table and figure stand in docs/rft.md. About 15 minutes for the gold reward and the base, 15 a seed.
#   SEEDS="1 2 3" bash benchmark/rft_small.sh [OUT [DATA]]
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/rft_small}
data=${2:-pydoc}
seeds=${SEEDS:-1 2 3}
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
if [ ! -f "$out/gold/final/manifest.json" ]; then
  rm -rf "$out/gold" # it cannot be resumed
  python benchmark/gold.py --dataset "$data" --output-dir "$out/gold"
fi
shared=(--dataset "$out/gold/demonstrations.jsonl" --eval-dataset "$out/gold/held_out.jsonl" --max-samples 0 --eval-samples 200
  --max-length 256 --max-new-tokens 48 --batch-size 32 --per-device-train-batch-size 32 --per-device-eval-batch-size 64
  --gold-reward-model "$out/gold/final")
once "$out" base sft.py --model tiny --num-train-epochs 3 --learning-rate 5e-4 "${shared[@]}"
one_seed() {
  once "$out/$1" sft sft.py --model "$out/base/final" --seed "$1" --select-top-k 800 --num-train-epochs 3 --learning-rate 2e-4 "${shared[@]}"
  once "$out/$1" rft rft.py --model "$out/base/final" --seed "$1" --select-top-k 800 --baseline "$out/$1/sft/final" --sft-epochs 0 \
    --reward-learning-rate 5e-4 --num-train-epochs 2 --learning-rate 1e-4 --total-episodes 5120 \
    --rollout-batch-size 64 --eval-updates 10 --value-warmup-ratio 0.0625 "${shared[@]}"
}
# shellcheck disable=SC2086
each_seed $seeds
runs=
for seed in $seeds; do runs+=" $out/$seed/rft"; done
# shellcheck disable=SC2086
python benchmark/fig2.py --runs $runs --output "$out"
