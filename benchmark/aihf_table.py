"""Tables and figures of benchmark/aihf_small.sh: every method with a gold reward, over seeds and ratios.

Intervals are 95%: a hierarchical bootstrap over seeds and held-out rows, over rows alone where there is one seed.

    python benchmark/aihf_table.py --runs runs/aihf_small --output runs/aihf_small
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.tables import (  # noqa: E402
    about_intervals,
    evaluations,
    mean_and_interval,
    of_seeds,
    read_json,
    read_log,
    require_measures,
    require_same_rows,
)
from common import UserError  # noqa: E402
from common.args import main
from common.evals import pairwise_wins
from extras import figures

METHODS = {  # folder -> label
    "sft": "SFT", "dpo": "DPO", "ipo": "IPO", "spin": "SPIN", "rlhf": "RLHF (online DPO)", "rlhf_ppo": "RLHF (PPO)",
    "direct": "Direct AIHF", "self_play": "Self-Play AIHF", "aihf": "AIHF (online DPO)", "aihf_ppo": "AIHF (PPO)",
}  # fmt: skip
RATIOS = {"10_1": "10:1", "1_1": "1:1", "1_10": "1:10"}  # demonstrations : preferences
COLUMNS = {  # column -> metric of evals/<n>.parquet, digits
    "gold score": ("gold/score", 2),
    "less the base's": ("gold/gain", 2),
    "win rate over base": ("gold/win_rate_base", 3),
    "win rate over SFT": ("gold/win_rate_sft", 3),
    "KL to the base, nats": ("kl_k1", 2),
    "NLL": ("nll", 2),
    "ROUGE-L": ("rouge_l", 3),
    "length": ("completions/mean_length", 1),
}
CLAIMS = [  # the paper: the first has the higher gold reward, and moves less from the base
    ("aihf", "rlhf"), ("aihf_ppo", "rlhf_ppo"), ("direct", "rlhf"), ("self_play", "rlhf"), ("direct", "dpo"),
    ("self_play", "dpo"), ("self_play", "spin"), ("aihf", "sft"), ("aihf_ppo", "sft"),
]  # fmt: skip
COLORS = {
    "sft": "#888888", "dpo": "#4477aa", "ipo": "#66ccee", "spin": "#ccbb44", "rlhf": "#ee6677", "rlhf_ppo": "#ee6677",
    "direct": "#aa3377", "self_play": "#332288", "aihf": "#228833", "aihf_ppo": "#228833",
}  # fmt: skip
DASHED = {"rlhf_ppo", "aihf_ppo"}
LEARNED = ("rlhf", "rlhf_ppo", "aihf", "aihf_ppo")  # those with a reward model


@dataclass
class Args:
    runs: str
    """folder of benchmark/aihf_small.sh: <ratio>/<seed>/<method>."""
    seeds: tuple[int, ...] = (1, 2, 3)
    ratio_seeds: tuple[int, ...] = ()
    """seeds of the runs at other ratios than 1:1; empty: the same."""
    output: str = "runs/aihf_small"
    """folder for the tables and figures."""


Run = dict[int, dict[str, np.ndarray]]  # steps done -> {metric: (rows,)}


def load(directory: Path) -> Run:
    """Evaluations of a run, by the optimizer steps done. UserError if it has not finished."""
    if not (directory / "final" / "manifest.json").is_file():
        raise UserError(f"--runs: found no finished run in {directory}, expected one of every method, seed and ratio")
    found = {e.step: e.columns for e in evaluations(directory)}
    needed = ["row", "gold/demonstrations", *(m for m, _ in COLUMNS.values())]
    start = next(iter(found.values()))
    for step, evaluation in found.items():
        require_measures(evaluation, ["gold/score"], directory, hint=", with --gold-reward-model")
        evaluation["gold/gain"] = evaluation["gold/score"] - start["gold/score"]
        evaluation.setdefault("gold/win_rate_sft", np.full(len(evaluation["gold/score"]), np.nan))  # filled in later
        require_measures(evaluation, needed, f"{directory} after {step} steps", hint=", with --gold-reward-model")
    return found


def at(runs: list[Run], point: int) -> list[dict[str, np.ndarray]]:
    """The evaluation of that place in the order (-1: the last) of each seed."""
    return [run[sorted(run)[point]] for run in runs]


def cell(seeds: list[dict], metric: str, digits: int) -> str:
    mean, low, high = mean_and_interval([e[metric] for e in seeds])
    spread = f" ±{np.std([e[metric].mean() for e in seeds], ddof=1):.{digits}f}" if len(seeds) > 1 else ""
    return f"{mean:.{digits}f}{spread} [{low:.{digits}f}, {high:.{digits}f}]"


def method_table(runs: dict[str, list[Run]]) -> str:
    """Last evaluation of every method at 1:1. All are made on the same prompts with the same random streams."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    start, sft = at(runs["sft"], 0), at(runs["sft"], -1)
    lines.append(f"| demonstrations | {cell(start[:1], 'gold/demonstrations', 2)} |" + " |" * (len(COLUMNS) - 1))
    for label, found in [("base", start), *((METHODS[m], at(r, -1)) for m, r in runs.items())]:
        for own, other in zip(found, sft, strict=True):
            own["gold/win_rate_sft"] = pairwise_wins(own["gold/score"], other["gold/score"])
        lines.append(f"| {label} | " + " | ".join(cell(found, *c) for c in COLUMNS.values()) + " |")
    return "\n".join(lines) + "\n"


