#!/usr/bin/env bash
# Experiments where the truth is known: learn from the best of N samples of a language model of film reviews, by a gold reward.
# Every arm and its place in theory: docs/evidence.md. Files and their sources: benchmark/film.py.
#   RATINGS=movie_snippets_rated.tsv REVIEWS=movie_reviews.zip bash benchmark/film.sh [OUT]
#   SEEDS="1 2 3 4 5" ... bash benchmark/film.sh [OUT]     # seed by seed, so that a cut leaves whole seeds
#   ARMS="sft spin-0.1" ... bash benchmark/film.sh [OUT]   # some arms alone
#   GRID=1 ... bash benchmark/film.sh [OUT]                # the grid of rates alone, on the development rows
#   PEOPLE=1 ... bash benchmark/film.sh [OUT]              # demonstrations are sentences that people rated as positive
#   PEAK=1 ... bash benchmark/film.sh [OUT]                # a gold reward with an interior optimum
# Finished runs are reused; one that was cut off is resumed. One run at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
source benchmark/lib.sh
out=${1:-runs/film}
seeds=${SEEDS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# ---- the world, the base model, the expert ----
world=$out/world
[ -f "$world/gold.json" ] || python benchmark/film.py --ratings "$RATINGS" --reviews "$REVIEWS" --output-dir "$world"
lengths=(--max-length 64 --max-prompt-length 20 --max-new-tokens 40 --per-device-eval-batch-size 256)
once "$out" base sft.py --model "$world/init" --dataset "$world/train.jsonl" --eval-dataset "$world/dev.jsonl" --max-samples 0 \
  --eval-samples 400 --max-length 72 --max-prompt-length 16 --max-new-tokens 56 --per-device-eval-batch-size 128 --batch-size 64 \
  --per-device-train-batch-size 64 --optimizer adamw --learning-rate 3e-3 --num-train-epochs 8 --keep-best

# expert NAME HELD_OUT ROWS FLAGS...: the best of 16 samples for the prompts of the pool and of some held-out rows
expert() {
  local name=$1 held=$2 rows=$3
  shift 3
  [ ! -f "$out/$name/expert.json" ] || return 0
  rm -rf "${out:?}/$name" # it cannot be resumed
  python benchmark/best_of.py --model "$out/base/final" --gold "$world" --best-of 16 --dataset "$world/prompts.jsonl" \
    --eval-dataset "$held" --eval-samples "$rows" --max-samples 4000 "${lengths[@]}" --output-dir "$out/$name" "$@"
}
expert expert "$world/held_out.jsonl" 1050
expert development "$world/dev.jsonl" 420 --max-samples 1

# ---- the arms: rates are the best of the grid ----
policy=(--model "$out/base/final" --dataset "$out/expert/train.jsonl" "${lengths[@]}" --max-samples 3200 --optimizer adamw
  --batch-size 32 --per-device-train-batch-size 32)
held=(--eval-dataset "$out/expert/held_out.jsonl" --eval-samples 1000)
rft=(--sft-epochs 0 --reward-model "" --num-train-epochs 1 --per-device-train-batch-size 64 --rollout-batch-size 64
  --value-warmup-ratio 0.1)
irl=(--max-samples 1600 --sft-epochs 0 --beta 0.1 --T 6 --num-generations 8 --total-prompts 320 --rollout-batch-size 64
  --eval-updates 5)
carried=(--ref initial --reward-init previous --reward-loss linear) # the other consistent setting: docs/theory.md, section 3
SFT_RATE=${SFT_RATE:-4e-4} SPIN_RATE=${SPIN_RATE:-4e-4} REWARD_RATE=${REWARD_RATE:-2e-3}
CARRIED_RATE=${CARRIED_RATE:-6e-4} PPO_RATE=${PPO_RATE:-6e-4}

# arm NAME SCRIPT FLAGS...: one run of every method, on this seed's part of the demonstrations
arm() {
  local name=$1 script=$2
  shift 2
  once "$to" "$name" "$script" "${policy[@]}" "${held[@]}" --seed "$seed" "$@"
}

# irl_arm NAME RATE FLAGS...: one run of the IRL script with this rate of its rewards
irl_arm() {
  local name=$1 rate=$2
  shift 2
  arm "$name" irl_dpo_ultrachat.py "${irl[@]}" "$@" --reward-learning-rate "$rate" --learning-rate "$SPIN_RATE"
}

# table OUT SEEDS NAME=LABEL...: tables and figure of the arms, with those seeds that have finished
table() {
  local to=$1 seeds=$2 pair seed made words=()
  shift 2
  for pair in "$@"; do
    made=$(for seed in $seeds; do [ ! -f "$out/$seed/${pair%%=*}/final/manifest.json" ] || echo "$out/$seed/${pair%%=*}"; done | paste -sd,)
    [ -z "$made" ] || words+=("${pair#*=}=$made")
  done
  python benchmark/film_table.py "${source_of_table[@]}" --output "$to" --runs "${words[@]}"
}

if [ "${GRID:-}" ]; then
  seed=100 to=$out/100 held=(--eval-dataset "$out/development/held_out.jsonl" --eval-samples 400)
  for rate in 1e-4 2e-4 4e-4; do arm "sft-$rate" sft.py --num-train-epochs 2 --learning-rate "$rate"; done
  for rate in 1e-3 2e-3 4e-3; do
    arm "reward-$rate" rft.py "${rft[@]}" --reward-learning-rate "$rate" --learning-rate 1e-4 --total-episodes 64 --eval-updates 1
  done
  for rate in 1e-4 2e-4 4e-4; do arm "spin-$rate" irft.py --T 1 --num-train-epochs 1 --learning-rate "$rate"; done
  for rate in 1e-4 3e-4 6e-4; do
    arm "rft-$rate" rft.py "${rft[@]}" --reward-learning-rate "$REWARD_RATE" --learning-rate "$rate" --beta 0.3 \
      --total-episodes 1280 --eval-updates 10
  done
  for rate in 2e-4 6e-4 2e-3; do
    irl_arm "irl-carried-$rate" "$rate" "${carried[@]}"
  done
  names=()
  for name in sft reward spin rft irl-carried; do
    for path in "$to/$name-"*; do names+=("${path##*/}=${path##*/}"); done
  done
  source_of_table=(--expert "$out/development")
  table "$to" 100 "${names[@]}"
  exit
fi

arms() { # arms NAME...: some arms of one seed
  local name value
  for name in "$@"; do
    value=${name#*-}
    case $name in
      sft) arm sft sft.py --num-train-epochs 2 --learning-rate "$SFT_RATE" ;;
      spin-*) arm "$name" irft.py --T 1 --num-train-epochs 1 --learning-rate "$SPIN_RATE" --beta "$value" ;;
      irft-*)
        arm "$name" irft.py --T "$value" --num-train-epochs 1 --learning-rate "$SPIN_RATE" --later-learning-rate "$SPIN_RATE"
        ;;
      rft-*)
        arm "$name" rft.py "${rft[@]}" --reward-learning-rate "$REWARD_RATE" --learning-rate "$PPO_RATE" --beta "$value" \
          --total-episodes 1280 --eval-updates 10
        ;;
      irl-accumulated) irl_arm "$name" "$REWARD_RATE" --ref initial --pairs accumulated ;;
      irl-long) irl_arm "$name" "$REWARD_RATE" --ref initial --num-train-epochs 4 ;; # no fewer updates than the arm above
      irl-carried) irl_arm "$name" "$CARRIED_RATE" "${carried[@]}" ;;
      irl-*) irl_arm "$name" "$REWARD_RATE" --ref "$value" ;;
    esac
  done
}

