#!/usr/bin/env bash
# The AIHF paper's Fig. 5 and Tab. 1 on our scale: AIHF, RLHF, inverse RL alone, BC and IPL on three control tasks, and what changes with
# the data, the horizon and the reward's steps. One expert and one data set for each environment. A run that is there is used
# again; one that was cut off goes on. LANES runs at a time, one core each; about four core-hours. MORE=1 adds seeds on HalfCheetah.
#   LANES=2 SEEDS=3 bash benchmark/control.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/control}
seeds=${SEEDS:-3}
lanes=${LANES:-$(nproc)}
export OMP_NUM_THREADS=1

# go NAME FLAGS...: a run of aihf_mujoco.py in OUT/NAME, in a lane of its own
go() {
  local to=$out/$1
  shift
  while [ "$(jobs -rp | wc -l)" -ge "$lanes" ]; do wait -n; done
  if [ -f "$to/final.safetensors" ]; then
    echo "$to is there: reused"
  elif [ -f "$to/args.json" ]; then
    python aihf_mujoco.py --resume "$to" 2>&1 | sed -u "s|^|[$to] |" &
  else
    python aihf_mujoco.py --data-dir "$out/data" --output-dir "$to" --num-seeds "$seeds" "$@" 2>&1 | sed -u "s|^|[$to] |" &
  fi
}

for env in HalfCheetah Hopper Walker2d; do go "$env/bc" --env "$env-v5" --method bc --eval-every 2500; done # makes the data too
wait
for env in HalfCheetah Hopper Walker2d; do
  task=(--env "$env-v5")
  [ "$env" = Walker2d ] && task+=(--num-seeds "${WALKER_SEEDS:-1}")
  go "$env/aihf" "${task[@]}"
  go "$env/rlhf" "${task[@]}" --demo-weight 0
  go "$env/irl" "${task[@]}" --preference-weight 0
  go "$env/ipl" "${task[@]}" --method ipl --eval-every 1000
done
if [ -n "${MORE:-}" ]; then # as many seeds again, where a run is shortest
  more=(--env HalfCheetah-v5 --seed "$((seeds + 1))")
  go "HalfCheetah/aihf_seed_$((seeds + 1))" "${more[@]}"
  go "HalfCheetah/rlhf_seed_$((seeds + 1))" "${more[@]}" --demo-weight 0
  go "HalfCheetah/irl_seed_$((seeds + 1))" "${more[@]}" --preference-weight 0
  go "HalfCheetah/ipl_seed_$((seeds + 1))" "${more[@]}" --method ipl --eval-every 1000
  go "HalfCheetah/bc_seed_$((seeds + 1))" "${more[@]}" --method bc --eval-every 2500
fi
cheetah=(--env HalfCheetah-v5 --total-steps 50000)
for n in 1 4; do
  go "HalfCheetah/aihf_demonstrations_$n" "${cheetah[@]}" --num-demonstrations "$n"
  go "HalfCheetah/irl_demonstrations_$n" "${cheetah[@]}" --num-demonstrations "$n" --preference-weight 0
done
go HalfCheetah/aihf_demonstrations_cut "${cheetah[@]}" --num-demonstrations 1 --demonstration-steps 100
go HalfCheetah/irl_demonstrations_cut "${cheetah[@]}" --num-demonstrations 1 --demonstration-steps 100 --preference-weight 0
go HalfCheetah/aihf_flipped "${cheetah[@]}" --flip-labels 0.3
go HalfCheetah/rlhf_flipped "${cheetah[@]}" --flip-labels 0.3 --demo-weight 0
for k in 5 80; do go "HalfCheetah/aihf_reward_steps_$k" "${cheetah[@]}" --reward-steps "$k"; done
hopper=(--env Hopper-v5 --total-steps 100000 --horizon terminate)
go Hopper/aihf_terminate "${hopper[@]}"
go Hopper/rlhf_terminate "${hopper[@]}" --demo-weight 0
wait
python benchmark/control_table.py --runs "$out" --output "$out"
