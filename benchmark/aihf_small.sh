#!/usr/bin/env bash
# The AIHF paper's comparison at small scale (its Tab. 2, Fig. 2, 3, 6, 7): a gold reward, a base policy, preferences labelled by
# the gold reward, then every method from the same base on the same data, and four of them at other ratios of demonstrations
# to preferences. Two runs at a time, each on half of the cores.
#   SEEDS="1 2 3" RATIO_SEEDS="1 2" bash benchmark/aihf_small.sh [OUT [DATA]]
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/aihf_small}
data=${2:-pydoc}
seeds=${SEEDS:-1 2 3}
ratio_seeds=${RATIO_SEEDS:-$seeds}
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
gold_world "$out" "$data"
if [ ! -f "$out/data/preferences.jsonl" ]; then
  rm -rf "$out/data"
  python benchmark/preferences.py --model "$out/base/final" --gold-reward-model "$out/gold/final" \
    --dataset "$out/split/demonstrations.jsonl" "${sizes[@]}" --max-preferences 1600 --output-dir "$out/data"
fi
train=(--model "$out/base/final" --dataset "$out/data/demonstrations.jsonl" "${held[@]}" "${sizes[@]}" --batch-size 32
  --per-device-train-batch-size 32 --gold-reward-model "$out/gold/final")
pairs=(--preference-dataset "$out/data/preferences.jsonl")
online=("${pairs[@]}" --sft-epochs 0 --reward-learning-rate 5e-4 --learning-rate 1e-4 --eval-updates 5)
ppo=("${online[@]}" --rollout-batch-size 64 --value-warmup-ratio 0.1)
method() { # OUT NAME SEED DEMONSTRATIONS PREFERENCES
  local shared=(--seed "$3" --max-samples "$4" "${train[@]}") prefs=(--max-preferences "$5")
  case $2 in
    sft) once "$1" sft sft.py "${shared[@]}" --num-train-epochs 2 --learning-rate 1e-4 ;;
    spin) once "$1" spin irft.py "${shared[@]}" --T 1 --learning-rate 1e-4 ;;
    dpo | ipo) once "$1" "$2" aihf_direct.py "${shared[@]}" "${pairs[@]}" "${prefs[@]}" --objective direct --demo-weight 0 \
      --preference-loss "$2" --T 2 --learning-rate 1e-4 ;;
    direct | self_play) once "$1" "$2" aihf_direct.py "${shared[@]}" "${pairs[@]}" "${prefs[@]}" --objective "$2" --T 2 \
      --learning-rate 1e-4 ;;
    rlhf) once "$1" rlhf aihf.py "${shared[@]}" "${online[@]}" "${prefs[@]}" --demo-weight 0 --T 1 --num-train-epochs 2 \
      --total-prompts 960 --rollout-batch-size 64 --num-generations 4 ;;
    aihf) once "$1" aihf aihf.py "${shared[@]}" "${online[@]}" "${prefs[@]}" --T 2 --total-prompts 480 \
      --rollout-batch-size 64 --num-generations 4 ;;
    rlhf_ppo) once "$1" rlhf_ppo aihf_ppo.py "${shared[@]}" "${ppo[@]}" "${prefs[@]}" --demo-weight 0 --T 1 \
      --num-train-epochs 2 --total-episodes 1920 ;;
    aihf_ppo) once "$1" aihf_ppo aihf_ppo.py "${shared[@]}" "${ppo[@]}" "${prefs[@]}" --T 2 --total-episodes 960 ;;
  esac
}
lanes() { # run "method ..." lines from stdin, two at a time
  while read -r line; do
    # shellcheck disable=SC2086
    method $line 2>&1 | sed -u "s|^|[${line// /-}] |" &
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  done
  wait
}
for seed in $seeds; do
  for name in sft dpo ipo spin rlhf rlhf_ppo direct self_play aihf aihf_ppo; do
    echo "$out/1_1/$seed $name $seed 800 800"
  done
done | lanes
for seed in $ratio_seeds; do
  for name in sft dpo rlhf aihf; do
    echo "$out/10_1/$seed $name $seed 1450 145"
    echo "$out/1_10/$seed $name $seed 145 1450"
  done
done | lanes
# how the reward of every method, implicit or learned, ranks pairs of prompts that no run has seen
pairs_of_held_out=$out/held_out/preferences.jsonl
held_out_pairs "$out"
judge() { # RUN
  [ ! -f "$1/eval/evaluation.json" ] || return 0
  rm -rf "$1/eval"
  local reward=()
  [ ! -d "$1/reward" ] || reward=(--reward-model "$1/reward")
  python evaluate.py --model "$1/final" --ref-model "$out/base/final" "${reward[@]}" --dataset "$pairs_of_held_out" \
    --eval-dataset "$pairs_of_held_out" --eval-samples 400 "${sizes[@]}" --output-dir "$1/eval"
}
for seed in $seeds; do
  for run in "$out/1_1/$seed"/*/; do
    judge "${run%/}" &
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  done
done
wait
python benchmark/aihf_table.py --runs "$out" --seeds $seeds --ratio-seeds $ratio_seeds --output "$out"
