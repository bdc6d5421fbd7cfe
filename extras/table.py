"""The table that a script prints at its end, and how a table fits the terminal."""

import sys
from collections.abc import Sequence

TABLE = {  # column of the printed table -> metric, digits
    "NLL": ("eval/nll", 2),
    "logp gap": ("eval/logps/gap", 2),
    "accuracy": ("eval/rewards/accuracies", 3),
    "acc. shuffled": ("eval/rewards/accuracies_shuffled", 3),
    "ROUGE-L": ("eval/rouge_l", 3),
    "length": ("eval/completions/mean_length", 1),
    "KL k1": ("eval/kl_k1", 3),
    "KL k3": ("eval/kl_k3", 3),
}
GOLD_TABLE = {
    "reward": ("eval/reward/samples", 3),
    "gold": ("eval/gold/score", 3),
    "win base": ("eval/gold/win_rate_base", 3),
    "win baseline": ("eval/gold/win_rate_baseline", 3),
    "win judge": ("eval/judge/win_rate_demonstrations", 3),
}
WIDE = 160  # columns of a table where stdout is no terminal: a file does not wrap


def print_evaluations(run, start: str, method: str) -> None:
    """Print one line for each evaluation of the run: the policy it started from, then the method's policies."""
    rows = [r for r in run.logged() if "eval/nll" in r]
    shown = {c: v for c, v in (TABLE | GOLD_TABLE).items() if any(v[0] in r for r in rows)}
    cells = [
        [
            method if i else start, str(row["outer_iteration"]), str(row["step"]),
            *(f"{row[name]:.{digits}f}" if row.get(name) is not None else "" for name, digits in shown.values()),
        ]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    print_table(
        f"held-out measures, {run.dir}", ["policy", "iteration", "step", *shown], cells, run.dir / "metrics.jsonl"
    )


def width() -> int:
    """Columns of the terminal on stdout; WIDE where that is none."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else WIDE


def needed(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of a table with one line for each row: a frame, and a space on each side of every cell."""
    widest = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(header, *rows, strict=True)
    ]
    return sum(widest) + 3 * len(widest) + 1


def print_table(title: str, header: list[str], rows: list[list[str]], whole: object = "", **how) -> None:
    """Print a table of which no row wraps: as it is if it fits the terminal, else turned, a column for each row.

    If it still does not fit, columns in the middle are left out, and a line says how many and where they stand (`whole`).
    how: arguments of rich's Table.
    """
    from rich.console import Console
    from rich.table import Table

    room, note = width(), ""
    if needed(header, rows) > room:
        rows, left_out = turned(header, rows, room)
        header, rows = rows[0], rows[1:]
        note = f"{left_out} more in {whole}" if left_out else ""
    table = Table(title=title, title_justify="left", **how)
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    Console(width=max(room, 20)).print(table, markup=False)
    if note:
        print(note)


def turned(header: list[str], rows: list[list[str]], room: int) -> tuple[list[list[str]], int]:
    """(the table with rows as columns, how many of them are left out so that it fits): the first row and the last ones stay."""
    kept = len(rows)
    while True:
        shown = rows if kept == len(rows) else [rows[0], *rows[len(rows) - kept + 1 :]]
        table = [list(column) for column in zip(header, *shown, strict=True)]
        if kept <= 2 or needed(table[0], table[1:]) <= room:
            return table, len(rows) - kept
        kept -= 1
