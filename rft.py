"""RFT: an explicit reward learned from demonstrations, then PPO against it.

Paper: Getting More Juice Out of the SFT Data, arXiv:2405.17888, Algorithm 1.

Maximum-likelihood inverse RL (Eq. 4) as a game (Eq. 5): in each of T outer iterations the policy answers the prompts of the
demonstrations, a scalar reward is trained to score the demonstrations above these answers (g_{t,k}, or its logistic form),
and PPO moves the policy towards pi_ref exp(r / beta) / Z (Eq. 9), the optimum of E[r] - beta KL(pi || pi_ref).

Not the paper: D1 the policy step is written out (the paper calls TRL's PPO; the released code does something else). D2 rewards
are centred so that held-out demonstrations average 0. D3 value model, optimizers' schedules and the PPO optimizer's state start
anew in every outer iteration, each of which passes over all demonstrations (paper: T = 1). D4 --sft-epochs first fine-tunes
the model on the demonstrations. D5 with --value-warmup-ratio the value model learns alone at first. D6 an answer without EOS
loses --missing-eos-penalty of its score. D7 RMSprop has the bias correction that torch's lacks.

Dims: B sequences, T response tokens (T alone, as a flag, is the number of outer iterations).

Laptop CPU, minutes:   python rft.py

The paper's run, from a pythia-1.4b in DIR that sft.py has fine-tuned on all of HH (docs/rft.md):

accelerate launch --quiet rft.py --model DIR --max-samples 0 --select-top-k 10000 --gold-reward-model beaver-7b-v3.0-reward
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
from common.data import collate, pad_right, pair_length, pair_rows, row_length
from common.engine import evaluating
from common.generation import make_generator
from common.logprobs import masked_mean, masked_sum
from common.ranges import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, UP_TO_1, ZERO_TO_1
from common.rewards import ActorCritic
from common.run import Run
from common.streams import data_order, learning_rate_at, make_optimizer, stream_seed
from extras import agreement, cost, gold, metrics, records, tokenizers, two_cores


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


# ---- the maths: PPO. All tensors (B, T), aligned to the response; mask is True through EOS ----
def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """-beta (log pi - log pi_ref) at every token, plus the score (B,) at the last one. Sums to r - beta log pi/pi_ref."""
    last = mask.long().cumsum(-1) == mask.sum(-1, keepdim=True)
    penalised = -beta * (logprobs - ref_logprobs) + torch.where(last, scores[:, None], torch.zeros_like(logprobs))
    return torch.where(mask, penalised, torch.zeros_like(penalised))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), no gradient. A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    Schulman et al., arXiv:1506.02438, Eq. 16. The value after the last token is 0. Zero outside the mask.
    """
    values, rewards = (torch.where(mask, x, torch.zeros_like(x)) for x in (values, rewards))
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and variance 1 over all True positions; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(x))


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) at every token, rho = pi / pi_old; 0 outside the mask.

    Schulman et al., arXiv:1707.06347, Eq. 7. Gradient through `logprobs` alone.
    """
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs)))
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    return torch.where(mask, losses, torch.zeros_like(losses))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """max((V - R)^2, (clip(V, V_old +- eps) - R)^2) / 2 at every token; 0 outside the mask. N+ details. Gradient through V."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    losses = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return torch.where(mask, losses, torch.zeros_like(losses))


# ---- the loop: Algorithm 1 ----
SFT, PAIRS, REWARD, PPO, STEPS = range(5)  # what the random streams of an outer iteration are for


