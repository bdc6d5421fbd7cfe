"""Compare runs on the same held-out rows: a table with intervals (console, Markdown, JSON) and a figure.

Rows of the table: the base model (the first run's first evaluation), then the last evaluation of each method. Intervals are 95%:
a hierarchical bootstrap over seeds and held-out rows, over rows alone where there is one seed. The standard deviation over seeds
stands beside the mean. Measures that a run lacks are left out of the table. Runs of every script that trains can be compared.

    python benchmark/compare.py --runs SFT=runs/a,runs/b SPIN=runs/c,runs/d --output runs/table
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
    evaluations,
    markdown,
    mean_and_interval,
    of_seeds,
    require_measures,
    require_same_rows,
)
from common import UserError  # noqa: E402
from common.args import main
from extras import figures
from extras.metrics import EVAL_METRICS
from extras.table import TABLE, print_table


@dataclass
class Args:
    runs: tuple[str, ...]
    """LABEL=DIR[,DIR...]: one method, one run directory per seed."""
    output: str = "runs/compare"
    """folder for table.md, table.json and figure.png."""
    title: str = ""
    """title of the figure."""


Columns = dict[str, np.ndarray]  # measure -> (rows,)


def load(directory: Path) -> list[tuple[int, Columns]]:
    """[(optimizer steps done, {measure: (rows,)})] of one run. UserError if it is not the run of a script that trains."""
    found = []
    for evaluation in evaluations(directory):
        require_measures(evaluation.columns, ["row", "nll"], directory)
        found.append((evaluation.step, {n if n == "row" else f"eval/{n}": v for n, v in evaluation.columns.items()}))
    return found


def summarise(seeds: list[Columns], measures: dict) -> dict[str, dict[str, float]]:
    """{measure: mean, low, high, sd over seeds, number of seeds} of per-row values, one evaluation a seed."""
    out = {}
    for name, _ in measures.values():
        mean, low, high = mean_and_interval([s[name] for s in seeds])
        spread = float(np.std([s[name].mean() for s in seeds], ddof=1)) if len(seeds) > 1 else float("nan")
        out[name] = {"mean": mean, "low": low, "high": high, "seed_sd": spread, "seeds": len(seeds)}
    return out


def differences(seeds: list[Columns], base: Columns, measures: dict) -> dict[str, dict[str, float]]:
    """The same of value minus base, row by row: what changed, without the spread between rows."""
    return summarise([{name: s[name] - base[name] for name, _ in measures.values()} for s in seeds], measures)


def table_of(rows: dict[str, dict], measures: dict) -> str:
    lines = []
    for label, row in rows.items():
        cells = []
        for name, digits in measures.values():
            r = row[name]
            spread = "" if np.isnan(r["seed_sd"]) else f" ±{r['seed_sd']:.{digits}f}"
            cells.append(f"{r['mean']:.{digits}f}{spread} [{r['low']:.{digits}f}, {r['high']:.{digits}f}]")
        lines.append([label, *cells])
    return markdown(["", *measures], lines)


def figure(methods: dict[str, list[list]], measures: dict, path: Path, title: str) -> None:
    """Each measure against optimizer steps: the mean over seeds, its interval, and every seed thin."""
    fig, axes = figures.subplots(2, 4, (13, 5.6), sharex=True)
    units = figures.units(EVAL_METRICS)
    for ax in axes.flat[len(measures) :]:
        ax.set_axis_off()
    for ax, (column, (name, _)) in zip(axes.flat, measures.items(), strict=False):
        for label, color in figures.colored(methods):
            runs = methods[label]
            each = [([step for step, _ in run], [values[name].mean() for _, values in run]) for run in runs]
            points = [mean_and_interval([run[k][1][name] for run in runs]) for k in range(len(runs[0]))]
            thin = each if len(runs) > 1 else []
            figures.draw(ax, each[0][0], *zip(*points, strict=True), color=color, label=label, each=thin)
        first = next(iter(methods.values()))[0][0][1]
        if name == "eval/completions/mean_length" and "eval/lengths/demonstrations" in first:
            figures.level(ax, first["eval/lengths/demonstrations"].mean(), "demonstrations")
        if name.startswith("eval/rewards"):
            figures.level(ax, 0.5)
        ax.set_title(f"{column} ({figures.BETTER[name]})" if name in figures.BETTER else column)
        ax.set_ylabel(units.get(name, ""))
    for ax in axes[1]:
        ax.set_xlabel("optimizer steps")
    figures.legend(fig, axes.flat[0])
    figures.caption(fig, about_intervals(max(map(len, methods.values()))))
    if title:
        fig.suptitle(title, x=0.01, ha="left", size=11)
    figures.save(fig, path)


def read_folders(words: tuple[str, ...]) -> dict[str, list[str]]:
    """{label: its run directories, one a seed} of --runs. UserError for words that are not LABEL=DIR[,DIR...]."""
    folders: dict[str, list[str]] = {}
    for word in words:
        label, sep, directories = word.partition("=")
        if not sep or not label or not all(directories.split(",")):
            raise UserError(f"--runs: found {word}, expected LABEL=DIR[,DIR...]")
        if label in folders:
            raise UserError(f"--runs: found {label} twice, expected one LABEL=DIR[,DIR...] for each method")
        folders[label] = directories.split(",")
        if len({Path(d).resolve() for d in folders[label]}) < len(folders[label]):
            raise UserError(f"--runs: found a directory twice in {word}, expected one for each seed")
    return folders


def read_methods(words: tuple[str, ...]) -> dict[str, list[list]]:
    """{label: the evaluations of its runs, one a seed} of --runs. UserError, in one line, for runs that cannot be compared."""
    folders = read_folders(words)
    methods = {label: [load(Path(d)) for d in directories] for label, directories in folders.items()}
    require_same_rows({
        f"{folders[label][i]}, evaluation {k}": values
        for label, runs in methods.items() for i, run in enumerate(runs) for k, (_, values) in enumerate(run)
    })  # fmt: skip
    for label, runs in methods.items():
        if len(counts := {len(run) for run in runs}) > 1:
            raise UserError(
                f"--runs: found {sorted(counts)} evaluations in the runs of {label}, expected the same number"
            )
    return methods


def compare(args: Args) -> None:
    methods = read_methods(args.runs)
    every = [values for runs in methods.values() for run in runs for _, values in run]
    measures = {column: v for column, v in TABLE.items() if all(v[0] in values for values in every)}
    base, seeds = next(iter(methods.values()))[0][0][1], max(map(len, methods.values()))
    names = {label: of_seeds(label, len(runs), seeds) for label, runs in methods.items()}
    last = {label: [run[-1][1] for run in runs] for label, runs in methods.items()}
    table = {"base": summarise([base], measures)} | {names[m]: summarise(v, measures) for m, v in last.items()}
    change = {f"{names[m]} - base": differences(v, base, measures) for m, v in last.items()}
    notes = [about_intervals(seeds)]
    for label, runs in methods.items():
        starts = [run[0][1]["eval/nll"].mean() for run in runs]
        if any(abs(s - base["eval/nll"].mean()) > 0.01 * abs(base["eval/nll"].mean()) for s in starts):
            found = ", ".join(f"{s:.2f}" for s in starts)
            notes.append(
                f"{label} starts from another policy than base, with NLL {found}: its difference to base is no gain."
            )
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join([*notes, "", table_of(table, measures), table_of(change, measures)]))
    (out / "table.json").write_text(json.dumps(table | change, indent=2) + "\n")
    figure(methods, measures, out / "figure.png", args.title)
    show(table | change, measures, len(base["row"]), notes)
    print(f"table: {out / 'table.md'}   figure: {out / 'figure.png'}")


def show(table: dict, measures: dict, rows: int, notes: list[str]) -> None:
    lines = []
    for label, row in table.items():
        cells = [f"{row[n]['mean']:.{d}f}\n{row[n]['low']:.{d}f}..{row[n]['high']:.{d}f}" for n, d in measures.values()]
        lines.append([label, *cells])
    print_table(f"{rows} held-out rows. " + " ".join(notes), ["", *measures], lines, "table.md", show_lines=True)


if __name__ == "__main__":
    main(lambda: compare(tyro.cli(Args, description=__doc__)))
