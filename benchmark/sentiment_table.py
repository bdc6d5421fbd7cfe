"""Tables, samples and figures of benchmark/sentiment.sh: the methods of the AIHF paper with a known reward of film reviews.

Every measure of samples comes from the evaluations of the runs; the gold score is that of benchmark/film.py on the stored
texts. Intervals are 95%: a hierarchical bootstrap over seeds and held-out rows.

    python benchmark/sentiment_table.py --runs runs/sentiment --gold runs/film/world --output runs/sentiment
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.demo import Point  # noqa: E402
from benchmark.film import Gold
from benchmark.film_table import ABOVE_LENGTH, OTHER_ROW, RIGHT, at_kl, length_accuracy, passed
from benchmark.tables import (
    Columns,
    about_intervals,
    cell,
    columns_of,
    evaluations,
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

METHODS = {  # folder -> label
    "sft": "SFT", "dpo": "DPO", "rlhf": "RLHF (online DPO)", "rlhf_sft": "RLHF from SFT", "rlhf_ppo": "RLHF (PPO)",
    "direct": "Direct AIHF", "self_play": "Self-Play AIHF", "aihf": "AIHF (online DPO)", "aihf_sft": "AIHF from SFT",
    "aihf_ppo": "AIHF (PPO)",
}  # fmt: skip
LEARNED = [m for m in METHODS if m.startswith(("rlhf", "aihf"))]  # the others' reward is log pi/pi_base
MEASURES = {  # column -> (measure, digits)
    "gold of samples": ("good", 3),
    "less the base's": ("gain", 3),
    "KL to the base, nats": ("kl_k3", 2),
    "NLL of demonstrations": ("nll", 2),
    "length": ("completions/mean_length", 1),
    "without end": ("completions/clipped_ratio", 3),
}
CONTRASTS = [
    ("aihf", "rlhf"), ("aihf_ppo", "rlhf_ppo"), ("aihf_sft", "rlhf_sft"), ("aihf", "rlhf_sft"), ("aihf", "sft"), ("aihf", "dpo"),
    ("aihf", "direct"), ("aihf", "self_play"), ("direct", "dpo"), ("self_play", "dpo"), ("direct", "rlhf"),
    ("self_play", "rlhf"), ("rlhf_sft", "rlhf"), ("rlhf_sft", "sft"), ("aihf_sft", "aihf"), ("aihf_sft", "sft"),
    ("direct", "sft"), ("self_play", "sft"),
]  # fmt: skip
PAIRS = {"held_out_medium_low": "medium over low", "held_out_high_medium": "high over medium"}
JUDGED = (*PAIRS.values(), "high over medium, balanced")
KLS = (0.3, 1.0, 3.0)
EQUAL = (10, 20)  # policy steps at which methods are compared
COLORS = {
    "sft": "#888888", "dpo": "#4477aa", "rlhf": "#ee6677", "rlhf_sft": "#ccbb44", "rlhf_ppo": "#ee6677",
    "direct": "#aa3377", "self_play": "#332288", "aihf": "#228833", "aihf_sft": "#66ccee", "aihf_ppo": "#228833",
}  # fmt: skip
DASHED = {"rlhf_ppo", "aihf_ppo"}
SHOWN = 3  # prompts whose answers are printed


@dataclass
class Args:
    runs: str
    """folder of benchmark/sentiment.sh: <preferences>/<seed>/<method>."""
    gold: str
    """folder of the gold reward, made by benchmark/film.py."""
    main: int = 300
    """preferences of the main comparison."""
    output: str = "runs/sentiment"
    """folder for the tables and figures."""


@dataclass
class Trial:
    """A finished run."""

    folder: Path
    points: list[Point]  # `step` counts the policy's optimizer steps; the measure `good` is the gold score


# ---- measures ----
def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, the mean rank for equal values. (n,)"""
    return pairwise_wins(values[:, None], values).sum(1) - 0.5


