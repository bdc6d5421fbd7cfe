"""IRL from demonstrations with online DPO, on UltraChat: a reward from demonstrations and answers, then DPO against it.

Paper: From Demonstrations to Rewards, arXiv:2503.13538, Algorithm 1 and Sec. 6.2. A flag gives the best-of-N of its draft. The
online DPO is that of Online-RLHF (arXiv:2405.07863), which the paper follows.

Maximum-likelihood inverse RL (Eq. 5): the demonstrations are answers of the KL-regularised optimum of an unknown reward. In each
of T outer iterations the policy answers the prompts of the demonstrations, a reward made from the SFT model learns to score the
demonstrations above these answers (Eq. 11), and online DPO moves the policy towards pi_ref exp(r / beta) / Z (Eq. 9). If DPO
goes on for long, the policy moves past that optimum, because the candidate with the highest of N scores is always preferred to
the one with the lowest.

Not the paper: D1 rewards are centred so that held-out demonstrations average 0. D2 schedules and the policy optimizer's state
start anew in every outer iteration. D3 --sft-epochs first fine-tunes the model on the demonstrations. D4 on small models DPO
takes its steps on a few prompts at a time, before the next ones are answered (--rollout-batch-size). D5 an answer without EOS
loses --missing-eos-penalty of its score. D6 pi_ref is the policy that an iteration starts from (docs/theory.md).

Dims: B sequences or pairs, T response tokens (T alone, as a flag, is the number of outer iterations), N candidates of a prompt.

Laptop CPU, minutes:   python irl_dpo_ultrachat.py

The paper's run:       accelerate launch --quiet irl_dpo_ultrachat.py --model mistral-7b-sft-beta
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import demos, evals, models, rewards
from common.args import Auto, RunArgs, main, parse_args, require
from common.data import collate, pair_length, pair_rows, row_length
from common.engine import evaluating
from common.generation import make_generator
from common.logprobs import masked_sum, response_logprobs
from common.ranges import AT_LEAST_1, AT_LEAST_2, BELOW_1, NOT_NEGATIVE, POSITIVE
from common.run import Run
from common.streams import data_order, learning_rate_at, make_optimizer, stream_seed
from extras import agreement, cost, gold, metrics, preference_data, records, two_cores
from extras.cache import weights_digest


# ---- the maths: SFT, and the reward ----
def nll_loss(token_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Negative log-likelihood of each response, RFT paper Eq. 1.

    token_logprobs: (B, T) log pi(y_t | x, y_<t), nats. response_mask: (B, T) bool, True through EOS.
    Returns (B,), nats per response, summed over its tokens.
    """
    return -masked_sum(token_logprobs, response_mask)


