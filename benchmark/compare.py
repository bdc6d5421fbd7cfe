"""Compare runs on the same held-out rows: a table with intervals (console, Markdown, JSON) and a figure.

Rows of the table: the base model (iteration 0), then the last evaluation of each method. The interval is a 95% bootstrap
over held-out rows of the mean over seeds; with two seeds or more the standard deviation over seeds stands beside it.

    python benchmark/compare.py --runs SFT=runs/a,runs/b SPIN=runs/c,runs/d --output runs/table
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, during the imports too, without a traceback

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError  # noqa: E402
from common.data import read_pairs  # noqa: E402
from common.evals import TABLE, bootstrap_interval  # noqa: E402
from common.run import main, read_metrics  # noqa: E402

COLORS = ["#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee"]
BETTER = {"eval/nll": "lower is better", "eval/rouge_l": "higher is better", "eval/logps/gap": "higher is better"}


@dataclass
class Args:
    runs: tuple[str, ...]
    """LABEL=DIR[,DIR...]: one method, one run directory per seed."""
    output: str = "runs/compare"
    """folder for table.md, table.json and figure.png."""
    title: str = ""
    """title of the figure."""


def load(directory: Path) -> dict[int, dict[str, np.ndarray]]:
    """{iteration: {metric: (rows,)}} of one run. UserError if it was never evaluated."""
    found = {}
    for path in sorted((directory / "evals").glob("[0-9]*.parquet")):
        rows = read_pairs(path)
        columns = {f"eval/{k}": np.array([r[k] for r in rows]) for k in rows[0] if k not in ("row", "sample")}
        found[int(path.stem)] = {"row": np.array([r["row"] for r in rows]), **columns}
    if len(found) < 2:
        raise UserError(f"--runs: found {len(found)} evaluations in {directory}, expected a finished run")
    return found


def steps_of(directory: Path) -> dict[int, int]:
    """{iteration: optimizer steps done} at each evaluation."""
    rows = read_metrics(directory / "metrics.jsonl")
    return {r["outer_iteration"]: r["step"] for r in rows if "eval/nll" in r}


def summarise(seeds: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """{metric: mean, low, high, sd over seeds} of per-row values, one evaluation a seed."""
    out = {}
    for name, _ in TABLE.values():
        values = np.stack([s[name] for s in seeds])  # (seeds, rows)
        low, high = bootstrap_interval(values.mean(0))
        spread = float(values.mean(1).std(ddof=1)) if len(seeds) > 1 else float("nan")
        out[name] = {"mean": float(values.mean()), "low": low, "high": high, "seed_sd": spread}
    return out


def differences(seeds: list[dict[str, np.ndarray]], base: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The same of value minus base, row by row: what changed, without the spread between rows."""
    return summarise([{name: s[name] - base[name] for name, _ in TABLE.values()} for s in seeds])


def markdown(table: dict[str, dict], seeds: int) -> str:
    lines = ["| | " + " | ".join(TABLE) + " |", "|---" * (len(TABLE) + 1) + "|"]
    for label, row in table.items():
        cells = []
        for name, digits in TABLE.values():
            r = row[name]
            spread = f" ±{r['seed_sd']:.{digits}f}" if seeds > 1 and not np.isnan(r["seed_sd"]) else ""
            cells.append(f"{r['mean']:.{digits}f}{spread} [{r['low']:.{digits}f}, {r['high']:.{digits}f}]")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(methods: dict[str, list[Path]], path: Path, title: str) -> None:
    """Each measure against optimizer steps: the mean over seeds, and every seed thin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(2, 4, figsize=(13, 5.6), sharex=True, layout="constrained")
    for ax, (column, (name, _)) in zip(axes.flat, TABLE.items(), strict=True):
        for color, (label, directories) in zip(COLORS, methods.items(), strict=False):
            curves = []
            for directory in directories:
                steps, found = steps_of(directory), load(directory)
                curves.append(([steps[i] for i in found], [found[i][name].mean() for i in found]))
                ax.plot(*curves[-1], color=color, alpha=0.25 if len(directories) > 1 else 1.0, marker="o", ms=3, lw=1.2)
            x = curves[0][0]
            ax.plot(x, np.mean([y for _, y in curves], 0), color=color, marker="o", ms=4, lw=2, label=label)
        if name == "eval/completions/mean_length":
            truth = load(next(iter(methods.values()))[0])[0]["eval/lengths/demonstrations"].mean()
            ax.axhline(truth, color="#888888", ls="--", lw=1)
            ax.text(
                0.02, truth, "demonstrations", transform=ax.get_yaxis_transform(), color="#666666", va="bottom", size=8
            )
        if name.startswith("eval/rewards"):
            ax.axhline(0.5, color="#888888", ls="--", lw=1)
        ax.set_title(f"{column} ({BETTER[name]})" if name in BETTER else column, size=9)
    for ax in axes[1]:
        ax.set_xlabel("optimizer steps")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    if title:
        fig.suptitle(title, x=0.01, ha="left", size=11)
    fig.savefig(path, dpi=130)


def compare(args: Args) -> None:
    methods = {}
    for word in args.runs:
        label, sep, directories = word.partition("=")
        if not sep:
            raise UserError(f"--runs: found {word}, expected LABEL=DIR[,DIR...]")
        methods[label] = [Path(d) for d in directories.split(",")]
    loaded = {label: [load(d) for d in directories] for label, directories in methods.items()}
    reference = next(iter(loaded.values()))[0][0]["row"]
    for label, runs in loaded.items():
        if any(not np.array_equal(run[max(run)]["row"], reference) for run in runs):
            raise UserError(f"--runs: {label} was evaluated on other rows than the first run; expected the same ones")
    table = {"base": summarise([next(iter(loaded.values()))[0][0]])}
    table |= {label: summarise([run[max(run)] for run in runs]) for label, runs in loaded.items()}
    base = next(iter(loaded.values()))[0][0]
    change = {f"{label} - base": differences([run[max(run)] for run in runs], base) for label, runs in loaded.items()}
    seeds = max(map(len, methods.values()))
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(markdown(table, seeds) + "\n" + markdown(change, seeds))
    (out / "table.json").write_text(json.dumps(table | change, indent=2) + "\n")
    figure(methods, out / "figure.png", args.title)
    show(table | change, len(reference), seeds)
    print(f"table: {out / 'table.md'}   figure: {out / 'figure.png'}")


def show(table: dict, rows: int, seeds: int) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(
        title=f"{rows} held-out rows, {seeds} seed(s); mean and 95% bootstrap interval over rows", show_lines=True
    )
    view.add_column("")
    for column in TABLE:
        view.add_column(column, justify="right")
    for label, row in table.items():
        cells = [f"{row[n]['mean']:.{d}f}\n{row[n]['low']:.{d}f}..{row[n]['high']:.{d}f}" for n, d in TABLE.values()]
        view.add_row(label, *cells)
    Console(width=160).print(view)


if __name__ == "__main__":
    main(lambda: compare(tyro.cli(Args, description=__doc__)))