def rank_correlation_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Values (n,) whose mean is Spearman's correlation of a and b, and whose spread is its influence function's.

    Of standardised ranks x and y: x y - rho (x^2 + y^2 - 2) / 2. So the bootstrap of a mean is one of the correlation.
    """
    x, y = ((r - r.mean()) / r.std() for r in (ranks(a), ranks(b)))
    rho = (x * y).mean()
    return x * y - rho * (x**2 + y**2 - 2) / 2


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov's distance of two samples, each standardised: the largest difference of their distribution functions."""
    a, b = (np.sort((v - v.mean()) / v.std()) for v in (a, b))
    every = np.concatenate([a, b])
    shares = (np.searchsorted(v, every, side="right") / len(v) for v in (a, b))
    return float(np.abs(np.subtract(*shares)).max())


# ---- runs ----
def policy_updates(folder: Path, number: int, step: int) -> int:
    """Optimizer steps of the policy at an evaluation. `number`: of its file; `step`: all optimizer steps of the run."""
    stored = read_json(folder / "args.json", "--runs")
    args = stored["args"]
    if stored["script"] == "aihf":
        return number * args["num_policy_epochs"] * -(-args["rollout_batch_size"] // args["batch_size"])
    if stored["script"] == "aihf_ppo":
        return number * args["num_ppo_epochs"] * args["num_mini_batches"]
    return step


def load(folder: Path, gold: Gold) -> Trial:
    """A finished run, with the gold score of its samples."""
    points = []
    for found in evaluations(folder):
        texts = [row["sample"] for row in read_pairs(folder / "evals" / f"{found.number:04d}.parquet")]
        columns = {**found.columns, "good": gold.score(texts)}
        points.append(Point(policy_updates(folder, found.number, found.step), columns, texts))
    return Trial(folder, points)


def trials(root: Path, gold: Gold) -> dict[str, list[Trial]]:
    """{method: its runs, a seed each} below <root>/<seed>/<method>; runs that are not finished and judged are left out."""
    seeds = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: int(p.name)) if root.is_dir() else []
    found = {m: [load(s / m, gold) for s in seeds if (s / m / "pairs.parquet").is_file()] for m in METHODS}
    return {m: runs for m, runs in found.items() if runs}


def add_gain(runs: list[Trial], base: np.ndarray) -> None:
    """Give every evaluation the measure `gain`: gold less that of the base's samples, (rows,)."""
    for point in [point for run in runs for point in run.points]:
        point.columns["gain"] = point.columns["good"] - base


def last(runs: list[Trial]) -> list[Columns]:
    return [run.points[-1].columns for run in runs]


def own_reward(method: str, run: Trial) -> np.ndarray:
    """Reward of the policy's last samples: the learned one, or log pi/pi_base of the policy itself. (rows,)"""
    columns = run.points[-1].columns
    return columns["reward/samples"] if method in LEARNED else columns["kl_k1"]


def own_correlation(method: str, run: Trial) -> np.ndarray:
    """rank_correlation_rows of reward and gold score over the policy's last samples. (rows,)"""
    return rank_correlation_rows(own_reward(method, run), run.points[-1].columns["good"])


def pair_wins(run: Trial, name: str) -> np.ndarray:
    """Right or not for each held-out pair of that file, by the run's reward. (pairs,)"""
    rows = [r for r in read_pairs(run.folder / "pairs.parquet") if r["pairs"] == name]
    chosen, rejected = (np.array([r[kind] for r in rows]) for kind in ("chosen", "rejected"))
    return pairwise_wins(chosen, rejected)


def judged(run: Trial) -> list[np.ndarray]:
    """The columns JUDGED of a run's reward, (pairs,) each.

    High answers are of late checkpoints more often than medium ones, so a reward that knows the checkpoints by their style seems
    right. Balanced: pairs with the high answer from the later checkpoint count as much as those with it from the earlier one.
    """
    inside, outside = (pair_wins(run, name) for name in PAIRS)
    rows = [r for r in read_pairs(run.folder / "pairs.parquet") if r["pairs"] == list(PAIRS)[1]]
    later = np.array([r["later"] for r in rows], dtype=bool)
    return [inside, outside, outside * np.where(later, 0.5 / later.mean(), 0.5 / (1 - later.mean()))]