def reward_loss(demonstration_scores: Tensor, answer_scores: Tensor, beta: float, kind: str = "logistic") -> Tensor:
    """Per-pair loss of the reward step. Carries gradient through both scores, (B,) each, reward units. Returns (B,).

    linear:   -(r(x, y) - r(x, y~)) / beta, whose gradient is -g_{t,k} (RFT paper, Alg. 1 and Eq. 13).
    logistic: -log sigmoid(r(x, y) - r(x, y~)) (IRL paper, Eq. 11): the same direction, bounded.
    ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = demonstration_scores - answer_scores
    return -F.logsigmoid(d) if kind == "logistic" else -d / beta


# ---- the maths: online DPO and best-of-N ----
def choose_pair(scores: Tensor, choice: str = "max_min") -> tuple[Tensor, Tensor]:
    """(preferred, other): indices of two of N scores, (B, N) -> (B,), (B,). The first one counts if scores are equal.

    max_min: the highest and the lowest (IRL paper, App. 8.2); both are the same index if all scores are equal.
    max_max: the highest and the second. max_random: the highest and the first other one; candidates come in no order, so that
    this is a random one. random: the first two, the higher one preferred.
    """
    n = scores.shape[-1]
    index = torch.arange(n, device=scores.device).expand_as(scores)

    def first(chosen: Tensor) -> Tensor:
        return torch.where(chosen, index, n).amin(-1)

    best = first(scores == scores.amax(-1, keepdim=True))
    if choice == "max_min":
        return best, first(scores == scores.amin(-1, keepdim=True))
    if choice == "max_max":
        others = scores.masked_fill(index == best[:, None], -math.inf)
        return best, first(others == others.amax(-1, keepdim=True))
    if choice == "max_random":
        return best, (best == 0).long()
    higher = (scores[:, 1] > scores[:, 0]).long()
    return higher, 1 - higher


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Per-pair -log likelihood of the preference under r = beta log pi/pi_ref. DPO, arXiv:2305.18290, Eq. 7.

    policy_chosen, policy_rejected: (B,) log pi(y_w|x) and log pi(y_l|x), summed over response tokens, nats; carry gradient.
    ref_chosen, ref_rejected:       (B,) the same under pi_ref, no gradient.
    Returns (B,): -log sigmoid(beta d), with d = (policy - ref)_chosen - (policy - ref)_rejected. ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,)
    return -F.logsigmoid(beta * d)


# ---- the loop: Algorithm 1 ----
SFT, PAIRS, REWARD, PROMPTS, STEPS = range(5)  # what the random streams of an outer iteration are for


class IRL:
    """The models of a run, and the steps of Alg. 1. Every step skips what a resumed run has done already."""

    def __init__(self, run: Run, tokenizer, demonstrations: list[dict], held_rows: list[dict], preferences: list[dict]):
        args = run.args
        self.run, self.args, self.tokenizer = run, args, tokenizer
        self.demonstrations, self.prompts, self.held_rows, self.held = demonstrations, demonstrations, held_rows, None
        self.preferences, self.reused = preferences, {}
        self.method, self.paper = "IRL", "arXiv:2503.13538, Alg. 1"
        self.steps = count_steps(len(demonstrations), args)
        policy = models.autocast_forward(run, models.prepare_policy(args))
        reward_model = models.autocast_forward(run, rewards.prepare_scalar(args, args.model, "--model"))
        self.policy, self.optimizer, self.reward_model, self.reward_optimizer = run.prepare(
            policy, make_optimizer(args.optimizer, policy.parameters()),
            reward_model, make_optimizer(args.optimizer, reward_model.parameters()),
        )  # fmt: skip
        self.raw, self.raw_reward = (run.unwrap(m) for m in (self.policy, self.reward_model))
        self.generator = make_generator(run, self.raw, tokenizer)
        self.sft_policy = str(run.dir / "sft") if args.sft_epochs else args.model  # where the initial policy is kept

    def learn(self) -> None:
        """Alg. 1, after the warm start. Resumes where the last checkpoint stands."""
        run, args = self.run, self.args
        run.load_checkpoint()
        if args.gold_reward_model and run.position["step"] < self.steps.sft:
            gold.GoldReward(run)  # one that cannot be used is refused before anything is trained
        self.warm_start()
        self.held = evals.prepare_held_out(run, self.raw, self.generator, self.held_rows, self.tokenizer)
        for t in range(run.position["outer_iteration"], args.T):
            self.reward_step(t)
            self.policy_step(t)

    def warm_start(self) -> None:
        """D3: the SFT policy from --model. Kept in sft/ as reference, as start of every reward, and for comparison."""
        run, args, total, device = self.run, self.args, self.steps.sft, self.run.accelerator.device
        self.policy.train()
        batches = run.epochs(len(self.demonstrations), args.sft_epochs, 0, SFT)
        for k, batch in run.updates("SFT", batches):
            rows = [self.demonstrations[i] for i in batch]
            scale = len(rows) / sum(len(r["response_ids"]) for r in rows)
            loss_fn = lambda part, scale=scale: sft_batch_loss(self.policy, part, device, scale)  # noqa: E731
            lr = learning_rate_at(k, total, args.sft_learning_rate, args.warmup_ratio, args.lr_scheduler_type)
            row = run.step(self.policy, self.optimizer, rows, loss_fn, row_length, lr, "sft_learning_rate")
            run.log_update({"sft/loss": row.pop("loss"), **row})
        if total and run.position["step"] == total:
            card = run.model_card("SFT", "arXiv:2503.13538, Eq. 1")
            run.save_final(self.policy, self.tokenizer, card, "sft")

    def sample_pairs(self, t: int) -> list[dict]:
        """Alg. 1, data sample: (y, y~) for every demonstration, from generations/iter_<t>.parquet if already made."""
        run, args, rows = self.run, self.args, self.demonstrations

        def make() -> list[dict]:
            with run.phase(f"iteration {t}: answers", len(rows), outer_iteration=t) as advance:
                seed = stream_seed(args.seed, t, PAIRS)
                temperature = args.temperature if args.negatives == "sampled" else args.greedy_temperature
                rollout = evals.sample_rows(run, self.generator, rows, seed, temperature, advance)
            return pair_rows(self.tokenizer, rows, rollout, t)

        return run.stored(run.dir / "generations" / f"iter_{t}.parquet", make, self.steps.before(t))

    def start_reward(self, t: int) -> None:
        """theta_{t,0}: made anew from the SFT policy, or carried over."""
        args = self.args
        if args.reward_init == "previous" and t > 0:
            return
        torch.manual_seed(args.seed)  # LoRA's first weights
        self.run.load_weights(self.reward_model, rewards.prepare_scalar(args, self.sft_policy, "--model"))
        self.reward_optimizer.state.clear()

    def reward_step(self, t: int) -> None:
        """Alg. 1, reward optimization: gradient steps on the pairs; then the reward is centred and measured."""
        run, args, first, end = self.run, self.args, self.steps.before(t), self.steps.before_policy(t)
        pairs = self.sample_pairs(t)
        if args.pairs == "accumulated":
            pairs = [p for i in range(t) for p in self.sample_pairs(i)] + pairs
        if run.position["step"] <= first:
            self.optimizer.state.clear()  # D2; and its memory, until the policy step
            self.start_reward(t)
        self.reward_model.train()
        model, device = self.reward_model, run.accelerator.device
        loss_fn = lambda part: reward_batch_loss(model, part, args, device)  # noqa: E731
        batches = run.epochs(len(pairs), args.num_train_epochs, t, REWARD)
        for k, batch in run.updates(f"iteration {t}: reward", batches, t, first):
            rows = [pairs[i] for i in batch]
            lr = learning_rate_at(k, len(batches), args.reward_learning_rate, args.warmup_ratio, args.lr_scheduler_type)
            row = run.step(model, self.reward_optimizer, rows, loss_fn, pair_length, lr, "reward_learning_rate")
            run.log_update({"reward/loss": row.pop("loss"), **row})
        if run.position["step"] == end:
            row = evals.evaluate_reward(run, self.raw_reward, self.held, t)
            center = row.pop("eval/reward/demonstrations")
            self.raw_reward.center += center  # D1
            row |= preference_data.evaluate_preferences(run, self.raw_reward, self.preferences, t)
            run.log({**row, "eval/reward/center": self.raw_reward.center.item()}, step=end, outer_iteration=t)

    def start_policy(self, t: int) -> str:
        """Before the policy step. Returns the reference's model or folder."""
        run, args = self.run, self.args
        previous = args.ref == "previous" and t > 0
        if run.position["step"] <= self.steps.before_policy(t):  # else the policy step has begun already
            if previous:
                card = run.model_card(self.method, self.paper)
                run.save_final(self.policy, self.tokenizer, card, f"policy_{t}")
        return str(run.dir / f"policy_{t}") if previous else self.sft_policy

    def collect(self, t: int, u: int, rows: list[dict], reference) -> list[dict]:
        """choose_pairs for the prompts of update u, block by block. Candidates are kept on disk, and none is scored twice."""
        run, pairs, seed = self.run, [], stream_seed(self.args.seed, t, PROMPTS)
        weights = [weights_digest(run, m) for m in (self.policy, self.reward_model)]
        for begin in range(0, len(rows), BLOCK):
            block, first = rows[begin : begin + BLOCK], u * self.args.rollout_batch_size + begin
            key = candidate_key(run, weights, self.generator, block, first, seed)
            make = functools.partial(score_candidates, run, self.raw_reward, self.generator, block, first, seed)
            candidates, folder = kept_candidates(run, f"iter_{t}_{first:07d}_{key}.parquet", make)
            self.reused[folder] = self.reused.get(folder, 0) + len(block)
            pairs += choose_pairs(run, block, candidates, reference)
            run.stop_if_asked()
        return pairs

    def say_reused(self, t: int) -> None:
        """Print where the candidates of the iteration come from, unless all of them were made here and now."""
        given, made = self.args.candidates_from, self.reused.pop("", 0)
        for folder, count in self.reused.items():
            self.run.print(f"iteration {t}: candidates of {count} prompts taken from {folder}")
        if given and made:
            reason = "those come from other weights, prompts or settings"
            self.run.print(f"iteration {t}: candidates of {made} prompts made anew, none in {given} match: {reason}")
        self.reused = {}

    def policy_step(self, t: int) -> None:
        """Alg. 1, policy alignment: online DPO (or best-of-N) on the reward, with an evaluation every --eval-updates updates."""
        run, args, steps = self.run, self.args, self.steps
        source, reference, name = self.start_policy(t), None, "best of N"
        if args.policy_objective == "dpo":
            reference, name = models.open_reference(run, self.raw, source), "online DPO"
        initial = reference if source == self.sft_policy else None
        total = args.total_prompts or len(self.prompts)
        batches = run.prompt_batches(len(self.prompts), total, t, PROMPTS)
        self.policy.train()
        for u, batch in run.updates(
            f"iteration {t}: {name}", batches, t, steps.before_policy(t), steps.per_update,
            evaluate=lambda u: self.measure(t, t * steps.updates + u, initial),
        ):  # fmt: skip
            pairs = self.collect(t, u, [self.prompts[i] for i in batch], reference)
            row = measure_candidates(pairs)
            with run.timed("update"):
                row |= policy_update(run, self.policy, self.optimizer, pairs, policy_rates(steps, u, args), t, STEPS, u)
            run.log_update(row, episodes=self.episodes(t, u + 1))
        self.say_reused(t)

    def episodes(self, t: int, updates: int) -> int:
        """Answers that the policy steps have sampled, after so many updates of outer iteration t."""
        total = self.args.total_prompts or len(self.prompts)
        return (t * total + min(updates * self.args.rollout_batch_size, total)) * self.args.num_generations

    def measure(self, t: int, updates: int, reference=None) -> None:
        """Evaluation of the policy after so many policy updates, against the initial policy, loaded unless it is given."""
        run = self.run
        reference = (reference or models.open_reference(run, self.raw, self.sft_policy))()
        row = evals.evaluate(
            run, self.raw, self.generator, self.held, self.tokenizer, self.args.beta, reference, updates,
            self.raw_reward,
        )  # fmt: skip
        episodes = self.episodes(t, updates - t * self.steps.updates)
        run.log(row, step=run.position["step"], outer_iteration=t, updates=updates, episodes=episodes)


