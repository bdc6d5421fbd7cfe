"""What bf16 promises on any CPU, emulated where it is not native. The other tests say float32 wherever a number matters."""

import json
import math
import signal

import pytest
import torch
from helpers import command, drive, make_data, make_model, metrics, weights

from common.data import read_pairs

MIXED = ["--mixed-precision", "bf16"]
PPO = "--sft-epochs 1 --total-episodes 8 --rollout-batch-size 4 --num-ppo-epochs 2 --reward-learning-rate 1e-3".split()
SCRIPTS = {
    "sft.py": ["--num-train-epochs", "1", "--batch-size", "8", "--per-device-train-batch-size", "8"],
    "irft.py": ["--T", "2", "--num-train-epochs", "1", "--ref", "previous"],
    "rft.py": ["--T", "1", "--num-train-epochs", "1", *PPO],
}
RUNS = {  # name -> script, flags
    "sft": ("sft.py", MIXED),
    "sft_float32": ("sft.py", ["--mixed-precision", "no"]),
    "irft": ("irft.py", MIXED),
    "irft_stored": ("irft.py", [*MIXED, "--dtype", "bfloat16"]),
    "rft": ("rft.py", MIXED),
}
KILLED = {"irft": 4, "irft_stored": 5, "rft": 12}  # name -> step: amid iteration 0, iteration 1, PPO


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All runs; some of them once more, killed and resumed; one on two processes."""
    folder = tmp_path_factory.mktemp("precision")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    scenarios, expected = [], []
    for name in RUNS:
        scenarios.append({"argv": argv(folder, name)})
        expected.append(0)
    for name, n in KILLED.items():
        out = folder / f"{name}_killed"
        scenarios.append({"argv": argv(folder, name, out), "at": "common.run.Run.step", "n": n})
        scenarios.append({"argv": [RUNS[name][0], "--resume", str(out)]})
        expected += [-signal.SIGKILL, 0]
    statuses, printed = drive(scenarios)
    assert statuses == expected, printed
    two = [*argv(folder, "sft", folder / "sft_two"), "--per-device-train-batch-size", "2"]
    statuses, printed = drive([{"argv": two}], config="cpu.yaml")
    assert statuses == [0], printed
    return folder


def argv(place, name: str, out=None) -> list[str]:
    script, flags = RUNS[name]
    return command(script, place / "model", place / "data.jsonl", out or place / name, *SCRIPTS[script], *flags)[1:]
