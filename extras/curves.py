"""Curves of runs from their metrics.jsonl and evals/: groups of seeds, means with intervals, frontiers, a PNG."""

import difflib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError
from common.store import read_metrics
from extras import figures
from extras.screen import SHOWN
from extras.table import GOLD_TABLE, TABLE

OWN = ("seed", "output_dir", "resume", "report_to", "overwrite")  # flags in which the runs of one group may differ
ROWS = "bootstrap over held-out rows"
BOTH = "bootstrap over seeds and held-out rows"
SEEDS = "Student's t over seeds"


@dataclass
class History:
    """The metrics of one run; of one seed of it where a run trains several."""

    folder: Path
    script: str
    args: dict
    rows: list[dict]

    def series(self, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, y), each (n,), of the rows that have both as finite numbers, in the order they were written."""
        pairs = [(row.get(x, math.nan), row.get(name, math.nan)) for row in self.rows]
        kept = [pair for pair in pairs if all(map(math.isfinite, pair))]
        return tuple(np.array(kept, float).reshape(-1, 2).T)  # type: ignore[return-value]

    @functools.cached_property
    def evaluations(self) -> list[dict[str, np.ndarray]]:
        """The measures of each evaluation of a policy by held-out row, {column: (rows,)}."""
        from extras.statistics import read_columns

        files = sorted((self.folder / "evals").glob("[0-9]*.parquet"), key=lambda path: int(path.stem))
        return [read_columns(path) for path in files]


# ---- runs and their groups ----
def read_run(folder: Path) -> list[History]:
    """Metrics of a run, one History for each seed in it. UserError, in one line, for a folder that is no run."""
    try:
        stored = json.loads((folder / "args.json").read_text())
        script, args = stored["script"], dict(stored["args"])
        rows = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = " ".join(str(error).split())[:160]
        expected = "the folder of a run, with args.json and metrics.jsonl"
        raise UserError(
            f"runs: found {folder}, which cannot be read as a run ({reason}), expected {expected}"
        ) from None
    if not rows:
        raise UserError(f"runs: found no metrics in {folder}, expected a run that has logged some")
    seeds = dict.fromkeys(row.get("seed") for row in rows)
    return [History(folder, script, args, [row for row in rows if row.get("seed") == seed]) for seed in seeds]


def read_groups(words: tuple[str, ...]) -> dict[str, list[History]]:
    """{label: runs that differ in the seed alone} of run folders; LABEL=DIR[,DIR...] makes a group by hand. UserError."""
    if not words:
        raise UserError("runs: found none, expected one or more folders of runs")
    named: dict[str, list[History]] = {}
    loose: dict[str, list[History]] = {}
    for word in words:
        label, sign, folders = word.partition("=")
        if sign and not Path(word).exists():
            if not label or not all(folders.split(",")):
                raise UserError(f"runs: found {word}, expected DIR or LABEL=DIR[,DIR...]")
            named.setdefault(label, []).extend(h for f in folders.split(",") for h in read_run(Path(f)))
            continue
        for history in read_run(Path(word)):
            settings = {name: value for name, value in history.args.items() if name not in OWN}
            loose.setdefault(json.dumps([history.script, settings], sort_keys=True), []).append(history)
    labels = names(list(loose.values()))
    return named | dict(zip(labels, loose.values(), strict=True))


def names(groups: list[list[History]]) -> list[str]:
    """A label for each group: the script, and the flags that tell it from the others of that script, at most three."""
    found = []
    for group in groups:
        first = group[0]
        others = [other[0].args for other in groups if other[0].script == first.script]
        differing = [
            f"{name} {value}" for name, value in first.args.items()
            if name not in OWN and any(other.get(name) != value for other in others)
        ]  # fmt: skip
        found.append(", ".join([first.script, *differing[:3]]))
    return [name if found.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(found)]


def metric_names(groups: dict[str, list[History]]) -> list[str]:
    """All names of numbers in the rows, in the order in which they come."""
    return list(dict.fromkeys(n for group in groups.values() for run in group for row in run.rows for n in row))


def resolve(name: str, groups: dict[str, list[History]], flag: str = "--metric") -> str:
    """The whole name of a metric from it or from its end: kl_k3 is eval/kl_k3. UserError if no run has it, or for two."""
    known = metric_names(groups)
    if name in known:
        return name
    ends = [n for n in known if n.endswith(f"/{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{flag}: found {name}, expected one of {', '.join(ends)}")
    short = {n.removeprefix("eval/"): n for n in known} | {n: n for n in known}
    near = dict.fromkeys(short[n] for n in difflib.get_close_matches(name, short, 3, 0.4))
    expected = f"{', '.join(near)}, or another metric of the runs" if near else f"one of {', '.join(known)}"
    raise UserError(f"{flag}: found {name}, which no run has, expected {expected}")


# ---- means and intervals ----
@dataclass
class Curve:
    """A metric of a group: means over its runs, each (n,), with an interval; `kind` says of what, and is empty without one."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kind: str
    each: list[tuple[np.ndarray, np.ndarray]]  # (x, y) of each run


