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
from benchmark.compare import read_folders
from benchmark.demo import Point, load, samples
from benchmark.tables import (
    about_intervals,
    cell,
    columns_of,
    markdown,
    mean_and_interval,
    of_seeds,
    read_json,
    require_same_rows,
)
from common import UserError
from common.args import main
from common.evals import pairwise_wins
from common.store import read_pairs
from extras import figures
from extras.sources import load_rows

TARGETS = (0.3, 1.0, 3.0)  # nats of KL to the base model
RIGHT, ABOVE_LENGTH, OTHER_ROW = 0.80, 0.10, 0.65  # the gates
MEASURES = {"nll": 2, "kl_k3": 2, "completions/mean_length": 1}  # column -> digits

Runs = dict[str, list[list[Point]]]  # label -> evaluations of its run, a list for each seed


@dataclass
class Args:
    runs: tuple[str, ...]
    """LABEL=DIR[,DIR...]: one arm, one run directory per seed. Arms whose labels agree up to a comma are one method."""
    expert: str = ""
    """folder that benchmark/best_of.py has made with --gold; empty: the demonstrations are people's."""
    demonstrations: str = ""
    """without --expert: the held-out demonstrations of the runs."""
    gold: str = ""
    """without --expert: folder of benchmark/film.py with the gold reward."""
    output: str = "runs/film"
    """folder for table.md and figure.png."""