def last_reward(folder: Path) -> Columns:
    """Scores of the last reward of a run on held-out rows: chosen, rejected (the first policy's sample), shuffled."""
    return columns_of(sorted((folder / "evals").glob("reward_*.parquet"))[-1], "--runs")


def length_alone(folder: Path, held: list[dict]) -> float:
    """Share of the pairs of demonstration and first policy's sample that length and end order, each half by the other's fit."""
    start = columns_of(folder / "evals" / "0000.parquet", "--runs")
    demonstrations = zip(start["lengths/demonstrations"], (r.get("response_finished", True) for r in held), strict=True)
    own = zip(start["completions/mean_length"], start["completions/clipped_ratio"] == 0, strict=True)
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(demonstrations, own, strict=True)]
    halves = pairs[::2], pairs[1::2]
    return (length_accuracy(*halves) + length_accuracy(*halves[::-1])) / 2


# ---- tables ----
def named(methods: dict[str, list[Trial]], *names: str) -> str:
    """Label of a method, or of the first less the second, marked where it has other seeds than most."""
    label = " less ".join(METHODS[name] for name in names)
    runs = methods[names[0]] if len(names) == 1 else paired(*(methods[name] for name in names))
    return of_seeds(label, len(runs), max(map(len, methods.values())))


def method_table(methods: dict[str, list[Trial]], start: Columns, expert: np.ndarray) -> str:
    rows = [["demonstrations", cell([expert], 3), *[""] * (len(MEASURES) - 1)]]
    rows.append(["base", *(cell([start[m]], digits) for m, digits in MEASURES.values())])
    for method, runs in methods.items():
        cells = [cell([c[m] for c in last(runs)], digits) for m, digits in MEASURES.values()]
        rows.append([named(methods, method), *cells])
    return markdown(["", *MEASURES], rows)


def paired(a: list[Trial], b: list[Trial]) -> list[tuple[Trial, Trial]]:
    """Runs of two methods on the same seed."""
    other = {run.folder.parent.name: run for run in b}
    return [(run, other[run.folder.parent.name]) for run in a if run.folder.parent.name in other]


def difference(values: list[np.ndarray], digits: int = 3) -> str:
    mean, low, high = mean_and_interval(values)
    return f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def contrast_table(methods: dict[str, list[Trial]]) -> str:
    rows = []
    for first, second in CONTRASTS:
        if not (pairs := paired(methods.get(first, []), methods.get(second, []))):
            continue
        ends = [(a.points[-1].columns, b.points[-1].columns) for a, b in pairs]
        gold = [a["good"] - b["good"] for a, b in ends]
        rows.append([
            named(methods, first, second), difference(gold), ", ".join(f"{v.mean():+.2f}" for v in gold),
            difference([a["kl_k3"] - b["kl_k3"] for a, b in ends], 2),
        ])  # fmt: skip
    return markdown(["", "gold of samples", "each seed", "KL to the base, nats"], rows)


def kl_table(methods: dict[str, list[Trial]]) -> str:
    """Gold at equal KL, of the seeds that come so far."""
    rows = []
    for method, runs in methods.items():
        cells = []
        for target in KLS:
            found = [v for v in (at_kl(run.points, target) for run in runs) if v is not None]
            cells.append(of_seeds(cell(found, 3), len(found), len(runs)) if found else "not reached")
        rows.append([named(methods, method), *cells])
    for first, second in CONTRASTS:
        cells, pairs = [], paired(methods.get(first, []), methods.get(second, []))
        for target in KLS:
            both = [(at_kl(a.points, target), at_kl(b.points, target)) for a, b in pairs]
            found = [a - b for a, b in both if a is not None and b is not None]
            cells.append(of_seeds(difference(found), len(found), len(pairs)) if found else "")
        if any(cells):
            rows.append([named(methods, first, second), *cells])
    return markdown(["gold of samples at", *(f"{k:g} nat{'s' * (k != 1)}" for k in KLS)], rows)


