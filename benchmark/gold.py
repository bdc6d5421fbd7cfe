"""A gold reward model for experiments at small scale, and the data that goes with it.

Prompts are cut to --prompt-chars first and split then. Families of nearly the same prompts stay together
(benchmark/families.py): nothing is trained on a held-out prompt, or on one of its family. The training rows are split in two
by a hash of the family. One half makes preferences: the row's own response is chosen over another row's, so the gold reward
says how well a text fits its prompt; with --sampler, in half of the pairs over that policy's own sample, so it also says how
far a text reads like a person's. A classifier with one label is trained on these by the Bradley-Terry loss. The other half is
for policies, as demonstrations.jsonl. (The embedded model, from which gold reward and policies start, was trained as a
language model on all training rows of pydoc; held-out rows nobody has seen.)

    python benchmark/gold.py --dataset pydoc --output-dir runs/gold
    python benchmark/gold.py --split-only --output-dir runs/split        # the two files of rows alone
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import rft  # noqa: E402
from benchmark.families import family_names, in_first_half  # noqa: E402
from common import evals, models, rewards
from common.args import Auto, BaseArgs, main, parse_args
from common.data import encode
from common.generation import make_generator
from common.ranges import NOT_NEGATIVE, POSITIVE
from common.run import Run
from common.streams import data_order, learning_rate_at, make_optimizer
from extras import records, tokenizers
from extras.sources import load_rows

SETTINGS = {
    "other": dict(
        dataset="pydoc", max_samples=0, eval_samples=400, max_length=160, max_new_tokens=48, learning_rate=5e-4,
        batch_size=32, per_device_train_batch_size=32, per_device_eval_batch_size=64,
    ),
}  # fmt: skip


@dataclass
class Args(BaseArgs):
    max_samples: Annotated[int, NOT_NEGATIVE] = 0
    """training rows of --dataset to use, the first N in a seeded order; 0 means all."""
    prompt_chars: Annotated[int, POSITIVE] = 160
    """prompts are cut at the last line that ends before this many characters."""
    sampler: str = ""
    """policy whose samples are rejected in every other pair; empty: other rows' responses in all of them."""
    split_only: bool = False
    """write demonstrations.jsonl and held_out.jsonl and stop: a --sampler can be trained on them."""
    num_train_epochs: Annotated[int, POSITIVE] = 6
    """passes over the preferences; each pairs a prompt with another row's response anew."""
    learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak; AdamW, linear warm-up over a tenth of the updates, then linear to 0."""
    batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """preferences per update."""
    per_device_train_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """preferences per forward pass."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """gradient norm is clipped at this value."""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass."""


METRICS = {
    "loss": "-log sigmoid(r(chosen) - r(rejected))",
    "grad_norm": "before clipping",
    "learning_rate": "of this update",
    "reward/accuracy": "share of pairs with r(chosen) > r(rejected)",
    "reward/margin": "mean of r(chosen) - r(rejected)",
    "reward/demonstrations": "mean reward of chosen",
    "reward/answers": "mean reward of rejected",
    "eval/accuracy": "reward/accuracy on prompts that were never seen, against another row's response",
    "eval/accuracy_samples": "the same against the sampler's",
}


def short_rows(args: Args, split: str) -> list[dict]:
    """Rows of the data set with prompts as text, cut to --prompt-chars."""
    rows = []
    for r in load_rows(args.dataset, split):
        text = r["prompt"] if isinstance(r["prompt"], str) else r["prompt"][-1]["content"]
        text = text.partition("POST: ")[2].removesuffix("\n\nTL;DR:") or text  # TL;DR's frame is most of a short prompt
        cut = text if len(text) <= args.prompt_chars else text[: args.prompt_chars].rpartition("\n")[0]
        rows.append({"row": r["row"], "prompt": cut or text[: args.prompt_chars], "response": r["response"]})
    return rows


def split_rows(args: Args) -> tuple[list[dict], list[dict], int]:
    """(training rows, held-out rows, how many rows were left out), each row with the name of its family.

    A family goes where the source has the row whose prompt names it. Its rows on the other side are left out, not moved:
    a model may have been trained on the source's own training rows.
    """
    test, train = short_rows(args, "test"), short_rows(args, "train")
    names = family_names([r["prompt"] for r in [*test, *train]])
    rows = [{**r, "family": name} for r, name in zip([*test, *train], names, strict=True)]
    test, train = rows[: len(test)], rows[len(test) :]
    led_by_test = {r["family"] for r in test if r["prompt"] == r["family"]}
    kept = [r for r in train if r["family"] not in led_by_test], [r for r in test if r["family"] in led_by_test]
    return *kept, len(rows) - len(kept[0]) - len(kept[1])


