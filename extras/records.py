"""Prompts that models were trained on before, so that held-out rows are known to be held out."""

import hashlib
import json
import warnings
from pathlib import Path

import tiny
from common.args import flag
from common.data import plain_prompt
from common.store import read_pairs, write_pairs
from extras import screen
from extras.samples import show_training_row
from extras.schedule import SCRIPTS, of_run
from extras.sources import load_rows

# ---- what models in run folders were trained on before ----
TRAINED = "trained_prompts.parquet"  # in a run's folder: prompt_keys of the rows it trains on, column key


def prompt_keys(row: dict) -> set[int]:
    """Return two numbers of 64 bits that identify a row's prompt: one for its text, one for the text that the model sees.

    Letter case and white space do not count. The first is the same under every template, the second for every longer
    prompt that was cut to the same text.
    """
    texts = {plain_prompt(row["prompt"]), row.get("prompt_text", "")} - {""}
    words = (" ".join(text.lower().split()).encode() for text in texts)
    return {int.from_bytes(hashlib.sha256(w).digest()[:8], "big", signed=True) for w in words}


def count_shared(rows: list[dict], others: list[dict]) -> int:
    """Return the number of rows whose prompt, as the model sees it, is that of one of the others too."""

    def name(row: dict) -> bytes:  # in place of the text: all texts of a large set take too much memory
        return hashlib.sha256(row["prompt_text"].encode("utf-8", "surrogatepass")).digest()

    seen = {name(row) for row in others}
    return sum(name(row) in seen for row in rows)


def record_prompts(run, tokenizer, *trained: list[dict]) -> None:
    """Keep the prompts that the run trains on in its folder, for load_held_out of runs on its models.

    All that the run trains on is known here: its phases are planned, and its first row is printed.
    """
    if run.is_main:
        if run.script in SCRIPTS:
            screen.screen.schedule = of_run(run.script, run.args, *trained)
            show_training_row(run, tokenizer, trained)
        keys = set().union(*(prompt_keys(row) for rows in trained for row in rows))
        write_pairs(run.dir / TRAINED, [{"key": key} for key in sorted(keys)])


def trained_before(name: str) -> tuple[set[int], list[Path]]:
    """(prompt_keys of all that a model was trained on, folders of runs among these that kept no record).

    Those are the run whose folder it lies in, and the runs that made the --model and --reward-model which that one began
    with, and so on. The embedded model was trained on pydoc's training rows; of other models nothing is known.
    """
    keys: set[int] = set()
    without_record, pending, seen = [], [name], set()
    while pending:
        model = pending.pop()
        if tiny.is_tiny(model):
            keys = keys.union(*map(prompt_keys, load_rows("pydoc", "train")))
        folder = Path(model).resolve().parent
        if folder in seen or not Path(model).is_dir():
            continue
        seen.add(folder)
        try:
            args = json.loads((folder / "args.json").read_text())["args"]
            pending += [m for m in (args["model"], args.get("reward_model")) if m]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the folder of no run
            continue
        if (folder / TRAINED).is_file():
            keys |= {row["key"] for row in read_pairs(folder / TRAINED)}
        else:
            without_record.append(folder)
    return keys, without_record


def say_known(args, rows: list[dict]) -> None:
    """One line for each model of the settings that was trained on prompts among the held-out rows.

    The rows stay: other runs are measured on the same ones.
    """
    without_record: dict[str, None] = {}
    for name in ("model", "ref_model", "reward_model", "gold_reward_model", "baseline"):
        if not (model := getattr(args, name, "")):
            continue
        known, unknown = trained_before(model)
        without_record |= dict.fromkeys(map(str, unknown))
        if n := sum(not known.isdisjoint(prompt_keys(row)) for row in rows):
            found = f"found {n} of {len(rows)} held-out prompts among those that {flag(name)} {model} was trained on,"
            warnings.warn(f"--eval-dataset: {found} by its run or by one before it", stacklevel=3)
    if without_record:
        found = f"found no {TRAINED} in {', '.join(without_record)}"
        warnings.warn(f"--eval-dataset: {found}: held-out prompts may have been trained on there", stacklevel=3)
