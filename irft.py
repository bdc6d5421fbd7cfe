"""IRFT: implicit reward learning from demonstrations. --T 1 is SPIN.

Paper: Getting More Juice Out of the SFT Data, arXiv:2405.17888, Algorithm 2.

Maximum-likelihood inverse RL (Eq. 4) with the reward r = beta log pi/pi_ref of the policy itself: in each of T outer
iterations the policy answers the prompts of one chunk of the demonstrations, and is then trained to raise the
demonstrations above its own answers, -log sigmoid(beta [(log pi - log pi_ref)(y) - (log pi - log pi_ref)(y~)]) (Eq. 7).

Not the paper: D1 log-probs are summed over the response tokens with EOS (paper silent). D2 beta stands inside the sigmoid
(as in the released code; Eq. 7 as printed has none). D3 one learning-rate schedule per pass over the data (paper silent). D4
RMSprop has the bias correction that torch's lacks (paper silent).

Dims: B pairs, T response tokens (T alone, as a flag, is the number of outer iterations).

Laptop CPU, minutes:   python irft.py

The paper's run:       accelerate launch --quiet irft.py --T 5 --model zephyr-7b-sft-full --template paper
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, demos, evals, models
from common.args import Auto, RunArgs, main, parse_args, require
from common.data import collate, pair_length, pair_rows
from common.engine import evaluating
from common.generation import make_generator
from common.logprobs import masked_sum, response_logprobs
from common.ranges import AT_LEAST_1, POSITIVE
from common.run import Run
from common.store import read_pairs
from common.streams import data_order, learning_rate_at, make_optimizer
from extras import cost, metrics, records, two_cores


# ---- the maths ----
def irft_loss(
    policy_chosen: Tensor,
    policy_generated: Tensor,
    ref_chosen: Tensor,
    ref_generated: Tensor,
    beta: float,
    loss_type: str = "logistic",
) -> Tensor:
    """Per-pair loss whose gradient is a stochastic estimate of the likelihood gradient. RFT paper, Eq. 6 and 7; SPIN's loss.

    policy_chosen, policy_generated: (B,) log pi(y|x) and log pi(y~|x), summed over response tokens, nats; carry gradient.
    ref_chosen, ref_generated:       (B,) the same under pi_ref, no gradient.
    Returns (B,): logistic -log sigmoid(beta d), linear -d, with d = (policy - ref)_chosen - (policy - ref)_generated.
    ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = (policy_chosen - ref_chosen) - (policy_generated - ref_generated)  # (B,)
    return -F.logsigmoid(beta * d) if loss_type == "logistic" else -d  # D2


# ---- the loop: Algorithm 2 ----
def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    demonstrations = demos.load_demonstrations(args, tokenizer)
    plan = make_plan(args.select_top_k or len(demonstrations), args)
    if args.dry_run:
        return cost.print_plan(args, "irft", plan_work(plan, demonstrations, args), *plan_lines(plan, args))
    held_rows = demos.load_held_out(args, tokenizer, demonstrations)

    run = Run(args, "irft", METRICS)
    if run.finished():
        return
    demonstrations = demos.select_demonstrations(run, demonstrations)
    records.record_prompts(run, tokenizer, demonstrations)
    model = models.prepare_policy(args)
    policy, optimizer = run.prepare(model, make_optimizer(args.optimizer, model.parameters()))
    raw = run.unwrap(policy)
    generator = make_generator(run, raw, tokenizer)
    run.print(
        f"irft: {len(demonstrations)} demonstrations, T = {args.T}, K = {plan.K}, {run.world} process(es), {run.dir}"
    )

    run.position["num_tokens"] = 0
    resumed = run.load_checkpoint()
    held = evals.prepare_held_out(run, raw, generator, held_rows, tokenizer)

    def measure(iteration: int) -> None:
        reference = models.reference_policy(run, policy, is_initial=iteration == 0)
        row = evals.evaluate(run, raw, generator, held, tokenizer, args.beta, reference, iteration)
        run.log(row, step=run.position["step"], outer_iteration=iteration, episodes=sum(plan.pairs[:iteration]))

    if not resumed:
        measure(0)
    for t in range(run.position["outer_iteration"], args.T):  # Alg. 2, l.3
        # ---- l.5: answers of the current policy, scored once under the reference ----
        pairs = make_pairs(run, t, plan, demonstrations, raw, generator, tokenizer)
        first = sum(plan.K[:t])
        if run.position["step"] == first and args.optimizer_state == "restart":
            optimizer.state.clear()
        # ---- l.6-9: K updates ----
        policy.train()
        begin, span, peak = plan.schedule[t]
        own = [p for p in pairs if p["iteration"] == t]
        answers = {
            "completions/mean_length": sum(len(p["rejected_ids"]) for p in own) / len(own),
            "completions/clipped_ratio": 1 - sum(p["finished"] for p in own) / len(own),
        }
        batches = run.epochs(len(pairs), args.num_train_epochs, t)
        for k, batch in run.updates(f"iteration {t}: training", batches, t, first):
            row = run.step(
                policy, optimizer, [pairs[i] for i in batch],
                lambda part: pair_loss(policy, part, args, run.accelerator.device), pair_length,
                learning_rate_at(first + k - begin, span, peak, args.warmup_ratio),
            )  # fmt: skip
            if k == 0 and (t == 0 or args.ref == "previous"):
                check_first_loss(run, row)
            seen = args.num_train_epochs * sum(plan.pairs[:t]) + sum(map(len, batches[: k + 1]))
            run.position["num_tokens"] += round(row["num_tokens"] * len(batch))
            row.update(answers, num_tokens=run.position["num_tokens"], epoch=seen / len(demonstrations))
            run.log_update(row, first + k + 1, episodes=sum(plan.pairs[: t + 1]))
        measure(t + 1)
        run.position.update(outer_iteration=t + 1)
    method = "SPIN" if args.T == 1 else "IRFT"
    path = run.save_final(policy, tokenizer, run.model_card(method, "arXiv:2405.17888"))
    evals.print_table(run, "start", method)
    run.print(f"model: {path}")
    run.end()