def for_gold(row: dict) -> bool:
    return in_first_half(row["family"], "gold")


def with_others(rows: list[dict], *key: int) -> list[dict]:
    """Preference pairs: each row's response against that of another row, a derangement of the rows."""
    order = data_order(len(rows), *key)
    others = zip(order, order[1:] + order[:1], strict=True)
    return [preference(rows[a], rows[b]["response_ids"]) for a, b in others]


def preference(row: dict, rejected_ids: list[int]) -> dict:
    return {"prompt_ids": row["prompt_ids"], "chosen_ids": row["response_ids"], "rejected_ids": rejected_ids}


def with_samples(run, rows: list[dict], tokenizer) -> list[dict]:
    """Preference pairs: each row's response against one of --sampler's, which has the tokenizer of --model."""
    args = run.args
    policy = models.for_inference(run, models.load_model(args, args.sampler, "--sampler"))
    generator = make_generator(run, policy, tokenizer)
    with run.phase("samples", len(rows)) as advance:
        samples = evals.sample_rows(run, generator, rows, args.seed, 1.0, advance).response_ids
    return [preference(row, y) for row, y in zip(rows, samples, strict=True)]


def accuracy(run, model, pairs: list[dict]) -> float:
    chosen, rejected = (
        evals.sequence_scores(run, model, [(p["prompt_ids"], p[kind]) for p in pairs])
        for kind in ("chosen_ids", "rejected_ids")
    )
    return sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(pairs)


def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    run = Run(args, "gold", METRICS)
    train_rows, test_rows, dropped = split_rows(args)
    run.print(
        f"gold: {len(train_rows)} training and {len(test_rows)} held-out rows of --dataset; {dropped} left out, whose family"
        " is on the other side"
    )
    train_rows = [train_rows[i] for i in data_order(len(train_rows), args.seed)[: args.max_samples or len(train_rows)]]
    lines = {"demonstrations": [r for r in train_rows if not for_gold(r)], "held_out": test_rows}
    for name, kept in lines.items():
        text = "".join(json.dumps({"prompt": r["prompt"], "completion": r["response"]}) + "\n" for r in kept)
        (run.dir / f"{name}.jsonl").write_text(text)
    if args.split_only:
        return run.end()
    rows = encode([r for r in train_rows if for_gold(r)], tokenizer, args.max_length, args.max_prompt_length)
    records.record_prompts(run, tokenizer, rows)
    held_rows = encode(test_rows[: args.eval_samples], tokenizer, args.max_length, args.max_prompt_length)
    held = {"eval/accuracy": with_others(held_rows, 0)}
    if args.sampler:
        sampled = with_samples(run, rows, tokenizer)
        held["eval/accuracy_samples"] = with_samples(run, held_rows, tokenizer)
    model = rewards.prepare_scalar(args, args.model, "--model")
    model, optimizer = run.prepare(model, make_optimizer("adamw", model.parameters()))
    total, step = args.num_train_epochs * -(-len(rows) // args.batch_size), 0
    run.print(f"gold: {len(rows)} preferences, {len(lines['demonstrations'])} demonstrations, {total} updates")
    for epoch in range(args.num_train_epochs):
        pairs = with_others(rows, args.seed, epoch)
        if args.sampler:
            pairs = [sampled[i] if (i + epoch) % 2 else pair for i, pair in enumerate(pairs)]
        with run.phase(f"epoch {epoch}", -(-len(rows) // args.batch_size), step=step) as advance:
            for batch in run.batches(len(pairs), epoch):
                row = run.step(
                    model, optimizer, [pairs[i] for i in batch],
                    lambda part: rft.reward_batch_loss(model, part, rft.Args(reward_loss="logistic"), run.accelerator.device),
                    rft.pair_length, learning_rate_at(step, total, args.learning_rate, 0.1),
                )  # fmt: skip
                step += 1
                run.log(row, step=step)
                advance(1)
        unseen = {name: accuracy(run, model, held_pairs) for name, held_pairs in held.items()}
        run.log(unseen, step=step)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in unseen.items())
        run.print(f"epoch {epoch}: accuracy {row['reward/accuracy']:.3f} on the last batch; {shown}")
    tokenizers.pad_for_readers(run.unwrap(model).model.config, tokenizer)
    run.save_final(
        model, tokenizer, f"Gold reward model of CleanIRL's benchmark, made from {args.dataset}.\n", part="model"
    )
    run.end()


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