class RFT:
    """The models of a run, and the steps of Alg. 1. Every step skips what a resumed run has done already."""

    def __init__(self, run: Run, tokenizer, demonstrations: list[dict], held_rows: list[dict]):
        args = run.args
        self.run, self.args, self.tokenizer = run, args, tokenizer
        self.demonstrations, self.prompts, self.held_rows, self.held = demonstrations, demonstrations, held_rows, None
        self.method, self.paper = "RFT", "arXiv:2405.17888, Alg. 1"
        self.steps = count_steps(len(demonstrations), args)
        source = args.reward_model or args.model
        policy = models.autocast_forward(run, models.prepare_policy(args))
        value, reward_model = (
            models.autocast_forward(run, rewards.prepare_scalar(args, source, "--reward-model")) for _ in range(2)
        )
        self.actor_critic, self.optimizer, self.reward_model, self.reward_optimizer = run.prepare(
            ActorCritic(policy, value), make_optimizer(args.optimizer, policy.parameters(), value.parameters()),
            reward_model, make_optimizer(args.optimizer, reward_model.parameters()),
        )  # fmt: skip
        self.raw, self.raw_reward = (run.unwrap(m) for m in (self.actor_critic, self.reward_model))
        self.generator = make_generator(run, self.raw.policy, tokenizer)
        self.sft_policy = str(run.dir / "sft") if args.sft_epochs else args.model  # where the initial policy is kept

    def learn(self) -> None:
        """Alg. 1, after the warm start. Resumes where the last checkpoint stands."""
        run, args = self.run, self.args
        run.load_checkpoint()
        if args.gold_reward_model and run.position["step"] < self.steps.sft:
            gold.GoldReward(run)  # one that cannot be used is refused before anything is trained
        self.warm_start()
        self.held = evals.prepare_held_out(run, self.raw.policy, self.generator, self.held_rows, self.tokenizer)
        for t in range(run.position["outer_iteration"], args.T):
            self.reward_step(t)
            self.policy_step(t)

    def warm_start(self) -> None:
        """D4: the SFT policy from --model. Kept in sft/ as reference, as start of the reward, and for comparison."""
        run, args, total, device = self.run, self.args, self.steps.sft, self.run.accelerator.device
        self.actor_critic.train()
        batches = run.epochs(len(self.demonstrations), args.sft_epochs, 0, SFT)
        for k, batch in run.updates("SFT", batches):
            rows = [self.demonstrations[i] for i in batch]
            scale = len(rows) / sum(len(r["response_ids"]) for r in rows)
            loss_fn = lambda part, scale=scale: sft_batch_loss(self.actor_critic, part, device, scale)  # noqa: E731
            lr = learning_rate_at(k, total, args.sft_learning_rate, args.warmup_ratio)
            rates = (lr, 0.0)  # the value model rests
            row = run.step(self.actor_critic, self.optimizer, rows, loss_fn, row_length, rates, "sft_learning_rate")
            run.log_update({"sft/loss": row.pop("loss"), **row})
        if total and run.position["step"] == total:
            card = run.model_card("SFT", "arXiv:2405.17888, Eq. 1")
            run.save_final(self.actor_critic, self.tokenizer, card, "sft", "policy")

    def sample_pairs(self, t: int) -> list[dict]:
        """Alg. 1, data sample: (y, y~) for every demonstration, from generations/iter_<t>.parquet if already made."""
        run, args, rows = self.run, self.args, self.demonstrations

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
        """Alg. 1, inner loop: K gradient steps on the pairs; then the reward is centred and measured."""
        run, args, first, end = self.run, self.args, self.steps.before(t), self.steps.before_policy(t)
        pairs = self.sample_pairs(t)
        if run.position["step"] <= first:
            self.optimizer.state.clear()  # D3; and its memory, until PPO
            self.start_reward(t)
        self.reward_model.train()
        model, device = self.reward_model, run.accelerator.device
        loss_fn = lambda part: reward_batch_loss(model, part, args, device)  # noqa: E731
        batches = run.epochs(len(pairs), args.num_train_epochs, t, REWARD)
        for k, batch in run.updates(f"iteration {t}: reward", batches, t, first):
            rows = [pairs[i] for i in batch]
            lr = learning_rate_at(k, len(batches), args.reward_learning_rate, args.warmup_ratio)
            row = run.step(model, self.reward_optimizer, rows, loss_fn, pair_length, lr, "reward_learning_rate")
            run.log_update({"reward/loss": row.pop("loss"), **row})
        if run.position["step"] == end:
            row = evals.evaluate_reward(run, self.raw_reward, self.held, t)
            center = row.pop("eval/reward/demonstrations")
            self.raw_reward.center += center  # D2
            run.log({**row, "eval/reward/center": self.raw_reward.center.item()}, step=end, outer_iteration=t)

    def start_policy(self, t: int) -> str:
        """Before PPO: value from reward, policy as --init says. Returns the reference's model or folder."""
        run, args = self.run, self.args
        previous = args.ref == "previous" and t > 0
        if run.position["step"] <= self.steps.before_policy(t):  # else PPO has begun already
            if previous:
                card = run.model_card(self.method, self.paper)
                run.save_final(self.actor_critic, self.tokenizer, card, f"policy_{t}", "policy")
            run.load_weights(self.actor_critic, self.raw_reward, "value")
            if args.init == "initial" and t > 0:
                torch.manual_seed(args.seed)
                run.load_weights(self.actor_critic, models.prepare_policy(args, self.sft_policy), "policy")
        return str(run.dir / f"policy_{t}") if previous else self.sft_policy

    def policy_step(self, t: int) -> None:
        """Alg. 1, policy alignment: PPO on r - beta log pi/pi_ref, with an evaluation every --eval-updates updates."""
        run, args, steps = self.run, self.args, self.steps
        reference = models.open_reference(run, self.raw.policy, source := self.start_policy(t))
        initial = reference if source == self.sft_policy else None
        warmup = int(steps.updates * args.value_warmup_ratio)  # D5
        batches = run.prompt_batches(len(self.prompts), steps.updates * args.rollout_batch_size, t, PPO)
        self.actor_critic.train()
        for u, batch in run.updates(
            f"iteration {t}: PPO", batches, t, steps.before_policy(t), steps.per_update,
            evaluate=lambda u: self.measure(t, t * steps.updates + u, initial),
        ):  # fmt: skip
            rows = [self.prompts[i] for i in batch]
            seed = stream_seed(args.seed, t, PPO, u)
            rollouts = collect(run, self.raw, self.raw_reward, self.generator, reference, rows, seed)
            run.stop_if_asked()
            row = add_advantages(rollouts, args)
            with run.timed("update"):
                if u == warmup:
                    self.optimizer.state.clear()  # the policy's means of zero gradients would make its first steps too long
                after = learning_rate_at(u - warmup, steps.updates - warmup, args.learning_rate, args.warmup_ratio)
                lr, weight = (args.learning_rate, 0.0) if u < warmup else (after, 1.0)
                row |= ppo_update(
                    run, self.actor_critic, self.optimizer, rollouts, lr, t, STEPS, u, policy_weight=weight
                )
            run.log_update(row, episodes=(t * steps.updates + u + 1) * args.rollout_batch_size)

    def measure(self, t: int, updates: int, reference=None) -> None:
        """Evaluation of the policy after so many PPO updates, against the initial policy, loaded unless it is given."""
        run = self.run
        reference = (reference or models.open_reference(run, self.raw.policy, self.sft_policy))()
        row = evals.evaluate(
            run, self.raw.policy, self.generator, self.held, self.tokenizer, self.args.beta, reference, updates,
            self.raw_reward,
        )  # fmt: skip
        episodes = updates * self.args.rollout_batch_size
        run.log(row, step=run.position["step"], outer_iteration=t, updates=updates, episodes=episodes)