# ---- what is scored, by which model ----
def sft_batch_loss(policy, rows: list[dict], device, scale: float = 1.0) -> tuple[Tensor, dict]:
    """nll_loss of demonstrations, times scale -> ((B,), {})."""
    batch = collate([(r["prompt_ids"], r["response_ids"]) for r in rows], pad_token_id=0).to(device)
    return nll_loss(response_logprobs(policy, batch).logprobs, batch.response_mask) * scale, {}


def reward_batch_loss(reward_model, pairs: list[dict], args: Args, device) -> tuple[Tensor, dict]:
    """reward_loss of (demonstration, answer) pairs -> ((B,), {metric: (sum, count)}). One forward pass over 2B sequences."""
    sequences = [(p["prompt_ids"], p[kind]) for kind in ("chosen_ids", "rejected_ids") for p in pairs]
    chosen, rejected = reward_model(collate(sequences, pad_token_id=0).to(device)).chunk(2)
    losses = reward_loss(chosen, rejected, args.beta, args.reward_loss)
    with torch.no_grad():
        count = chosen.new_tensor(len(pairs))
        stats = {
            "reward/accuracy": (((chosen > rejected) + 0.5 * (chosen == rejected)).sum(), count),
            "reward/margin": ((chosen - rejected).sum(), count),
            "reward/demonstrations": (chosen.sum(), count),
            "reward/answers": (rejected.sum(), count),
        }
    return losses, stats


