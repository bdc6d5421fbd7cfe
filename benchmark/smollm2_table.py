"""Make tables and figure of smollm2.sh: held-out pairs of people, summaries, labelled pairs by subset, lm-eval, MT-Bench.

Parts that are not there are left out, so it can be called at any time. Intervals are 95%: a hierarchical bootstrap over seeds and
held-out rows, over rows alone where there is one seed.

    python benchmark/smollm2_table.py --runs runs/smollm2 --output runs/smollm2
"""

import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.demo import Point  # noqa: E402
from benchmark.film_table import equal_kl_table
from benchmark.tables import (
    Columns,
    Evaluation,
    about_intervals,
    cell,
    columns_of,
    evaluations,
    markdown,
    mean_and_interval,
    of_seeds,
    read_json,
    require_measures,
    require_same_rows,
)
from common import UserError
from common.args import main
from common.evals import pairwise_wins
from common.store import read_pairs
from extras import figures, lm_eval_table
from extras.reward_pairs import ALL, MEAN, REWARDS

LABELS = {"sft": "SFT", "spin": "SPIN", "rft": "RFT"}
HH = {  # column -> measure of an evaluation's rows, digits
    "NLL": ("nll", 2),
    "log-prob gap": ("logps/gap", 2),
    "accuracy, implicit reward": ("rewards/accuracies", 3),
    "KL": ("kl_k1", 2),
    "length": ("completions/mean_length", 1),
}
SUMMARIES = {"KL": ("kl_k1", 2), "NLL": ("nll", 2), "ROUGE-L": ("rouge_l", 3), "length": ("completions/mean_length", 1)}


@dataclass
class Args:
    runs: str
    """folder that benchmark/smollm2.sh fills."""
    output: str = "runs/smollm2"
    """folder for smollm2.md and, where part 1 has runs, smollm2.png."""


def label(name: str) -> str:
    """irft5_lora -> IRFT, T = 5, LoRA."""
    method, _, lora = name.partition("_")
    shown = f"IRFT, T = {method[4:]}" if method.startswith("irft") else LABELS.get(method, method)
    return f"{shown}, LoRA" if lora else shown


def runs_of(folder: Path) -> dict[str, list[Path]]:
    """{method: its finished runs, one a seed} below the folders of seeds, full weights before LoRA."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[0-9]*/*/final/manifest.json")):
        found.setdefault(path.parent.parent.name, []).append(path.parent.parent)
    return {name: found[name] for name in sorted(found, key=in_order)}


def in_order(name: str) -> tuple[bool, str]:
    """Return the place of a method in a table: full weights before LoRA."""
    return "lora" in name, name


# ---- part 1 ----
def hh_table(folder: Path) -> str:
    """Rows: the start, then every method's last evaluation. The learned reward of RFT has a column of its own."""
    methods = runs_of(folder)
    seeds, rows = max(map(len, methods.values())), []
    for name, runs in methods.items():
        every = [evaluations(run) for run in runs]
        for one, run in zip(every, runs, strict=True):
            require_measures(one[-1].columns, [measure for measure, _ in HH.values()], run)
        if not rows:
            rows.append(["start", *hh_cells([every[0][0].columns]), "", ""])
        gained = cell([one[-1].columns["logps/gap"] - one[0].columns["logps/gap"] for one in every], 2)
        learned = [pairwise_wins(scores["chosen"], scores["rejected"]) for run in runs for scores in last_reward(run)]
        shown = cell(learned, 3) if learned else ""
        rows.append(
            [of_seeds(label(name), len(runs), seeds), *hh_cells([one[-1].columns for one in every]), gained, shown]
        )
    header = ["", *HH, "log-prob gap, less the start's", "accuracy, learned reward"]
    return f"{about_intervals(seeds)}\n\n{markdown(header, rows)}"


def hh_cells(columns: list[dict]) -> list[str]:
    return [cell([one[measure] for one in columns], digits) for measure, digits in HH.values()]


def last_reward(run: Path) -> list[dict]:
    """[columns of the last reward model's scores of held-out pairs], empty for a run without one."""
    files = sorted((run / "evals").glob("reward_*.parquet"), key=lambda path: int(path.stem.partition("_")[2]))
    return [columns_of(files[-1], "--runs")] if files else []


