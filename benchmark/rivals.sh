#!/usr/bin/env bash
# Speed beside TRL and a plain PPO on this machine: a table for docs/performance.md. Makes TRL's environment at its first run
# (1.5 GB; RIVALS_VENV names another folder). About 15 minutes on two quiet cores.
#   bash benchmark/rivals.sh
#   bash benchmark/rivals.sh --what dpo sft --shapes tiny 17m --repeats 5
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${RIVALS_VENV:-.venv-rivals}
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c "import trl, peft" 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} torch==2.13.0 trl==1.16.0 "transformers>=5.16.1,<5.20" peft
fi
# Threads that wait for work must not spin while another process has its turn.
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0 HF_HUB_DISABLE_TELEMETRY=1
exec python benchmark/rivals.py --rivals-python "$venv/bin/python" "$@"
