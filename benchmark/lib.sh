# once OUT NAME SCRIPT FLAGS...: run a script unless it has finished; resume one that was cut off.
once() {
  local out=$1/$2 script=$3
  shift 3
  if [ -f "$out/final/manifest.json" ]; then
    echo "$out is there: reused"
  elif [ -f "$out/args.json" ]; then
    python "$script" --resume "$out"
  else
    python "$script" --output-dir "$out" "$@"
  fi
}

# each_seed SEED...: the caller's one_seed for every seed, two at a time, each on half of the cores.
each_seed() {
  local seed
  for seed in "$@"; do
    one_seed "$seed" 2>&1 | sed -u "s/^/[seed $seed] /" &
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  done
  wait
}

# two_lanes OUT FLAGS...: SFT then SPIN beside IRFT, each lane on half of the cores.
two_lanes() {
  local out=$1
  shift
  export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
  (once "$out" sft sft.py "$@" && once "$out" spin irft.py --T 1 "$@") 2>&1 | sed -u 's/^/[sft, spin] /' &
  local lane=$!
  once "$out" irft irft.py --T 5 "$@" 2>&1 | sed -u 's/^/[irft] /'
  wait "$lane"
}

sizes=(--max-length 160 --max-new-tokens 48 --per-device-eval-batch-size 64)

# gold_world OUT DATA: rows split between gold reward and policies, a base policy, and a gold reward that knows its samples.
# Sets `held`, the held-out rows.
gold_world() {
  local out=$1 data=$2
  [ -f "$out/split/held_out.jsonl" ] || python benchmark/gold.py --dataset "$data" --max-samples 12000 --split-only --output-dir "$out/split"
  held=(--eval-dataset "$out/split/held_out.jsonl" --eval-samples 200)
  once "$out" base sft.py --model tiny --dataset "$out/split/demonstrations.jsonl" "${held[@]}" "${sizes[@]}" --max-samples 0 \
    --batch-size 32 --per-device-train-batch-size 32 --num-train-epochs 3 --learning-rate 5e-4
  if [ ! -f "$out/gold/final/manifest.json" ]; then
    rm -rf "$out/gold" # it cannot be resumed
    python benchmark/gold.py --dataset "$data" --max-samples 12000 --sampler "$out/base/final" --output-dir "$out/gold"
  fi
}

# held_out_pairs OUT: OUT/held_out/preferences.jsonl, pairs of the base's samples that the gold reward labels, of held-out prompts.
held_out_pairs() {
  local out=$1
  [ ! -f "$out/held_out/preferences.jsonl" ] || return 0
  rm -rf "$out/held_out"
  python benchmark/preferences.py --model "$out/base/final" --gold-reward-model "$out/gold/final" \
    --dataset "$out/split/held_out.jsonl" "${sizes[@]}" --max-preferences 400 --seed 2 --output-dir "$out/held_out"
}
