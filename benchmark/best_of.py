"""Demonstrations of an expert whose reward is known: of N samples of a policy, the one with the highest reward.

The reward is 1 for a response that begins with --word, else 0, so that a reader sees it in the text. With --gold it is the
gold reward of a folder that benchmark/film.py has made. Among equal samples the first one counts. Where the policy gives
the word with probability p, the expert gives it with 1 - (1 - p)^N. Prompts are those of --dataset; held-out ones share no
family with the training ones (benchmark/families.py).

expert.json has the mean reward of policy and expert. For a word it also has the exact p of every held-out prompt, for --gold
the rewards of the N samples.

    python benchmark/best_of.py --output-dir runs/demo/expert        # train.jsonl, held_out.jsonl, expert.json
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmark.families import family_names  # noqa: E402
from benchmark.film import Gold
from benchmark.preferences import write_jsonl
from common import UserError, demos, evals, models
from common.args import BaseArgs, main, parse_args
from common.data import plain_prompt
from common.generation import make_generator
from common.ranges import AT_LEAST_2, POSITIVE
from common.run import Run
from common.store import write_json

SETTINGS = {
    "other": dict(dataset="pydoc", eval_samples=400, max_length=256, max_new_tokens=48, per_device_eval_batch_size=64),
}
LEAST = 1e-4  # probability below which a beginning of the word is not followed any further


@dataclass
class Args(BaseArgs):
    word: str = "Return"
    """what a good response begins with."""
    gold: str = ""
    """folder of benchmark/film.py with the reward to use in place of --word."""
    gold_kind: Literal["score", "peak"] = "score"
    """with --gold: the predicted rating, or the reward with an interior optimum."""
    best_of: Annotated[int, AT_LEAST_2] = 4
    """N, samples of which one becomes the demonstration, >= 2."""
    select_top_k = 0
    max_samples: Annotated[int, POSITIVE] = 1600
    """training prompts, > 0; --eval-samples is the number of held-out ones."""


def is_good(text: str, word: str) -> bool:
    return text.startswith(word)


def reward_of(word: str, gold: str = "", kind: str = "score") -> Callable[[list[str]], np.ndarray]:
    """The expert's reward, as a function of texts -> (texts,): of the word or, if it is given, of the folder `gold`."""
    if not gold:
        return lambda texts: np.array([float(is_good(text, word)) for text in texts])
    known = Gold(gold)
    return known.score if kind == "score" else known.peak


def choose(rewards: Sequence[float]) -> int:
    """Index of the first sample among those with the highest reward."""
    return int(np.argmax(rewards))


@torch.no_grad()
def probability(model, tokenizer, prompt_ids: list[int], word: str) -> float:
    """Probability that the model begins an answer with the word, however tokens cut it. White space before it is skipped.

    Beginnings less probable than LEAST are left out: the value is too low by less than LEAST for each of them.
    """
    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    total, begun = 0.0, [([], "", 1.0)]
    while begun:
        ids, text, before = begun.pop()
        logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]], device=model.device)).logits[0, -1]
        after = (logits.double().softmax(-1)[: len(pieces)] * before).tolist()
        for token, (piece, p) in enumerate(zip(pieces, after, strict=True)):
            longer = (text + piece).lstrip()
            if is_good(longer, word):
                total += p
            elif p >= LEAST and word.startswith(longer) and token != tokenizer.eos_token_id:
                begun.append(([*ids, token], longer, p))
    return total


def prompts(args: Args, tokenizer) -> tuple[list[dict], list[dict]]:
    """(training, held-out) rows with prompt_ids; a held-out row whose family has a training row is left out."""
    train = demos.load_demonstrations(args, tokenizer)
    held = demos.load_held_out(args, tokenizer, train)
    names = family_names([plain_prompt(r["prompt"]) for r in [*train, *held]])
    known = set(names[: len(train)])
    apart = [r for r, name in zip(held, names[len(train) :], strict=True) if name not in known]
    if not apart:
        raise UserError(f"--dataset: found {len(held)} held-out prompts, all like training prompts, expected others")
    return train, apart


def make(args: Args) -> None:
    reward = reward_of(args.word, args.gold, args.gold_kind)
    tokenizer = models.load_tokenizer(args)
    train, held = prompts(args, tokenizer)
    run, n, rates = Run(args, "best_of", {}), args.best_of, {}
    policy = models.for_inference(run, models.load_model(args))
    generator = make_generator(run, policy, tokenizer)
    for name, rows in (("train", train), ("held_out", held)):
        asked = [{**r, "row": r["row"] * n + k} for r in rows for k in range(n)]
        with run.phase(f"{n} samples of {len(rows)} prompts", len(asked)) as advance:
            rollout = evals.sample_rows(run, generator, asked, args.seed, 1.0, advance)
        texts = evals.sampled_texts(tokenizer, rollout)
        rewards = reward(texts).reshape(len(rows), n)
        lines = []
        for i, (row, own) in enumerate(zip(rows, rewards, strict=True)):
            best = n * i + choose(own)
            lines.append({"prompt": row["prompt"], "completion": texts[best], "finished": rollout.finished[best]})
        write_jsonl(run.dir / f"{name}.jsonl", [line for line in lines if line["completion"]])
        rates[name] = {
            "prompts": len(rows), "policy": float(rewards.mean()), "expert": float(rewards.max(1).mean())
        }  # fmt: skip
        run.print(f"{name}: {rates[name]}")
    if args.gold:
        found = {"gold": args.gold, "gold_kind": args.gold_kind, "best_of": n, **rates, "rewards": rewards.tolist()}
        write_json(run.dir / "expert.json", found)
        return run.end()
    with run.phase("probabilities of the word", len(held)) as advance:
        exact = []
        for row in held:
            exact.append(probability(policy, tokenizer, row["prompt_ids"], args.word))
            advance(1)
    write_json(run.dir / "expert.json", {"word": args.word, "best_of": n, **rates, "probabilities": exact})
    run.end()


if __name__ == "__main__":
    main(lambda: make(parse_args(Args, __doc__, SETTINGS)))
