"""What the tables of benchmark/ share: means over seeds with an interval over held-out rows."""

import numpy as np

from common.evals import bootstrap_interval


def mean_and_interval(values: list[np.ndarray]) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, rows): 95% bootstrap over rows of the mean over seeds."""
    return float(np.mean(values)), *bootstrap_interval(np.mean(values, 0))


def cell(values: list[np.ndarray], digits: int) -> str:
    mean, low, high = (f"{v:.{digits}f}" for v in mean_and_interval(values))
    return f"{mean} [{low}, {high}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
