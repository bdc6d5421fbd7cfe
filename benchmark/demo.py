"""The demo's table, samples and figure: methods that learn from an expert whose reward a reader can see.

The reward is 1 for an answer that begins with the expert's word, else 0 (benchmark/best_of.py). Two lines of theory are
exact, from the probability p(x) with which the base model begins its answer to x with the word. The expert's share is the
mean of 1 - (1 - p)^N. A reward that is learned on the base model's answers, as with T = 1, ends at
pi_ref (D/pi_ref)^(1/beta) / Z (docs/theory.md, section 2), whose share is the second line. D is the expert.

    python benchmark/demo.py --expert runs/demo/expert --runs SFT=runs/demo/sft SPIN=runs/demo/spin --output runs/demo
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.best_of import reward_of  # noqa: E402
from benchmark.compare import COLORS, read_folders
from benchmark.tables import (
    Columns,
    about_intervals,
    cell,
    evaluations,
    markdown,
    of_seeds,
    read_json,
    require_same_rows,
)
from common.args import main
from common.store import read_pairs
from extras.sources import load_rows

MEASURES = {"good": 3, "nll": 2, "kl_k3": 2, "completions/mean_length": 1}  # column -> digits
TITLES = {
    "nll": "NLL of the expert's answers, nats",
    "kl_k3": "KL to the base, nats",
    "completions/mean_length": "tokens",
}
SHOWN = 4  # prompts whose answers are printed


@dataclass
class Args:
    runs: tuple[str, ...]
    """LABEL=DIR[,DIR...]: one method, one run directory per seed."""
    expert: tuple[str, ...]
    """folders that benchmark/best_of.py has made, one per seed."""
    output: str = "runs/demo"
    """folder for table.md and figure.png."""
    beta: float = 0.1
    """KL weight of the line of T = 1."""


@dataclass
class Point:
    """One evaluation of a run."""

    step: int
    columns: Columns  # measure -> (rows,)
    texts: list[str]


# ---- what theory says ----
def expert_share(p: np.ndarray, n: int) -> np.ndarray:
    """Probability that one of n samples is good if each is with probability p. (prompts,) -> (prompts,)"""
    return 1 - (1 - p) ** n


def limit_share(p: np.ndarray, n: int, beta: float) -> np.ndarray:
    """Probability of a good answer under pi_ref (D/pi_ref)^(1/beta) / Z, where D is the best of n samples of pi_ref.

    D/pi_ref is the same number for all good answers to a prompt, and another one for all others. p: (prompts,) in (0, 1).
    """
    expert = expert_share(p, n)
    log_odds = np.log(p / (1 - p)) + (np.log(expert / p) - np.log((1 - expert) / (1 - p))) / beta
    return 1 / (1 + np.exp(-log_odds))


# ---- runs ----
def load(folder: Path, reward: Callable[[list[str]], np.ndarray]) -> list[Point]:
    """Evaluations of a run, with the measure `good`: the reward of its samples. reward: texts -> (texts,)"""
    points = []
    for evaluation in evaluations(folder):
        texts = [row["sample"] for row in read_pairs(folder / "evals" / f"{evaluation.number:04d}.parquet")]
        points.append(Point(evaluation.step, {**evaluation.columns, "good": reward(texts)}, texts))
    return points


# ---- what is shown ----
def table(methods: dict[str, list[list[Point]]], lines: dict[str, float], word: str) -> str:
    first = next(iter(methods.values()))
    seeds = max(map(len, methods.values()))
    rows = [[f"{name}, exact", f"{share:.3f}", "", "", ""] for name, share in lines.items()]
    last = {"base model": [run[0] for run in first]} | {label: [r[-1] for r in runs] for label, runs in methods.items()}
    for label, points in last.items():
        cells = [cell([p.columns[name] for p in points], digits) for name, digits in MEASURES.items()]
        rows.append([of_seeds(label, len(points), seeds), *cells])
    return about_intervals(seeds) + "\n\n" + markdown(["", f'begins with "{word}"', *TITLES.values()], rows)


def samples(methods: dict[str, list[list[Point]]], prompts: list[str]) -> str:
    """The last answers of the first seed to its first prompts, below those of the base model. prompts: by number of row."""
    runs = {label: seeds[0] for label, seeds in methods.items()}
    base = next(iter(runs.values()))[0]
    lines = []
    for i, row in enumerate(base.columns["row"][:SHOWN]):
        said = {"base model": base.texts[i]} | {label: run[-1].texts[i] for label, run in runs.items()}
        lines += [prompts[int(row)].splitlines()[0], *(f"  {label:<14} {text}" for label, text in said.items()), ""]
    return "\n".join(lines)


def figure(methods: dict[str, list[list[Point]]], lines: dict[str, float], word: str, path: Path) -> None:
    """Good answers and NLL against optimizer steps, and good answers against KL: the mean over seeds, and each seed thin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    good = f'answers that begin with "{word}"'
    titles = (f"{good}, share", TITLES["nll"], f"{good}, share")
    for ax, y, x, title in zip(axes, ("good", "nll", "good"), ("step", "step", "kl_k3"), titles, strict=True):
        for color, (label, runs) in zip(itertools.cycle(COLORS), methods.items(), strict=False):
            curves = np.array(
                [[[p.step if n == "step" else p.columns[n].mean() for n in (x, y)] for p in r] for r in runs]
            )
            for curve in curves if len(curves) > 1 else ():
                ax.plot(*curve.T, color=color, alpha=0.25, lw=1)
            ax.plot(*curves.mean(0).T, color=color, marker="o", ms=4, lw=2, label=label)
        for (name, share), style in zip(lines.items(), (":", "--", "-."), strict=False):
            if y == "good":
                ax.axhline(share, color="#666666", ls=style, lw=1)
                ax.text(
                    1, share, name, transform=ax.get_yaxis_transform(), ha="right", va="bottom", color="#666666", size=8
                )
        ax.set_title(title, size=9, loc="left")
        ax.set_xlabel("optimizer steps; those of a reward model count too" if x == "step" else TITLES[x])
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    fig.savefig(path, dpi=130)


def show(args: Args) -> None:
    experts = [read_json(Path(folder) / "expert.json", "--expert") for folder in args.expert]
    word, n = experts[0]["word"], experts[0]["best_of"]
    p = np.concatenate([expert["probabilities"] for expert in experts])
    end = f"end of T = 1 at beta {args.beta:g}"
    lines = {"base model": p, "the expert": expert_share(p, n), end: limit_share(p, n, args.beta)}
    lines = {name: float(share.mean()) for name, share in lines.items()}
    reward = reward_of(word)
    methods = {label: [load(Path(d), reward) for d in folders] for label, folders in read_folders(args.runs).items()}
    for seed in range(len(experts)):
        require_same_rows({label: runs[seed][0].columns for label, runs in methods.items() if seed < len(runs)})
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    text = table(methods, lines, word)
    (out / "table.md").write_text(text)
    figure(methods, lines, word, out / "figure.png")
    print(samples(methods, [row["prompt"] for row in load_rows(f"{args.expert[0]}/held_out.jsonl", "all")]))
    print(text)
    print(f"table: {out / 'table.md'}   figure: {out / 'figure.png'}")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
