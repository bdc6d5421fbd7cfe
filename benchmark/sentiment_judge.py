"""Scores of held-out pairs by the reward of each finished run: the learned one, or else log pi/pi_base of its policy.

    python benchmark/sentiment_judge.py --model runs/film/base/final --runs runs/sentiment/300/1/*
        --pairs runs/sentiment/data/held_out_*_*.jsonl --output-dir runs/sentiment/judge

The scores go to pairs.parquet in the folder of the run: pairs (name of the file), row, chosen, rejected, and later: whether the
chosen answer is of a later checkpoint than the rejected one.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import evals, models, rewards  # noqa: E402
from common.args import BaseArgs, main, parse_args
from common.data import encode
from common.ranges import POSITIVE
from common.run import Run
from common.store import write_pairs
from extras.sources import load_rows

SETTINGS = {"other": dict(eval_samples=1, max_length=72, max_new_tokens=56, per_device_eval_batch_size=128)}
KINDS = {"chosen": "response_ids", "rejected": "rejected_ids"}


@dataclass
class Args(BaseArgs):
    runs: tuple[str, ...] = ()
    """folders of finished runs; those that have been judged are left as they are."""
    pairs: tuple[str, ...] = ()
    """files of prompt, chosen, rejected."""
    max_pairs: Annotated[int, POSITIVE] = 600
    """pairs of each file, the first ones, > 0."""


def logprobs(run, model, sequences: list[tuple]) -> list[float]:
    """log pi of each response, nats."""
    return [total for total, _ in evals.sequence_logprobs(run, model, sequences)]


def judge(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    run = Run(args, "sentiment_judge", {})
    base = models.for_inference(run, models.load_model(args))
    rows, groups, later = {}, {}, {}
    for path in args.pairs:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        later[Path(path).stem] = [line["checkpoint_chosen"] > line["checkpoint_rejected"] for line in lines]
        pairs = load_rows(path, "all", "preferences", "--pairs")[: args.max_pairs]
        own = rows[Path(path).stem] = encode(pairs, tokenizer, args.max_length, args.max_prompt_length, "--pairs")
        for kind, ids in KINDS.items():
            groups[Path(path).stem, kind] = [(p["prompt_ids"], p[ids]) for p in own]
    reference = evals.score_groups(groups, lambda s: logprobs(run, base, s))
    for folder in map(Path, args.runs):
        if (folder / "pairs.parquet").exists():
            continue
        if (folder / "reward").is_dir():
            scalar = models.for_inference(run, rewards.load_scalar_model(args, str(folder / "reward"), "--runs"))
            found = evals.score_groups(groups, lambda s, scalar=scalar: evals.sequence_scores(run, scalar, s))
        else:
            policy = models.for_inference(run, models.load_model(args, str(folder / "final"), "--runs"))
            found = evals.score_groups(groups, lambda s, policy=policy: logprobs(run, policy, s))
            found = {
                name: [a - b for a, b in zip(values, reference[name], strict=True)] for name, values in found.items()
            }
        scored = [
            {"pairs": name, "row": p["row"], "chosen": chosen, "rejected": rejected, "later": later[name][p["row"]]}
            for name, own in rows.items()
            for p, chosen, rejected in zip(own, found[name, "chosen"], found[name, "rejected"], strict=True)
        ]
        write_pairs(folder / "pairs.parquet", scored)
        right = [s["chosen"] > s["rejected"] for s in scored]
        run.print(f"{folder}: {sum(right) / len(right):.3f} of {len(right)} pairs right")
    run.end()


if __name__ == "__main__":
    main(lambda: judge(parse_args(Args, __doc__, SETTINGS)))
