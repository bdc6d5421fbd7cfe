#!/usr/bin/env bash
# The AIHF paper's sentiment task (App. A.1.2) at small scale: preferences and demonstrations are answers of a policy that PPO
# trains on a known reward; every method learns from them and is measured by that reward. One run at a time, on one core.
#   bash benchmark/sentiment.sh WORLD BASE [OUT]    WORLD: folder of benchmark/film.py; BASE: a model trained on its train.jsonl
#   SEEDS, RATIO_SEEDS, WEIGHT_SEEDS, PPO_SEEDS: seeds of the comparison, of other numbers of preferences, of other weights of
#   Direct AIHF, and of the two methods with PPO.
# Finished runs are reused; one that was cut off begins anew. Seeds are in the outer loop: a cut leaves whole seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
world=$1 base=$2
out=${3:-runs/sentiment}
seeds=${SEEDS:-1 2 3 4 5}
ratio_seeds=${RATIO_SEEDS:-$seeds} weight_seeds=${WEIGHT_SEEDS:-$seeds} ppo_seeds=${PPO_SEEDS:-$seeds}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
sizes=(--model "$base" --max-length 72 --max-new-tokens 56 --per-device-eval-batch-size 128)

finish() { # OUT WORDS...: run a command that writes to OUT unless it has ended
  local to=$1
  shift
  [ ! -f "$to/done" ] || return 0
  rm -rf "$to"
  python "$@" --output-dir "$to"
  touch "$to/done"
}

# ---- the data ----
finish "$out/split" benchmark/sentiment_data.py "${sizes[@]}" --dataset "$world/prompts.jsonl"
finish "$out/ppo" benchmark/sentiment_gold.py "${sizes[@]}" --gold "$world" --dataset "$out/split/ppo.jsonl" \
  --eval-dataset "$world/dev.jsonl" --optimizer adamw --beta 0.3
mapfile -t checkpoints < <(ls -d "$out"/ppo/checkpoint_* | sort -V)
finish "$out/data" benchmark/sentiment_data.py "${sizes[@]}" --gold "$world" --checkpoints "${checkpoints[@]}" \
  --dataset "$out/split/data.jsonl" --eval-dataset "$world/held_out.jsonl" --dev "$world/dev.jsonl"

# ---- the methods ----
common=(--dataset "$out/data/demonstrations.jsonl" --max-samples 300 --optimizer adamw --batch-size 32
  --per-device-train-batch-size 32)
explicit=(--policy-prompts "$out/split/methods.jsonl" --base "$base" --sft-epochs 0 --reward-model "" --rollout-batch-size 64)
dpo=("${explicit[@]}" --lr-scheduler-type linear --num-generations 4)
ppo=("${explicit[@]}" --value-warmup-ratio 0.1 --num-ppo-epochs 2)
method() { # OUT NAME RATE SEED PREFERENCES FLAGS...: one run, in OUT/NAME/RATE for the grid and in OUT/NAME else
  local to=$1 name=$2 rate=$3 m=$5
  local all=("${sizes[@]}" "${common[@]}" --learning-rate "$rate" --seed "$4")
  local both=(--preference-dataset "$out/data/preferences.jsonl" --max-preferences "$m")
  shift 5
  case $name in
    sft) finish "$to" sft.py "${all[@]}" --num-train-epochs 2 "$@" ;;
    dpo) finish "$to" aihf_direct.py "${all[@]}" "${both[@]}" --objective direct --demo-weight 0 --T 2 "$@" ;;
    direct | self_play) finish "$to" aihf_direct.py "${all[@]}" "${both[@]}" --objective "$name" --T 2 "$@" ;;
    rlhf) finish "$to" benchmark/sentiment_rl.py aihf "${all[@]}" "${both[@]}" "${dpo[@]}" --demo-weight 0 --T 1 \
      --num-train-epochs 4 --total-prompts 640 --eval-updates 5 "$@" ;;
    aihf) finish "$to" benchmark/sentiment_rl.py aihf "${all[@]}" "${both[@]}" "${dpo[@]}" --T 2 --num-train-epochs 2 \
      --total-prompts 320 --eval-updates 5 "$@" ;;
    rlhf_ppo) finish "$to" benchmark/sentiment_rl.py aihf_ppo "${all[@]}" "${both[@]}" "${ppo[@]}" --demo-weight 0 --T 1 \
      --num-train-epochs 4 --total-episodes 640 --eval-updates 5 "$@" ;;
    aihf_ppo) finish "$to" benchmark/sentiment_rl.py aihf_ppo "${all[@]}" "${both[@]}" "${ppo[@]}" --T 2 --num-train-epochs 2 \
      --total-episodes 320 --eval-updates 5 "$@" ;;
  esac
}

