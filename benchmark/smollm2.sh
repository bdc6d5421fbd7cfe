#!/usr/bin/env bash
# Experiments on a real pretrained model, SmolLM2-135M-Instruct (docs/smollm2.md): people's pairs, summaries, and the field's
# evaluations. Whatever is there is reused, and a run that was cut off is resumed: give the same command again.
#   bash benchmark/smollm2.sh OUT [DATA]                  # two CPU cores, an evening
#   bash benchmark/smollm2.sh OUT [DATA] --device cuda    # the full sizes, three seeds
# DATA is a folder with hh_harmless.jsonl and debian_tldr.jsonl, and for the third part also llmbar/, pandalm.json, TruthfulQA.csv
# and gsm8k_*.jsonl. Without DATA pairs and posts come from the hub, and the third part has the held-out pairs alone.
# MODEL is the start, by default smollm2-135m (a folder of that name, or the hub's). PARTS names parts to run: hh summaries field.
# SEEDS, ROWS, EVAL, WINDOW, ANSWER (tokens), EPISODES, PAIRS (of a file), LIMIT (of lm-eval) replace the sizes below; SFT_RATE and
# RATE the learning rates, LORA_SFT_RATE and LORA_RATE those with LoRA; FLAGS are added to every run.
set -euo pipefail
device=cpu words=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?"--device: found nothing, expected cpu or cuda"} && shift 2 ;;
    *) words+=("$(realpath -m "$1")") && shift ;;
  esac
done
out=${words[0]:?"OUT: found nothing, expected a folder"} data=${words[1]:-}
case $device in
  cpu) seeds=1 rows=300 eval=100 window=320 answer=64 episodes=320 batch=4 limit=40 ts="2 5" lora=irft summaries=300 ;;
  cuda) seeds="1 2 3" rows=0 eval=500 window=1024 answer=256 episodes=2560 batch=16 limit= ts="2 5 10" lora="sft spin irft" summaries=8000 ;;
  *) echo "--device: found $device, expected cpu or cuda" >&2 && exit 2 ;;
esac
[ -z "${MODEL:-}" ] || [ ! -d "$MODEL" ] || MODEL=$(realpath "$MODEL")
cd "$(dirname "$0")/.."
source benchmark/lib.sh
model=${MODEL:-smollm2-135m} parts=${PARTS:-hh summaries field}
seeds=${SEEDS:-$seeds} rows=${ROWS:-$rows} eval=${EVAL:-$eval} window=${WINDOW:-$window} answer=${ANSWER:-$answer}
episodes=${EPISODES:-$episodes} limit=${LIMIT:-$limit} summaries=${ROWS:-$summaries}
if [ ! -f "$out/data/summaries_held_out.jsonl" ]; then
  sources=()
  [ -z "$data" ] || sources=(--pairs "$data/hh_harmless.jsonl" --summaries "$data/debian_tldr.jsonl")
  python benchmark/smollm2_data.py "${sources[@]}" --output-dir "$out/data"
fi
# shellcheck disable=SC2206
sizes=(--eval-samples "$eval" --max-length "$window" --max-new-tokens "$answer" --batch-size 16 --per-device-train-batch-size "$batch"
  --per-device-eval-batch-size $((4 * batch)) ${FLAGS:-})

# measured FILE FLAGS...: evaluate.py, unless its FILE is there; an evaluation that was cut off begins again.
measured() {
  local folder
  folder=$(dirname "$1")
  [ -f "$1" ] && echo "$1 is there: reused" && return 0
  rm -rf "$folder"
  shift
  python evaluate.py --output-dir "$folder" --per-device-eval-batch-size $((4 * batch)) "$@"
}

# method FOLDER START NAME SEED FLAGS...: one run; NAME is sft, rft, spin or irftT, with _lora at its end for LoRA, r = 64.
method() {
  local folder=$1 name=$3 full=${3%_lora} shared=(--model "$2" --seed "$4" "${sizes[@]}")
  local sft_rate=${SFT_RATE:-2e-5} rate=${RATE:-5e-6}
  shift 4
  [ "$name" = "$full" ] || { shared+=(--lora-r 64) && sft_rate=${LORA_SFT_RATE:-2e-4} rate=${LORA_RATE:-5e-5}; }
  case $full in
    sft) once "$folder" "$name" sft.py "${shared[@]}" --learning-rate "$sft_rate" "$@" ;;
    rft) once "$folder" rft rft.py "${shared[@]}" --learning-rate "$rate" --sft-epochs 0 --total-episodes "$episodes" \
      --rollout-batch-size 32 --eval-updates 10 "$@" ;;
    spin) once "$folder" "$name" irft.py --T 1 "${shared[@]}" --learning-rate "$rate" "$@" ;;
    irft*) once "$folder" "$name" irft.py --T "${full#irft}" "${shared[@]}" --learning-rate "$rate" "$@" ;;
  esac
}

