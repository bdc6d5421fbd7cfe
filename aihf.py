"""AIHF: one reward from demonstrations and preferences, then online DPO against it. --demo-weight 0 is RLHF.

Paper: Learning Reward and Policy Jointly from Demonstration and Preference Improves Alignment, arXiv:2406.06874, Algorithm 1,
with the policy step of App. A.1.4.

One scalar reward explains both sources of feedback (Eq. 5 to 8): the demonstrations as answers of its KL-regularised optimum,
the preferences as Bradley-Terry choices. In each of T outer iterations the policy answers the prompts of the
demonstrations, the reward is trained to score demonstrations above these answers (weight w1) and chosen above rejected
responses, and online DPO moves the policy towards pi_ref exp(r / beta) / Z (Eq. 42). If DPO goes on for long, the policy moves
past that optimum, because the answer with the highest of N scores is always preferred to the one with the lowest.

Not the paper: D1 DPO takes its steps on a few prompts at a time, before the next ones are answered (--rollout-batch-size; the
paper answers all prompts first). D2 rewards are centred so that held-out chosen responses average 0. D3 schedules and the policy
optimizer's state start anew in every outer iteration, each of which passes over all data. D4 --sft-epochs first fine-tunes
the model on the demonstrations. D5 an answer without EOS loses --missing-eos-penalty of its score. D6 RMSprop (paper silent)
has the bias correction that torch's lacks.

Dims: B sequences or pairs, T response tokens (T alone, as a flag, is the number of outer iterations), N answers to a prompt.

Laptop CPU, minutes:   python aihf.py

The paper's run:       accelerate launch --quiet aihf.py --model mistral-7b-sft-beta
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import math
from dataclasses import dataclass
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
from common.ranges import AT_LEAST_1, AT_LEAST_2, NOT_NEGATIVE, POSITIVE
from common.run import Run
from common.streams import data_order, learning_rate_at, make_optimizer, stream_seed
from extras import agreement, cost, gold, metrics, preference_data, records, tokenizers, two_cores


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


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, beta: float, kind: str = "logistic") -> Tensor:
    """Per-pair Bradley-Terry loss. Carries gradient through both scores, (B,) each, reward units. Returns (B,).

    linear:   -log sigmoid((r(x, y_w) - r(x, y_l)) / beta) (AIHF paper, Eq. 8): the likelihood in the units of reward_loss.
    logistic: -log sigmoid(r(x, y_w) - r(x, y_l)), the usual reward model.
    ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = chosen_scores - rejected_scores
    return -F.logsigmoid(d if kind == "logistic" else d / beta)


