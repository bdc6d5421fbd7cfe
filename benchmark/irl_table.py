"""Table and figure of benchmark/irl_small.sh, the IRL paper's Fig. 2 at small scale: SFT, IRL and SPIN by outer iteration.

Intervals are 95%: a hierarchical bootstrap over seeds and held-out rows, over rows alone where there is one seed. Thin lines are
single seeds.

    python benchmark/irl_table.py --runs runs/irl_small --output runs/irl_small
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.tables import (  # noqa: E402
    about_intervals,
    cell,
    columns_of,
    markdown,
    mean_and_interval,
    read_json,
    require_measures,
)
from common import UserError  # noqa: E402
from common.args import main
from common.evals import pairwise_wins
from extras import figures

COLUMNS = {  # column -> measure, digits
    "(a) accuracy, labelled pairs": ("accuracy", 3),
    "accuracy, person over SFT's sample": ("accuracy_sft", 3),
    "accuracy, own over another's": ("accuracy_shuffled", 3),
    "(b) gold score": ("gold/score", 2),
    "less SFT's": ("gold/gain", 2),
    "(c) win rate over people": ("gold/win_rate_demonstrations", 3),
    "ROUGE-L": ("rouge_l", 3),
    "length": ("completions/mean_length", 1),
    "NLL of people": ("nll", 1),
}
COLORS = dict(zip(("SFT", "SPIN", "IRL", "people"), figures.COLORS, strict=False))
Point = dict[str, np.ndarray]  # measure -> (rows,)


@dataclass
class Args:
    runs: str
    """folder of benchmark/irl_small.sh: <seed>/irl, <seed>/spin_<k>, ..."""
    seeds: tuple[int, ...] = (1, 2, 3)
    output: str = "runs/irl_small"
    """folder for irl.md and irl.png."""


def load_irl(folder: Path) -> list[Point]:
    """SFT and the policy after each outer iteration, with the reward that iteration learned."""
    files = sorted((folder / "evals").glob("[0-9]*.parquet"), key=lambda p: int(p.stem))
    settings = read_json(folder / "args.json", "--runs").get("args", {})
    if "T" not in settings:
        raise UserError(f"--runs: found no T in {folder / 'args.json'}, expected a run of irl_ppo_tldr.py")
    T = settings["T"]
    evaluations = [columns_of(p, "--runs") for p in files]
    if len(evaluations) != T + 1 or "gold/score" not in evaluations[0]:
        raise UserError(
            f"--runs: found {len(evaluations)} evaluations in {folder}, expected {T + 1} with gold scores: one before"
            " and one after each outer iteration"
        )
    for t, point in enumerate(evaluations[1:]):
        pairs, held = (
            columns_of(folder / "evals" / f"{k}_{t:04d}.parquet", "--runs") for k in ("preferences", "reward")
        )
        point["pair"], point["accuracy"] = pairs["row"], pairwise_wins(pairs["chosen"], pairs["rejected"])
        point["accuracy_sft"] = pairwise_wins(held["chosen"], held["rejected"])
        point["accuracy_shuffled"] = pairwise_wins(held["chosen"], held["shuffled"])
    return evaluations


def load_spin(folder: Path) -> list[Point]:
    """The policy after each iteration of SPIN, with its implicit reward."""
    points = []
    while (path := folder / f"spin_{len(points) + 1}_held_out").is_dir():
        point = columns_of(path / "evals" / "0000.parquet", "--runs")
        implicit = ["rewards/accuracies", "rewards/accuracies_shuffled"]
        require_measures(point, ["row", "gold/score", *implicit], path, hint=", with --ref-model")
        point["accuracy_sft"], point["accuracy_shuffled"] = (point[name] for name in implicit)
        path = folder / f"spin_{len(points) + 1}_preferences"
        pairs = columns_of(path / "evals" / "0000.parquet", "--runs")
        require_measures(pairs, ["row", implicit[0]], path, hint=", with --ref-model")
        point["pair"], point["accuracy"] = pairs["row"], pairs["rewards/accuracies"]
        points.append(point)
    return points


def on_shared_rows(points: list[Point]) -> None:
    """Keep of every measure the held-out rows, or labelled pairs, that all points have.

    SPIN leaves prompts that are too long out, IRL cuts them.
    """
    for ids, measures in (("pair", {"accuracy"}), ("row", set().union(*points) - {"accuracy", "pair", "row"})):
        having = [p for p in points if ids in p]
        shared = sorted(set.intersection(*(set(p[ids].tolist()) for p in having)))
        if not shared:
            raise UserError(
                f"--runs: found no {ids} that all evaluations have, expected runs on the same held-out data"
            )
        for point in having:
            place = {row: i for i, row in enumerate(point[ids].tolist())}
            for name in measures & point.keys():
                point[name] = point[name][[place[row] for row in shared]]


def show(args: Args) -> None:
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds: found {' '.join(map(str, args.seeds))}, expected each once")
    folders = [Path(args.runs) / str(seed) for seed in args.seeds]
    irl = [load_irl(f / "irl") for f in folders]
    spin = [load_spin(f) for f in folders]
    if len({(len(i), len(s)) for i, s in zip(irl, spin, strict=True)}) > 1:
        raise UserError("--runs: found seeds with other numbers of iterations, expected the same ones")
    on_shared_rows([p for run in (*irl, *spin) for p in run])
    for seed, points in enumerate(irl):
        people = {"gold/score": points[0]["gold/demonstrations"]}
        for point in (*points, *spin[seed], people):
            point["gold/gain"] = point["gold/score"] - points[0]["gold/score"]
        points.append(people)
    named = {"SFT": [r[0] for r in irl]}
    named |= {f"IRL, iteration {k}": [r[k] for r in irl] for k in range(1, len(irl[0]) - 1)}
    named |= {f"SPIN, iteration {k + 1}": [r[k] for r in spin] for k in range(len(spin[0]))}
    named["people"] = [r[-1] for r in irl]
    rows = []
    for name, points in named.items():
        cells = [cell([p[m] for p in points], digits) if m in points[0] else "" for m, digits in COLUMNS.values()]
        rows.append([name, *cells])
    text = f"{about_intervals(len(args.seeds))}\n\n{markdown(['', *COLUMNS], rows)}"
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    (out / "irl.md").write_text(text)
    figure(named, out / "irl.png")
    print(f"{text}\ntable: {out / 'irl.md'}   figure: {out / 'irl.png'}")


def figure(named: dict[str, list[Point]], path: Path) -> None:
    fig, (axes,) = figures.subplots(1, 3, (12, 3.6))
    last = max(int(n.split()[-1]) for n in named if n[-1].isdigit())
    panels = [
        ("accuracy", "(a) accuracy of the reward", "share of labelled pairs"),
        ("gold/score", "(b) gold score of samples", "gold reward units"),
        ("gold/win_rate_demonstrations", "(c) win rate over people", "share of held-out posts"),
    ]
    for ax, (measure, title, ylabel) in zip(axes, panels, strict=True):
        for method in ("IRL", "SPIN"):
            points = [(0, named["SFT"])] if measure in named["SFT"][0] else []
            points += [(int(n.split()[-1]), p) for n, p in named.items() if n.startswith(method)]
            places = [k for k, _ in points]
            values = [[seed[measure] for seed in p] for _, p in points]
            each = [(places, [v[seed].mean() for v in values]) for seed in range(len(named["SFT"]))]
            middle, low, high = zip(*(mean_and_interval(v) for v in values), strict=True)
            figures.draw(ax, places, middle, low, high, COLORS[method], method, each)
        for name in ("SFT", "people"):
            if measure == "gold/score":
                ax.axhline(np.mean([p[measure] for p in named[name]]), color=COLORS[name], lw=1.4, ls="--", label=name)
        if measure == "accuracy":
            figures.level(ax, 0.5)
        ax.set(xlabel="outer iteration", ylabel=ylabel, xticks=range(last + 1))
        ax.set_title(title, loc="left")
        ax.legend(frameon=False, loc="center" if measure == "gold/score" else "best")
    figures.caption(fig, about_intervals(len(named["SFT"])))
    figures.save(fig, path)


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
