"""SFT: supervised fine-tuning on demonstrations, the warm start and the baseline of every method here.

Paper: Getting More Juice Out of the SFT Data, arXiv:2405.17888, Eq. 1: max_theta E_(x,y)~D [log pi(y|x; theta)].

The loss is the negative log-likelihood of the response tokens, EOS included and trained exactly once; prompt tokens
carry no loss. Flags, data, evaluation and checkpoints are those of irft.py: `diff sft.py irft.py` shows the method.

Not the paper: D1 the mean is taken over the response tokens of the whole update (paper silent; --loss-reduction). D2 RMSprop has
the bias correction that torch's lacks (paper silent).

Dims: B demonstrations, T response tokens.

Laptop CPU, a minute:   python sft.py

At scale:               accelerate launch --quiet sft.py --model zephyr-7b-sft-full
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from common import demos, evals, models
from common.args import RunArgs, main, parse_args
from common.data import collate, row_length
from common.generation import make_generator
from common.logprobs import masked_sum, response_logprobs
from common.ranges import AT_LEAST_1, POSITIVE
from common.run import Run
from common.streams import learning_rate_at, make_optimizer
from extras import cost, metrics, records, two_cores


# ---- the maths ----
def nll_loss(token_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Negative log-likelihood of each response, RFT paper Eq. 1.

    token_logprobs: (B, T) log pi(y_t | x, y_<t), nats. response_mask: (B, T) bool, True through EOS.
    Returns (B,), nats per response, summed over its tokens.
    """
    return -masked_sum(token_logprobs, response_mask)


# ---- the loop ----
def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    demonstrations = demos.load_demonstrations(args, tokenizer)
    count = args.select_top_k or len(demonstrations)
    updates = math.ceil(count / args.batch_size)  # in one epoch
    total = updates * args.num_train_epochs
    if args.dry_run:
        work, rows = cost.Work(args, demonstrations), demonstrations[:count]
        work.add("training", "train", cost.written(rows, "response_ids") * args.num_train_epochs, args.batch_size)
        work.evaluations(args.num_train_epochs + 1)
        return cost.print_plan(
            args, "sft", work, f"data {args.dataset}, {count} demonstrations",
            f"{total} updates of {args.batch_size} demonstrations, {args.num_train_epochs} epoch(s)",
        )  # fmt: skip
    held_rows = demos.load_held_out(args, tokenizer, demonstrations)

    run = Run(args, "sft", METRICS)
    if run.finished():
        return
    demonstrations = demos.select_demonstrations(run, demonstrations)
    records.record_prompts(run, tokenizer, demonstrations)
    model = models.prepare_policy(args)
    policy, optimizer = run.prepare(model, make_optimizer(args.optimizer, model.parameters()))
    raw = run.unwrap(policy)
    generator = make_generator(run, raw, tokenizer)
    run.print(f"sft: {len(demonstrations)} demonstrations, {total} updates, {run.world} process(es), {run.dir}")

    run.position["num_tokens"] = 0
    resumed = run.load_checkpoint()
    held = evals.prepare_held_out(run, raw, generator, held_rows, tokenizer)

    def measure(iteration: int) -> None:
        reference = models.reference_policy(run, policy, is_initial=iteration == 0)
        row = evals.evaluate(run, raw, generator, held, tokenizer, args.beta, reference, iteration)
        run.log(row, step=run.position["step"], outer_iteration=iteration)
        if args.keep_best and iteration and row["eval/nll"] < run.position.get("best_nll", math.inf):
            run.save_final(policy, tokenizer, card(), name="best")
            # a resumed run knows what best/ has to beat
            run.position.update(best_nll=row["eval/nll"], best_epoch=iteration)

    def card() -> str:
        return run.model_card("SFT", "arXiv:2405.17888, Eq. 1")

    if not resumed:
        measure(0)
    for epoch in range(run.position["outer_iteration"], args.num_train_epochs):
        policy.train()
        first = epoch * updates
        batches = run.batches(len(demonstrations), 0, epoch)
        for k, batch in run.updates(f"epoch {epoch}", batches, epoch, first):
            rows = [demonstrations[i] for i in batch]
            tokens = sum(len(r["response_ids"]) for r in rows)
            scale = len(rows) / tokens if args.loss_reduction == "token" else 1.0  # D1
            row = run.step(
                policy, optimizer, rows,
                lambda part, scale=scale: demonstration_loss(policy, part, run.accelerator.device, scale), row_length,
                learning_rate_at(first + k, total, args.learning_rate, args.warmup_ratio),
            )  # fmt: skip
            run.position["num_tokens"] += round(row["num_tokens"] * len(batch))
            row.update(num_tokens=run.position["num_tokens"], epoch=(first + k + 1) / updates)
            run.log_update(row, first + k + 1)
        measure(epoch + 1)
    path = run.rename("best", "final") if args.keep_best else run.save_final(policy, tokenizer, card())
    evals.print_table(run, "start", "SFT")
    run.print(f"model: {path}" + (f", of epoch {run.position['best_epoch']}" if args.keep_best else ""))
    run.end()