def dpo_batch_loss(policy, pairs: list[dict], args: Args, device) -> tuple[Tensor, dict]:
    """dpo_loss of scored pairs -> ((B,), {metric: (sum, count)}). One forward pass over 2B sequences."""
    sequences = [(p["prompt_ids"], p[kind]) for kind in ("chosen_ids", "rejected_ids") for p in pairs]
    batch = collate(sequences, pad_token_id=0).to(device)
    scores = response_logprobs(policy, batch, args.temperature)
    logps = masked_sum(scores.logprobs, batch.response_mask)
    chosen, rejected = logps.chunk(2)
    ref_chosen, ref_rejected = (chosen.new_tensor([p[f"ref_{kind}"] for p in pairs]) for kind in ("chosen", "rejected"))
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta)
    with torch.no_grad():
        sampled = [logps.new_tensor(p[f"sampled_{kind}"]) for kind in ("chosen", "rejected") for p in pairs]
        off = sum((now[: len(old)] - old).abs().sum() for now, old in zip(scores.logprobs, sampled, strict=True))
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
            "sampling/logp_difference": (off, tokens),
        }
    return losses, stats


def best_of_n_batch_loss(policy, pairs: list[dict], args: Args, device) -> tuple[Tensor, dict]:
    """nll_loss of the best candidates -> ((B,), {metric: (sum, count)}). One forward pass over B sequences."""
    batch = collate([(p["prompt_ids"], p["chosen_ids"]) for p in pairs], pad_token_id=0).to(device)
    scores = response_logprobs(policy, batch, args.temperature)
    losses = nll_loss(scores.logprobs, batch.response_mask)
    with torch.no_grad():
        sampled = [losses.new_tensor(p["sampled_chosen"]) for p in pairs]
        off = sum((now[: len(old)] - old).abs().sum() for now, old in zip(scores.logprobs, sampled, strict=True))
        tokens = batch.response_mask.sum()
        stats = {
            "logps/chosen": (-losses.sum(), losses.new_tensor(len(pairs))),
            "entropy": (scores.entropy.sum(), tokens),
            "sampling/logp_difference": (off, tokens),
        }
    return losses, stats


# ---- candidates, and the pairs made of them ----
BLOCK = 256  # prompts whose candidates are sampled, scored and kept on disk at a time


