"""How time and memory grow with T, candidates, rows, answers' lengths and processes, beside the plan of --dry-run.

Every row is a run of a script on the embedded model, on one core for each process. Its time is that of its phases, without
the imports; its memory the growth of the largest process's resident set over one that has only imported. The plan's hours
come from rates that --dry-run measures once, before the first run. Five minutes on two quiet cores; prints Markdown.

    python benchmark/cost.py
    python benchmark/cost.py --only T rows
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.phases import phases  # noqa: E402
from common import UserError  # noqa: E402
from common.args import main  # noqa: E402

SMALL = dict(max_samples=192, eval_samples=32, num_train_epochs=1, save_steps=1000, mixed_precision="no")
TABLES = {  # what grows -> (title, script, flag, its values, other flags)
    "T": ("outer iterations", "irft.py", "T", (1, 2, 4), {}),
    "N": ("candidates of a prompt", "irl_dpo_ultrachat.py", "num_generations", (2, 4, 8), dict(
        T=1, max_samples=64, total_prompts=64, rollout_batch_size=64, sft_epochs=1)),
    "rows": ("demonstrations", "sft.py", "max_samples", (192, 384, 768), {}),
    "lengths": ("longest answer, tokens", "irft.py", "max_new_tokens", (12, 24, 48), dict(T=1)),
    "processes": ("processes", "irft.py", "", (1, 2), dict(T=1, max_samples=384)),
}  # fmt: skip
UNITS = {"": 1, "k": 1e3, "M": 1e6, "s": 1, "min": 60, "h": 3600}


@dataclass
class Args:
    only: tuple[str, ...] = tuple(TABLES)
    """what grows: T, N, rows, lengths, processes."""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def child(words: list[str]) -> tuple[str, int]:
    """(stdout, peak resident bytes) of a command, of its largest process. UserError if it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            last = (err.read().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{' '.join(words[1:3])}: found exit status {process.returncode} ({last}), expected 0")
        return out.read(), usage.ru_maxrss * 1024


def number(text: str, pattern: str) -> float:
    """The number and unit that a pattern finds in what --dry-run prints."""
    found = re.search(pattern, text)
    if not found:
        raise UserError(f"--dry-run: found no {pattern!r} in its plan, expected hours and rates")
    return float(found[1]) * UNITS[found[2]]


def command(script: str, flags: dict, *more: str) -> list[str]:
    return [script, *(word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))), *more]


def measured(script: str, flags: dict, processes: int) -> tuple[float, int]:
    """(seconds of all phases, peak resident bytes) of a run."""
    start = [sys.executable]
    if processes > 1:
        config = str(ROOT / "configs" / "cpu.yaml")
        start = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", config]
        start += ["--num_processes", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        _, peak = child([*start, *command(script, flags, "--output-dir", f"{folder}/run")])
        return sum(seconds for _, seconds in phases(Path(folder) / "run" / "timing.jsonl").values()), peak


def planned(script: str, flags: dict, processes: int, rates: tuple[float, float]) -> tuple[float, float, float]:
    """(seconds, seconds at most, bytes) of the plan."""
    given = dict(tokens_per_second=rates[0], generation_tokens_per_second=rates[1], num_processes=processes)
    plan = child([sys.executable, *command(script, {**flags, **given}, "--dry-run")])[0]
    expected = number(plan, r"on a token; ([\d.e+]+) (s|min|h)\b")
    most = number(plan, r"on a token; (?:.*?at most )?([\d.e+]+) (s|min|h)\)? on")
    return expected, most, max(float(x) for x in re.findall(r"memory per device, .*: about ([\d.]+) GiB", plan)) * 2**30


def show(args: Args) -> None:
    """Print the tables."""
    if unknown := set(args.only) - TABLES.keys():
        raise UserError(f"--only: found {', '.join(sorted(unknown))}, expected some of {', '.join(TABLES)}")
    plan = child([sys.executable, *command("irft.py", SMALL, "--dry-run", "--tokens-per-second", "measure")])[0]
    rates = number(plan, r"at ([\d.]+) ?(|k|M) tokens a second"), number(plan, r"device, ([\d.]+) ?(|k|M) generated")
    print(f"Rates: {rates[0]:.0f} tokens a second trained on one core, {rates[1]:.0f} generated.\n", flush=True)
    imports = (
        "import irft, rft, accelerate, transformers; transformers.AutoModelForCausalLM, transformers.AutoTokenizer"
    )
    base = child([sys.executable, "-c", imports])[1]
    for name in args.only:
        title, script, flag, values, own = TABLES[name]
        print(f"| {title} (`{script}`) | measured, s | plan, s | plan / measured | measured, MiB | plan, MiB |")
        print("|---|---|---|---|---|---|")
        for value in values:
            flags = {**SMALL, **own} | ({flag: value} if flag else {})
            processes = value if name == "processes" else 1
            seconds, peak = measured(script, flags, processes)
            expected, most, size = planned(script, flags, processes, rates)
            guess = f"{expected:.1f} (at most {most:.1f})"
            memory = f"{max(peak - base, 0) / 2**20:.0f} | {size / 2**20:.0f}"
            print(f"| {value} | {seconds:.1f} | {guess} | {expected / seconds:.2f} | {memory} |", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
