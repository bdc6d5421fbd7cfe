"""The table that a script prints at its end."""

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


def print_evaluations(run, start: str, method: str) -> None:
    """Print one line for each evaluation of the run: the policy it started from, then the method's policies."""
    from rich.console import Console
    from rich.table import Table

    rows = [r for r in run.logged() if "eval/nll" in r]
    shown = {c: v for c, v in (TABLE | GOLD_TABLE).items() if any(v[0] in r for r in rows)}
    table = Table(title=f"held-out measures, {run.dir}")
    for column in ("policy", "iteration", "step", *shown):
        table.add_column(column, justify="right")
    for i, row in enumerate(rows):
        cells = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in shown.values()]
        table.add_row(method if i else start, str(row["outer_iteration"]), str(row["step"]), *cells)
    Console(width=140).print(table)