def score_candidates(run, reward_model, generator, rows: list[dict], first: int, seed: int) -> list[dict[str, list]]:
    """N answers to each prompt with their scores: {name: list of N} for each row. Every answer is scored once.

    Candidate j of row i has the random stream (first + i) N + j of the seed. Scoring is in batches sorted by length.
    """
    args = run.args

    def work(indices: list[int]) -> list[dict]:
        n = args.num_generations
        with run.timed("sample"):
            asked = [(rows[i]["prompt_ids"], (first + i) * n + j) for i in indices for j in range(n)]
            rollout = generator.sample([x for x, _ in asked], [k for _, k in asked], seed, args.temperature)
        sequences = list(zip(rollout.prompt_ids, rollout.response_ids, strict=True))
        with run.timed("score"), evaluating(reward_model):
            scores = run.score_batches(sequences, lambda batch: reward_model(batch).tolist())
        names = {"response_ids": rollout.response_ids, "finished": rollout.finished, "logprobs": rollout.logprobs}
        names["scores"] = scores
        return [{k: v[i * n : (i + 1) * n] for k, v in names.items()} for i in range(len(indices))]

    return run.map_rows(len(rows), work)


def candidate_key(run, weights: list[str], generator, rows: list[dict], first: int, seed: int) -> str:
    """Digest of everything that the result of score_candidates depends on. weights: digests of policy and reward model."""
    args = run.args
    made_by = [*weights, sorted(generator.eos_ids), [r["prompt_ids"] for r in rows], first, seed, args.num_generations]
    made_by += [args.temperature, args.max_new_tokens, run.accelerator.mixed_precision]
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]


def kept_candidates(run, name: str, make: Callable[[], list[dict]]) -> tuple[list[dict], str]:
    """(candidates, folder they were taken from): from the file of that name in candidates/ of this run or of --candidates-from.

    If neither has it, make() makes them, they are kept in this run, and the folder is "".
    """
    from accelerate.utils import broadcast_object_list

    own = run.dir / "candidates"
    folders = [own, *([Path(run.args.candidates_from) / "candidates"] if run.args.candidates_from else [])]
    (found,) = broadcast_object_list([next((str(f) for f in folders if (f / name).is_file()), "")])
    return run.stored(Path(found or own) / name, make), found


def choose_pairs(run, rows: list[dict], candidates: list[dict], reference) -> list[dict]:
    """Choose the pair of every prompt, with the log-probs of policy and reference. In best_of_n the best candidate is chosen.

    The policy's log-probs are those the answers were sampled with. The reference scores the two answers that are kept, and only
    for DPO. reference() is a context that yields the reference policy.
    """
    args, dpo = run.args, run.args.policy_objective == "dpo"
    scores = torch.tensor([c["scores"] for c in candidates], dtype=torch.float64)
    scores -= args.missing_eos_penalty * ~torch.tensor([c["finished"] for c in candidates])
    picked = [p.tolist() for p in choose_pair(scores, args.pair_choice if dpo else "max_min")]
    sequences = [
        (r["prompt_ids"], c["response_ids"][k]) for p in picked for r, c, k in zip(rows, candidates, p, strict=True)
    ]
    pairs = []
    for i, (candidate, b, w) in enumerate(zip(candidates, *picked, strict=True)):
        own = scores[i].tolist()
        pairs.append({
            "prompt_ids": sequences[i][0], "chosen_ids": sequences[i][1], "rejected_ids": sequences[len(rows) + i][1],
            "sampled_chosen": candidate["logprobs"][b], "sampled_rejected": candidate["logprobs"][w],
            "score_chosen": own[b], "score_rejected": own[w], "scores": own,
            "lengths": list(map(len, candidate["response_ids"])), "finished": candidate["finished"],
        })  # fmt: skip
    if dpo:
        with run.timed("reference"), reference() as ref_policy, evaluating(ref_policy):
            ref = run.map_sequences(sequences, lambda batch: evals.batch_logprobs(ref_policy, batch, args.temperature))
        for pair, (chosen, _), (rejected, _) in zip(pairs, ref[: len(rows)], ref[len(rows) :], strict=True):
            pair |= {"ref_chosen": chosen, "ref_rejected": rejected}
    return pairs


# ---- a policy update: the pairs, optimizer steps ----
def makes_pair(pair: dict) -> bool:
    """True if one answer is preferred to another. (Equal answers can differ in score: padding changes the rounding.)"""
    return pair["score_chosen"] > pair["score_rejected"] and pair["chosen_ids"] != pair["rejected_ids"]


def measure_candidates(pairs: list[dict]) -> dict[str, float]:
    """Metrics of all N answers to the prompts of an update."""
    scores = torch.tensor([p["scores"] for p in pairs], dtype=torch.float64)
    best, worst = scores.amax(-1), scores.amin(-1)
    return {
        "objective/scores": scores.mean().item(),
        "objective/scores_best": best.mean().item(),
        "objective/scores_margin": (best - worst).mean().item(),
        "objective/pairs": sum(map(makes_pair, pairs)) / len(pairs),
        "completions/mean_length": torch.tensor([p["lengths"] for p in pairs], dtype=torch.float64).mean().item(),
        "completions/clipped_ratio": 1
        - torch.tensor([p["finished"] for p in pairs], dtype=torch.float64).mean().item(),
    }


