"""Checks of the launch: environment variables of torchrun and accelerate."""

import importlib.util
import os
import re
from pathlib import Path

from common import UserError


# ---- the launch ----
def check_launch() -> None:
    """UserError where the environment asks for processes that could not find each other, or an engine that is not installed."""
    numbers = {"WORLD_SIZE": 0, "RANK": 0, "LOCAL_RANK": 0}
    for name in numbers.keys() & os.environ.keys():
        if not re.fullmatch(r"-?\d+", os.environ[name]):
            found = f"{name}: found {os.environ[name]!r} in the environment"
            raise UserError(f"{found}, expected a whole number, as torchrun sets it")
        numbers[name] = int(os.environ[name])
    world = numbers["WORLD_SIZE"]
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if world > 1 and missing:
        raise UserError(
            f"WORLD_SIZE: found {world} in the environment but no {', '.join(missing)}, expected all that torchrun and"
            f" accelerate launch set: unset WORLD_SIZE, or type accelerate launch --num_processes {world} ..."
        )
    if world and numbers["RANK"] >= world:
        raise UserError(f"RANK: found {numbers['RANK']} in the environment, expected 0 to {world - 1} (WORLD_SIZE - 1)")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not importlib.util.find_spec("deepspeed"):
        raise UserError(
            "DeepSpeed, which the accelerate config asks for: found it not installed here, expected pip install -r"
            " requirements-engines.txt, or another file of configs/"
        )


def expected_processes() -> int:
    """How many processes the launcher was asked for: torchrun's WORLD_SIZE, or the words of `accelerate launch`."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    import psutil
    import yaml

    words = psutil.Process().parent().cmdline() if psutil.Process().parent() else []
    if "launch" not in words or not any("accelerate" in w for w in words):
        return 1
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name in ("--num_processes", "--num-processes"):
        if name in words:
            return int(words[words.index(name) + 1])
    for name in ("--config_file", "--config-file"):
        if name in words:
            return int(yaml.safe_load(Path(words[words.index(name) + 1]).read_text()).get("num_processes") or 1)
    return 1
