"""Tables, samples and figure of film.sh: methods that learn from the best of N samples by a gold reward that is known.

A run is compared with SFT at its end, at equal KL to the base model, and after equal numbers of updates. Between a run's own
evaluations its gold reward is interpolated, linear in the square root of the KL. A method that ran with several beta gives one
path, of all its evaluations in a seed, by their KL.

Three lines are theory's. The expert lies at log N - (N - 1)/N nats from the base model. The best of M samples, for every M, is
the path of a policy that loses nothing. Where T = 1 ends, pi_ref (D/pi_ref)^(1/beta) / Z (docs/theory.md, section 2), is there
the best of 1 + (N - 1)/beta samples, because D/pi_ref of the best of N is N F^(N - 1), F being the share of worse samples.

    python benchmark/film_table.py --expert runs/film/expert --output runs/film
        --runs SFT=runs/film/1/sft,runs/film/2/sft "SPIN b=0.1=runs/film/1/spin-0.1,runs/film/2/spin-0.1"
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.best_of import reward_of  # noqa: E402
from benchmark.compare import COLORS, read_folders
from benchmark.demo import Point, load, samples
from benchmark.tables import (
    about_intervals,
    cell,
    columns_of,
    markdown,
    of_seeds,
    read_json,
    require_same_rows,
)
from common import UserError
from common.args import main
from common.evals import pairwise_wins
from common.store import read_pairs
from extras.sources import load_rows

TARGETS = (0.3, 1.0, 3.0)  # nats of KL to the base model
RIGHT, ABOVE_LENGTH, OTHER_ROW = 0.80, 0.10, 0.65  # the gates
MEASURES = {"nll": 2, "kl_k3": 2, "completions/mean_length": 1}  # column -> digits

Runs = dict[str, list[list[Point]]]  # label -> evaluations of its run, a list for each seed


@dataclass
class Args:
    runs: tuple[str, ...]
    """LABEL=DIR[,DIR...]: one arm, one run directory per seed. Arms whose labels agree up to a comma are one method."""
    expert: str
    """folder that benchmark/best_of.py has made with --gold."""
    output: str = "runs/film"
    """folder for table.md and figure.png."""


# ---- measures ----
def distinct_2(texts: list[str]) -> float:
    """Share of different pairs of neighbouring words among all such pairs in the texts: it falls where samples are alike."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / max(len(pairs), 1)


def best_of(rewards: np.ndarray, m: float) -> float:
    """Expected reward of the best of m draws, m > 0 and not always whole, from the distribution of rewards (n,)."""
    ordered, n = np.sort(rewards), len(rewards)
    share = (np.arange(n + 1) / n) ** m
    return float((ordered * np.diff(share)).sum())


def kl_of_best(m: float) -> float:
    """KL of the best of m samples to the policy that they come from, nats: log m - (m - 1)/m."""
    return float(np.log(m) - (m - 1) / m)


def kl_of(point: Point) -> float:
    return max(float(point.columns["kl_k3"].mean()), 0.0)


def at(points: list[Point], target: float, place: Callable[[Point], float]) -> np.ndarray | None:
    """`good` of every row where place(point) is `target`, linear between the two points around it. (rows,)

    None where no point lies on one of the sides.
    """
    ordered = sorted(points, key=place)
    for left, right in itertools.pairwise(ordered):
        a, b = place(left), place(right)
        if a <= target <= b:
            w = (target - a) / (b - a) if b > a else 0.0
            return (1 - w) * left.columns["good"] + w * right.columns["good"]
    return None


def at_kl(points: list[Point], nats: float) -> np.ndarray | None:
    """`good` of every row at a KL of so many nats to the base model; linear in the square root of the KL."""
    return at(points, float(np.sqrt(nats)), lambda point: float(np.sqrt(kl_of(point))))


def paths(runs: Runs) -> Runs:
    """{method: all evaluations of its arms in a seed}; a method is the part of a label before the comma."""
    found: Runs = defaultdict(list)
    for label, seeds in runs.items():
        own = found[label.partition(",")[0]]
        for i, points in enumerate(seeds):
            if i == len(own):
                own.append([])
            own[i] = [*own[i], *points]
    return dict(found)


