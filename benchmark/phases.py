"""Show where the time of a run goes: the phases of its timing.jsonl, and the parts of PPO, with their shares.

python benchmark/phases.py --run runs/rft
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.tables import read_log  # noqa: E402
from common import UserError  # noqa: E402
from common.args import main

KNOWN = ("outer_iteration", "step", "evaluation", "phase", "items", "seconds")


@dataclass
class Args:
    run: str
    """directory of a finished run."""


def phases(path: Path) -> dict[str, tuple[int, float]]:
    """{phase or part: (items, seconds)}, summed over iterations; a phase with parts is given by its parts and the rest."""
    out: dict[str, tuple[int, float]] = {}

    def add(name: str, items: int, seconds: float) -> None:
        before = out.get(name, (0, 0.0))
        out[name] = (before[0] + items, before[1] + seconds)

    rows = read_log(path, "--run")
    if not all({"phase", "items", "seconds"} <= row.keys() for row in rows):
        raise UserError(
            f"--run: found rows without phase, items and seconds in {path}, expected the directory of a run"
        )
    inside = any("evaluate" in r for r in rows)  # evaluations within PPO are also phases of their own
    for r in rows:
        name = re.sub(r"(iteration|evaluation|reward|epoch) \d+", r"\1", r["phase"]).removeprefix("iteration: ")
        if name == "evaluation" and inside:
            continue
        parts = {k: v for k, v in r.items() if k not in KNOWN}
        for part, seconds in parts.items():
            add(f"{name}: {part}", r["items"], seconds)
        add(f"{name}: rest" if parts else name, r["items"], r["seconds"] - sum(parts.values()))
    return out


def show(args: Args) -> None:
    found = phases(Path(args.run) / "timing.jsonl")
    total = sum(seconds for _, seconds in found.values())
    print("| phase | items | seconds | share |\n|---|---|---|---|")
    for name, (items, seconds) in found.items():
        print(f"| {name} | {items} | {seconds:.1f} | {seconds / (total or 1):.0%} |")
    print(f"| all | | {total:.1f} | |")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
