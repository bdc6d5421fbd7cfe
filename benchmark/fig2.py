"""The RFT paper's Fig. 2 from runs of rft.py with a gold reward and a baseline: score and win rate against policy updates.

Intervals are 95%: a hierarchical bootstrap over seeds and held-out rows, over rows alone where there is one seed. Thin lines are
single seeds.

    python benchmark/fig2.py --runs runs/1/rft runs/2/rft --output runs/fig2
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.tables import (  # noqa: E402
    about_intervals,
    columns_of,
    evaluations,
    mean_and_interval,
    require_measures,
    require_same_rows,
    script_of,
)
from common import UserError  # noqa: E402
from common.args import main
from common.evals import pairwise_wins
from extras import figures

MEASURES = {  # column of the table -> metric of evals/<updates>.parquet, digits
    "gold score": ("gold/score", 2),
    "score - base's": ("gold/gain", 2),
    "win rate over base": ("gold/win_rate_base", 3),
    "win rate over SFT": ("gold/win_rate_baseline", 3),
    "learned reward": ("reward/samples", 3),
    "KL to the base, nats": ("kl_k1", 3),
    "NLL": ("nll", 2),
    "ROUGE-L": ("rouge_l", 3),
    "length": ("completions/mean_length", 1),
}
SFT, _, RFT, *_ = figures.COLORS
BASE = figures.GREY


@dataclass
class Args:
    runs: tuple[str, ...]
    """run directories of rft.py, one per seed, made with --gold-reward-model and --baseline."""
    output: str = "runs/fig2"
    """folder for fig2.md, fig2.json and fig2.png."""


def load(directory: Path) -> dict[int, dict[str, np.ndarray]]:
    """{updates: {metric: (rows,)}} of a run of rft.py. UserError if it is of another script, or lacks a measure."""
    if (script := script_of(directory, "--runs")) != "rft":
        raise UserError(f"--runs: found a run of {script}.py in {directory}, expected runs of rft.py")
    found = {e.number: e.columns for e in evaluations(directory)}
    needed = ["gold/score", "gold/win_rate_base", "gold/win_rate_baseline"]  # the figure's
    for number, columns in found.items():
        hint = ", with --gold-reward-model and --baseline"
        require_measures(columns, ["row", *needed], f"{directory}, evaluation {number}", hint=hint)
    return found


def load_levels(directory: Path) -> dict[str, np.ndarray]:
    """Gold scores of demonstrations, base and baseline, (rows,) each."""
    path = directory / "evals" / "reference.parquet"
    columns, names = columns_of(path, "--runs"), ("demonstrations", "base", "baseline")
    require_measures(columns, [f"gold_{name}" for name in names], path)
    return {name: columns[f"gold_{name}"] for name in names}


def with_seeds(values: list[np.ndarray]) -> dict[str, float]:
    """Mean over seeds and rows, its interval, and each seed's mean."""
    mean, low, high = mean_and_interval(values)
    return {"mean": mean, "low": low, "high": high, "seeds": [float(v.mean()) for v in values]}


def summarise(runs: list[dict], levels: list[dict]) -> dict[str, dict]:
    """{row of the table: {measure: mean, low, high, seeds}} of the levels and of RFT at every evaluation."""
    table = {}
    for name in ("demonstrations", "base", "baseline"):
        label = {"demonstrations": "demonstrations", "base": "base", "baseline": "SFT, selected"}[name]
        table[label] = {"gold/score": with_seeds([level[name] for level in levels])}
        gain = [level[name] - level["base"] for level in levels]
        table[label]["gold/gain"] = with_seeds(gain)
        if name == "baseline":
            over = [pairwise_wins(level["baseline"], level["base"]) for level in levels]
            table[label]["gold/win_rate_base"] = with_seeds(over)
    for updates in runs[0]:
        rows = [
            {**run[updates], "gold/gain": run[updates]["gold/score"] - level["base"]}
            for run, level in zip(runs, levels, strict=True)
        ]
        table[f"RFT, {updates} updates"] = {
            metric: with_seeds([r[metric] for r in rows])
            for metric, _ in MEASURES.values()
            if all(metric in r for r in rows)
        }
    return table


def markdown(table: dict[str, dict]) -> str:
    lines = ["| | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for label, row in table.items():
        cells = []
        for metric, digits in MEASURES.values():
            r = row.get(metric)
            cells.append(f"{r['mean']:.{digits}f} [{r['low']:.{digits}f}, {r['high']:.{digits}f}]" if r else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(runs: list[dict], table: dict[str, dict], path: Path) -> None:
    fig, ((left, right),) = figures.subplots(1, 2, (9.5, 3.6))
    updates = list(runs[0])

    def curve(ax, metric: str, color: str, label: str) -> None:
        points = [table[f"RFT, {u} updates"][metric] for u in updates]
        mean, low, high = ([p[key] for p in points] for key in ("mean", "low", "high"))
        seeds = [(updates, [p["seeds"][seed] for p in points]) for seed in range(len(runs))]
        figures.draw(ax, updates, mean, low, high, color, label, seeds)

    curve(left, "gold/score", RFT, "RFT on the selected")
    for label, name, color in (("SFT on the selected", "SFT, selected", SFT), ("base: SFT on all", "base", BASE)):
        level = table[name]["gold/score"]
        left.axhline(level["mean"], color=color, lw=1.6, ls="--", label=label)
        left.axhspan(level["low"], level["high"], color=color, alpha=0.1, lw=0)
    left.set(xlabel="PPO updates", ylabel="gold score of samples, reward units")
    left.set_title("(a) average score", loc="left")
    curve(right, "gold/win_rate_base", BASE, "over the base")
    curve(right, "gold/win_rate_baseline", SFT, "over SFT on the selected")
    figures.level(right, 0.5)
    right.set(xlabel="PPO updates", ylabel="win rate, share of prompts")
    right.set_title("(b) win rate of RFT", loc="left")
    for ax in (left, right):
        ax.legend(frameon=False, loc="best")
    figures.caption(fig, about_intervals(len(runs)))
    figures.save(fig, path)


def fig2(args: Args) -> None:
    folders = [Path(d) for d in args.runs]
    if len({d.resolve() for d in folders}) < len(folders):
        raise UserError("--runs: found a directory twice, expected one for each seed")
    runs = [load(d) for d in folders]
    levels = [load_levels(d) for d in folders]
    if any(run.keys() != runs[0].keys() for run in runs):
        raise UserError("--runs: found runs with evaluations at other updates, expected the same ones")
    require_same_rows({f"{d}, {u} updates": c for d, run in zip(folders, runs, strict=True) for u, c in run.items()})
    table = summarise(runs, levels)
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    text = f"{about_intervals(len(runs))}\n\n{markdown(table)}"
    (out / "fig2.md").write_text(text)
    (out / "fig2.json").write_text(json.dumps(table, indent=2) + "\n")
    figure(runs, table, out / "fig2.png")
    print(text)
    print(f"table: {out / 'fig2.md'}   figure: {out / 'fig2.png'}")


if __name__ == "__main__":
    main(lambda: fig2(tyro.cli(Args, description=__doc__)))