def policy_update(run, policy, optimizer, pairs: list[dict], rates: list[float], *key: int) -> dict[str, float]:
    """--num-policy-epochs passes of DPO over the pairs, or of SFT on the best candidates -> metrics, means over the steps.

    rates: learning rate of each step. The last ones stay unused if some prompts make no pair.
    """
    args, device, steps = run.args, run.accelerator.device, []
    if args.policy_objective == "dpo":
        pairs = [p for p in pairs if makes_pair(p)]
    for epoch in range(args.num_policy_epochs):
        order = data_order(len(pairs), args.seed, *key, epoch)
        for begin in range(0, len(order), args.batch_size):
            rows = [pairs[i] for i in order[begin : begin + args.batch_size]]
            scale = len(rows) / sum(len(p["chosen_ids"]) for p in rows)  # best_of_n: mean over the step's tokens

            def loss_fn(part, scale=scale):
                if args.policy_objective == "dpo":
                    return dpo_batch_loss(policy, part, args, device)
                losses, stats = best_of_n_batch_loss(policy, part, args, device)
                return losses * scale, stats

            steps.append(run.step(policy, optimizer, rows, loss_fn, pair_length, rates[len(steps)]))
            agreement.check_first_step("policy", steps[0], args.temperature)
    if not steps:
        return {}
    row = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
    return {"policy/loss": row.pop("loss"), **row, "sampling/logp_difference": steps[0]["sampling/logp_difference"]}


def policy_rates(steps: Steps, u: int, args: Args) -> list[float]:
    """Learning rates of update u's steps: one schedule over all steps of the iteration, however many an update has."""
    total = steps.updates * steps.per_update
    return [
        learning_rate_at(k, total, args.learning_rate, args.warmup_ratio, args.lr_scheduler_type)
        for k in range(u * steps.per_update, (u + 1) * steps.per_update)
    ]


# ---- the plan: numbers of optimizer steps, known before anything runs ----
@dataclass
class Steps:
    sft: int
    K: list[int]  # reward steps of each outer iteration
    updates: int  # policy updates in one outer iteration
    per_update: int  # optimizer steps of one policy update, at most

    def before(self, t: int) -> int:
        """Optimizer steps before outer iteration t."""
        return self.sft + sum(self.K[:t]) + t * self.updates * self.per_update

    def before_policy(self, t: int) -> int:
        """Optimizer steps before the policy step of outer iteration t."""
        return self.before(t) + self.K[t]


def count_steps(n: int, args: Args) -> Steps:
    """Steps for n demonstrations; the last batch of an epoch may be smaller."""
    kept = [t + 1 if args.pairs == "accumulated" else 1 for t in range(args.T)]  # iterations whose pairs are used
    reward = [args.num_train_epochs * math.ceil(n * k / args.batch_size) for k in kept]
    prompts = args.total_prompts or n
    updates = math.ceil(prompts / args.rollout_batch_size)
    per_update = args.num_policy_epochs * math.ceil(min(args.rollout_batch_size, prompts) / args.batch_size)
    return Steps(args.sft_epochs * math.ceil(n / args.batch_size), reward, updates, per_update)


# ---- a run, from data to the saved models ----
def expert_rows(run: Run, tokenizer, rows: list[dict]) -> list[dict]:
    """gold.expert_rows, with answers that fit in --max-length."""
    args = run.args
    return gold.expert_rows(
        run, tokenizer, rows, args.greedy_temperature, lambda r: args.max_length - len(r["prompt_ids"])
    )