# ---- what is scored ----
def pair_loss(policy, pairs: list[dict], args: Args, device) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """irft_loss of stored pairs -> ((B,), {metric: (sum, count)}). One forward pass over 2B sequences."""
    sequences = [(p["prompt_ids"], p["chosen_ids"]) for p in pairs] + [
        (p["prompt_ids"], p["rejected_ids"]) for p in pairs
    ]
    batch = collate(sequences, pad_token_id=0).to(device)
    scores = response_logprobs(policy, batch)
    chosen, rejected = masked_sum(scores.logprobs, batch.response_mask).chunk(2)  # D1
    ref_chosen = chosen.new_tensor([p["ref_chosen"] for p in pairs])
    ref_rejected = chosen.new_tensor([p["ref_rejected"] for p in pairs])
    losses = irft_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta, args.loss_type)
    with torch.no_grad():
        r_chosen, r_rejected = args.beta * (chosen - ref_chosen), args.beta * (rejected - ref_rejected)
        count, tokens = chosen.new_tensor(len(pairs)), batch.response_mask.sum()
        stats = {
            "rewards/chosen": (r_chosen.sum(), count),
            "rewards/rejected": (r_rejected.sum(), count),
            "rewards/margins": ((r_chosen - r_rejected).sum(), count),
            "rewards/accuracies": (((r_chosen > r_rejected) + 0.5 * (r_chosen == r_rejected)).sum(), count),
            "logps/chosen": (chosen.sum(), count),
            "logps/rejected": (rejected.sum(), count),
            "entropy": (scores.entropy.sum(), tokens),
            "mean_token_accuracy": (scores.correct.sum(), tokens),
            "num_tokens": (batch.attention_mask.sum(), count),
        }
    return losses, stats


# ---- line 5: the policy's answers, and what the reference says of every pair ----
def make_pairs(run, t: int, plan: Plan, demonstrations, policy, generator, tokenizer) -> list[dict]:
    """Training pairs of outer iteration t with reference log-probs, kept in generations/iter_<t>.parquet."""
    args = run.args

    def make() -> list[dict]:
        rows = [demonstrations[i] for i in plan.chunks[t % args.num_chunks]]
        temperature = 0.0 if args.negatives == "greedy" else args.temperature
        with run.phase(f"iteration {t}: answers", len(rows), outer_iteration=t) as advance:
            rollout = evals.sample_rows(run, generator, rows, args.seed * 10_007 + t, temperature, advance)
        pairs = pair_rows(tokenizer, rows, rollout, t)
        for s in replayed(t, args):
            pairs += [p for p in read_pairs(pairs_path(run, s)) if p["iteration"] == s]
        is_reference = args.ref == "previous" or t == 0
        with (
            run.phase(f"iteration {t}: reference", 2 * len(pairs), outer_iteration=t) as advance,
            models.reference_policy(run, policy, is_reference) as ref_policy,
            evaluating(ref_policy),
        ):
            sequences = [(p["prompt_ids"], p[f"{kind}_ids"]) for p in pairs for kind in ("chosen", "rejected")]
            scored = evals.sequence_logprobs(run, ref_policy, sequences, advance=advance)
            for pair, (chosen, _), (rejected, _) in zip(pairs, scored[::2], scored[1::2], strict=True):
                pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected
        return pairs

    return run.stored(pairs_path(run, t), make, sum(plan.K[:t]))