judge() { # PAIRS RUN...: how the reward of each run orders pairs, in its pairs.parquet
  local kind=$1
  shift
  rm -rf "$out/judge"
  python benchmark/sentiment_judge.py "${sizes[@]}" --runs "$@" --output-dir "$out/judge" \
    --pairs "$out/data/${kind}_medium_low.jsonl" "$out/data/${kind}_high_medium.jsonl"
}

# ---- rates, on the development set with a seed of its own ----
dev=(--eval-dataset "$out/data/dev.jsonl" --eval-samples 200 --eval-updates 1000)
rate_of() { awk -v name="$1" '$1 == name {print $2}' "$out/grid/rates"; }
if [ ! -f "$out/grid/rates_of_rewards" ]; then
  for rate in 3e-4 1e-3 3e-3; do
    method "$out/grid/reward_aihf/$rate" aihf 1e-4 0 300 "${dev[@]}" --reward-learning-rate $rate --T 1 --num-train-epochs 4 \
      --total-prompts 64
  done
  judge dev "$out"/grid/reward_*/*
  python benchmark/sentiment_grid.py --grid "$out/grid" --gold "$world"
  cp "$out/grid/rates" "$out/grid/rates_of_rewards"
fi
reward=$(awk '$1 == "reward_aihf" {print $2}' "$out/grid/rates_of_rewards") # one rate for all rewards
if [ ! -f "$out/grid/done" ]; then
  for rate in 3e-4 1e-3 3e-3; do
    for name in sft dpo direct self_play; do method "$out/grid/$name/$rate" $name $rate 0 300 "${dev[@]:0:4}"; done
    for name in rlhf aihf aihf_ppo; do
      method "$out/grid/$name/$rate" $name $rate 0 300 "${dev[@]}" --reward-learning-rate "$reward"
    done
  done
  python benchmark/sentiment_grid.py --grid "$out/grid" --gold "$world"
  touch "$out/grid/done"
fi

# ---- every method; then other numbers of preferences, and other weights ----
test=(--eval-dataset "$out/data/held_out.jsonl" --eval-samples 1000)
seeded() { # PREFERENCES SEED NAME
  local to=$out/$1/$2/$3 name=$3 start=()
  case $name in
    *_sft) name=${name%_sft} start=(--model "$out/$1/$2/sft/final") ;; # with the rate tuned from the base
  esac
  case $name in
    sft | dpo | direct | self_play) method "$to" "$name" "$(rate_of "$name")" "$2" "$1" "${test[@]}" ;;
    rlhf_ppo) method "$to" "$name" "$(rate_of aihf_ppo)" "$2" "$1" "${test[@]}" --reward-learning-rate "$reward" ;;
    *) method "$to" "$name" "$(rate_of "$name")" "$2" "$1" "${test[@]}" --reward-learning-rate "$reward" "${start[@]}" ;;
  esac
}
for seed in $seeds; do
  for name in sft rlhf aihf rlhf_sft aihf_sft dpo direct self_play; do seeded 300 "$seed" $name; done
done
for seed in $ratio_seeds; do
  for m in 1000 100; do
    for name in rlhf aihf; do seeded $m "$seed" $name; done
  done
done
for seed in $weight_seeds; do
  for w1 in 0.01 0.25 1; do
    method "$out/w1/$w1/$seed/direct" direct "$(rate_of direct)" "$seed" 300 "${test[@]}" --demo-weight $w1
  done
done
for seed in $ppo_seeds; do
  for name in rlhf_ppo aihf_ppo; do seeded 300 "$seed" $name; done
done
judge held_out "$out"/[0-9]*/*/* "$out"/w1/*/*/*
python benchmark/sentiment_table.py --runs "$out" --gold "$world" --output "$out"