# ---- what is scored ----
def demonstration_loss(
    policy, rows: list[dict], device, scale: float = 1.0
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """nll_loss of demonstrations, times scale -> ((B,), {metric: (sum, count)})."""
    batch = collate([(r["prompt_ids"], r["response_ids"]) for r in rows], pad_token_id=0).to(device)
    scores = response_logprobs(policy, batch)
    losses = nll_loss(scores.logprobs, batch.response_mask)
    count, tokens = losses.new_tensor(len(rows)), batch.response_mask.sum()
    return losses * scale, {
        "nll": (losses.detach().sum(), count),
        "entropy": (scores.entropy.sum(), tokens),
        "mean_token_accuracy": (scores.correct.sum(), tokens),
        "num_tokens": (batch.attention_mask.sum(), count),
    }


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    num_train_epochs: Annotated[int, AT_LEAST_1] = 2
    """passes over the demonstrations, >= 1. RFT paper: 2; for the base of its Sec. 5.2, and SFT on the top 10k, 10."""
    keep_best: bool = False
    """final/ is the model after the epoch with the lowest held-out NLL, not after the last one. RFT paper, Sec. 5.2: the best of
    10 epochs, by "testing accuracy"."""
    loss_reduction: Literal["token", "sequence"] = "token"
    """mean over all response tokens of the update, or over responses of their summed NLL (Eq. 1 as written)."""
    beta: Annotated[float, POSITIVE] = 0.1
    """scale of the implicit reward beta log pi/pi_ref in the evaluation; no part of the loss. > 0."""


SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=1600, eval_samples=200, max_length=256, max_new_tokens=48, learning_rate=4e-4, batch_size=32,
        per_device_train_batch_size=32, per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args, learning_rate=2e-5),
    "pythia": dict(  # RFT paper, Table 3 beside irft.py: data, batch 16, window; the rate is ours, from alignment-handbook
        dataset="ultrachat_200k", max_samples=50_000, eval_samples=500, max_length=1024, max_new_tokens=256, learning_rate=2e-5,
        batch_size=16, per_device_train_batch_size=8, per_device_eval_batch_size=32,
    ),
    "other": dict(  # the same of the paper's 7B model
        dataset="ultrachat_200k", max_samples=50_000, eval_samples=500, max_length=2048, max_new_tokens=256, learning_rate=2e-5,
        batch_size=16, per_device_train_batch_size=2, per_device_eval_batch_size=16,
    ),
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "loss": "NLL, nats per response token (--loss-reduction token) or per response (sequence)",
    "nll": "-log pi of the demonstration, nats per response",
    "entropy": "of the next-token distribution, exact, nats per response token",
    "mean_token_accuracy": "share of response tokens that are the model's most likely one",
    "num_tokens": "prompt and response tokens trained on so far",
    "grad_norm": "before clipping",
    "learning_rate": "of this update",
    "epoch": "passes over the demonstrations so far",
    **metrics.EVAL_METRICS,
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