def hh_curve(every: list[list[Evaluation]], measure: str, less_start: bool = False) -> np.ndarray:
    """Return (4, evaluations): optimizer steps, then the mean of a measure over seeds and rows and the ends of its interval.

    every: the evaluations of each seed. less_start: take the first evaluation's values away, row by row.
    UserError unless all seeds evaluate after the same steps.
    """
    if len(found := {tuple(one.step for one in own) for own in every}) > 1:
        raise UserError(f"--runs: found evaluations after steps {sorted(found)}, expected the same ones in every seed")
    points = []
    for same in zip(*every, strict=True):
        values = [
            one.columns[measure] - (own[0].columns[measure] if less_start else 0.0)
            for one, own in zip(same, every, strict=True)
        ]
        points.append((same[0].step, *mean_and_interval(values)))
    return np.transpose(points)


def hh_figure(folder: Path, path: Path) -> None:
    """Draw NLL, log-prob gap (RFT paper, Fig. 1 right) and accuracy of the implicit reward (Table 8) against optimizer steps."""
    fig, axes = figures.subplots(1, 3, (11, 3.9))
    methods = {name: [evaluations(run) for run in runs] for name, runs in runs_of(folder).items()}
    panels = (
        ("NLL of the chosen answers, nats", "nll", False),
        ("log-prob gap, less the start's, nats", "logps/gap", True),
        ("accuracy of the implicit reward", "rewards/accuracies", False),
    )
    for ax, (title, measure, less_start) in zip(axes[0], panels, strict=True):
        for i, (name, color) in enumerate(figures.colored(methods)):
            steps, mean, low, high = hh_curve(methods[name], measure, less_start)
            ax.plot(steps, mean, color=color, marker="o", ms=3.5, ls="--" if "lora" in name else "-", label=label(name))
            ax.vlines(steps + 0.3 * i, low, high, color=color, lw=1, alpha=0.6)  # side by side, to be told apart
        ax.set_title(title, loc="left")
        ax.set_xlabel("optimizer steps")
    figures.level(axes[0, 1], 0.0)
    figures.level(axes[0, 2], 0.5, "chance")
    figures.legend(fig, axes[0, 0])
    figures.caption(fig, about_intervals(max(map(len, methods.values()))))
    figures.save(fig, path)


# ---- part 2 ----
def summaries_table(folder: Path, demonstrations: Path) -> str:
    """A row for every evaluation of every method, so that methods can be compared at equal KL; greedy ROUGE-L at the end."""
    texts = [json.loads(line)["completion"] for line in demonstrations.read_text().splitlines()]
    methods = runs_of(folder)
    seeds, rows = max(map(len, methods.values())), []
    for name, runs in methods.items():
        every = [evaluations(run) for run in runs]
        for i in range(min(map(len, every))):
            cells = [cell([one[i].columns[measure] for one in every], digits) for measure, digits in SUMMARIES.values()]
            last = i == min(map(len, every)) - 1
            files = [run.parent / "greedy" / name / "evals" / "0000.parquet" for run in runs]
            greedy = [columns_of(file, "--runs")["rouge_l"] for file in files if last and file.is_file()]
            tests = [samples_told_apart(run, one[i].number, texts) for run, one in zip(runs, every, strict=True)]
            shown = [cell(greedy, 3) if greedy else "", f"{np.mean(tests):.3f}"]
            rows.append([of_seeds(label(name), len(runs), seeds), str(every[0][i].step), *cells, *shown])
    header = ["", "updates", *SUMMARIES, "ROUGE-L, greedy", "two-sample test"]
    note = "Two-sample test: accuracy of a classifier between demonstrations and samples; 0.5 if it cannot tell them apart."
    return f"{about_intervals(seeds)} {note}\n\n{markdown(header, rows)}"