def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    if args.expert_model:
        models.load_tokenizer(args, args.expert_model, "--expert-model")
    demonstrations = demos.load_demonstrations(args, tokenizer)
    if args.dry_run:
        rows, tokens = demonstrations[: args.select_top_k or None], args.max_new_tokens
        n, steps, expert = len(rows), count_steps(len(rows), args), args.expert_model or "the data set's own"
        reward_steps = f"{steps.K[0]} to {steps.K[-1]}" if args.pairs == "accumulated" else steps.K[0]
        prompts = args.total_prompts or n
        candidates, dpo = prompts * args.num_generations, args.policy_objective == "dpo"
        kind = f"DPO on pairs ({args.pair_choice})" if dpo else "fine-tuning on the best of them"
        return cost.print_plan(
            args, "irl_dpo_ultrachat", cost.with_reward(args, rows, [], steps.updates),
            f"data {args.dataset}, demonstrations: {expert}, T = {args.T}",
            f"{steps.sft} SFT steps of {args.batch_size} demonstrations; then in each outer iteration",
            f"{n} answers of up to {tokens} tokens ({n * tokens} at most), K = {reward_steps} reward steps,",
            f"{candidates} candidates of {prompts} prompts ({candidates * tokens} tokens at most), each scored once,",
            f"{steps.updates} policy updates of {steps.per_update} optimizer steps: {kind}",
            f"in all {steps.before(args.T)} optimizer steps",
        )  # fmt: skip
    held_rows = demos.load_held_out(args, tokenizer, demonstrations)
    preferences = preference_data.load_eval_preferences(args, tokenizer)

    run = Run(args, "irl_dpo_ultrachat", METRICS)
    if run.finished():
        return
    demonstrations = demos.select_demonstrations(run, expert_rows(run, tokenizer, demonstrations))
    irl = IRL(run, tokenizer, demonstrations, expert_rows(run, tokenizer, held_rows), preferences)
    records.record_prompts(run, tokenizer, demonstrations)
    steps, prompts = irl.steps, args.total_prompts or len(irl.prompts)
    run.print(
        f"irl_dpo_ultrachat: {len(demonstrations)} demonstrations, {steps.sft} SFT steps, T = {args.T}, K = {steps.K[0]},"
        f" {steps.updates} policy updates, {args.policy_objective} on {prompts} prompts x {args.num_generations}"
        f" candidates, {run.world} process(es), {run.dir}"
    )
    irl.learn()
    reward_path = rewards.save_reward(run, irl.reward_model, irl.method, irl.paper, "demonstrations")
    path = run.save_final(irl.policy, tokenizer, run.model_card(irl.method, irl.paper))
    evals.print_table(run, "SFT" if args.sft_epochs else "start", irl.method)
    run.print(f"model: {path}   reward model: {reward_path}")
    run.end()


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    scalar_models: ClassVar[int] = 1

    T: Annotated[int, AT_LEAST_1] = 2
    """outer iterations, >= 1: how often the policy answers anew and a reward is learned. Paper: 2."""
    num_train_epochs: Annotated[int, AT_LEAST_1] = 1
    """passes of the reward model over its pairs in one outer iteration, >= 1. Paper: 1."""
    expert_model: str = ""
    """model whose answers are the demonstrations, training and held-out, kept in the cache folder; empty: --dataset's own."""
    greedy_temperature: Annotated[float, POSITIVE] = 0.01
    """temperature of the expert's answers and of --negatives greedy, > 0. Released code: 0.01."""
    eval_preference_dataset: str = "none"
    """held-out preferences of people, on which every reward is measured (Fig. 2a); none, a file, folder, short name or hub id."""
    beta: Annotated[float, POSITIVE] = 0.1
    """weight of KL(pi || pi_ref), reward units per nat, > 0: in DPO, and in a linear reward step. Paper: 0.1."""
    negatives: Literal["sampled", "greedy"] = "sampled"
    """the policy's answers in the reward's pairs: at --temperature (Alg. 1), or near-greedy (released code)."""
    pairs: Literal["current", "accumulated"] = "current"
    """what a reward learns from: this outer iteration's pairs (paper), or those of the earlier ones too (released code, which
    leaves out the first)."""
    reward_loss: Literal["logistic", "linear"] = "logistic"
    """logistic: Eq. 11, bounded; linear: the likelihood's own gradient (Eq. 10), unbounded."""
    reward_init: Literal["sft", "previous"] = "sft"
    """where a reward step starts: the SFT policy every time (Sec. 6.1, released code), or the last iteration's reward."""
    reward_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of the reward model, > 0. Released code (TL;DR): 3e-6."""
    ref: Literal["initial", "previous"] = "previous"
    """reference policy of DPO: that of the last iteration (released code, Online-RLHF), or the SFT one (Eq. 5; circles)."""
    sft_epochs: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """passes of supervised fine-tuning over the demonstrations before anything else, >= 0; 0: --model is fine-tuned already."""
    sft_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of --sft-epochs, > 0."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of sampled answers, > 0; it divides the logits of every log-prob the policy step uses. Online-RLHF: 1."""
    lr_scheduler_type: Literal["linear", "cosine"] = "cosine"
    """how a learning rate falls to 0 after its warm-up. Paper: cosine."""
    policy_objective: Literal["dpo", "best_of_n"] | Auto = "auto"
    """dpo: on a pair of each prompt's candidates; best_of_n: supervised fine-tuning on the best of them, with no reference (the
    draft's policy trainer)."""
    pair_choice: Literal["max_min", "max_max", "max_random", "random"] = "max_min"
    """DPO's pair of a prompt: the best candidate and the worst (paper), the best and the second, the best and any other, or any
    two. Names of Online-RLHF."""
    num_generations: Annotated[int | Auto, AT_LEAST_2] = "auto"
    """N, candidates of a prompt, >= 2. Paper: 32."""
    candidates_from: str = ""
    """run whose candidates and scores are used if they come from the same weights, prompts and settings; empty: none."""
    total_prompts: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """prompts the policy step answers in one outer iteration; 0 means all there are. Online-RLHF: 20,000."""
    rollout_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """prompts answered at a time, over all devices, before the policy takes its steps on them, > 0. Online-RLHF: all at once."""
    num_policy_epochs: Annotated[int, AT_LEAST_1] = 1
    """passes of the policy over each batch of pairs, >= 1. Online-RLHF: 2."""
    missing_eos_penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """taken from the score of an answer without EOS, reward units, >= 0. N+ details: such an answer scores -1."""
    eval_updates: Annotated[int | Auto, POSITIVE] = "auto"
    """policy updates, each on --rollout-batch-size prompts, between evaluations, > 0; one is also made at the end."""
    optimizer: Literal["rmsprop", "adamw"] = "adamw"
    """both without weight decay; rmsprop with the bias correction that torch's lacks. Paper: AdamW."""
    warmup_ratio: Annotated[float, BELOW_1] = 0.0
    """part of the updates in which a learning rate rises linearly; then it falls to 0. Online-RLHF, released code: 0."""

    def check(self) -> None:
        self.ref = self.ref if self.policy_objective == "dpo" else "initial"  # best_of_n has none
        super().check()
        require(
            not self.candidates_from or self.resume or (Path(self.candidates_from) / "candidates").is_dir(),
            "candidates_from", self.candidates_from, "the directory of a run of this script, with a folder candidates/",
        )  # fmt: skip

    @property
    def sequences_per_row(self) -> int:
        return 2 if self.policy_objective == "dpo" else 1


