"""vLLM's side of sampling in rivals.py, run by the Python of `make install-vllm`: answers to prompts, in turns.

    python benchmark/rivals_vllm.py CASE.json

The engine runs in this process, on the same model, in the same precision, without CUDA graphs or torch.compile, which take
longer to start on a CPU than they save. All answers of a turn are asked for at once; vLLM makes its batches itself.
"""

import json
import os
import sys
from pathlib import Path

from turns import Clock, Turns

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def main(case: dict) -> None:
    turns = Turns()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=case["model"], skip_tokenizer_init=True, generation_config="vllm", dtype="float32", max_model_len=512,
        enforce_eager=True, seed=0,
    )  # fmt: skip
    size = case["batch"] * case["updates"]

    def answer(turn: int) -> int:
        rows = case["rows"][turn * size : (turn + 1) * size]
        settings = [
            SamplingParams(
                temperature=1.0, max_tokens=case["new_tokens"], ignore_eos=True, stop_token_ids=case["ends"], detokenize=False,
                seed=turn * size + i,
            )
            for i in range(len(rows))
        ]  # fmt: skip
        found = engine.generate([{"prompt_token_ids": r["prompt_ids"]} for r in rows], settings, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    turns.report(losses=[], tokens=answer(0))
    turn = 1
    while turns.wait():
        clock = Clock()
        tokens = answer(turn)
        turns.report(seconds=clock.seconds(), tokens=tokens)
        turn += 1


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