def contrast_table(runs: dict[str, list[Run]]) -> str:
    """Differences of two methods' last evaluations, prompt by prompt and seed by seed."""
    lines = ["| | gold score | each seed | KL to the base, nats |", "|---|---|---|---|"]
    for first, second in CLAIMS:
        pairs = list(zip(at(runs[first], -1), at(runs[second], -1), strict=True))
        cells = []
        for metric in ("gold/score", "kl_k1"):
            mean, low, high = mean_and_interval([a[metric] - b[metric] for a, b in pairs])
            cells.append(f"{mean:+.2f} [{low:.2f}, {high:.2f}]")
        cells.insert(1, ", ".join(f"{(a['gold/score'] - b['gold/score']).mean():+.2f}" for a, b in pairs))
        lines.append(f"| {METHODS[first]} less {METHODS[second]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratio_table(runs: dict[str, dict[str, list[Run]]]) -> str:
    names = list(runs["10_1"])
    lines = [
        "| demonstrations : preferences | " + " | ".join(METHODS[m] for m in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    usual = len(runs["1_1"]["sft"])
    for ratio, label in RATIOS.items():
        label = of_seeds(label, len(runs[ratio][names[0]]), usual)
        lines.append(f"| {label} | " + " | ".join(cell(at(runs[ratio][m], -1), "gold/gain", 2) for m in names) + " |")
    return "\n".join(lines) + "\n"


def reward_table(runs: dict[str, list[Run]], folders: dict[str, list[Path]]) -> str:
    """Show how rewards rank held-out pairs, and a learned one the policy's own last samples (the paper's Tab. 5 and Fig. 6)."""
    names = (
        "held-out preferences, implicit reward", "held-out preferences, learned reward",
        "demonstration over the base's sample, learned reward", "rank correlation with gold on own samples",
    )  # fmt: skip
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, directories in folders.items():
        judged = [read_json(d / "eval" / "evaluation.json", "--runs").get("measures", {}) for d in directories]
        implicit, learned = (
            [j[name]["value"] for j in judged if name in j]
            for name in ("eval/rewards/accuracies", "eval/reward/accuracy")
        )
        columns = [implicit, learned, [], []]
        if learned:
            columns[2] = [last_logged(d, "eval/reward/accuracy") for d in directories]
            columns[3] = [rank_correlation(e["reward/samples"], e["gold/score"]) for e in at(runs[method], -1)]
        cells = [f"{np.mean(v):.3f} ({', '.join(f'{x:.3f}' for x in v)})" if v else "" for v in columns]
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def last_logged(directory: Path, name: str) -> float:
    values = [row[name] for row in read_log(directory / "metrics.jsonl", "--runs") if name in row]
    if not values:
        raise UserError(
            f"--runs: found no {name} in {directory / 'metrics.jsonl'}, expected a run that learned a reward"
        )
    return values[-1]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: of the ranks, how many values lie below each, equal ones counted half."""
    first, second = (pairwise_wins(v[:, None], v).sum(1) for v in (a, b))
    return np.corrcoef(first, second)[0, 1]


def figure(runs: dict[str, dict[str, list[Run]]], path: Path) -> None:
    fig, axes = figures.subplots(2, 2, (10.5, 7.6))
    equal = runs["1_1"]
    for method, seeds in equal.items():
        points = len(seeds[0])
        gold, kl = (
            [np.mean([e[m].mean() for e in at(seeds, k)]) for k in range(points)] for m in ("gold/score", "kl_k1")
        )
        done = np.array(sorted(seeds[0]), float)
        style = dict(
            color=COLORS[method], ls="--" if method in DASHED else "-", marker="o", ms=3, lw=1.5, label=METHODS[method]
        )
        axes[0, 0].plot((done - done[0]) / (done[-1] - done[0]), gold, **style)
        axes[0, 1].plot(kl, gold, **style)
    axes[0, 0].set(xlabel="share of the training done", ylabel="gold score of samples, reward units")
    axes[0, 0].set_title("(a) score during training, 1:1", loc="left")
    axes[0, 1].set(xlabel="KL to the base, nats per response", ylabel="gold score of samples, reward units")
    axes[0, 1].set_title("(b) score against KL, 1:1", loc="left")
    axes[0, 1].legend(frameon=False, fontsize=7, handlelength=3.5)
    bins = np.linspace(-3, 3, 31)
    for method in ("rlhf", "aihf"):
        last = at(equal[method], -1)
        for metric, fill in (("reward/samples", True), ("gold/score", False)):
            values = np.concatenate([(e[metric] - e[metric].mean()) / e[metric].std() for e in last])
            kind = dict(alpha=0.35) if fill else dict(histtype="step", lw=1.5)
            label = f"{METHODS[method]}: {'learned' if fill else 'gold'}"
            axes[1, 0].hist(values, bins, density=True, color=COLORS[method], label=label, **kind)
    axes[1, 0].set(xlabel="reward of own samples, standardised", ylabel="density")
    axes[1, 0].set_title("(c) learned and gold reward of own samples", loc="left")
    axes[1, 0].legend(frameon=False, fontsize=7)
    x = np.arange(len(RATIOS))
    for i, method in enumerate(runs["10_1"]):
        stats = [mean_and_interval([e["gold/gain"] for e in at(runs[r][method], -1)]) for r in RATIOS]
        mean, low, high = (np.array(v) for v in zip(*stats, strict=True))
        axes[1, 1].errorbar(
            x + 0.12 * (i - 1.5), mean, [mean - low, high - mean], fmt="o", color=COLORS[method], ms=4, capsize=2,
            label=METHODS[method],
        )  # fmt: skip
    axes[1, 1].axhline(0, color=figures.GREY, ls="--", lw=1, label="base")
    axes[1, 1].set_xticks(x, list(RATIOS.values()))
    axes[1, 1].set(xlabel="demonstrations : preferences", ylabel="gold score less the base's, reward units")
    axes[1, 1].margins(y=0.2)
    axes[1, 1].set_title("(d) other ratios", loc="left")
    axes[1, 1].legend(frameon=False, fontsize=7, ncols=3, loc="upper left")
    figures.caption(fig, "bars of (d): 95% bootstrap over seeds and held-out rows")
    figures.save(fig, path)


def check_folders(root: Path, folders: dict[str, dict[str, list[Path]]]) -> None:
    """UserError unless every run that the tables show is there, by its folder."""
    shown = {"sft", *(method for claim in CLAIMS for method in claim)}
    if missing := sorted(shown - folders["1_1"].keys()):
        raise UserError(
            f"--runs: found no run of {', '.join(missing)} under {root / '1_1'}, expected every method there"
        )
    for ratio in RATIOS:
        if folders[ratio].keys() != folders["10_1"].keys() and ratio != "1_1":
            raise UserError(
                f"--runs: found other methods under {root / ratio} than under {root / '10_1'}, expected the same"
            )
    if not folders["10_1"]:
        raise UserError(f"--runs: found no runs under {root / '10_1'}, expected those of other ratios")
    for directories in folders["1_1"].values():
        if len(set(directories)) < len(directories):
            raise UserError("--seeds: found a seed twice, expected each once")


def show(args: Args) -> None:
    root, out = Path(args.runs), Path(args.output)
    folders: dict[str, dict[str, list[Path]]] = {}
    for ratio in RATIOS:
        seeds = args.seeds if ratio == "1_1" else args.ratio_seeds or args.seeds
        found = {m: [root / ratio / str(s) / m for s in seeds] for m in METHODS}
        folders[ratio] = {m: directories for m, directories in found.items() if directories[0].is_dir()}
    check_folders(root, folders)
    runs = {ratio: {m: [load(d) for d in dirs] for m, dirs in methods.items()} for ratio, methods in folders.items()}
    require_same_rows({
        f"{directory} after {step} steps": columns
        for ratio, methods in runs.items() for m, seeds in methods.items()
        for directory, run in zip(folders[ratio][m], seeds, strict=True) for step, columns in run.items()
    })  # fmt: skip
    for m, seeds in runs["1_1"].items():
        if len(counts := {len(run) for run in seeds}) > 1:
            raise UserError(f"--runs: found {sorted(counts)} evaluations in the runs of {m}, expected the same number")
        if m in LEARNED:
            for directory, last in zip(folders["1_1"][m], at(seeds, -1), strict=True):
                require_measures(last, ["reward/samples"], directory)
    parts = [
        f"{about_intervals(len(args.seeds))}\n",
        method_table(runs["1_1"]),
        contrast_table(runs["1_1"]),
        ratio_table(runs),
        reward_table(runs["1_1"], folders["1_1"]),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "aihf.md").write_text("\n".join(parts))
    figure(runs, out / "aihf.png")
    print("\n".join(parts))
    print(f"tables: {out / 'aihf.md'}   figure: {out / 'aihf.png'}")


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