all="sft spin-1 spin-0.3 spin-0.1 rft-0.1 rft-0.3 irft-5 rft-1 irft-2 irl-previous irl-initial irft-10 irl-accumulated irl-long
  irl-carried"
if [ "${PEOPLE:-}" ]; then # section "People's sentences" of docs/evidence.md
  policy=(--model "$out/base/final" --dataset "$world/positive_train.jsonl" "${lengths[@]}" --max-samples 0 --optimizer adamw
    --batch-size 32 --per-device-train-batch-size 32)
  held=(--eval-dataset "$world/positive_held_out.jsonl" --eval-samples 1000)
  out=$out/people
  source_of_table=(--demonstrations "$world/positive_held_out.jsonl" --gold "$world")
elif [ "${PEAK:-}" ]; then # section "A reward that one word cannot win"
  expert peak/expert "$world/held_out.jsonl" 1050 --gold-kind peak
  out=$out/peak
  policy[3]=$out/expert/train.jsonl
  held[1]=$out/expert/held_out.jsonl
  source_of_table=(--expert "$out/expert")
else
  source_of_table=(--expert "$out/expert")
fi
for seed in $seeds; do
  to=$out/$seed
  # shellcheck disable=SC2086 # names of arms are words
  arms ${ARMS:-$all}
done
table "$out" "$seeds" sft=SFT "spin-1=SPIN, beta 1" "spin-0.3=SPIN, beta 0.3" "spin-0.1=SPIN, beta 0.1" "irft-2=IRFT T 2" \
  "irft-5=IRFT T 5" "irft-10=IRFT T 10" "rft-1=RFT, beta 1" "rft-0.3=RFT, beta 0.3" "rft-0.1=RFT, beta 0.1" \
  "irl-previous=IRL ref previous" "irl-initial=IRL ref initial" "irl-accumulated=IRL accumulated pairs" \
  "irl-long=IRL 4 epochs of reward" "irl-carried=IRL carried reward"
