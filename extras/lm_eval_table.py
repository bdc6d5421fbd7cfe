"""One table from the result files of lm-eval (EleutherAI's harness), with the metric and shots that the papers name.

A file of lm-eval 0.4 has `results` {task: {"metric,filter": value, "metric_stderr,filter": value}}, `n-shot`, `n-samples`
and `model_name`. Groups such as mmlu have no number of shots of their own.
"""

import json
from pathlib import Path

from common import UserError
from common.store import write_json
from extras.value_lists import words_of

METRICS = {  # task of the Open LLM Leaderboard (first version) -> the metric of the papers' tables
    "arc_challenge": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "mmlu": "acc,none",
    "truthfulqa_mc2": "acc,none",
    "winogrande": "acc,none",
    "gsm8k": "exact_match,strict-match",
}
SHOTS = {"arc_challenge": 25, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10, "mmlu": 5}
LOCAL = "_local"  # ends the names of our tasks that read local files


def tabulate(args) -> list[dict]:
    """Print the table of --lm-eval, and write it to lm_eval.json and lm_eval.md of --output-dir -> its rows."""
    rows = [row for word in words_of(args.lm_eval) for path in result_files(Path(word)) for row in read_results(path)]
    rows.sort(key=lambda row: row["model"])  # stable: tasks stay in the order of their file
    if args.output_dir != "auto":
        out = Path(args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "lm_eval.json", {"rows": rows})
        (out / "lm_eval.md").write_text(markdown(rows))
        print(f"table: {out / 'lm_eval.md'}   values: {out / 'lm_eval.json'}")
    show(rows)
    return rows


def result_files(path: Path) -> list[Path]:
    """The file itself; of a folder, the newest results_*.json of each folder below it."""
    if path.is_file():
        return [path]
    newest = {found.parent: found for found in sorted(path.rglob("results_*.json"))}  # their names end in the time
    if not newest:
        raise UserError(
            f"--lm-eval: found no results_*.json at {path}, expected a result file of lm-eval, or its --output_path"
        )
    return list(newest.values())


def read_results(path: Path) -> list[dict]:
    """[{model, task, metric, shots, value, stderr, rows, usual_shots}]: a known task's usual metric, else every metric."""
    try:
        content = json.loads(path.read_text())
        results, shots, counts = content["results"], content.get("n-shot", {}), content.get("n-samples", {})
        model = str(content.get("model_name") or path.parent.name)
        rows = []
        for task, values in results.items():
            known = task.removesuffix(LOCAL)
            metrics = [METRICS[known]] if known in METRICS else [k for k in values if "," in k and "_stderr" not in k]
            for key in metrics:
                metric, _, kind = key.partition(",")
                stderr = values.get(f"{metric}_stderr,{kind}")
                rows.append({
                    "model": model, "task": task, "metric": metric if kind == "none" else f"{metric}, {kind}",
                    "shots": shots.get(task), "usual_shots": SHOTS.get(known), "value": float(values[key]),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "rows": counts.get(task, {}).get("effective"),
                })  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"--lm-eval: found {path} ({found}), expected a result file of lm-eval 0.4") from error
    return rows


def cells(row: dict) -> list[str]:
    """The words of a line. Shots that are not the leaderboard's are marked: the numbers are then no others' numbers."""
    usual, shots = row["usual_shots"], row["shots"]
    marked = "" if shots is None else f"{shots}" if usual in (None, shots) else f"{shots} (usual: {usual})"
    value = f"{100 * row['value']:.2f}" + ("" if row["stderr"] is None else f" ± {100 * row['stderr']:.2f}")
    return [row["model"], row["task"], row["metric"], marked, "" if row["rows"] is None else str(row["rows"]), value]


HEADER = ["model", "task", "metric", "shots", "rows", "value ± standard error, %"]


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title="results of lm-eval")
    for i, name in enumerate(HEADER):
        view.add_column(name, justify="right" if i > 2 else "left", overflow="fold")  # names are whole
    for row in rows:
        view.add_row(*cells(row))
    Console(width=100).print(view)