# ---- what is scored, by which model ----
def sft_batch_loss(actor_critic, rows: list[dict], device, scale: float = 1.0) -> tuple[Tensor, dict]:
    """nll_loss of demonstrations, times scale -> ((B,), {})."""
    batch = collate([(r["prompt_ids"], r["response_ids"]) for r in rows], pad_token_id=0).to(device)
    scores, nothing = actor_critic(batch, with_values=False)
    return (nll_loss(scores.logprobs, batch.response_mask) + nothing) * scale, {}


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


def ppo_batch_loss(
    actor_critic, rows: list[dict], args: Args, device, scale: float, policy_weight: float = 1.0
) -> tuple[Tensor, dict]:
    """PPO's loss of stored answers -> ((B,), {metric: (sum, count)}).

    scale: answers over response tokens of the whole minibatch, so that the mean over answers is the mean over its tokens.
    policy_weight: 0 while the value model learns alone.
    """
    batch = collate([(r["prompt_ids"], r["response_ids"]) for r in rows], pad_token_id=0).to(device)
    mask = batch.response_mask
    scores, values = actor_critic(batch, args.temperature)
    old_logprobs, old_values, advantages, returns = (
        pad(rows, name, values) for name in ("logprobs", "values", "advantages", "returns")
    )
    pg = policy_loss(scores.logprobs, old_logprobs, advantages, mask, args.cliprange)
    vf = value_loss(values, old_values, returns, mask, args.cliprange_value)
    losses = masked_sum(policy_weight * pg + args.vf_coef * vf, mask) * scale
    with torch.no_grad():
        logratio = torch.where(mask, scores.logprobs - old_logprobs, torch.zeros_like(pg))
        ratio, tokens = logratio.exp(), mask.sum()
        stats = {
            "loss/policy_avg": (pg.sum(), tokens),
            "loss/value_avg": (vf.sum(), tokens),
            "policy/approxkl_avg": (0.5 * (logratio**2).sum(), tokens),
            "policy/clipfrac_avg": ((((ratio - 1).abs() > args.cliprange) & mask).sum(), tokens),
            "policy/entropy_avg": (scores.entropy.sum(), tokens),
            "val/ratio": (masked_sum(ratio, mask).sum(), tokens),
            "val/clipfrac_avg": ((((values - old_values).abs() > args.cliprange_value) & mask).sum(), tokens),
            "sampling/logp_difference": (logratio.abs().sum(), tokens),
        }
    return losses, stats


