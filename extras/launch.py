"""Checks of the launch: environment variables of torchrun and accelerate."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from common import UserError
from common.args import require


def check_launch() -> None:
    """Raise UserError if the launch asks for processes that could not find each other, or an engine that is not installed."""
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
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_ADDR") and "WORLD_SIZE" not in os.environ:
        # accelerate launch gives MASTER_ADDR to several processes, and to the only one that it starts in their place
        raise UserError(
            "launched for several processes, but accelerate runs 1: expected as many as were asked for. Type: accelerate launch"
            f" --config_file configs/cpu.yaml --num_processes N {Path(sys.argv[0]).name} ..., or unset MASTER_ADDR if you set it"
        )
    planned = "--dry-run" in sys.argv  # for another machine, where it may be installed
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not (planned or importlib.util.find_spec("deepspeed")):
        raise UserError(
            "DeepSpeed, which the accelerate config asks for: found it not installed here, expected pip install -r"
            " requirements-engines.txt, or another file of configs/"
        )


def check_engine(args, engine: str, processes: int, script: str) -> None:
    """Raise UserError if accelerate runs another number of processes than the launcher, or if a flag rules the engine out."""
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if processes != expected:
        raise UserError(
            f"launched for {expected} processes, but accelerate runs {processes}: they would train apart. Type:"
            f" accelerate launch --config_file configs/cpu.yaml --num_processes {expected} {script}.py ..."
        )
    one = "one process, or DDP (configs/ddp.yaml): 4-bit weights are not cut up"
    require(not args.load_in_4bit or engine == "plain", "load_in_4bit", engine, one)
    known = args.dtype == "float32" or args.mixed_precision == "bf16" or not engine.startswith("zero")
    found = f"{args.dtype} without mixed precision, under {engine}"
    require(known, "dtype", found, "--mixed-precision bf16 beside it")


def check_installed(args) -> None:
    """Raise UserError if the run's tracker or sampler is not installed, or the tracker or the hub has no key."""
    from extras.hub import check_hub
    from extras.trackers import check_tracker

    check_hub(args)
    check_tracker(args.report_to)
    samples = "--generation hf beside it: torch's switch does not reach vLLM"
    require(not (args.deterministic and args.generation == "vllm"), "deterministic", True, samples)
    require(
        args.generation == "hf" or importlib.util.find_spec("vllm") is not None, "generation",
        "vllm, which is not installed here",
        "hf, or vLLM installed: pip install -r requirements-gpu.txt (without an NVIDIA GPU: make install-vllm)",
    )  # fmt: skip