# ---- gates ----
def length_accuracy(train: list[dict], held: list[dict]) -> float:
    """Share of held-out pairs that length and end alone order rightly, ties half; a logistic fit on the training pairs.

    Rows have chosen and rejected, each (tokens, whether it ended).
    """
    from sklearn.linear_model import LogisticRegression

    def features(answer: tuple[int, bool]) -> list[float]:
        length, ended = answer
        return [length, length**2 / 100, float(np.log(length)), float(ended)]

    def margins(rows: list[dict]) -> np.ndarray:
        return np.array([np.subtract(features(row["chosen"]), features(row["rejected"])) for row in rows])

    x = margins(train)
    fit = LogisticRegression(fit_intercept=False).fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)))
    scores = margins(held) @ fit.coef_[0]
    return float(pairwise_wins(scores, np.zeros_like(scores)).mean())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two columns (rows,)."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


@dataclass
class Gate:
    """What a learned reward knows, over held-out rows. Each column is (rows,)."""

    right: np.ndarray  # demonstration above the base's own sample
    other: np.ndarray  # demonstration above another row's
    ranks: float  # rank correlation with the gold reward on the base's samples


def gate_of(folder: Path, points: list[Point]) -> Gate:
    """The gate of a run: of its reward model's last scores or, without one, of beta log pi/pi_ref at its last evaluation."""
    gold = points[0].columns["good"]  # the first evaluation's samples are the base's
    if files := sorted((folder / "evals").glob("reward_*.parquet")):
        scores = columns_of(files[0], "--runs")
        right = pairwise_wins(scores["chosen"], scores["rejected"])
        other = pairwise_wins(scores["chosen"], scores["shuffled"])
        return Gate(right, other, rank_correlation(scores["rejected"], gold))
    last = points[-1].columns
    own = -last["nll"] - last["logps/gap"]  # log pi of the base's samples
    reference = np.array([row["ref_rejected"] for row in read_pairs(folder / "evals" / "reference.parquet")])
    return Gate(
        last["rewards/accuracies"], last["rewards/accuracies_shuffled"], rank_correlation(own - reference, gold)
    )


def length_gate(folder: Path, held: dict[int, dict]) -> float | None:
    """length_accuracy of a run's first pairs, or None for a run without pairs. held: the expert's held-out rows by number."""
    made = sorted((folder / "generations").glob("iter_*.parquet"))
    if not made:
        return None
    end = read_json(folder / "final" / "config.json", "--runs")["eos_token_id"]
    train = [
        {k: (len(p[f"{k}_ids"]), p[f"{k}_ids"][-1] == end) for k in ("chosen", "rejected")} for p in read_pairs(made[0])
    ]
    first = read_pairs(sorted((folder / "evals").glob("[0-9]*.parquet"))[0])
    reference = read_pairs(folder / "evals" / "reference.parquet")
    measured = [
        {
            "chosen": (int(row["lengths/demonstrations"]), held[row["row"]].get("response_finished", True)),
            "rejected": (len(own["rejected_ids"]), own["rejected_ids"][-1] == end),
        }
        for row, own in zip(first, reference, strict=True)
    ]
    return length_accuracy(train, measured)


def passed(right: float, length: float, other: float) -> str:
    """Which of the three gates hold, in words."""
    failed = [
        name
        for name, ok in (
            (f"right < {RIGHT:.2f}", right >= RIGHT),
            (f"above length < {ABOVE_LENGTH:.2f}", right - length >= ABOVE_LENGTH),
            (f"other row < {OTHER_ROW:.2f}", other >= OTHER_ROW),
        )
        if not ok
    ]
    return "all three" if not failed else "not: " + ", ".join(failed)