def pad(rows: list[dict], name: str, like: Tensor) -> Tensor:
    """The rows' lists of that name as (B, T), 0 beyond each response; type and device of `like`."""
    return pad_right([r[name] for r in rows], 0.0, like.dtype).to(like.device)


# ---- a PPO update: answers, advantages, optimizer steps ----
def collect(run, actor_critic, reward_model, generator, reference, rows: list[dict], seed: int) -> list[dict]:
    """One answer per row with what policy, reference, value and reward say of it; each sequence meets each model once.

    The policy's log-probs are those it was sampled with. reference() is a context that yields the reference policy.
    """
    args = run.args

    def work(indices: list[int]) -> list[dict]:
        with run.timed("sample"):
            rollout = generator.sample([rows[i]["prompt_ids"] for i in indices], indices, seed, args.temperature)
        sequences = list(zip(rollout.prompt_ids, rollout.response_ids, strict=True))
        with run.timed("score"), evaluating(reward_model):
            scores = run.score_batches(sequences, lambda batch: reward_model(batch).tolist())
        with run.timed("reference"), reference() as ref_policy, evaluating(ref_policy):
            ref = run.score_batches(sequences, lambda batch: evals.batch_logprobs(ref_policy, batch, args.temperature))
        with run.timed("value"), evaluating(actor_critic.value):
            values = run.score_batches(sequences, lambda batch: actor_critic.value(batch, every=True).tolist())
        return [
            {
                "prompt_ids": x, "response_ids": y, "finished": done, "logprobs": logp, "ref_logprobs": ref_logp,
                "values": value[: len(y)], "score": score - args.missing_eos_penalty * (not done),
            }
            for (x, y), done, logp, score, (_, ref_logp), value in zip(
                sequences, rollout.finished, rollout.logprobs, scores, ref, values, strict=True
            )
        ]  # fmt: skip

    return run.map_rows(len(rows), work)