def update_table(methods: dict[str, list[Trial]]) -> str:
    """Gold after equal numbers of optimizer steps of the policy."""
    rows = []
    for method, runs in methods.items():
        cells = []
        for steps in EQUAL:
            found = [[p.columns["good"] for p in run.points if p.step == steps] for run in runs]
            cells.append(cell([own[0] for own in found], 3) if all(found) else "not measured")
        rows.append([named(methods, method), *cells])
    return markdown(["gold of samples after", *(f"{steps} steps of the policy" for steps in EQUAL)], rows)


def reward_table(methods: dict[str, list[Trial]]) -> str:
    """How each reward orders held-out pairs and the policy's own samples."""
    rows = []
    for method, runs in methods.items():
        cells = [cell(list(own), 3) for own in zip(*map(judged, runs), strict=True)]
        gold = [c["good"] for c in last(runs)]
        rewards = [own_reward(method, run) for run in runs]
        cells.append(cell([own_correlation(method, run) for run in runs], 3))
        cells.append(", ".join(f"{distance(r, g):.2f}" for r, g in zip(rewards, gold, strict=True)))
        kind = "learned" if method in LEARNED else "log π/π_base"
        rows.append([named(methods, method), kind, *cells])
    return markdown(
        ["", "reward", *JUDGED, "rank correlation with gold on own samples", "distance from gold, each seed"],
        rows,
    )


def reward_contrasts(methods: dict[str, list[Trial]]) -> str:
    """Differences of two rewards: on pairs, and in the rank correlation on each policy's own samples."""
    rows = []
    for first, second in [*CONTRASTS[:4], ("aihf", "dpo"), ("direct", "dpo"), ("self_play", "dpo")]:
        if not (pairs := paired(methods.get(first, []), methods.get(second, []))):
            continue
        both = [zip(judged(a), judged(b), strict=True) for a, b in pairs]
        cells = [difference([x - y for x, y in own]) for own in zip(*both, strict=True)]
        cells.append(difference([own_correlation(first, a) - own_correlation(second, b) for a, b in pairs]))
        rows.append([named(methods, first, second), *cells])
    return markdown(["", *JUDGED, "rank correlation on own samples"], rows)


def gate_table(methods: dict[str, list[Trial]], gold: Gold, held: list[dict]) -> str:
    """The conditions under which a learned reward is worth a policy step, for each reward and for the gold reward itself."""
    expert = gold.score([row["response"] for row in held])
    run = methods["sft"][0]
    own, others = pairwise_wins(expert, run.points[0].columns["good"]), pairwise_wins(expert, np.roll(expert, -1))
    rows = []

    def row(label: str, own: list[np.ndarray], length: float, others: list[np.ndarray]) -> None:
        held_up = passed(float(np.mean(own)), length, float(np.mean(others)))
        rows.append([label, cell(own, 3), f"{length:.3f}", cell(others, 3), held_up])

    row("the gold reward itself", [own], length_alone(run.folder, held), [others])
    for method, runs in ((m, methods[m]) for m in LEARNED if m in methods):
        scores = [last_reward(run.folder) for run in runs]
        own = [pairwise_wins(s["chosen"], s["rejected"]) for s in scores]
        others = [pairwise_wins(s["chosen"], s["shuffled"]) for s in scores]
        row(named(methods, method), own, float(np.mean([length_alone(run.folder, held) for run in runs])), others)
    names = [
        f"over the first policy's sample, at least {RIGHT}", f"length and end alone, at least {ABOVE_LENGTH} less",
        f"over another row's demonstration, at least {OTHER_ROW}", "gates passed",
    ]  # fmt: skip
    return markdown(["", *names], rows)