def summaries_at_kl(folder: Path) -> str:
    """Tabulate ROUGE-L at equal KL to the start, interpolated in each seed's path, and less SFT's; empty without a run of SFT."""
    paths = {
        label(name): [
            [Point(one.step, {**one.columns, "good": one.columns["rouge_l"]}, []) for one in evaluations(run)]
            for run in runs
        ]
        for name, runs in runs_of(folder).items()
    }
    return equal_kl_table(paths, "SFT", "ROUGE-L at ", digits=3) if "SFT" in paths else ""


def samples_told_apart(run: Path, number: int, demonstrations: list[str]) -> float:
    stored = read_pairs(run / "evals" / f"{number:04d}.parquet")
    return told_apart([demonstrations[row["row"]] for row in stored], [row["sample"] for row in stored])


def told_apart(first: list[str], second: list[str], width: int = 4096, steps: int = 300) -> float:
    """Classifier two-sample test: accuracy of telling texts of `first` from those of `second`, each fold by the other's model.

    Logistic regression with a ridge on hashed 1- and 2-grams of words and the length. Texts i of both are in the same fold,
    since they answer one prompt.
    """
    n = len(first)
    features = np.stack([hashed(text, width) for text in (*first, *second)])
    target, fold = np.repeat([1.0, 0.0], n), np.tile(np.arange(n) % 2, 2)
    right = np.zeros(2 * n)
    for held in (0, 1):
        x, y = features[fold != held], target[fold != held]
        weights = np.zeros(width + 2)
        for _ in range(steps):
            gradient = x.T @ (1 / (1 + np.exp(-x @ weights)) - y) / len(y) + 1e-3 * weights
            weights -= gradient
        margins = features[fold == held] @ weights
        right[fold == held] = pairwise_wins(margins * (2 * target[fold == held] - 1), np.zeros_like(margins))
    return float(right.mean())


def hashed(text: str, width: int) -> np.ndarray:
    """(width + 2,): counts of hashed words and pairs of words, of unit norm; log length; 1."""
    words = text.lower().split()
    vector = np.zeros(width + 2)
    for gram in (*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))):
        vector[zlib.crc32(gram.encode()) % width] += 1
    vector[:width] /= max(np.linalg.norm(vector), 1.0)
    vector[width:] = np.log1p(len(words)) - 2, 1  # near 0, so that its weight and the constant's are learned apart
    return vector


# ---- part 3 ----
Measured = dict[str, dict[str, Columns]]  # name of a method -> seed -> scores of every pair


def measured_pairs(folder: Path) -> Measured:
    """Read the scores of labelled pairs below `folder`: the start's, which has no seed, then each method's, LoRA last."""
    found: Measured = {}
    paths = folder.glob("[0-9]*/*/evals/reward_pairs.parquet")
    of_methods = sorted(paths, key=lambda path: (in_order(path.parent.parent.name), path))
    for path in (*folder.glob("base/evals/reward_pairs.parquet"), *of_methods):
        run = path.parent.parent
        seed = "" if run.name == "base" else run.parent.name
        found.setdefault(run.name, {})[seed] = columns_of(path, "--runs")
    require_same_rows({f"{name} {seed}": one for name, seeds in found.items() for seed, one in seeds.items()})
    return found


def wins_of(columns: Columns, reward: str) -> np.ndarray:
    """Return (pairs,): 1 where the reward of this name scores the chosen response higher, 1/2 for a tie."""
    return pairwise_wins(columns[f"{reward}_chosen"], columns[f"{reward}_rejected"])


def pairs_table(folder: Path) -> str:
    """Tabulate the accuracy of each model's rewards: by subset, as mean over subsets, over all pairs. Add contrasts_table."""
    found = measured_pairs(folder)
    subsets = [one["subset"] for seeds in found.values() for one in seeds.values()][0]
    parts = {name: subsets == name for name in dict.fromkeys(subsets)}
    usual, rows = max(map(len, found.values())), []
    for name, seeds in found.items():
        every = list(seeds.values())
        for reward in (reward for reward in REWARDS if f"{reward}_chosen" in every[0]):
            wins = [wins_of(one, reward) for one in every]
            columns = [[one[part] for one in wins] for part in parts.values()]
            columns += [[over_subsets(one, subsets) for one in wins], wins]
            shown = "start" if name == "base" else of_seeds(label(name), len(every), usual)
            rows.append([shown, reward, *(cell(values, 3) for values in columns)])
    sizes = {name: part.sum() for name, part in parts.items()} | dict.fromkeys((MEAN, ALL), len(subsets))
    header = ["model", "reward", *(f"{name} ({pairs})" for name, pairs in sizes.items())]
    return "\n".join([about_intervals(usual), "", markdown(header, rows), contrasts_table(found)])