def add_advantages(rollouts: list[dict], args: Args) -> dict[str, float]:
    """Put advantages (whitened over all answers) and returns into the rollouts -> metrics of the batch."""
    like = torch.zeros((), dtype=torch.float64)
    logprobs, ref_logprobs, values = (pad(rollouts, name, like) for name in ("logprobs", "ref_logprobs", "values"))
    lengths = torch.tensor([len(r["response_ids"]) for r in rollouts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    scores = torch.tensor([r["score"] for r in rollouts], dtype=torch.float64)
    rewards_of_tokens = token_rewards(scores, logprobs, ref_logprobs, mask, args.beta)
    advantages, returns = gae(rewards_of_tokens, values, mask, args.gamma, args.lam)
    for r, a, g, n in zip(rollouts, whiten(advantages, mask).tolist(), returns.tolist(), lengths.tolist(), strict=True):
        r["advantages"], r["returns"] = a[:n], g[:n]
    kl = masked_sum(logprobs - ref_logprobs, mask).mean()
    error, returned = (returns - values)[mask], returns[mask]
    return {
        "objective/scores": scores.mean().item(),
        "objective/kl": kl.item(),
        "objective/non_score_reward": -args.beta * kl.item(),
        "objective/rlhf_reward": (scores.mean() - args.beta * kl).item(),
        "val/explained_variance": (1 - error.var() / returned.var().clamp(min=1e-12)).item(),
        "val/num_eos_tokens": sum(r["finished"] for r in rollouts),
        "completions/mean_length": lengths.double().mean().item(),
        "completions/clipped_ratio": 1 - sum(r["finished"] for r in rollouts) / len(rollouts),
    }


def ppo_update(
    run, actor_critic, optimizer, rollouts: list[dict], lr: float, *key: int, policy_weight: float = 1.0
) -> dict[str, float]:
    """--num-ppo-epochs passes of --num-mini-batches steps over the rollouts -> metrics, means over the steps."""
    args, steps = run.args, []
    for epoch in range(args.num_ppo_epochs):
        order = data_order(len(rollouts), args.seed, *key, epoch)
        size = math.ceil(len(rollouts) / args.num_mini_batches)
        for begin in range(0, len(order), size):
            rows = [rollouts[i] for i in order[begin : begin + size]]
            scale = len(rows) / sum(len(r["response_ids"]) for r in rows)
            loss_fn = lambda part, scale=scale: ppo_batch_loss(  # noqa: E731
                actor_critic, part, args, run.accelerator.device, scale, policy_weight
            )
            rates = lr if policy_weight else (0.0, lr)  # the policy rests while the value model learns alone
            steps.append(run.step(actor_critic, optimizer, rows, loss_fn, row_length, rates))
            agreement.check_first_step("PPO", steps[0], args.temperature)
    row = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0] if name != "loss"}
    return {**row, "sampling/logp_difference": steps[0]["sampling/logp_difference"]}


# ---- the plan: numbers of optimizer steps, known before anything runs ----
@dataclass
class Steps:
    sft: int
    K: int  # reward steps in one outer iteration
    updates: int  # PPO updates in one outer iteration
    per_update: int  # optimizer steps of one PPO update

    def before(self, t: int) -> int:
        """Optimizer steps before outer iteration t."""
        return self.sft + t * (self.K + self.updates * self.per_update)

    def before_policy(self, t: int) -> int:
        """Optimizer steps before the policy step of outer iteration t."""
        return self.before(t) + self.K


def count_steps(n: int, args: Args) -> Steps:
    """Steps for n demonstrations. K = n epochs / batch, rounded up per epoch (RFT paper, after Alg. 1)."""
    batches = math.ceil(n / args.batch_size)
    updates = math.ceil(args.total_episodes / args.rollout_batch_size)
    per_update = args.num_ppo_epochs * args.num_mini_batches
    return Steps(args.sft_epochs * batches, args.num_train_epochs * batches, updates, per_update)


