"""Rows for benchmark/smollm2.sh: chosen answers to train on beside held-out pairs of people's preferences, and summaries.

Families of prompts stay on one side (benchmark/families.py): a hash of its name says which. What is trained on has no rejected
response.

    python benchmark/smollm2_data.py --pairs DATA/hh_harmless.jsonl --summaries DATA/debian_tldr.jsonl --output-dir runs/data
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.families import digest, family_names  # noqa: E402
from common.args import main
from common.data import plain_prompt
from common.streams import data_order
from extras.sources import load_rows


@dataclass
class Args:
    output_dir: str
    """folder for hh_train.jsonl, hh_pairs.jsonl, summaries_train.jsonl and summaries_held_out.jsonl."""
    pairs: str = "hh-rlhf"
    """preferences of people: a file, folder, short name or hub id."""
    summaries: str = "tldr-sft"
    """posts with summaries: the same."""
    max_rows: int = 20_000
    """rows to use of each, the first N in an order that depends on nothing else."""


def split(rows: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """(rows to train on, held-out rows): about `share` of the families of prompts are held out, with all their rows."""
    names = family_names([plain_prompt(row["prompt"]) for row in rows])
    out = [digest(name, "smollm2")[0] < 256 * share for name in names]
    return [r for r, held in zip(rows, out, strict=True) if not held], [
        r for r, held in zip(rows, out, strict=True) if held
    ]


def some(rows, n: int) -> list[dict]:
    return [rows[i] for i in sorted(data_order(len(rows), 0)[:n])]


def demonstration(row: dict) -> dict:
    return {"prompt": row["prompt"], "completion": row["chosen"] if "chosen" in row else row["response"]}


def preference(row: dict) -> dict:
    return {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "subset": "held-out pairs"}


def write(args: Args) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, held = split(some(load_rows(args.pairs, "all", "preferences", "--pairs"), args.max_rows), 1 / 3)
    made = {"hh_train": list(map(demonstration, train)), "hh_pairs": list(map(preference, held))}
    train, held = split(some(load_rows(args.summaries, "all", flag="--summaries"), args.max_rows), 0.1)
    made |= {"summaries_train": list(map(demonstration, train)), "summaries_held_out": list(map(demonstration, held))}
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main(lambda: write(tyro.cli(Args, description=__doc__)))