# ---- what is shown ----
def main_table(runs: Runs, reference: str) -> str:
    """A row for the base model and for the end of each arm; differences are row by row, to the arm `reference`."""
    first, seeds = next(iter(runs.values())), max(map(len, runs.values()))
    ends = {"base model": [r[0] for r in first]} | {label: [r[-1] for r in own] for label, own in runs.items()}
    compared = [r[-1].columns["good"] for r in runs[reference]]
    rows = []
    for label, points in ends.items():
        gain = (
            ""
            if label == reference
            else cell([p.columns["good"] - b for p, b in zip(points, compared, strict=False)], 2)
        )
        rows.append([
            of_seeds(label, len(points), seeds), cell([p.columns["good"] for p in points], 2), gain,
            *(cell([p.columns[name] for p in points], digits) for name, digits in MEASURES.items()),
            f"{np.mean([distinct_2(p.texts) for p in points]):.2f}", str(points[0].step),
        ])  # fmt: skip
    header = ["", "gold", f"gold minus {reference}'s", "NLL, nats", "KL to base, nats", "tokens", "distinct-2", "steps"]
    return about_intervals(seeds) + "\n\n" + markdown(header, rows)


def equal_kl_table(runs: Runs, reference: str) -> str:
    """Gold at equal KL to the base model, and its difference to SFT's; empty where no seed's path gets there."""
    methods, seeds = paths(runs), max(map(len, runs.values()))
    rows = []
    for label, own in methods.items():
        cells = []
        for nats in TARGETS:
            found = [at_kl(points, nats) for points in own]
            compared = [at_kl(points, nats) for points in methods[reference]]
            values = [a for a in found if a is not None]
            cells.append(of_seeds(cell(values, 2), len(values), seeds) if values else "")
            gains = [a - b for a, b in zip(found, compared, strict=False) if a is not None and b is not None]
            cells.append(cell(gains, 2) if gains and label != reference else "")
        rows.append([label, *cells])
    header = ["", *(word for nats in TARGETS for word in (f"{nats:g} nats", f"minus {reference}'s"))]
    return markdown(header, rows)


def gate_table(folders: dict[str, list[str]], runs: Runs, held: dict[int, dict], n: int, reward) -> str:
    """A row for each arm that learns a reward, and one for the gold reward itself."""
    gates = {
        label: [gate_of(Path(d), points) for d, points in zip(folders[label], own, strict=True)]
        for label, own in runs.items()
    }
    rows = []
    first = next(iter(runs.values()))
    demonstrations = reward([held[int(row)]["response"] for row in first[0][0].columns["row"]])
    gold = [
        (
            pairwise_wins(demonstrations, r[0].columns["good"]),
            pairwise_wins(demonstrations, np.roll(demonstrations, -1)),
        )
        for r in first[:1]
    ]
    rows.append([
        "the gold reward itself", cell([a for a, _ in gold], 3), "", cell([b for _, b in gold], 3), "1", "",
    ])  # fmt: skip
    rows.append(["ceiling of any reward", f"{n / (n + 1):.3f}", "", "", "", ""])
    for label, own in gates.items():
        lengths = [x for d in folders[label] if (x := length_gate(Path(d), held)) is not None]
        if not lengths:
            continue
        right, other = [g.right for g in own], [g.other for g in own]
        verdict = passed(float(np.mean(right)), float(np.mean(lengths)), float(np.mean(other)))
        rows.append([
            label, cell(right, 3), f"{np.mean(lengths):.3f}", cell(other, 3),
            f"{np.mean([g.ranks for g in own]):.2f}", verdict,
        ])  # fmt: skip
    header = [
        "reward of", "demonstration above own sample", "by length and EOS alone", "above another row's demonstration",
        "rank correlation with gold", "gates passed",
    ]  # fmt: skip
    return markdown(header, rows)