# ---- the maths: online DPO ----
def max_min(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(best, worst): index of the highest and of the lowest of N scores, (B, N) -> (B,), (B,). AIHF paper, App. A.1.4.

    The first index counts if scores are equal. Both are the same index exactly if all N scores are equal.
    """
    n = scores.shape[-1]
    index = torch.arange(n, device=scores.device).expand_as(scores)
    best = torch.where(scores == scores.amax(-1, keepdim=True), index, n).amin(-1)
    worst = torch.where(scores == scores.amin(-1, keepdim=True), index, n).amin(-1)
    return best, worst


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


class AIHF:
    """The models of a run, and the steps of Alg. 1. Every step skips what a resumed run has done already."""

    def __init__(self, run: Run, tokenizer, demonstrations: list[dict], preferences: list[dict], held_rows: list[dict]):
        args = run.args
        self.run, self.args, self.tokenizer = run, args, tokenizer
        self.demonstrations, self.preferences, self.held_rows, self.held = demonstrations, preferences, held_rows, None
        self.prompts = preferences if args.prompts == "preferences" else demonstrations
        self.method, self.paper = "AIHF" if args.demo_weight else "RLHF", "arXiv:2406.06874, Alg. 1"
        self.steps = count_steps(len(demonstrations), len(preferences), args)
        source = args.reward_model or args.model
        policy = models.autocast_forward(run, models.prepare_policy(args))
        reward_model = models.autocast_forward(run, rewards.prepare_scalar(args, source, "--reward-model"))
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
        """D4: the SFT policy from --model. Kept in sft/ as reference, as start of the reward, and for comparison."""
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
            card = run.model_card("SFT", "arXiv:2406.06874, Sec. 5")
            run.save_final(self.policy, self.tokenizer, card, "sft")

    def sample_pairs(self, t: int) -> list[dict]:
        """Alg. 1, data sample: (y, y~) for every demonstration, from generations/iter_<t>.parquet if already made."""
        run, args, rows = self.run, self.args, self.demonstrations
        if not args.demo_weight:
            return []

        def make() -> list[dict]:
            with run.phase(f"iteration {t}: answers", len(rows), outer_iteration=t) as advance:
                seed = stream_seed(args.seed, t, PAIRS)
                rollout = evals.sample_rows(run, self.generator, rows, seed, args.temperature, advance)
            return pair_rows(self.tokenizer, rows, rollout, t)

        return run.stored(run.dir / "generations" / f"iter_{t}.parquet", make, self.steps.before(t))

    def start_reward(self, t: int) -> None:
        """theta_{t,0}: carried over (Alg. 1), or made anew from the SFT policy or a base model."""
        args = self.args
        if args.reward_init == "previous" and (t > 0 or args.reward_model):
            return
        source = self.sft_policy if args.reward_init != "base" else args.reward_model or args.model
        torch.manual_seed(args.seed)  # LoRA's first weights
        self.run.load_weights(self.reward_model, rewards.prepare_scalar(args, source, "--reward-model"))
        self.reward_optimizer.state.clear()

    def reward_step(self, t: int) -> None:
        """Alg. 1, reward step: K gradient steps on pairs and preferences; then the reward is centred and measured."""
        run, args, first, end = self.run, self.args, self.steps.before(t), self.steps.before_policy(t)
        pairs = self.sample_pairs(t)
        if run.position["step"] <= first:
            self.optimizer.state.clear()  # D3; and its memory, until online DPO
            self.start_reward(t)
        self.reward_model.train()
        model, device = self.reward_model, run.accelerator.device
        loss_fn = lambda part: reward_batch_loss(model, part, args, device)  # noqa: E731
        epochs = [
            mixed_batches(len(pairs), len(self.preferences), args, t, REWARD, e) for e in range(args.num_train_epochs)
        ]
        batches = [(parts, i) for parts in epochs for i in range(len(parts))]
        for k, batch in run.updates(f"iteration {t}: reward", batches, t, first):
            rows = weighted_rows(pairs, self.preferences, *batch, args)
            lr = learning_rate_at(k, len(batches), args.reward_learning_rate, args.warmup_ratio, args.lr_scheduler_type)
            row = run.step(model, self.reward_optimizer, rows, loss_fn, pair_length, lr, "reward_learning_rate")
            run.log_update({"reward/loss": row.pop("loss"), **row})
        if run.position["step"] == end:
            row = evals.evaluate_reward(run, self.raw_reward, self.held, t)
            center = row.pop("eval/reward/demonstrations")
            self.raw_reward.center += center  # D2
            run.log({**row, "eval/reward/center": self.raw_reward.center.item()}, step=end, outer_iteration=t)

    def start_policy(self, t: int) -> str:
        """Before online DPO: policy as --init says. Returns the reference's model or folder."""
        run, args = self.run, self.args
        previous = args.ref == "previous" and t > 0
        if run.position["step"] <= self.steps.before_policy(t):  # else the policy step has begun already
            if previous:
                card = run.model_card(self.method, self.paper)
                run.save_final(self.policy, self.tokenizer, card, f"policy_{t}")
            if args.init == "initial" and t > 0:
                torch.manual_seed(args.seed)
                run.load_weights(self.policy, models.prepare_policy(args, self.sft_policy))
        return str(run.dir / f"policy_{t}") if previous else self.sft_policy

    def policy_step(self, t: int) -> None:
        """Alg. 1, policy alignment: online DPO against the reward, with an evaluation every --eval-updates updates."""
        run, args, steps = self.run, self.args, self.steps
        reference = models.open_reference(run, self.raw, source := self.start_policy(t))
        initial = reference if source == self.sft_policy else None
        total = args.total_prompts or len(self.prompts)
        batches = run.prompt_batches(len(self.prompts), total, t, PROMPTS)
        self.policy.train()
        for u, batch in run.updates(
            f"iteration {t}: online DPO", batches, t, steps.before_policy(t), steps.per_update,
            evaluate=lambda u: self.measure(t, t * steps.updates + u, initial),
        ):  # fmt: skip
            rows = [self.prompts[i] for i in batch]
            seed = stream_seed(args.seed, t, PROMPTS, u)
            pairs = collect(run, self.raw_reward, self.generator, reference, rows, seed)
            run.stop_if_asked()
            row = measure_candidates(pairs)
            with run.timed("update"):
                row |= dpo_update(run, self.policy, self.optimizer, pairs, policy_rates(steps, u, args), t, STEPS, u)
            run.log_update(row, episodes=self.episodes(t, u + 1))

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
    """Weighted losses of pairs -> ((B,), {metric: (sum, count)}). One forward pass over 2B sequences.

    A pair has chosen_ids, rejected_ids, weight, and is a demonstration with the policy's answer, or a preference.
    """
    sequences = [(p["prompt_ids"], p[kind]) for kind in ("chosen_ids", "rejected_ids") for p in pairs]
    chosen, rejected = reward_model(collate(sequences, pad_token_id=0).to(device)).chunk(2)
    demonstrated = torch.tensor([p["demonstrated"] for p in pairs], device=chosen.device)
    losses = torch.where(
        demonstrated,
        reward_loss(chosen, rejected, args.beta, args.reward_loss),
        preference_loss(chosen, rejected, args.beta, args.reward_loss),
    )
    with torch.no_grad():
        won = (chosen > rejected) + 0.5 * (chosen == rejected)
        stats = {}
        for name, mask in (("demonstrations", demonstrated), ("preferences", ~demonstrated)):
            stats |= {
                f"{name}/loss": (losses[mask].sum(), mask.sum()),
                f"{name}/accuracy": (won[mask].sum(), mask.sum()),
                f"{name}/margin": ((chosen - rejected)[mask].sum(), mask.sum()),
            }
        stats["reward/demonstrations"] = (chosen[demonstrated].sum(), demonstrated.sum())
        stats["reward/answers"] = (rejected[demonstrated].sum(), demonstrated.sum())
    return losses * losses.new_tensor([p["weight"] for p in pairs]), stats


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


# ---- an update of online DPO: answers, the best and the worst, optimizer steps ----
def collect(run, reward_model, generator, reference, rows: list[dict], seed: int) -> list[dict]:
    """Sample N answers to every prompt and return the best and the worst, with the log-probs of policy and reference.

    The policy's log-probs are those the answers were sampled with. The reference scores only the two answers that are kept.
    No model scores an answer twice. reference() is a context that yields the reference policy.
    """
    args = run.args

    def work(indices: list[int]) -> list[dict]:
        n = args.num_generations
        with run.timed("sample"):
            asked = [(rows[i]["prompt_ids"], i * n + j) for i in indices for j in range(n)]
            rollout = generator.sample([x for x, _ in asked], [k for _, k in asked], seed, args.temperature)
        sequences = list(zip(rollout.prompt_ids, rollout.response_ids, strict=True))
        with run.timed("score"), evaluating(reward_model):
            scores = run.score_batches(sequences, lambda batch: reward_model(batch).tolist())
            scores = torch.tensor(scores, dtype=torch.float64).view(len(indices), n)
            scores -= args.missing_eos_penalty * ~torch.tensor(rollout.finished, dtype=torch.bool).view(len(indices), n)
        best, worst = (index + torch.arange(len(scores)) * n for index in max_min(scores))
        kept = [*best.tolist(), *worst.tolist()]
        with run.timed("reference"), reference() as ref_policy, evaluating(ref_policy):
            ref = run.score_batches(
                [sequences[k] for k in kept], lambda batch: evals.batch_logprobs(ref_policy, batch, args.temperature)
            )
        pairs = []
        for i, (b, w) in enumerate(zip(best.tolist(), worst.tolist(), strict=True)):
            own = range(i * n, (i + 1) * n)
            pairs.append({
                "prompt_ids": sequences[b][0], "chosen_ids": sequences[b][1], "rejected_ids": sequences[w][1],
                "sampled_chosen": rollout.logprobs[b], "sampled_rejected": rollout.logprobs[w],
                "ref_chosen": ref[i][0], "ref_rejected": ref[len(best) + i][0], "scores": scores[i].tolist(),
                "score_chosen": scores[i].max().item(), "score_rejected": scores[i].min().item(),
                "lengths": [len(rollout.response_ids[k]) for k in own], "finished": [rollout.finished[k] for k in own],
            })  # fmt: skip
        return pairs

    return run.map_rows(len(rows), work)


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


def dpo_update(run, policy, optimizer, pairs: list[dict], rates: list[float], *key: int) -> dict[str, float]:
    """--num-policy-epochs passes of DPO over the prompts that make a pair -> metrics, means over the steps.

    rates: learning rate of each step. The last ones stay unused if some prompts make no pair.
    """
    args, steps = run.args, []
    pairs = [p for p in pairs if makes_pair(p)]
    for epoch in range(args.num_policy_epochs):
        order = data_order(len(pairs), args.seed, *key, epoch)
        for begin in range(0, len(order), args.batch_size):
            rows = [pairs[i] for i in order[begin : begin + args.batch_size]]
            loss_fn = lambda part: dpo_batch_loss(policy, part, args, run.accelerator.device)  # noqa: E731
            steps.append(run.step(policy, optimizer, rows, loss_fn, pair_length, rates[len(steps)]))
            agreement.check_first_step("DPO", steps[0], args.temperature)
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


# ---- the plan: numbers of optimizer steps, and the rows and weights of each, known before anything runs ----
@dataclass
class Steps:
    sft: int
    K: int  # reward steps in one outer iteration
    updates: int  # policy updates in one outer iteration
    per_update: int  # optimizer steps of one policy update, at most

    def before(self, t: int) -> int:
        """Optimizer steps before outer iteration t."""
        return self.sft + t * (self.K + self.updates * self.per_update)

    def before_policy(self, t: int) -> int:
        """Optimizer steps before the policy step of outer iteration t."""
        return self.before(t) + self.K


def count_steps(n: int, m: int, args: Args) -> Steps:
    """Steps for n demonstrations and m preferences. An epoch of the reward passes once over both (mixed_batches)."""
    batches = math.ceil(n / args.batch_size)
    mixed = math.ceil(max(n if args.demo_weight else 0, m) / args.batch_size)
    prompts = args.total_prompts or (m if args.prompts == "preferences" else n)
    updates = math.ceil(prompts / args.rollout_batch_size)
    per_update = args.num_policy_epochs * math.ceil(min(args.rollout_batch_size, prompts) / args.batch_size)
    return Steps(args.sft_epochs * batches, args.num_train_epochs * mixed, updates, per_update)


def mixed_batches(n: int, m: int, args, *key: int) -> list[tuple[list[int], list[int]]]:
    """(demonstrations, preferences) of each step of one epoch over n and m of them: one pass over both, in equal parts."""
    steps = math.ceil(max(n, m) / args.batch_size)
    first, second = data_order(n, args.seed, *key), data_order(m, args.seed, *key, 1)
    return [
        (first[k * n // steps : (k + 1) * n // steps], second[k * m // steps : (k + 1) * m // steps])
        for k in range(steps)
    ]


def weighted_rows(pairs: list[dict], preferences: list[dict], batches: list, k: int, args: Args) -> list[dict]:
    """Rows of step k of an epoch. Weights are such that the losses of the epoch's steps average to w1 mean_D + mean_P."""
    first, second = batches[k]
    size = len(first) + len(second)  # a step's objective is the mean over its rows
    weights = [
        weight * len(batches) * size / max(n, 1)
        for weight, n in ((args.demo_weight, len(pairs)), (1.0, len(preferences)))
    ]
    rows = [{**pairs[i], "weight": weights[0], "demonstrated": True} for i in first]
    return rows + [{**preferences[i], "weight": weights[1], "demonstrated": False} for i in second]


# ---- a run, from data to the saved models ----
def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    if args.reward_model:
        tokenizers.check_same_tokenizer(args, tokenizer, args.reward_model, "--reward-model")
    demonstrations, preferences = preference_data.load_both(args, tokenizer)
    if args.dry_run:
        rows, tokens = demonstrations[: args.select_top_k or None], args.max_new_tokens
        n, size = len(rows), args.rollout_batch_size * args.num_generations
        steps, answers = count_steps(n, len(preferences), args), n if args.demo_weight else 0
        return cost.print_plan(
            args, "aihf", cost.with_reward(args, rows, preferences, steps.updates), f"w1 = {args.demo_weight:g}, T = {args.T}"
            f", reward {args.reward_model or args.model}, demonstrations {args.dataset}, preferences {args.preference_dataset}",
            f"{steps.sft} SFT steps of {args.batch_size} demonstrations; then in each outer iteration",
            f"{answers} answers of up to {tokens} tokens ({answers * tokens} at most), K = {steps.K} reward steps,",
            f"{steps.updates} policy updates of {steps.per_update} optimizer steps, each after",
            f"up to {size} answers ({size * tokens} tokens at most)",
            f"in all {steps.before(args.T)} optimizer steps",
        )  # fmt: skip
    held_rows = demos.load_held_out(args, tokenizer, demonstrations + preferences, args.preference_dataset)

    run = Run(args, "aihf", METRICS)
    if run.finished():
        return
    aihf = AIHF(run, tokenizer, demos.select_demonstrations(run, demonstrations), preferences, held_rows)
    records.record_prompts(run, tokenizer, aihf.demonstrations, preferences)
    run.print(
        f"aihf: {len(aihf.demonstrations)} demonstrations, {len(preferences)} preferences, {aihf.steps.sft} SFT steps,"
        f" T = {args.T}, K = {aihf.steps.K}, {aihf.steps.updates} policy updates on {args.rollout_batch_size} prompts x"
        f" {args.num_generations} answers, {run.world} process(es), {run.dir}"
    )
    aihf.learn()
    centred_on = "chosen responses" if "rejected_ids" in held_rows[0] else "demonstrations"
    reward_path = rewards.save_reward(run, aihf.reward_model, aihf.method, aihf.paper, centred_on)
    card = run.model_card(aihf.method, aihf.paper)
    path = run.save_final(aihf.policy, tokenizer, card)
    evals.print_table(run, "SFT" if args.sft_epochs else "start", aihf.method)
    run.print(f"model: {path}   reward model: {reward_path}")
    run.end()


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    sequences_per_row: ClassVar[int] = 2
    scalar_models: ClassVar[int] = 1

    T: Annotated[int, AT_LEAST_1] = 2
    """outer iterations, >= 1: how often the policy answers anew and a reward is learned."""
    num_train_epochs: Annotated[int, AT_LEAST_1] = 1
    """passes of the reward model over demonstrations and preferences in one outer iteration, >= 1; K follows from it."""
    preference_dataset: str = "auto"
    """preferences: pydoc, a file or folder, a short name or a hub id; if it is --dataset, rows not used as demonstrations."""
    max_preferences: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """preferences to use, the first N in a seeded order; 0 means all. Paper: the rest of HH."""
    demo_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """w1 of Eq. 5, >= 0: weight of the demonstrations beside the preferences' 1. 0 is RLHF: the reward sees no demonstration."""
    prompts: Literal["preferences", "demonstrations"] = "preferences"
    """whose prompts the policy step answers. Paper, Sec. 5: those of the preferences."""
    beta: Annotated[float, POSITIVE] = 0.1
    """weight of KL(pi || pi_ref), reward units per nat, > 0: in the policy step, and in a linear reward step."""
    reward_loss: Literal["logistic", "linear"] = "logistic"
    """logistic: -log sigmoid of both differences, bounded; linear: the likelihoods' own gradients (Eq. 17 to 19), unbounded."""
    reward_model: str = "auto"
    """what the reward is made from: a causal model or a classifier with one label; empty: the policy's own model."""
    reward_init: Literal["previous", "sft", "base"] = "previous"
    """where a reward step starts. previous: the last iteration's reward (Alg. 1), at first --reward-model, else the SFT policy;
    sft: the SFT policy every time (IRL's released code); base: --reward-model, else --model, every time."""
    reward_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of the reward model, > 0. Paper: 5e-7 (7B), the one rate it names."""
    init: Literal["previous", "initial"] = "previous"
    """where the policy step starts in an outer iteration: the last iteration's policy, or the initial (SFT) policy."""
    ref: Literal["initial", "previous"] = "initial"
    """reference policy of DPO: the initial (SFT) policy (the equations), or that of the last iteration."""
    sft_epochs: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """passes of supervised fine-tuning over the demonstrations before anything else, >= 0; 0: --model is fine-tuned already."""
    sft_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of --sft-epochs, > 0."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of sampled answers, > 0; it divides the logits of every log-prob the policy step uses."""
    lr_scheduler_type: Literal["linear", "cosine"] | Auto = "auto"
    """how a learning rate falls to 0 after its warm-up. Paper: cosine (App. A.1.4)."""
    num_generations: Annotated[int | Auto, AT_LEAST_2] = "auto"
    """N, answers to a prompt of which the best and the worst make a pair, >= 2."""
    total_prompts: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """prompts the policy step answers in one outer iteration; 0 means all there are."""
    rollout_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """prompts answered at a time, over all devices, before DPO takes its steps on them, > 0. Paper: all prompts at once."""
    num_policy_epochs: Annotated[int, AT_LEAST_1] = 1
    """passes of DPO over each batch of pairs, >= 1."""
    missing_eos_penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """taken from the score of an answer without EOS, reward units, >= 0. N+ details: such an answer scores -1."""
    eval_updates: Annotated[int | Auto, POSITIVE] = "auto"
    """policy updates, each on --rollout-batch-size prompts, between evaluations, > 0; one is also made at the end."""

    def check(self) -> None:
        super().check()
        require(
            self.preference_dataset != "none", "preference_dataset", "none",
            "a source of preferences: rft.py learns from demonstrations alone",
        )  # fmt: skip
        require(
            not (self.reward_init == "sft" and self.reward_model), "reward_init", "sft",
            f"--reward-model '' beside it, not {self.reward_model}: the reward starts from the SFT policy",
        )  # fmt: skip

    def needs_demonstrations(self) -> bool:
        return any((self.demo_weight, self.sft_epochs, self.select_top_k, self.prompts == "demonstrations"))


SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=800, preference_dataset="pydoc", max_preferences=800, eval_samples=200, max_length=256,
        max_new_tokens=48, learning_rate=2e-4, lr_scheduler_type="linear", reward_model="", reward_learning_rate=1e-3,
        sft_epochs=2, sft_learning_rate=4e-4, batch_size=32, num_generations=4, total_prompts=640, rollout_batch_size=64,
        eval_updates=5, per_device_train_batch_size=32, per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args),
    "pythia": dict(  # AIHF paper, Sec. 5: data, reward's model, one epoch of SFT; rates, batches, lengths and N are ours
        dataset="hh-rlhf", max_samples=10_000, preference_dataset="hh-rlhf", max_preferences=0, eval_samples=500, max_length=1024,
        max_new_tokens=256, learning_rate=5e-7, lr_scheduler_type="cosine", reward_model="pythia-1.4b",
        reward_learning_rate=5e-6, sft_epochs=1, sft_learning_rate=2e-5, batch_size=64, num_generations=4,
        total_prompts=0, rollout_batch_size=1024, eval_updates=10, per_device_train_batch_size=4, per_device_eval_batch_size=32,
    ),
    # AIHF paper, Sec. 5 and App. A.1.4: data, length, cosine, batch 8 (eight devices with 1), and 5e-7 "for the 7B model", which
    # is the policy and the reward; N and how many prompts are answered at a time are ours
    "other": dict(
        dataset="ultrachat_200k", max_samples=0, preference_dataset="ultrafeedback_binarized", max_preferences=0,
        eval_samples=500, max_length=512, max_new_tokens=256, learning_rate=5e-7, lr_scheduler_type="cosine", reward_model="",
        reward_learning_rate=5e-7, sft_epochs=0, sft_learning_rate=2e-5, batch_size=8, num_generations=4, total_prompts=0,
        rollout_batch_size=1024, eval_updates=10, per_device_train_batch_size=1, per_device_eval_batch_size=16,
    ),
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "sft/loss": "NLL, nats per response token, of --sft-epochs",
    "reward/loss": "w1 demonstrations/loss + preferences/loss, over an epoch; falls",
    "demonstrations/loss": "reward_loss, mean over pairs; logistic: near log 2 = 0.693 at the start, falls",
    "demonstrations/accuracy": "share of pairs with r(demonstration) > r(answer), ties half; near 0.5 at the start, rises",
    "demonstrations/margin": "mean of r(demonstration) - r(answer), reward units; rises",
    "preferences/loss": "preference_loss, mean over pairs; near log 2 = 0.693 at the start, falls",
    "preferences/accuracy": "share of pairs with r(chosen) > r(rejected), ties half; near 0.5 at the start, rises",
    "preferences/margin": "mean of r(chosen) - r(rejected), reward units; rises",
    "reward/demonstrations": "mean reward of the demonstrations in the batch",
    "reward/answers": "mean reward of the policy's answers in the batch",
    "eval/reward/center": "what was subtracted so that held-out chosen responses average 0",
    "objective/scores": "mean score of all answers, missing-EOS penalty taken off; rises",
    "objective/scores_best": "mean score of the preferred answers",
    "objective/scores_margin": "mean difference of best and worst score of a prompt",
    "objective/pairs": "share of prompts whose answers do not all have one score; the others make no pair",
    "policy/loss": "dpo_loss, mean over the pairs of a step, then over the steps of an update",
    "rewards/chosen": "beta (log pi - log pi_ref) of the preferred answers; 0 at the start",
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
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