# 1. Chosen answers alone: log-prob gap and accuracy on held-out pairs of people (RFT paper, Fig. 1 right and Table 8).
names="sft spin"
for t in $ts; do names+=" irft$t"; done
names+=" rft"
for name in $lora; do names+=" ${name/irft/irft5}_lora"; done
if [[ $parts == *hh* ]]; then
  for seed in $seeds; do
    for name in $names; do
      method "$out/hh/$seed" "$model" "$name" "$seed" --dataset "$out/data/hh_train.jsonl" \
        --eval-dataset "$out/data/hh_pairs.jsonl" --max-samples "$rows" --cut-demonstrations
    done
  done
fi

# 2. Summaries: SFT to its minimum, and every method from there. Near-greedy samples at the end.
if [[ $parts == *summaries* ]]; then
  short=(--dataset "$out/data/summaries_train.jsonl" --eval-dataset "$out/data/summaries_held_out.jsonl" --max-samples "$summaries")
  method "$out/summaries" "$model" sft 1 "${short[@]}" --keep-best --num-train-epochs 4
  base=$out/summaries/sft/final
  greedy=(--temperature 0.01 --eval-dataset "$out/data/summaries_held_out.jsonl" --eval-samples "$eval" --max-length "$window"
    --max-new-tokens "$answer")
  for seed in $seeds; do
    for name in sft spin irft2 irft5; do
      method "$out/summaries/$seed" "$base" "$name" "$seed" "${short[@]}"
      measured "$out/summaries/$seed/greedy/$name/evaluation.json" --model "$out/summaries/$seed/$name/final" "${greedy[@]}"
    done
  done
  measured "$out/summaries/greedy/base/evaluation.json" --model "$base" "${greedy[@]}"
fi

# 3. The field's evaluations of the models of part 1: all held-out pairs of people, other labelled pairs, lm-eval where it is
# installed, MT-Bench where a judge is named.
if [[ $parts == *field* ]]; then
  if [ -n "$data" ] && [ ! -f "$out/data/labelled.jsonl" ]; then
    files=("$data"/llmbar/*.json)
    [ $device = cpu ] || files+=("$data/pandalm.json")
    python benchmark/reward_pairs.py --files "${files[@]}" --most "${PAIRS:-0}" --output "$out/data/labelled.jsonl"
  fi
  for run in base "$out"/hh/*/*/; do
    name=base final=$model models=()
    if [ "$run" != base ]; then
      [ -f "$run/final/manifest.json" ] || continue
      name=${run#"$out/hh/"} name=${name%/} final=${run}final models=(--ref-model "$model")
      [ ! -d "$run/reward" ] || models+=(--reward-model "${run}reward")
    fi
    measured "$out/field/people/$name/reward_pairs.json" --model "$final" "${models[@]}" \
      --reward-pairs "$out/data/hh_pairs.jsonl" --max-length "$window" --max-new-tokens "$answer"
    if [ -n "$data" ]; then
      measured "$out/field/pairs/$name/reward_pairs.json" --model "$final" "${models[@]}" \
        --reward-pairs "$out/data/labelled.jsonl" --max-length 1024 --max-new-tokens 64
    fi
    if [ -n "${JUDGE_MODEL:-}" ] && [ -f "$data/mt_bench_questions.jsonl" ]; then
      # shellcheck disable=SC2086
      measured "$out/field/mt_bench/$name/mt_bench.json" --model "$final" --mt-bench "$data/mt_bench_questions.jsonl" \
        --max-length 2048 --max-new-tokens 512 --judge-model "$JUDGE_MODEL" ${JUDGE_BASE_URL:+--judge-base-url $JUDGE_BASE_URL}
    fi
    if command -v "${LM_EVAL:-lm-eval}" > /dev/null && [ -n "$data" ]; then
      LM_EVAL_DATA=$data bash benchmark/lm_eval.sh "$final" "$out/field/lm_eval/$name" ${limit:+--limit "$limit"} --batch_size 8
    fi
  done
fi
python benchmark/smollm2_table.py --runs "$out" --output "$out"