def pairs_path(run, t: int) -> Path:
    return run.dir / "generations" / f"iter_{t}.parquet"


def check_first_loss(run, row: dict[str, float]) -> None:
    """While policy and reference coincide every margin is 0: the logistic loss is log 2, the linear one 0, to rounding."""
    expected = math.log(2) if run.args.loss_type == "logistic" else 0.0
    exact = run.accelerator.mixed_precision == "no" and run.args.dtype == "float32"
    scale = 1.0 if run.args.loss_type == "logistic" else 1.0 / run.args.beta
    if not abs(row["loss"] - expected) < (1e-4 if exact else 5e-2) * scale:
        raise UserError(
            f"first loss: found {row['loss']:.6f}, expected {expected:.6f}: policy and reference should coincide here but do not"
        )


# ---- the plan: Alg. 2's chunks, K and learning rates, known before anything runs ----
@dataclass
class Plan:
    chunks: list[list[int]]  # indices into the demonstrations
    pairs: list[int]  # pairs trained on in outer iteration t
    K: list[int]  # updates in outer iteration t
    schedule: list[
        tuple[int, int, float]
    ]  # (first step, steps, peak) of the schedule that outer iteration t belongs to

    @property
    def steps(self) -> int:
        return sum(self.K)


def make_plan(n: int, args: Args) -> Plan:
    """Split n demonstrations into chunks and count the updates. UserError if there are more chunks than demonstrations."""
    if args.num_chunks > n:
        name = "T" if args.T == args.num_chunks else "num_chunks"
        require(False, name, getattr(args, name), f"at most {n}, the number of demonstrations (one chunk each)")
    order = data_order(n, args.seed)
    chunks = [order[c * n // args.num_chunks : (c + 1) * n // args.num_chunks] for c in range(args.num_chunks)]
    sizes = [len(chunks[t % args.num_chunks]) for t in range(args.T)]
    pairs = [sum(sizes[s] for s in (*replayed(t, args), t)) for t in range(args.T)]
    K = [args.num_train_epochs * math.ceil(m / args.batch_size) for m in pairs]
    schedule = []
    for t in range(args.T):
        p = t // args.num_chunks  # D3
        span = (
            range(t, t + 1)
            if args.optimizer_state == "restart"
            else range(p * args.num_chunks, min((p + 1) * args.num_chunks, args.T))
        )
        peak = args.learning_rate if p == 0 else args.later_learning_rate
        schedule.append((sum(K[: span.start]), sum(K[i] for i in span), peak))
    return Plan(chunks, pairs, K, schedule)


def replayed(t: int, args: Args) -> range:
    """Earlier outer iterations whose pairs are trained on again in outer iteration t."""
    return range({"none": t, "previous": max(t - 1, 0), "all": 0}[args.replay], t)


def plan_work(plan: Plan, demonstrations: list[dict], args: Args) -> cost.Work:
    """--dry-run: what passes through the policy and its reference."""
    work = cost.Work(args, demonstrations)
    own = [[demonstrations[i] for i in plan.chunks[t % args.num_chunks]] for t in range(args.T)]
    for t, rows in enumerate(own):
        pairs = work.pairs([row for s in (*replayed(t, args), t) for row in own[s]])
        work.add("answers", "generate", work.answered(rows), len(rows))
        work.add("reference", "score", pairs, plan.pairs[t])
        work.add("training", "train", pairs * args.num_train_epochs, args.batch_size)
    work.evaluations(args.T + 1)
    return work


def plan_lines(plan: Plan, args: Args) -> list[str]:
    """--dry-run: the chunks, and the answers and updates of every outer iteration."""
    lines = [f"data {args.dataset}, T = {args.T}, {len(plan.chunks)} chunk(s)"]
    for t in range(args.T):
        n = len(plan.chunks[t % len(plan.chunks)])
        lines.append(
            f"iteration {t}: {n} answers of up to {args.max_new_tokens} tokens ({n * args.max_new_tokens} at most),"
            f" {plan.K[t]} updates on {plan.pairs[t]} pairs, peak learning rate {plan.schedule[t][2]:g}"
        )
    return [*lines, f"in all {plan.steps} updates of {args.batch_size} pairs"]


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    sequences_per_row: ClassVar[int] = 2

    T: Annotated[int, AT_LEAST_1] = 5
    """outer iterations, >= 1: how often the policy answers anew. 1 is SPIN. Paper: 5 to 8 (Tables 3, 4)."""
    num_chunks: Annotated[int | Auto, AT_LEAST_1] = "auto"
    """parts the demonstrations are split into, one per outer iteration; auto: T. 5 with --T 10 is the paper's second pass."""
    num_train_epochs: Annotated[int, AT_LEAST_1] = 2
    """passes over the pairs of one outer iteration, >= 1. Paper: 2; released 7B code: 1."""
    beta: Annotated[float, POSITIVE] = 0.1
    """weight of KL(pi || pi_ref), reward units per nat, > 0. Paper: 0.1 (App. C)."""
    loss_type: Literal["logistic", "linear"] = "logistic"
    """logistic: Eq. 7 with h = log sigmoid; linear: the bare estimator of Eq. 6, unbounded, for study."""
    ref: Literal["initial", "previous"] = "initial"
    """reference policy: the model the run starts from (the equations), or that of the last iteration (SPIN, released code)."""
    optimizer_state: Literal["carry", "restart"] = "carry"
    """over outer iterations: optimizer state and schedule go on (Alg. 2), or start anew in every one (released code)."""
    replay: Literal["none", "previous", "all"] = "none"
    """pairs of earlier outer iterations to train on again: none (Alg. 2), those of the last one (SPIN), or all."""
    negatives: Literal["sampled", "greedy"] = "sampled"
    """the policy's answers: sampled (Alg. 2, line 5), or greedy (what the released script does)."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of sampled answers, > 0. At 1 they come from the distribution whose log-probs enter the loss."""
    later_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate from the second pass over the chunks on, > 0. Paper: 1e-7."""

    def check(self) -> None:
        if self.num_chunks == "auto":
            self.num_chunks = self.T
        super().check()


SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=1600, eval_samples=200, max_length=256, max_new_tokens=48, learning_rate=6e-5,
        later_learning_rate=1.2e-5, batch_size=32, per_device_train_batch_size=16, per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args),
    "pythia": dict(  # RFT paper, Sec. 5.1 and App. C, pythia-1.4b: batch 16 is two devices with 8; answers up to 256: ours
        dataset="ultrachat_200k", max_samples=50_000, eval_samples=500, max_length=1024, max_new_tokens=256, learning_rate=5e-7,
        later_learning_rate=1e-7, batch_size=16, per_device_train_batch_size=8, per_device_eval_batch_size=32,
    ),
    "other": dict(  # RFT paper, zephyr-7b-sft-full: batch 16 is eight devices with 2
        dataset="ultrachat_200k", max_samples=50_000, eval_samples=500, max_length=2048, max_new_tokens=256, learning_rate=5e-7,
        later_learning_rate=1e-7, batch_size=16, per_device_train_batch_size=2, per_device_eval_batch_size=16,
    ),
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "loss": "irft_loss, nats per pair; log 2 = 0.693 at the first update of a run (logistic), falls slowly",
    "rewards/chosen": "beta (log pi - log pi_ref) of demonstrations; 0 at the start, should not fall",
    "rewards/rejected": "the same of the policy's own answers; 0 at the start, falls",
    "rewards/margins": "rewards/chosen - rewards/rejected; 0 at the start, rises",
    "rewards/accuracies": "share of pairs with a margin above 0, ties half; 0.5 at the start",
    "logps/chosen": "log pi of demonstrations, nats per response",
    "logps/rejected": "log pi of the policy's own answers, nats per response",
    "entropy": "of the next-token distribution, exact, nats per response token",
    "mean_token_accuracy": "share of response tokens that are the model's most likely one",
    "num_tokens": "prompt and response tokens trained on so far",
    "grad_norm": "before clipping",
    "learning_rate": "of this update",
    "epoch": "passes over the demonstrations so far",
    "completions/mean_length": "tokens of the answers of this outer iteration, EOS included",
    "completions/clipped_ratio": "share of answers cut at --max-new-tokens",
    **metrics.EVAL_METRICS,
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
