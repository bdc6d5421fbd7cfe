#!/usr/bin/env bash
# A scale model of the IRL paper's Fig. 2: demonstrations are people's own summaries, the student is `tiny`, a gold reward stands for
# the truth. SFT, then three outer iterations of irl_ppo_tldr.py, and two of SPIN from the same SFT policy. Two runs at a time,
# each on half of the cores; about 15 minutes for gold reward and base, 30 a seed.
#   SEEDS="1 2 3" bash benchmark/irl_small.sh [OUT [DATA]]
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/irl_small}
data=${2:-pydoc}
seeds=${SEEDS:-1 2 3}
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
gold_world "$out" "$data"
held_out_pairs "$out"
mkdir -p "$out/spaced" # summaries with the leading space that TL;DR's template asks of other scripts
sed 's/"completion": "/& /' "$out/split/demonstrations.jsonl" >"$out/spaced/demonstrations.jsonl"
sed 's/"completion": "/& /' "$out/split/held_out.jsonl" >"$out/spaced/held_out.jsonl"
sed 's/"chosen": "/& /; s/"rejected": "/& /' "$out/held_out/preferences.jsonl" >"$out/spaced/preferences.jsonl"
train=(--max-samples 1600 --batch-size 32 --per-device-train-batch-size 32)
spaced=(--dataset "$out/spaced/demonstrations.jsonl" --eval-dataset "$out/spaced/held_out.jsonl" --eval-samples 200)
gold=(--gold-reward-model "$out/gold/final")

# measured OUT NAME FLAGS...: evaluate.py, unless its values are there
measured() {
  [ ! -f "$1/$2/evaluation.json" ] || return 0
  local to=$1/$2
  rm -rf "$to"
  shift 2
  python evaluate.py "${sizes[@]}" --temperature 0.7 --output-dir "$to" "$@"
}
one_seed() {
  local to=$out/$1 policy=$out/$1/irl/sft
  once "$to" irl irl_ppo_tldr.py --model tiny --seed "$1" --T 3 --dataset "$out/split/demonstrations.jsonl" "${held[@]}" "${sizes[@]}" \
    "${train[@]}" "${gold[@]}" --eval-preference-dataset "$out/held_out/preferences.jsonl" --sft-epochs 3 --sft-learning-rate 5e-4 \
    --reward-learning-rate 5e-4 --learning-rate 5e-5 --total-episodes 1280 --rollout-batch-size 64 --eval-updates 20
  for k in 1 2; do
    once "$to" "spin_$k" irft.py --model "$policy" --seed "$1" --T 1 "${spaced[@]}" "${sizes[@]}" "${train[@]}" \
      --num-train-epochs 1 --learning-rate 1e-4
    policy=$to/spin_$k/final
    measured "$to" "spin_${k}_held_out" --model "$policy" --ref-model "$to/irl/sft" "${spaced[@]}" "${gold[@]}"
    measured "$to" "spin_${k}_preferences" --model "$policy" --ref-model "$to/irl/sft" \
      --dataset "$out/spaced/preferences.jsonl" --eval-dataset "$out/spaced/preferences.jsonl" --eval-samples 400
  done
}
# shellcheck disable=SC2086
each_seed $seeds
# shellcheck disable=SC2086
python benchmark/irl_table.py --runs "$out" --seeds $seeds --output "$out"
