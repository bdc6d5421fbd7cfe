#!/usr/bin/env bash
# Speed beside TRL, a plain PPO, vLLM and `generate` on this machine: tables for docs/performance.md. The first run makes TRL's
# environment (1.5 GB). RIVALS_VENV names another folder for it. vLLM is compared with if `make install-vllm` has made
# .venv-vllm, or VLLM_VENV names another folder. About 15 minutes on two quiet cores, and 5 more for `generate`.
#   bash benchmark/rivals.sh
#   bash benchmark/rivals.sh --what dpo sft --shapes tiny 17m --repeats 5
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${RIVALS_VENV:-.venv-rivals}
vllm=${VLLM_VENV:-.venv-vllm}/bin/python
if ! "$venv/bin/python" -c "import trl, peft" 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} torch==2.13.0 trl==1.16.0 "transformers>=5.16.1,<5.20" peft
fi
[ -x "$vllm" ] || vllm=""
# Threads that wait for work must not spin while another process has its turn.
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0 HF_HUB_DISABLE_TELEMETRY=1
python benchmark/rivals.py --rivals-python "$venv/bin/python" --vllm-python "$vllm" "$@"
if [ $# -eq 0 ]; then
  echo
  python benchmark/sampling.py
fi