def figure(runs: Runs, expert: dict, path: Path) -> None:
    """Gold, NLL and distinct-2 against the KL to the base model, and gold against steps: means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    names = list(dict.fromkeys(label.partition(",")[0] for label in runs))
    marks = ["o", "s", "^", "D", "v", "P"]
    panels = (
        ("gold reward of the samples", kl_of, lambda p: p.columns["good"].mean()),
        ("NLL of the expert's answers, nats", kl_of, lambda p: p.columns["nll"].mean()),
        ("distinct-2 of the samples", kl_of, lambda p: distinct_2(p.texts)),
        ("gold reward of the samples", lambda p: p.step, lambda p: p.columns["good"].mean()),
    )
    seen: dict[str, int] = defaultdict(int)
    style = {}
    for label in runs:
        name = label.partition(",")[0]
        style[label] = (COLORS[names.index(name) % len(COLORS)], marks[seen[name] % len(marks)])
        seen[name] += 1
    for ax, (title, x, y) in zip(axes.flat, panels, strict=True):
        for label, seeds in runs.items():
            curve = np.mean([[[x(p), y(p)] for p in points] for points in seeds], 0)
            color, mark = style[label]
            ax.plot(*curve.T, color=color, marker=mark, ms=4, lw=1.5, label=label)
        ax.set_title(title, size=9, loc="left")
        ax.set_xlabel("KL to the base, nats" if x is kl_of else "optimizer steps; those of a reward model count too")
        if x is kl_of:
            ax.set_xscale("symlog", linthresh=0.5)
    pooled, n = np.ravel(expert["rewards"]), expert["best_of"]
    m = np.geomspace(1, 1e4, 60)
    axes[0, 0].plot(
        [kl_of_best(k) for k in m],
        [best_of(pooled, k) for k in m],
        color="#888888",
        ls="--",
        lw=1,
        label="best of M, theory",
    )
    axes[0, 0].plot(
        kl_of_best(n), expert["held_out"]["expert"], color="black", marker="*", ms=12, ls="", label="the expert"
    )
    for ax in (axes[0, 0], axes[1, 1]):
        ax.axhline(expert["held_out"]["expert"], color="#888888", ls=":", lw=1)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    fig.savefig(path, dpi=110)


def theory_table(expert: dict) -> str:
    """Where the expert lies, and where T = 1 ends at each beta, if the reward is log D/pi_ref exactly."""
    pooled, n = np.ravel(expert["rewards"]), expert["best_of"]
    measured = expert["held_out"]
    rows = [
        ["base model, measured", f"{measured['policy']:.2f}", "0"],
        [f"the expert, best of {n}, measured", f"{measured['expert']:.2f}", f"{kl_of_best(n):.2f}"],
    ]
    for beta in (1.0, 0.3, 0.1):
        m = 1 + (n - 1) / beta
        rows.append(
            [f"end of T = 1 at beta {beta:g}: best of {m:.0f}", f"{best_of(pooled, m):.2f}", f"{kl_of_best(m):.2f}"]
        )
    return markdown(["theory", "gold", "KL to base, nats"], rows)


def show(args: Args) -> None:
    folders = read_folders(args.runs)
    expert = read_json(Path(args.expert) / "expert.json", "--expert")
    if "rewards" not in expert:
        raise UserError(f"--expert: found no rewards in {args.expert}, expected a folder made with best_of.py --gold")
    reward = reward_of("", expert["gold"], expert["gold_kind"])
    runs = {label: [load(Path(d), reward) for d in own] for label, own in folders.items()}
    require_same_rows(
        {d: points[0].columns for label in runs for d, points in zip(folders[label], runs[label], strict=True)}
    )
    held = {row["row"]: row for row in load_rows(f"{args.expert}/held_out.jsonl", "all")}
    reference = next(iter(runs))
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        theory_table(expert), main_table(runs, reference), equal_kl_table(runs, reference),
        gate_table(folders, runs, held, expert["best_of"], reward),
    ]  # fmt: skip
    (out / "table.md").write_text("\n".join(parts))
    figure(runs, expert, out / "figure.png")
    print(samples(runs, {number: row["prompt"] for number, row in held.items()}))
    print("\n".join(parts))
    print(f"table: {out / 'table.md'}   figure: {out / 'figure.png'}")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
