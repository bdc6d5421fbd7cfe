"""Preferences with a known reward: two samples of a policy to each prompt, compared by a gold reward model.

The label is drawn from the Bradley-Terry model that the algorithms assume, P(a over b) = sigmoid(gold(a) - gold(b)), as with
synthetic labellers in Gao et al., arXiv:2210.10760. --dataset is split in two by a hash of the family of the prompt
(benchmark/families.py). One half goes to demonstrations.jsonl; the prompts of the other half are answered and labelled here.

    python benchmark/preferences.py --model runs/base/final --gold-reward-model runs/gold/final
        --dataset runs/gold/demonstrations.jsonl
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmark.families import family_names, in_first_half  # noqa: E402
from common import evals, models
from common.args import BaseArgs, main, parse_args
from common.data import encode, plain_prompt
from common.generation import make_generator
from common.ranges import POSITIVE
from common.run import Run
from extras.gold import GoldReward
from extras.sources import load_rows

SETTINGS = {
    "other": dict(dataset="pydoc", eval_samples=1, max_length=256, max_new_tokens=48, per_device_eval_batch_size=64),
}


@dataclass
class Args(BaseArgs):
    max_preferences: Annotated[int, POSITIVE] = 1000
    """prompts to make a pair for, > 0."""


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    run = Run(args, "preferences", {})
    rows = load_rows(args.dataset, "all")
    names = family_names([plain_prompt(r["prompt"]) for r in rows])
    shown = [in_first_half(name, "split") for name in names]
    given = [{"prompt": r["prompt"], "completion": r["response"]} for r, own in zip(rows, shown, strict=True) if own]
    write_jsonl(run.dir / "demonstrations.jsonl", given)
    asked = [r for r, own in zip(rows, shown, strict=True) if not own][: args.max_preferences]
    asked = encode(asked, tokenizer, args.max_length, args.max_prompt_length)
    policy = models.for_inference(run, models.load_model(args))
    generator = make_generator(run, policy, tokenizer)
    answers = []  # two lists of (text, ended in EOS)
    for k in range(2):
        with run.phase(f"samples {k}", len(asked)) as advance:
            rollout = evals.sample_rows(run, generator, asked, args.seed * 2 + k, 1.0, advance)
        answers.append(list(zip(evals.sampled_texts(tokenizer, rollout), rollout.finished, strict=True)))
    gold = GoldReward(run)
    a, b = (np.array(gold.score(asked, *map(list, zip(*drawn, strict=True)))) for drawn in answers)
    first = np.random.default_rng(args.seed).random(len(asked)) < 1 / (1 + np.exp(b - a))
    pairs = []
    for row, x, y, won in zip(asked, *answers, first, strict=True):
        (chosen, ended), (rejected, other_ended) = (x, y) if won else (y, x)
        pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        pairs.append(
            {**pair, "chosen_finished": ended, "rejected_finished": other_ended}
        )  # one that is cut gets no EOS
    write_jsonl(run.dir / "preferences.jsonl", pairs)
    agree = np.mean(first == (a > b))
    run.print(
        f"{len(pairs)} preferences, {len(given)} demonstrations; gold {np.mean([a, b]):.2f} +- {np.std([a, b]):.2f},"
        f" mean |difference| {np.abs(a - b).mean():.2f}, the label is the higher one in {agree:.0%}"
    )
    run.end()


if __name__ == "__main__":
    main(lambda: make(parse_args(Args, __doc__, SETTINGS)))
