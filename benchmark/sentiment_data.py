"""Preferences and demonstrations of the AIHF paper's sentiment task: answers of PPO's checkpoints, sorted by the gold reward.

AIHF paper, arXiv:2406.06874, App. A.1.2. The prompts are split in three: 30% for PPO on the gold reward, 40% that its
checkpoints answer, 30% for the methods that are compared. The answers of all checkpoints together are cut into thirds by
their gold score: low, medium and high. A preference is a medium answer over a low one to the same prompt. A demonstration is a
high answer to another prompt. The checkpoints answer the held-out prompts too; the cuts between the thirds stay the same.

    python benchmark/sentiment_data.py --dataset runs/film/world/prompts.jsonl --output-dir runs/sentiment/split
    python benchmark/sentiment_data.py --dataset runs/sentiment/split/data.jsonl --checkpoints runs/sentiment/ppo/checkpoint_*
        --gold runs/film/world --eval-dataset runs/film/world/held_out.jsonl --dev runs/film/world/dev.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmark.families import digest  # noqa: E402
from benchmark.film import Gold  # noqa: E402
from benchmark.preferences import write_jsonl
from common import UserError, evals, models
from common.args import BaseArgs, main, parse_args
from common.data import encode, plain_prompt
from common.generation import make_generator
from common.ranges import POSITIVE
from common.run import Run
from common.store import write_json
from common.streams import data_order
from extras.sources import load_rows

SETTINGS = {"other": dict(eval_samples=1000, max_length=72, max_new_tokens=56, per_device_eval_batch_size=128)}
PARTS = {"ppo": 3, "data": 4, "methods": 3}  # part -> tenths of the prompts
CLASSES = ("low", "medium", "high")


@dataclass
class Args(BaseArgs):
    gold: str = ""
    """folder of the gold reward, made by benchmark/film.py."""
    checkpoints: tuple[str, ...] = ()
    """policies that answer the prompts; none: split --dataset in three files and stop."""
    dev: str = ""
    """rows of the development set, as --eval-dataset has those of the test."""
    dev_samples: Annotated[int, POSITIVE] = 400
    """rows of the development set, > 0."""
    max_preferences: Annotated[int, POSITIVE] = 1200
    """preferences to make, > 0. The other prompts are for demonstrations."""


# ---- the parts of the prompts, and the classes of the answers ----
def part_of(prompt: str) -> str:
    """The part that a prompt is in, by its hash: equal prompts are in one part."""
    tenth = int.from_bytes(digest(prompt, "sentiment")[:4], "big") % 10
    ends = np.cumsum(list(PARTS.values()))
    return list(PARTS)[int(np.searchsorted(ends, tenth, side="right"))]


def cuts(scores: np.ndarray) -> tuple[float, float]:
    """The scores between the thirds of all answers."""
    low, high = np.quantile(scores, [1 / 3, 2 / 3])
    return float(low), float(high)


def class_of(score: float, between: tuple[float, float]) -> str:
    """low up to the first cut, high above the second one, else medium."""
    return CLASSES[int(score > between[0]) + int(score > between[1])]


def by_class(answers: list[dict], between: tuple[float, float]) -> dict[int, dict[str, list[dict]]]:
    """{row of a prompt: {class: its answers}}; an answer has row, score, text."""
    found: dict[int, dict[str, list[dict]]] = {}
    for answer in answers:
        own = found.setdefault(answer["row"], {name: [] for name in CLASSES})
        own[class_of(answer["score"], between)].append(answer)
    return found


def pair(better: dict, worse: dict) -> dict:
    return {
        "prompt": better["prompt"], "chosen": better["text"], "rejected": worse["text"],
        "chosen_finished": better["finished"], "rejected_finished": worse["finished"],
        "gold_chosen": better["score"], "gold_rejected": worse["score"],
        "checkpoint_chosen": better["checkpoint"], "checkpoint_rejected": worse["checkpoint"],
    }  # fmt: skip


def demonstration(answer: dict) -> dict:
    return {
        "prompt": answer["prompt"], "completion": answer["text"], "finished": answer["finished"], "gold": answer["score"]
    }  # fmt: skip


def pairs_of(classes: dict[int, dict[str, list[dict]]], better: str, worse: str, seed: int) -> dict[int, dict]:
    """{row of a prompt: a pair of one answer of each class, drawn by the seed}, for the prompts that have both."""
    stream = np.random.default_rng(seed)
    found = {}
    for row, own in classes.items():
        if own[better] and own[worse]:
            drawn = (own[name][stream.integers(len(own[name]))] for name in (better, worse))
            found[row] = pair(*drawn)
    return found


def demonstrations_of(classes: dict[int, dict[str, list[dict]]], seed: int) -> dict[int, dict]:
    """{row of a prompt: one of its high answers, drawn by the seed}, for the prompts that have one."""
    stream = np.random.default_rng(seed)
    return {
        row: demonstration(own["high"][stream.integers(len(own["high"]))])
        for row, own in classes.items()
        if own["high"]
    }


def share_out(classes: dict[int, dict[str, list[dict]]], most: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(preferences, demonstrations): up to `most` pairs of medium over low, and high answers to the other prompts."""
    rows = list(classes)
    pairs, shown = pairs_of(classes, "medium", "low", seed), demonstrations_of(classes, seed)
    order = [rows[i] for i in data_order(len(rows), seed)]
    paired = [row for row in order if row in pairs][:most]
    taken = {classes_prompt(classes[row]) for row in paired}  # a prompt may stand in several rows
    others = [row for row in order if row in shown and classes_prompt(classes[row]) not in taken]
    return [pairs[row] for row in paired], [shown[row] for row in others]


