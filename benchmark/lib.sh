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