# ---- measures ----
def distinct_2(texts: list[str]) -> float:
    """Share of different pairs of neighbouring words among all such pairs in the texts: it falls where samples are alike."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / max(len(pairs), 1)


def two_sample(demonstrations: list[str], texts: list[str]) -> float:
    """Accuracy of a fresh classifier that tells demonstrations from samples, five-fold: 0.5 if they are alike, at most 1.

    A logistic regression on tf-idf of words and pairs of words. The two answers to a prompt are in one fold.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline

    n = len(demonstrations)
    words = TfidfVectorizer(tokenizer=str.split, token_pattern=None, ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    rows = np.tile(np.arange(n), 2)
    folds = GroupKFold(5).split(rows, groups=rows)
    return float(cross_val_score(model, [*demonstrations, *texts], np.repeat([1, 0], n), cv=folds).mean())


def best_of(rewards: np.ndarray, m: float, by: np.ndarray | None = None) -> float:
    """Expected reward of the best of m draws, m > 0 and not always whole, from the distribution of rewards (n,).

    by: scores (n,) that say which draw is the best, such as those of a learned reward; by default the rewards themselves.
    """
    n = len(rewards)
    ordered = rewards[np.argsort(rewards if by is None else by, kind="stable")]
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


def at_step(points: list[Point], step: int) -> np.ndarray | None:
    """`good` of every row after so many optimizer steps, linear between evaluations."""
    return at(points, float(step), lambda point: float(point.step))


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
    scores: np.ndarray  # of the base's samples


def gate_of(folder: Path, points: list[Point]) -> Gate:
    """The gate of a run: of its first reward model or, without one, of log pi/pi_ref at its last evaluation."""
    if files := sorted((folder / "evals").glob("reward_*.parquet")):
        scores = columns_of(files[0], "--runs")
        right = pairwise_wins(scores["chosen"], scores["rejected"])
        other = pairwise_wins(scores["chosen"], scores["shuffled"])
        return Gate(right, other, scores["rejected"])
    last = points[-1].columns
    own = -last["nll"] - last["logps/gap"]  # log pi of the base's samples
    reference = np.array([row["ref_rejected"] for row in read_pairs(folder / "evals" / "reference.parquet")])
    return Gate(last["rewards/accuracies"], last["rewards/accuracies_shuffled"], own - reference)


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
def main_table(runs: Runs, demonstrations: list[str], rewards: np.ndarray, reference: str) -> str:
    """A row for the base model and for the end of each arm; differences are row by row.

    demonstrations: those of the measured rows, in their order; rewards: their gold, (rows,). reference: the arm to compare with.
    """
    first, seeds = next(iter(runs.values())), max(map(len, runs.values()))
    ends = {"base model": [r[0] for r in first]} | {label: [r[-1] for r in own] for label, own in runs.items()}
    compared = [r[-1].columns["good"] for r in runs[reference]]
    rows = []
    for label, points in ends.items():
        gains = [p.columns["good"] - b for p, b in zip(points, compared, strict=False)]
        wins = [pairwise_wins(p.columns["good"], b) for p, b in zip(points, compared, strict=False)]
        rows.append([
            of_seeds(label, len(points), seeds), cell([p.columns["good"] for p in points], 2),
            cell([p.columns["good"] - rewards for p in points], 2),
            "" if label == reference else cell(gains, 2), "" if label == reference else cell(wins, 2),
            *(cell([p.columns[name] for p in points], digits) for name, digits in MEASURES.items()),
            f"{np.mean([two_sample(demonstrations, p.texts) for p in points]):.3f}",
            f"{np.mean([distinct_2(p.texts) for p in points]):.2f}", str(points[0].step),
        ])  # fmt: skip
    header = [
        "", "gold", "minus the demonstrations'", f"minus {reference}'s", f"wins over {reference}", "NLL, nats",
        "KL to base, nats", "tokens", "two-sample accuracy", "distinct-2", "updates",
    ]  # fmt: skip
    return about_intervals(seeds) + "\n\n" + markdown(header, rows)


def equal_table(runs: Runs, reference: str, words: list[str], at_each: list[Callable], digits: int = 2) -> str:
    """Tabulate `good` at places that the runs share, and less the reference's; empty where no seed's path gets there.

    at_each: functions of a run's evaluations, in the order of the words that name their columns.
    """
    seeds, rows = max(map(len, runs.values())), []
    for label, own in runs.items():
        cells = []
        for place in at_each:
            found, compared = ([place(points) for points in seed_runs] for seed_runs in (own, runs[reference]))
            values = [a for a in found if a is not None]
            gains = [a - b for a, b in zip(found, compared, strict=False) if a is not None and b is not None]
            cells.append(of_seeds(cell(values, digits), len(values), seeds) if values else "")
            cells.append(cell(gains, digits) if gains and label != reference else "")
        rows.append([label, *cells])
    return markdown(["", *(word for name in words for word in (name, f"minus {reference}'s"))], rows)


def equal_kl_table(runs: Runs, reference: str, prefix: str = "", digits: int = 2) -> str:
    """Tabulate `good` at each of TARGETS. prefix: what the names of the columns begin with."""
    at_each = [lambda points, nats=nats: at_kl(points, nats) for nats in TARGETS]
    return equal_table(runs, reference, [f"{prefix}{nats:g} nats" for nats in TARGETS], at_each, digits)


def iterations_table(runs: Runs) -> str:
    """Gold and length after every iteration, for the arms with more than two evaluations after the start; empty without one.

    The last column is the gold at the end less that after the first iteration, row by row.
    """
    several = {label: own for label, own in runs.items() if len(own[0]) > 3}
    if not several:
        return ""
    last, rows = max(len(own[0]) for own in several.values()), []
    for label, own in several.items():
        every = [[points[i] for points in own] for i in range(len(own[0]))]
        gain = [points[-1].columns["good"] - points[1].columns["good"] for points in own]
        lengths = [f"{np.mean([p.columns['completions/mean_length'] for p in some]):.1f}" for some in every]
        blank = [""] * (last - len(every))
        gold = [cell([p.columns["good"] for p in some], 2) for some in every]
        name = of_seeds(label, len(own), max(map(len, runs.values())))
        rows += [[name, "gold", *gold, *blank, cell(gain, 2)], ["", "tokens", *lengths, *blank, ""]]
    return markdown(["", "", "start", *map(str, range(1, last)), "last less first"], rows)


def gate_table(folders: dict[str, list[str]], runs: Runs, held: dict[int, dict], rewards: np.ndarray, n: int) -> str:
    """A row for the gold reward itself and for each arm. SFT learns no reward; its row is of log pi/pi_ref all the same.

    rewards: gold of the measured demonstrations, (rows,). n: samples of which the expert takes the best, 0 if people wrote them.
    """
    base = next(iter(runs.values()))[0][0].columns["good"]
    best, shuffled = pairwise_wins(rewards, base), pairwise_wins(rewards, np.roll(rewards, -1))
    m = n or 16
    rows = [["the gold reward itself", cell([best], 3), "", cell([shuffled], 3), "1.00", f"{best_of(base, m):.2f}", ""]]
    if n:
        rows.append(["ceiling of any reward, N/(N+1)", f"{n / (n + 1):.3f}", "", "", "", "", ""])
    for label, own in runs.items():
        lengths = [x for d in folders[label] if (x := length_gate(Path(d), held)) is not None]
        gates = [gate_of(Path(d), points) for d, points in zip(folders[label], own, strict=True)]
        both = list(
            zip(gates, own, strict=True)
        )  # the first evaluation's samples are the base's, and those that are scored
        rights, others = [gate.right for gate in gates], [gate.other for gate in gates]
        right, other = float(np.mean(rights)), float(np.mean(others))
        rows.append([
            of_seeds(label, len(own), max(map(len, runs.values()))), cell(rights, 3),
            f"{np.mean(lengths):.3f}" if lengths else "", cell(others, 3),
            f"{np.mean([rank_correlation(g.scores, r[0].columns['good']) for g, r in both]):.2f}",
            f"{np.mean([best_of(r[0].columns['good'], m, g.scores) for g, r in both]):.2f}",
            passed(right, float(np.mean(lengths)), other) if lengths else "no reward is learned: log pi/pi_ref",
        ])  # fmt: skip
    header = [
        "reward of", "demonstration above own sample", "by length and EOS alone", "above another row's demonstration",
        "rank correlation with gold", f"gold of the best of {m} by it", "gates passed",
    ]  # fmt: skip
    return markdown(header, rows)


def figure(runs: Runs, expert: dict | None, learned: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Gold with its intervals, NLL and distinct-2 against the KL to the base model, and gold against steps: means over seeds.

    learned: for each reward model its scores of the base's samples and their gold, (rows,) each. KL on a scale of its root.
    """
    fig, axes = figures.subplots(2, 2, (12, 8))
    names = list(dict.fromkeys(label.partition(",")[0] for label in runs))
    marks = ["o", "s", "^", "D", "v", "P"]
    intervals = {label: [mean_and_interval([p.columns["good"] for p in some])[1:] for some in zip(*seeds, strict=True)]
                 for label, seeds in runs.items()}  # fmt: skip

    def gold(point: Point) -> float:
        return point.columns["good"].mean()

    panels = (
        ("gold reward of the samples, 95% intervals", kl_of, gold),
        ("NLL of the demonstrations, nats", kl_of, lambda p: p.columns["nll"].mean()),
        ("distinct-2 of the samples", kl_of, lambda p: distinct_2(p.texts)),
        ("gold reward of the samples, 95% intervals", lambda p: p.step, gold),
    )
    seen: dict[str, int] = defaultdict(int)
    style = {}
    for label in runs:
        name = label.partition(",")[0]
        again, color = divmod(names.index(name), len(figures.COLORS))  # a second round of colours is dotted and hollow
        filled = "white" if again else figures.COLORS[color]
        look = dict(color=figures.COLORS[color], marker=marks[seen[name] % len(marks)], ls=":" if again else "-")
        style[label] = dict(look, markerfacecolor=filled, label=label)
        seen[name] += 1
    for ax, (title, x, y) in zip(axes.flat, panels, strict=True):
        for label, seeds in runs.items():
            curve = np.mean([[[x(p), y(p)] for p in points] for points in seeds], 0)
            ax.plot(*curve.T, ms=4, lw=1.5, **style[label])
            if y is gold:
                ax.vlines(curve[:, 0], *np.transpose(intervals[label]), color=style[label]["color"], lw=1, alpha=0.6)
        ax.set_title(title, size=9, loc="left")
        ax.set_xlabel("KL to the base, nats" if x is kl_of else "optimizer steps; those of a reward model count too")
        if x is kl_of:
            ax.set_xscale("function", functions=(lambda nats: np.sqrt(np.maximum(nats, 0)), np.square))
            ax.set_xticks([0, 0.3, 1, 3, 6, 12], ["0", "0.3", "1", "3", "6", "12"])
            ax.set_xlim(left=0)
    if expert:
        pooled, n, share = np.ravel(expert["rewards"]), expert["best_of"], expert["held_out"]["expert"]
        m = np.geomspace(1, 1e4, 60)
        curve = [kl_of_best(k) for k in m], [best_of(pooled, k) for k in m]
        axes[0, 0].plot(*curve, color="#888888", ls="--", lw=1, label="best of M, theory")
        axes[0, 0].plot(kl_of_best(n), share, color="black", marker="*", ms=12, ls="", label="the expert")
        for ax in (axes[0, 0], axes[1, 1]):
            ax.axhline(share, color="#888888", ls=":", lw=1)
    if learned:
        m = np.geomspace(1, 200, 30)  # more of a thousand samples would be the few best ones
        values = [np.mean([best_of(own, k, scores) for scores, own in learned]) for k in m]
        axes[0, 0].plot(
            [kl_of_best(k) for k in m], values, color="#ccbb44", ls="-.", lw=1.5, label="best of M by RFT's reward"
        )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    figures.save(fig, path, 110)


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
    folders, expert = read_folders(args.runs), None
    if args.expert:
        expert = read_json(Path(args.expert) / "expert.json", "--expert")
        if "rewards" not in expert:
            raise UserError(
                f"--expert: found no rewards in {args.expert}, expected a folder made with best_of.py --gold"
            )
        reward = reward_of("", expert["gold"], expert["gold_kind"])
    else:
        reward = reward_of("", args.gold)
    source = f"{args.expert}/held_out.jsonl" if expert else args.demonstrations
    held = {row["row"]: row for row in load_rows(source, "all", flag="--expert" if expert else "--demonstrations")}
    runs = {label: [load(Path(d), reward) for d in own] for label, own in folders.items()}
    require_same_rows({d: r[0].columns for label in runs for d, r in zip(folders[label], runs[label], strict=True)})
    reference = next(iter(runs))
    demonstrations = [held[int(row)]["response"] for row in runs[reference][0][0].columns["row"]]
    rewards = reward(demonstrations)
    total = runs[reference][0][-1].step
    by_step = [lambda points, step=step: at_step(points, step) for step in (total // 2, total)]
    parts = {
        "At the end of each run": main_table(runs, demonstrations, rewards, reference),
        "At equal KL to the base model": equal_kl_table(paths(runs), reference),
        "At equal numbers of updates": equal_table(
            runs, reference, [f"{total // 2} updates", f"{total} updates"], by_step
        ),
        "Gates": gate_table(folders, runs, held, rewards, expert["best_of"] if expert else 0),
    }
    if over := iterations_table(runs):
        parts["Over iterations"] = over
    if expert:
        parts = {"Theory": theory_table(expert), **parts}
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"### {title}\n\n{part}" for title, part in parts.items())
    (out / "table.md").write_text(text)
    learned = [
        (gate_of(Path(d), points).scores, points[0].columns["good"])
        for label, own in runs.items() if label.startswith("RFT") for d, points in zip(folders[label], own, strict=True)
    ]  # fmt: skip
    figure(runs, expert, learned, out / "figure.png")
    print(samples(runs, {number: row["prompt"] for number, row in held.items()}))
    print(text)
    print(f"table: {out / 'table.md'}   figure: {out / 'figure.png'}")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