def ratio_table(sizes: dict[int, dict[str, list[Trial]]]) -> str:
    names = [m for m in METHODS if sum(m in methods for methods in sizes.values()) > 1]
    rows = []
    for size, methods in sizes.items():
        cells = []
        for m in names:
            runs = methods.get(m, [])
            cells.append(f"{cell([c['gain'] for c in last(runs)], 3)} ({len(runs)})" if runs else "")
        rows.append([str(size), *cells])
    return markdown(["preferences", *(METHODS[m] for m in names)], rows)


def other_sizes(sizes: dict[int, dict[str, list[Trial]]], shown: int) -> list[str]:
    """Contrasts and rewards with other numbers of preferences than the one shown."""
    parts = []
    for size, methods in sizes.items():
        if size != shown and methods:
            parts += [f"With {size} preferences\n", contrast_table(methods), reward_table(methods)]
            parts.append(reward_contrasts(methods))
    return parts


def weight_table(root: Path, methods: dict[str, list[Trial]], gold: Gold, base: np.ndarray) -> str:
    """Direct AIHF at several weights of the demonstrations, DPO being the weight 0. base: gold of the base's samples, (rows,)."""
    found = {float(p.name): trials(p, gold).get("direct", []) for p in root.iterdir()}
    add_gain([run for runs in found.values() for run in runs], base)
    found = {0.0: methods.get("dpo", []), 0.05: methods.get("direct", []), **found}
    found, rows = {w: runs for w, runs in found.items() if runs}, []
    for weight, runs in sorted(found.items()):
        cells = [cell([c[m] for c in last(runs)], d) for m, d in list(MEASURES.values())[:4]]
        cells += [cell(list(own), 3) for own in zip(*map(judged, runs), strict=True)]
        rows.append([f"{weight:g} ({len(runs)})", *cells])
    return markdown(["w1 (seeds)", *list(MEASURES)[:4], *JUDGED], rows)


def samples(methods: dict[str, list[Trial]], prompts: list[str], gold: Gold) -> str:
    """The last answers of the first seed, with their gold scores, below those of the base."""
    first = next(iter(methods.values()))[0].points[0]
    lines = []
    for i in range(SHOWN):
        said = {"base": first.texts[i]} | {METHODS[m]: runs[0].points[-1].texts[i] for m, runs in methods.items()}
        lines.append(prompts[i])
        lines += [
            f"  {label:<18} {score:+.2f}  {text}"
            for (label, text), score in zip(said.items(), gold.score(list(said.values())), strict=True)
        ]
        lines.append("")
    return "\n".join(lines)