# ---- a run, from data to the saved models ----
def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    if args.reward_model:
        tokenizers.check_same_tokenizer(args, tokenizer, args.reward_model, "--reward-model")
    demonstrations = demos.load_demonstrations(args, tokenizer)
    if args.dry_run:
        rows, size, tokens = demonstrations[: args.select_top_k or None], args.rollout_batch_size, args.max_new_tokens
        n, steps = len(rows), count_steps(len(rows), args)
        return cost.print_plan(
            args, "rft", cost.with_reward(args, rows, [], steps.updates),
            f"reward from {args.reward_model or args.model}, data {args.dataset}, T = {args.T}",
            f"{steps.sft} SFT steps of {args.batch_size} demonstrations; then in each outer iteration",
            f"{n} answers of up to {tokens} tokens ({n * tokens} at most), K = {steps.K} reward steps,",
            f"{steps.updates} PPO updates of {steps.per_update} optimizer steps on {size} answers,",
            f"in all {steps.before(args.T)} optimizer steps",
        )  # fmt: skip
    held_rows = demos.load_held_out(args, tokenizer, demonstrations)

    run = Run(args, "rft", METRICS)
    if run.finished():
        return
    rft = RFT(run, tokenizer, demos.select_demonstrations(run, demonstrations), held_rows)
    records.record_prompts(run, tokenizer, rft.demonstrations)
    run.print(
        f"rft: {len(rft.demonstrations)} demonstrations, {rft.steps.sft} SFT steps, T = {args.T}, K = {rft.steps.K},"
        f" {rft.steps.updates} PPO updates of {args.rollout_batch_size} answers, {run.world} process(es), {run.dir}"
    )
    rft.learn()
    reward_path = rewards.save_reward(run, rft.reward_model, rft.method, rft.paper, "demonstrations")
    path = run.save_final(rft.actor_critic, tokenizer, run.model_card(rft.method, rft.paper), part="policy")
    evals.print_table(run, "SFT" if args.sft_epochs else "start", rft.method)
    run.print(f"model: {path}   reward model: {reward_path}")
    run.end()


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    scalar_models: ClassVar[int] = 2

    T: Annotated[int, AT_LEAST_1] = 1
    """outer iterations, >= 1: how often the policy answers anew and a reward is learned. Paper: 1."""
    num_train_epochs: Annotated[int, AT_LEAST_1] = 2
    """passes of the reward model over the demonstrations in one outer iteration, >= 1; K follows from it. Paper: 2."""
    beta: Annotated[float, POSITIVE] = 0.1
    """weight of KL(pi || pi_ref), reward units per nat, > 0: in the reward gradient and in PPO. Paper: 0.1 (App. C)."""
    reward_loss: Literal["logistic", "linear"] = "logistic"
    """logistic: -log sigmoid(r(y) - r(y~)), bounded (IRL paper, Eq. 11; released code); linear: g_{t,k} of Alg. 1, unbounded."""
    reward_model: str = "auto"
    """what the reward is made from: a causal model or a classifier with one label; empty: the policy's own model."""
    reward_init: Literal["previous", "sft", "base"] = "previous"
    """where a reward step starts. previous: the last iteration's reward (Alg. 1), at first --reward-model, else the SFT policy;
    sft: the SFT policy every time (IRL's released code); base: --reward-model, else --model, every time."""
    reward_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of the reward model, > 0. Paper: 5e-7."""
    init: Literal["previous", "initial"] = "previous"
    """where PPO starts in an outer iteration: the last iteration's policy, or the initial (SFT) policy."""
    ref: Literal["initial", "previous"] = "initial"
    """reference policy of the KL penalty: the initial (SFT) policy (the equations), or that of the last iteration."""
    sft_epochs: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """passes of supervised fine-tuning over the demonstrations before anything else, >= 0; 0: --model is fine-tuned already."""
    sft_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of --sft-epochs, > 0."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of sampled answers, > 0; it divides the logits of every log-prob PPO uses."""
    total_episodes: Annotated[int | Auto, POSITIVE] = "auto"
    """answers PPO samples in one outer iteration, > 0. Paper: 17,500 policy steps (Fig. 2), which may be 35,000 answers."""
    rollout_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """answers per PPO update over all devices, > 0."""
    num_ppo_epochs: Annotated[int, AT_LEAST_1] = 4
    """passes of PPO over each batch of answers, >= 1. TRL: 4."""
    num_mini_batches: Annotated[int, AT_LEAST_1] = 1
    """optimizer steps per such pass, >= 1. TRL: 1."""
    cliprange: Annotated[float, POSITIVE] = 0.2
    """PPO's clip of the probability ratio, > 0. TRL: 0.2."""
    cliprange_value: Annotated[float, POSITIVE] = 0.2
    """clip of the change of a value, reward units, > 0. TRL: 0.2."""
    vf_coef: Annotated[float, NOT_NEGATIVE] = 0.1
    """weight of the value loss, >= 0. TRL: 0.1."""
    value_warmup_ratio: Annotated[float | Auto, BELOW_1] = "auto"
    """part of the PPO updates of an outer iteration, the first ones, in which the value model learns alone, in [0, 1). TRL: 0."""
    gamma: Annotated[float, UP_TO_1] = 1.0
    """discount per token, in (0, 1]. TRL: 1."""
    lam: Annotated[float, ZERO_TO_1] = 0.95
    """lambda of generalised advantage estimation, in [0, 1]. TRL: 0.95."""
    missing_eos_penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """taken from the score of an answer without EOS, reward units, >= 0. N+ details: such an answer scores -1."""
    eval_updates: Annotated[int | Auto, POSITIVE] = "auto"
    """PPO updates between evaluations, > 0; one is also made at the end."""

    def check(self) -> None:
        super().check()
        require(
            self.rollout_batch_size % self.num_mini_batches == 0, "num_mini_batches", self.num_mini_batches,
            f"a divisor of --rollout-batch-size {self.rollout_batch_size}",
        )  # fmt: skip
        require(
            not (self.reward_init == "sft" and self.reward_model), "reward_init", "sft",
            f"--reward-model '' beside it, not {self.reward_model}: the reward starts from the SFT policy",
        )  # fmt: skip


SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=1600, eval_samples=200, max_length=256, max_new_tokens=48, learning_rate=2e-4,
        reward_model="", reward_learning_rate=1e-3, sft_epochs=2, sft_learning_rate=4e-4, batch_size=32, total_episodes=1920,
        rollout_batch_size=64, value_warmup_ratio=0.125, eval_updates=15, per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args),
    # 35,000 answers are the 17,500 policy steps of Fig. 2, if a step is one of the optimizer: 4 for every 8 answers
    "pythia": dict(  # RFT paper, Sec. 5.1, App. C: rates, window, batch 8 (two devices with 4); answers up to 256, SFT rate: ours
        dataset="hh-rlhf", max_samples=10_000, eval_samples=500, max_length=1024, max_new_tokens=256, learning_rate=5e-7,
        reward_model="pythia-1b", reward_learning_rate=5e-7, sft_epochs=0, sft_learning_rate=2e-5, batch_size=8,
        total_episodes=35_000, rollout_batch_size=8, value_warmup_ratio=0.0, eval_updates=125, per_device_train_batch_size=4,
        per_device_eval_batch_size=32,
    ),
    "other": dict(  # ours, since the paper has Alg. 1 on pythia alone; batch 16 is that of its 7B runs, as many steps as above
        dataset="hh-rlhf", max_samples=10_000, eval_samples=500, max_length=1024, max_new_tokens=256, learning_rate=5e-7,
        reward_model="", reward_learning_rate=5e-7, sft_epochs=0, sft_learning_rate=2e-5, batch_size=16,
        total_episodes=70_000, rollout_batch_size=16, value_warmup_ratio=0.0, eval_updates=125, per_device_train_batch_size=2,
        per_device_eval_batch_size=16,
    ),
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "sft/loss": "NLL, nats per response token, of --sft-epochs",
    "reward/loss": "reward_loss, mean over pairs; logistic: near log 2 = 0.693 at the start, falls",
    "reward/accuracy": "share of pairs with r(demonstration) > r(answer), ties half; near 0.5 at the start, rises",
    "reward/margin": "mean of r(demonstration) - r(answer), reward units; rises",
    "reward/demonstrations": "mean reward of the demonstrations in the batch",
    "reward/answers": "mean reward of the policy's answers in the batch",
    "eval/reward/center": "what was subtracted so that held-out demonstrations average 0",
    **metrics.PPO_METRICS,
    **metrics.EVAL_METRICS,
    **{k: v for k, v in metrics.REWARD_METRICS.items() if k != "eval/reward/demonstrations"},
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
