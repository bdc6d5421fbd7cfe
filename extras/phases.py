"""--stop-after: the phases of a script that a run can end after, with all of their work saved."""

import re
import sys
from pathlib import Path

from common import UserError

PHASES = {  # script -> its phases, in their order, as the progress on the screen names them
    "sft": ("epoch",),
    "irft": ("answers", "training"),
    "rft": ("sft", "answers", "reward", "ppo"),
    "aihf": ("sft", "answers", "reward", "online-dpo"),
    "aihf_ppo": ("sft", "answers", "reward", "ppo"),
    "aihf_direct": ("answers", "training"),
    "irl_ppo_tldr": ("sft", "answers", "reward", "ppo"),
    "irl_dpo_ultrachat": ("sft", "answers", "reward", "online-dpo", "best-of-n"),
    "aihf_mujoco": ("data",),
}


def word_of(phase: str) -> str:
    """The word for a phase on the command line: online-dpo for "iteration 3: online DPO", epoch for "epoch 1"."""
    return re.sub(r"^iteration \d+: | \d+$", "", phase).lower().replace(" ", "-")


def check_phase(script: str, word: str) -> None:
    """Raise UserError, with the list, if the script has no phase of this name."""
    if word and word not in PHASES[script]:
        raise UserError(f"--stop-after: found {word}, expected one of {', '.join(PHASES[script])}")


def stop_after(run, phase: str, worked: bool = True) -> None:
    """End the run on all ranks, with status 0, if --stop-after names this phase, whose work has just been saved.

    worked: False if this process found the phase done already.
    """
    if worked and run.args.stop_after and word_of(phase) == run.args.stop_after:
        run.print(f"--stop-after {run.args.stop_after}: stopped; continue with --resume {run.dir}")
        run.end()
        sys.exit(0)


def answers_or_rows(path: Path) -> str:
    """The phase that makes a file of rows: answers for generations/iter_<t>.parquet, else the file's own name."""
    return "answers" if path.stem.startswith("iter_") else path.stem