MISTRAL = dict(  # IRL paper, Sec. 6.2 and App. 8.2; lengths, prompts and the rate of DPO: Online-RLHF; of the reward: IRL's code
    dataset="ultrachat_200k", max_samples=50_000, eval_samples=500, max_length=2048, max_new_tokens=1024, learning_rate=5e-7,
    reward_learning_rate=3e-6, sft_epochs=0, sft_learning_rate=2e-5, batch_size=64, policy_objective="dpo", num_generations=32,
    total_prompts=20_000, rollout_batch_size=20_000, eval_updates=1, per_device_train_batch_size=2,
    per_device_eval_batch_size=32,
)  # fmt: skip
SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=800, eval_samples=200, max_length=256, max_new_tokens=48, learning_rate=1e-4,
        reward_learning_rate=5e-4, sft_epochs=2, sft_learning_rate=5e-4, batch_size=32, policy_objective="dpo",
        num_generations=8, total_prompts=320, rollout_batch_size=64, eval_updates=5, per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args),
    "zephyr-7b-sft-full": {**MISTRAL, "policy_objective": "best_of_n"},  # the draft's model; its tables give no more
    "other": MISTRAL,
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "sft/loss": "NLL, nats per response token, of --sft-epochs",
    "reward/loss": "reward_loss, mean over pairs; logistic: near log 2 = 0.693 at the start, falls",
    "reward/accuracy": "share of pairs with r(demonstration) > r(answer), ties half; near 0.5 at the start, rises",
    "reward/margin": "mean of r(demonstration) - r(answer), reward units; rises",
    "reward/demonstrations": "mean reward of the demonstrations in the batch",
    "reward/answers": "mean reward of the policy's answers in the batch",
    "eval/reward/center": "what was subtracted so that held-out demonstrations average 0",
    "objective/scores": "mean score of all candidates, missing-EOS penalty taken off; rises",
    "objective/scores_best": "mean score of the best candidate of a prompt",
    "objective/scores_margin": "mean difference of best and worst score of a prompt",
    "objective/pairs": "share of prompts with a pair whose scores, and tokens, differ; DPO leaves out the others",
    "policy/loss": "dpo_loss, mean over the pairs of a step, or NLL, nats per response token; mean over the steps of an update",
    "rewards/chosen": "DPO: beta (log pi - log pi_ref) of the preferred answers; 0 at the start",
    "rewards/rejected": "the same of the other ones; 0 at the start, falls",
    "rewards/margins": "rewards/chosen - rewards/rejected; 0 at the start, rises",
    "rewards/accuracies": "share of pairs with a margin above 0, ties half; 0.5 at the start",
    "logps/chosen": "log pi of the preferred answers, nats per response",
    "logps/rejected": "log pi of the other ones, nats per response",
    "entropy": "of the next-token distribution, exact, nats per response token",
    "sampling/logp_difference": "mean |log pi (training) - log pi (sampling)| per token at the first step; rounding only",
    "completions/mean_length": "tokens of the answers, EOS included",
    "completions/clipped_ratio": "share of answers cut at --max-new-tokens",
    "grad_norm": "before clipping",
    "learning_rate": "of this update",
    **metrics.EVAL_METRICS,
    **{k: v for k, v in metrics.REWARD_METRICS.items() if k != "eval/reward/demonstrations"},
    **preference_data.PREFERENCE_METRICS,
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
