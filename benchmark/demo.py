"""The demo's table, samples and figure: methods that learn from an expert whose reward a reader can see.

The reward is 1 for an answer that begins with the expert's word, else 0 (benchmark/best_of.py). Two lines of theory are
exact, from the probability p(x) with which the base model begins its answer to x with the word. The expert's share is the
mean of 1 - (1 - p)^N. A reward that is learned on the base model's answers, as with T = 1, ends at
pi_ref (D/pi_ref)^(1/beta) / Z (docs/theory.md, section 2), whose share is the second line. D is the expert.

    python benchmark/demo.py --expert runs/demo/expert --runs SFT=runs/demo/sft SPIN=runs/demo/spin --output runs/demo
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.best_of import reward_of  # noqa: E402
from benchmark.compare import read_folders
from benchmark.tables import (
    Columns,
    about_intervals,
    cell,
    evaluations,
    markdown,
    mean_and_interval,
    of_seeds,
    read_json,
    require_same_rows,
)
from common import UserError
from common.args import main
from common.store import read_pairs
from extras import figures
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


def in_all(seeds: list[list[str]]) -> list[str]:
    """The prompts that all seeds have. A seed's expert leaves out the held-out prompts that are like its training prompts."""
    others = [set(prompts) for prompts in seeds[1:]]
    return [prompt for prompt in seeds[0] if all(prompt in own for own in others)]


def only(points: list[Point], prompts: list[str], kept: list[str]) -> list[Point]:
    """The rows of the prompts `kept`, in that order. prompts: by number of row."""
    shown = []
    for point in points:
        place = {prompts[int(row)]: i for i, row in enumerate(point.columns["row"])}
        own = [place[prompt] for prompt in kept if prompt in place]
        columns = {name: values[own] for name, values in point.columns.items()}
        shown.append(Point(point.step, columns, [point.texts[i] for i in own]))
    return shown


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
    """Good answers and NLL against optimizer steps, and good answers against KL: means, intervals, each seed thin."""
    fig, (axes,) = figures.subplots(1, 3, (12, 3.8))
    good = f'answers that begin with "{word}"'
    titles = (f"{good}, share", TITLES["nll"], f"{good}, share")
    for ax, y, x, title in zip(axes, ("good", "nll", "good"), ("step", "step", "kl_k3"), titles, strict=True):
        for label, color in figures.colored(methods):
            runs = methods[label]
            curves = np.array(
                [[[p.step if n == "step" else p.columns[n].mean() for n in (x, y)] for p in r] for r in runs]
            )
            each = [curve.T for curve in curves] if len(curves) > 1 else []
            ends = zip(
                *(mean_and_interval(list(point))[1:] for point in zip(*per_row(runs, y), strict=True)), strict=True
            )
            figures.draw(ax, *curves.mean(0).T, *(ends if x == "step" else ()), color=color, label=label, each=each)
        for (name, share), style in zip(lines.items(), (":", "--", "-."), strict=False):
            if y == "good":
                ax.axhline(share, color="#666666", ls=style, lw=1)
                ax.text(
                    1, share, name, transform=ax.get_yaxis_transform(), ha="right", va="bottom", color="#666666", size=8
                )
        ax.set_title(title, size=9, loc="left")
        ax.set_xlabel("optimizer steps; those of a reward model count too" if x == "step" else TITLES[x])
    figures.legend(fig, axes[0])
    figures.caption(fig, about_intervals(max(map(len, methods.values()))))
    figures.save(fig, path)


def per_row(runs: list[list[Point]], measure: str) -> list[list[np.ndarray]]:
    """For each seed the values by row, each (rows,), of all its evaluations."""
    return [[point.columns[measure] for point in run] for run in runs]


def show(args: Args) -> None:
    experts = [read_json(Path(folder) / "expert.json", "--expert") for folder in args.expert]
    word, n = experts[0]["word"], experts[0]["best_of"]
    p = np.concatenate([expert["probabilities"] for expert in experts])
    end = f"end of T = 1 at beta {args.beta:g}"
    lines = {"base model": p, "the expert": expert_share(p, n), end: limit_share(p, n, args.beta)}
    lines = {name: float(share.mean()) for name, share in lines.items()}
    reward = reward_of(word)
    prompts = [[row["prompt"] for row in load_rows(f"{folder}/held_out.jsonl", "all")] for folder in args.expert]
    folders, kept = read_folders(args.runs), in_all(prompts)
    for label, runs in folders.items():
        if len(runs) > len(prompts):
            found = f"found {len(runs)} runs of {label} and {len(prompts)} folders of --expert"
            raise UserError(f"--runs: {found}, expected a folder for each run")
    methods = {
        label: [only(load(Path(d), reward), own, kept) for d, own in zip(runs, prompts, strict=False)]
        for label, runs in folders.items()
    }
    for seed in range(len(experts)):
        require_same_rows({label: runs[seed][0].columns for label, runs in methods.items() if seed < len(runs)})
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    text = table(methods, lines, word)
    (out / "table.md").write_text(text)
    figure(methods, lines, word, out / "figure.png")
    print(samples(methods, prompts[0]))
    print(text)
    print(f"table: {out / 'table.md'}   figure: {out / 'figure.png'}")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