def classes_prompt(own: dict[str, list[dict]]) -> str:
    """The prompt of the answers in {class: answers}."""
    return next(answer["prompt"] for answers in own.values() for answer in answers)


# ---- the stages ----
def split(run, rows: list[dict]) -> None:
    for name in PARTS:
        own = [r for r in rows if part_of(plain_prompt(r["prompt"])) == name]
        write_jsonl(run.dir / f"{name}.jsonl", [{"prompt": r["prompt"], "completion": r["response"]} for r in own])
        run.print(f"{name}: {len(own)} of {len(rows)} prompts")


def answer(run, rows: list[dict], name: str, gold: Gold, tokenizer) -> list[dict]:
    """One answer of every checkpoint to every row, with its gold score; empty answers are left out."""
    args, found = run.args, []
    for k, folder in enumerate(args.checkpoints):
        policy = models.for_inference(run, models.load_model(args, folder, "--checkpoints"))
        generator = make_generator(run, policy, tokenizer)
        with run.phase(f"{name}: answers of {Path(folder).name}", len(rows)) as advance:
            rollout = evals.sample_rows(run, generator, rows, args.seed * 1000 + k, 1.0, advance)
        texts = evals.sampled_texts(tokenizer, rollout)
        scores = gold.score(texts)
        run.print(f"{name}: {Path(folder).name} gold {scores.mean():.3f} +- {scores.std():.3f}")
        found += [
            {"row": r["row"], "prompt": r["prompt"], "text": t, "finished": done, "score": float(s), "checkpoint": k}
            for r, t, done, s in zip(rows, texts, rollout.finished, scores, strict=True)
            if t
        ]
    return found


def make(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    run = Run(args, "sentiment_data", {})
    rows = load_rows(args.dataset, "all")
    if not args.checkpoints:
        split(run, rows)
        return run.end()
    gold = Gold(args.gold)
    answered = {}
    sources = {"data": (rows, 0), "held_out": (load_rows(args.eval_dataset, "all"), args.eval_samples)}
    sources["dev"] = (load_rows(args.dev, "all"), args.dev_samples)
    for name, (own, n) in sources.items():
        drawn = [own[i] for i in data_order(len(own), args.seed)[: n * 5 // 4 or None]]  # not all have a high answer
        asked = encode(drawn, tokenizer, args.max_length, args.max_prompt_length)
        answered[name] = answer(run, asked, name, gold, tokenizer)
    between = cuts(np.array([a["score"] for a in answered["data"]]))
    preferences, given = share_out(by_class(answered["data"], between), args.max_preferences, args.seed)
    write_jsonl(run.dir / "preferences.jsonl", preferences)
    write_jsonl(run.dir / "demonstrations.jsonl", given)
    sizes = {"preferences": len(preferences), "demonstrations": len(given)}
    for name, n in (("held_out", args.eval_samples), ("dev", args.dev_samples)):
        classes = by_class(answered[name], between)
        shown = list(demonstrations_of(classes, args.seed).values())[:n]
        if len(shown) < n:
            raise UserError(
                f"found {len(shown)} prompts of {name} with a high answer, expected {n}: lower --eval-samples"
            )
        write_jsonl(run.dir / f"{name}.jsonl", shown)
        for better, worse in (("medium", "low"), ("high", "medium")):
            pairs = list(pairs_of(classes, better, worse, args.seed).values())
            write_jsonl(run.dir / f"{name}_{better}_{worse}.jsonl", pairs)
            sizes[f"{name}_{better}_{worse}"] = len(pairs)
    write_jsonl(run.dir / "answers.jsonl", [{"part": name, **a} for name, found in answered.items() for a in found])
    write_json(run.dir / "data.json", {"cuts": between, **sizes})
    run.print(f"cuts {between[0]:.3f} and {between[1]:.3f}; {sizes}")
    run.end()


if __name__ == "__main__":
    main(lambda: make(parse_args(Args, __doc__, SETTINGS)))
