#!/usr/bin/env bash
# TruthfulQA (MC2, 0 shots) and GSM8K (5 shots) by lm-eval 0.4.13, from local files and without a hub (docs/evaluate.md).
#   LM_EVAL_DATA=DATA bash benchmark/lm_eval.sh MODEL OUT [flags of lm-eval, such as --limit 100 --batch_size 16]
# DATA holds TruthfulQA.csv, gsm8k_train.jsonl and gsm8k_test.jsonl. LM_EVAL is the command, by default lm-eval; it lives in an
# environment of its own. TASKS may name one of the two. A task whose results are in OUT is not run again.
set -euo pipefail
model=$1 out=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
for task in ${TASKS:-truthfulqa_mc2_local gsm8k_local}; do
  if [ -n "$(find "$out/$task" -name 'results_*.json' 2>/dev/null)" ]; then
    echo "$out/$task is there: reused"
    continue
  fi
  ${LM_EVAL:-lm-eval} run --model hf --model_args "pretrained=$model,dtype=${DTYPE:-bfloat16}" --tasks "$task" \
    --include_path "$here/lm_eval" --output_path "$out/$task" "$@"
done
