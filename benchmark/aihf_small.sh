#!/usr/bin/env bash
# The AIHF paper's comparison at small scale (its Tab. 2, Fig. 2, 3, 6, 7): a gold reward, a base policy, preferences labelled by
# the gold reward, then every method from the same base on the same data, and four of them at other ratios of demonstrations
# to preferences. Two runs at a time, each on half of the cores.
#   SEEDS="1 2 3" bash benchmark/aihf_small.sh [OUT [DATA]]
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/aihf_small}
data=${2:-pydoc}
seeds=${SEEDS:-1 2 3}
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
if [ ! -f "$out/gold/final/manifest.json" ]; then
  rm -rf "$out/gold" # it cannot be resumed
  python benchmark/gold.py --dataset "$data" --max-samples 7000 --output-dir "$out/gold"
fi
sizes=(--max-length 160 --max-new-tokens 48 --per-device-eval-batch-size 64)
held=(--eval-dataset "$out/gold/held_out.jsonl" --eval-samples 200)
once "$out" base sft.py --model tiny --dataset "$out/gold/demonstrations.jsonl" "${held[@]}" "${sizes[@]}" --max-samples 0 \
  --batch-size 32 --per-device-train-batch-size 32 --num-train-epochs 3 --learning-rate 5e-4
if [ ! -f "$out/data/preferences.jsonl" ]; then
  python benchmark/preferences.py --model "$out/base/final" --gold-reward-model "$out/gold/final" \
    --dataset "$out/gold/demonstrations.jsonl" "${sizes[@]}" --output-dir "$out/data"
fi
train=(--model "$out/base/final" --dataset "$out/data/demonstrations.jsonl" "${held[@]}" "${sizes[@]}" --batch-size 32
  --per-device-train-batch-size 32 --gold-reward-model "$out/gold/final")
pairs=(--preference-dataset "$out/data/preferences.jsonl")
online=("${pairs[@]}" --sft-epochs 0 --reward-learning-rate 5e-4 --learning-rate 1e-4 --eval-updates 5)
ppo=("${online[@]}" --rollout-batch-size 64 --value-warmup-ratio 0.1)
method() { # OUT NAME SEED DEMONSTRATIONS PREFERENCES
  local shared=(--seed "$3" --max-samples "$4" "${train[@]}") prefs=(--max-preferences "$5")
  case $2 in
    sft) once "$1" sft sft.py "${shared[@]}" --num-train-epochs 2 --learning-rate 2e-4 ;;
    spin) once "$1" spin irft.py "${shared[@]}" --T 1 --learning-rate 5e-5 ;;
    dpo | ipo) once "$1" "$2" aihf_direct.py "${shared[@]}" "${pairs[@]}" "${prefs[@]}" --objective direct --demo-weight 0 \
      --preference-loss "$2" --T 2 --learning-rate 5e-5 ;;
    direct | self_play) once "$1" "$2" aihf_direct.py "${shared[@]}" "${pairs[@]}" "${prefs[@]}" --objective "$2" --T 2 \
      --learning-rate 5e-5 ;;
    rlhf) once "$1" rlhf aihf.py "${shared[@]}" "${online[@]}" "${prefs[@]}" --demo-weight 0 --T 1 --num-train-epochs 2 \
      --total-prompts 640 --rollout-batch-size 64 --num-generations 4 ;;
    aihf) once "$1" aihf aihf.py "${shared[@]}" "${online[@]}" "${prefs[@]}" --T 2 --total-prompts 320 \
      --rollout-batch-size 64 --num-generations 4 ;;
    rlhf_ppo) once "$1" rlhf_ppo aihf_ppo.py "${shared[@]}" "${ppo[@]}" "${prefs[@]}" --demo-weight 0 --T 1 \
      --num-train-epochs 2 --total-episodes 1280 ;;
    aihf_ppo) once "$1" aihf_ppo aihf_ppo.py "${shared[@]}" "${ppo[@]}" "${prefs[@]}" --T 2 --total-episodes 640 ;;
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
    echo "$out/1_1/$seed $name $seed 440 440"
  done
done | lanes
for seed in $seeds; do
  for name in sft dpo rlhf aihf; do
    echo "$out/10_1/$seed $name $seed 800 80"
    echo "$out/1_10/$seed $name $seed 80 800"
  done
done | lanes
python benchmark/aihf_table.py --runs "$out" --seeds $seeds --output "$out"
