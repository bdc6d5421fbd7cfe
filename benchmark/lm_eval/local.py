"""What the tasks beside this file read: the files of the folder that the variable LM_EVAL_DATA names."""

import csv
import json
import math
import os
from pathlib import Path


def data_file(name: str) -> Path:
    path = Path(os.environ.get("LM_EVAL_DATA", "")) / name
    if "LM_EVAL_DATA" not in os.environ or not path.is_file():
        raise SystemExit(f"LM_EVAL_DATA: found no file {path}, expected the folder with {name}")
    return path


def truthfulqa(**_):
    """{validation: rows of question, choices and labels}: correct answers of the CSV (label 1), then incorrect ones (0)."""
    from datasets import Dataset

    rows = []
    with data_file("TruthfulQA.csv").open(encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            right, wrong = answers(row["Correct Answers"]), answers(row["Incorrect Answers"])
            labels = [1] * len(right) + [0] * len(wrong)
            rows.append({"question": row["Question"], "choices": right + wrong, "labels": labels})
    return {"validation": Dataset.from_list(rows)}


def answers(cell: str) -> list[str]:
    """The answers of a cell of the CSV, between semicolons."""
    return [text.strip() for text in cell.split(";") if text.strip()]


def true_mass(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """MC2: the share of probability that the correct answers have among all answers. results: (log-likelihood, is greedy)."""
    top = max(log_likelihood for log_likelihood, _ in results)
    mass = [math.exp(log_likelihood - top) for log_likelihood, _ in results]
    return {"acc": sum(m for m, label in zip(mass, doc["labels"], strict=True) if label == 1) / sum(mass)}


def gsm8k(**_):
    """{train, test: rows of question and answer}."""
    from datasets import Dataset

    def rows(split: str) -> list[dict]:
        return [json.loads(line) for line in data_file(f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()]

    return {split: Dataset.from_list(rows(split)) for split in ("train", "test")}