def student(degrees: int, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t: tan(u) has its density at t / sqrt(degrees), where u has cos(u)^(degrees - 1)."""
    u = np.linspace(0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos((u[1:] + u[:-1]) / 2) ** (degrees - 1))
    at = np.searchsorted(mass, level * mass[-1])
    return math.sqrt(degrees) * math.tan(u[at + 1])


def seed_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each (n,), of the mean over seeds of values (seeds, n): 95%, Student's t."""
    seeds = len(values)
    half = student(seeds - 1) * values.std(0, ddof=1) / math.sqrt(seeds)
    return values.mean(0) - half, values.mean(0) + half


def by_row(runs: list[History], name: str) -> list[np.ndarray] | None:
    """For each evaluation the values (seeds, rows) of a measure; None if a run has none by row, or another set of rows."""
    column = name.removeprefix("eval/")
    if not name.startswith("eval/") or not all(run.evaluations and column in run.evaluations[-1] for run in runs):
        return None
    count = min(len(run.evaluations) for run in runs)
    first = runs[0].evaluations[0]["row"]
    tables = [[run.evaluations[i] for run in runs] for i in range(count)]
    if not all(column in t and np.array_equal(t["row"], first) for same in tables for t in same):
        return None
    return [np.stack([t[column] for t in same]) for same in tables]


def interval(runs: list[History], name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """(low, high, what the interval is over) of the means of values (seeds, n)."""
    rows = by_row(runs, name)
    if rows is not None and len(rows) == values.shape[1]:  # else it is not known which row belongs to which
        from extras.statistics import bootstrap_interval

        low, high = np.array([bootstrap_interval(v) for v in rows]).T
        return low, high, BOTH if len(runs) > 1 else ROWS
    if len(runs) > 1:
        return *seed_interval(values), SEEDS
    return values[0], values[0], ""


def curve(runs: list[History], name: str, x: str = "step") -> Curve | None:
    """A metric against what a row counts, at the places that all runs of a group have reached; None if they share none."""
    each = [run.series(name, x) for run in runs]
    last = [dict(zip(*map(list, series), strict=True)) for series in each]  # of two rows at one place the later one
    shared = [place for place in last[0] if all(place in other for other in last)]
    if not shared:
        return None
    values = np.array([[own[place] for place in shared] for own in last])
    low, high, kind = interval(runs, name, values)
    return Curve(np.array(shared), values.mean(0), low, high, kind, each)


@dataclass
class Frontier:
    """Two metrics of a group against each other, one point for each row that has both, in order."""

    x: Curve
    y: Curve


def frontier(runs: list[History], name: str, x: str) -> Frontier | None:
    """Means over runs of both metrics at the same place in the order of their rows; None if no row has both."""
    each = [run.series(name, x) for run in runs]
    count = min(len(own) for own, _ in each)
    if not count:
        return None

    def side(metric: str, index: int) -> Curve:
        values = np.array([series[index][:count] for series in each])
        low, high, kind = interval(runs, metric, values)
        return Curve(np.arange(count), values.mean(0), low, high, kind, each)

    return Frontier(side(x, 0), side(name, 1))


# ---- figures ----
def default_metrics(groups: dict[str, list[History]], most: int = 16) -> list[str]:
    """What is drawn unless metrics are named: losses and scores of training, then the measures of the printed table."""
    known = metric_names(groups)
    wanted = [*SHOWN, *(name for name, _ in (TABLE | GOLD_TABLE).values()), "eval/reward/accuracy"]
    return [name for name in dict.fromkeys(wanted) if name in known][:most]


def draw_curves(
    groups: dict[str, list[History]], metrics: list[str], path: Path, x: str = "step", title: str = ""
) -> None:
    """A panel for each metric, a colour for each group, to a PNG. x: what a row counts, or a metric, for a frontier.

    UserError if a metric has no value beside x in any run.
    """
    figure, axes = figures.grid(len(metrics), min(len(metrics), 4 if len(metrics) > 6 else 3))
    script, kinds = next(iter(groups.values()))[0].script, {}
    units = figures.units(figures.meanings(script))
    for ax, metric in zip(axes, metrics, strict=True):
        drawn = False
        for label, color in figures.colored(groups):
            runs = groups[label]
            shown = label if len(runs) == 1 else f"{label} ({len(runs)} seeds)"
            if x in figures.AXES:
                if found := curve(runs, metric, x):
                    thin = found.each if len(runs) > 1 else ()
                    low, high = (found.low, found.high) if found.kind else (None, None)
                    figures.draw(ax, found.x, found.mean, low, high, color, shown, thin)
                    kinds[found.kind] = drawn = True
            elif both := frontier(runs, metric, x):
                draw_frontier(ax, both, color, shown)
                kinds[both.y.kind] = kinds[both.x.kind] = drawn = True
        if not drawn:
            raise UserError(
                f"--metric: found no row with both {metric} and {x}, expected runs that logged them together"
            )
        ax.set_title(f"{metric} ({figures.BETTER[metric]})" if metric in figures.BETTER else metric)
        ax.set_ylabel(units.get(metric, ""))
        ax.set_xlabel(figures.axis_title(x, script))
    figures.legend(figure, axes[0])
    figures.caption(figure, about(kinds))
    if title:
        figure.suptitle(title, x=0.01, ha="left", size=11)
    figures.save(figure, path)


def draw_frontier(ax, both: Frontier, color: str, label: str) -> None:
    """Points joined in their order, with bars for both intervals; the last one is larger."""
    x, y = both.x, both.y
    bars = {
        key: [np.maximum(side.mean - side.low, 0), np.maximum(side.high - side.mean, 0)]
        for key, side in (("xerr", x), ("yerr", y)) if side.kind
    }  # fmt: skip
    ax.errorbar(x.mean, y.mean, **bars, color=color, lw=1.4, elinewidth=0.8, marker="o", ms=3.5, label=label)
    ax.plot(x.mean[-1], y.mean[-1], color=color, marker="o", ms=7)


def about(kinds: dict[str, bool]) -> str:
    """Say in words what the bands or bars of a figure are."""
    named = [kind for kind in kinds if kind]
    return f"bands and bars: 95%, {' or '.join(named)}" if named else "one run: no intervals"


def draw_run(run) -> str:
    """curves.png in the folder of a finished run. Returns its path, or in words what is missing to draw it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return f"not drawn, for want of matplotlib: pip install matplotlib, then python plot.py {run.dir}"
    groups = read_groups((str(run.dir),))
    groups = {next(iter(groups)): next(iter(groups.values()))}
    if not (metrics := default_metrics(groups)):
        return "not drawn: the run has logged no metric that a figure shows"
    draw_curves(groups, metrics, path := run.dir / "curves.png", title=run.dir.name)
    return str(path)