def over_subsets(wins: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """Return (pairs,) of values whose mean weighs every subset alike, and whose spread is that within the subsets.

    A bootstrap of them over all pairs has the variance of one that draws within each subset.
    """
    names, which, sizes = np.unique(subsets, return_inverse=True, return_counts=True)
    means = np.bincount(which, wins) / sizes
    return means.mean() + (wins - means[which]) * len(wins) / (len(names) * sizes[which])


def contrasts_table(found: Measured) -> str:
    """Share of right pairs of the implicit rewards, less that of length alone and of the same seed's SFT, pair by pair."""
    rows = []
    for name, seeds in found.items():
        implicit = {seed: wins_of(one, "implicit") for seed, one in seeds.items() if "implicit_chosen" in one}
        if not implicit:
            continue
        less_length = cell([own - wins_of(seeds[seed], "shorter") for seed, own in implicit.items()], 3)
        sft = found.get("sft", {}) if name != "sft" else {}
        less_sft = [own - wins_of(sft[seed], "implicit") for seed, own in implicit.items() if seed in sft]
        rows.append([label(name), less_length, cell(less_sft, 3) if less_sft else ""])
    return markdown(["implicit reward of", "less the shorter answer's", "less SFT's"], rows) if rows else ""


def lm_eval_rows(folder: Path) -> str:
    """The table of lm-eval's results, with the names of the runs in place of the folders of their models."""
    rows = []
    for path in lm_eval_table.result_files(folder):
        name = str(path.relative_to(folder).parent.parent.parent)  # below it: the task, then the model's folder
        rows += [{**row, "model": name} for row in lm_eval_table.read_results(path)]
    return lm_eval_table.markdown(sorted(rows, key=lambda row: (row["task"], row["model"])))


def mt_bench_table(folder: Path) -> str:
    rows = []
    for path in sorted(folder.rglob("mt_bench.json")):
        found = read_json(path, "--runs")
        shown = (found[part]["value"] for part in ("turn_1", "turn_2", "both"))
        rows.append(
            [
                str(path.parent.relative_to(folder)),
                *(f"{v:.2f}" if v is not None else "" for v in shown),
                str(found["ungraded"]),
            ]
        )
    return markdown(["model", "first turn", "second turn", "both", "without a grade"], rows)


def write(args: Args) -> None:
    runs, parts = Path(args.runs), []
    if runs_of(runs / "hh"):
        parts += ["## Held-out pairs of people, chosen answers trained on alone\n", hh_table(runs / "hh")]
    if runs_of(runs / "summaries"):
        held_out = runs / "data" / "summaries_held_out.jsonl"
        parts += ["## Summaries\n", summaries_table(runs / "summaries", held_out), summaries_at_kl(runs / "summaries")]
    for title, name, file, table in (
        ("All held-out pairs of people", "people", "reward_pairs.parquet", pairs_table),
        ("Other labelled pairs", "pairs", "reward_pairs.parquet", pairs_table),
        ("lm-eval", "lm_eval", "results_*.json", lm_eval_rows),
        ("MT-Bench", "mt_bench", "mt_bench.json", mt_bench_table),
    ):
        if any((runs / "field" / name).rglob(file)):
            parts += [f"## {title}\n", table(runs / "field" / name)]
    if not parts:
        raise UserError(f"--runs: found no finished run in {runs}, expected a folder of benchmark/smollm2.sh")
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    (out / "smollm2.md").write_text("\n".join(parts))
    print("\n".join(parts))
    if runs_of(runs / "hh"):
        hh_figure(runs / "hh", out / "smollm2.png")
    print(f"table: {out / 'smollm2.md'}")


if __name__ == "__main__":
    main(lambda: write(tyro.cli(Args, description=__doc__)))