# ---- figure ----
def figure(methods: dict[str, list[Trial]], path: Path) -> None:
    fig, axes = figures.subplots(2, 2, (11, 8))
    frontier, pairs, density, ranked = axes.flat
    for method, runs in methods.items():
        style = dict(color=COLORS[method], ls="--" if method in DASHED else "-")
        curves = np.array([[[p.columns[m].mean() for p in run.points] for m in ("kl_k3", "good")] for run in runs])
        for curve in curves:
            frontier.plot(*curve, alpha=0.2, lw=1, **style)
        frontier.plot(*curves.mean(0), marker="o", ms=3, lw=2, label=METHODS[method], **style)
    frontier.set(xlabel="KL to the base, nats per answer", ylabel="gold of samples")
    frontier.set_title("(a) gold against KL (Fig. 7); thin lines are seeds", loc="left")
    frontier.legend(frameon=False, fontsize=7, handlelength=3)
    x = np.arange(len(methods))
    for k, label in enumerate(JUDGED):
        stats = [mean_and_interval([judged(run)[k] for run in runs]) for runs in methods.values()]
        mean, low, high = (np.array(v) for v in zip(*stats, strict=True))
        style = dict(fmt="os^"[k], ms=5, capsize=2, label=label, color=("#4477aa", "#228833", "#ccbb44")[k])
        pairs.errorbar(x + 0.2 * k - 0.2, mean, [mean - low, high - mean], **style)
    pairs.axhline(0.5, color="#bbbbbb", lw=1)
    labels = [METHODS[m].replace(" (", "\n(") for m in methods]
    pairs.set_xticks(x, labels, rotation=45, ha="right", fontsize=7)
    pairs.set(ylabel="share of held-out pairs right")
    pairs.set_title("(b) accuracy inside and outside the preferences", loc="left")
    pairs.legend(frameon=False, fontsize=8)
    bins = np.linspace(-3.5, 3.5, 36)
    shown = [m for m in ("rlhf", "rlhf_sft", "aihf", "aihf_sft") if m in methods]
    for k, method in enumerate(shown):
        runs = methods[method]
        kinds = [own_reward(method, run) for run in runs], [c["good"] for c in last(runs)]
        for values, filled in zip(kinds, (True, False), strict=True):
            flat = np.concatenate([(v - v.mean()) / v.std() for v in values])
            heights = np.histogram(flat, bins, density=True)[0] + 0.6 * k
            style = dict(fill=True, alpha=0.35) if filled else dict(fill=False, lw=1.5)
            density.stairs(heights, bins, baseline=0.6 * k, color=COLORS[method], **style)
        density.text(-3.4, 0.6 * k + 0.35, METHODS[method], color=COLORS[method], fontsize=8)
    density.set(xlabel="own samples, standardised; filled: learned reward, line: gold", yticks=[])
    density.set_title("(c) learned and gold reward of own samples (Fig. 6)", loc="left")
    correlations = [[own_correlation(method, run) for run in runs] for method, runs in methods.items()]
    mean, low, high = (np.array(v) for v in zip(*map(mean_and_interval, correlations), strict=True))
    ranked.errorbar(x, mean, [mean - low, high - mean], fmt="o", ms=5, capsize=2, color="#4477aa")
    ranked.axhline(0, color="#bbbbbb", lw=1)
    ranked.set_xticks(x, labels, rotation=45, ha="right", fontsize=7)
    ranked.set(ylabel="Spearman's correlation with gold")
    ranked.set_title("(d) order of own samples", loc="left")
    figures.save(fig, path, 120)


def show(args: Args) -> None:
    root, out, gold = Path(args.runs), Path(args.output), Gold(args.gold)
    numbers = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())
    sizes = {size: trials(root / str(size), gold) for size in numbers}
    methods = sizes.get(args.main, {})
    if not methods:
        raise UserError(f"--runs: found no finished run in {root / str(args.main)}, expected <seed>/<method>")
    ends = {str(run.folder): run.points[-1].columns for own in sizes.values() for runs in own.values() for run in runs}
    require_same_rows(ends)
    start = methods["sft"][0].points[0].columns
    add_gain([run for own in sizes.values() for runs in own.values() for run in runs], start["good"])
    shown = start["row"]
    held = {row["row"]: row for row in load_rows(str(root / "data" / "held_out.jsonl"), "all")}
    held = [held[int(row)] for row in shown]
    expert = gold.score([row["response"] for row in held])
    parts = [f"{about_intervals(max(map(len, methods.values())))}\n"]
    if (root / "grid" / "table.md").is_file():
        parts += ["Rates\n", (root / "grid" / "table.md").read_text()]
    parts += [
        "Methods\n", method_table(methods, start, expert),
        "Contrasts\n", contrast_table(methods), "Equal KL\n", kl_table(methods), "Equal updates\n", update_table(methods),
        "Gates\n", gate_table(methods, gold, held),
        "Rewards\n", reward_table(methods), reward_contrasts(methods),
    ]  # fmt: skip
    if len(sizes) > 1:
        parts += ["Numbers of preferences, gold less the base's (seeds)\n", ratio_table(sizes)]
        parts += other_sizes(sizes, args.main)
    if (root / "w1").is_dir():
        parts += ["w1 of Direct AIHF\n", weight_table(root / "w1", methods, gold, start["good"])]
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(parts)
    (out / "sentiment.md").write_text(text)
    said = samples(methods, [row["prompt"] for row in held], gold)
    (out / "samples.txt").write_text(said)
    figure(methods, out / "sentiment.png")
    print(said)
    print(text)
    print(f"tables: {out / 'sentiment.md'}   figure: {out / 'sentiment.png'}")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
