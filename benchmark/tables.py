"""Shared by the tables of benchmark/: the evaluations of a run, and means over seeds with an interval over seeds and rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError
from common.store import read_metrics
from extras.statistics import bootstrap_interval, read_columns

Columns = dict[str, np.ndarray]  # measure -> (rows,)


# ---- runs ----
@dataclass
class Evaluation:
    number: int  # in the name of its file: outer iteration, epoch or updates, as the script counts
    step: int  # optimizer steps done
    columns: Columns


def read_json(path: Path, flag: str) -> dict:
    """A JSON object. UserError, in one line, if the file is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: found no readable {path} ({error}), expected the directory of a run") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag}: found a {type(value).__name__} in {path}, expected an object")
    return value


def read_log(path: Path, flag: str) -> list[dict]:
    """Rows of a metrics.jsonl or timing.jsonl. UserError, in one line, if the file is missing, broken or empty."""
    try:
        rows = read_metrics(path)
    except (OSError, UserError) as error:
        raise UserError(f"{flag}: found no readable {path} ({error}), expected the directory of a run") from None
    if not rows:
        raise UserError(f"{flag}: found no rows in {path}, expected a run that has begun")
    return rows


def columns_of(path: Path, flag: str) -> Columns:
    """Columns of a file of evals/. UserError, in one line, if it is missing, broken or empty."""
    try:
        return read_columns(path)
    except (OSError, ValueError, IndexError) as error:  # pyarrow's errors are of the first two types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{flag}: found no readable rows in {path} ({reason}), expected an evaluation") from None


def script_of(folder: Path, flag: str) -> str:
    """The script that made a run, by its args.json."""
    return str(read_json(folder / "args.json", flag).get("script"))


def evaluations(folder: Path, flag: str = "--runs", at_least: int = 2) -> list[Evaluation]:
    """Evaluations of a run of any script that trains, in order. UserError if there are fewer than `at_least`."""
    if not folder.is_dir():
        raise UserError(f"{flag}: found no folder {folder}, expected the directory of a run")
    files = sorted((folder / "evals").glob("[0-9]*.parquet"), key=lambda path: int(path.stem))
    if len(files) < at_least:
        expected = f"{at_least} or more: a finished run of a script that trains"
        raise UserError(f"{flag}: found {len(files)} evaluations in {folder}, expected {expected}")
    steps = [row.get("step", 0) for row in read_log(folder / "metrics.jsonl", flag) if "eval/nll" in row]
    if len(steps) != len(files):
        found = f"found {len(files)} evaluations in {folder / 'evals'} but {len(steps)} in its metrics.jsonl"
        raise UserError(f"{flag}: {found}, expected as many")
    return [Evaluation(int(f.stem), s, columns_of(f, flag)) for f, s in zip(files, steps, strict=True)]


def require_measures(columns: Columns, names, where, flag: str = "--runs", hint: str = "") -> None:
    """UserError unless all measures are there; hint: what makes them be there."""
    if missing := [name for name in names if name not in columns]:
        raise UserError(f"{flag}: found no {', '.join(missing)} in {where}, expected a run that measured it{hint}")


def require_same_rows(runs: dict[str, Columns], flag: str = "--runs") -> None:
    """UserError unless all evaluations {name of the run: columns} are of the same held-out rows, in the same order."""
    (first, reference), *others = runs.items()
    for name, columns in others:
        if not np.array_equal(columns["row"], reference["row"]):
            raise UserError(f"{flag}: found other held-out rows in {name} than in {first}, expected the same ones")


# ---- numbers ----
def mean_and_interval(values: list[np.ndarray]) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, rows): 95% hierarchical bootstrap, over the rows alone where there is one seed."""
    return float(np.mean(values)), *bootstrap_interval(np.stack(values))


def cell(values: list[np.ndarray], digits: int) -> str:
    mean, low, high = (f"{v:.{digits}f}" for v in mean_and_interval(values))
    return f"{mean} [{low}, {high}]"


def of_seeds(label: str, seeds: int, usual: int) -> str:
    """A row's label, marked where it is measured with another number of seeds than the table."""
    return label if seeds == usual else f"{label} ({seeds} seed{'s' * (seeds != 1)})"


def about_intervals(seeds: int) -> str:
    """Say in words how the intervals of a table were made, which depends on its number of seeds."""
    if seeds == 1:
        return "One seed: 95% bootstrap intervals over held-out rows; they say nothing of other seeds."
    return f"{seeds} seeds: 95% hierarchical bootstrap intervals, over seeds and held-out rows."


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
