"""IRL from demonstrations with PPO, on TL;DR: SFT, then in turn a reward from expert's and own summaries, and PPO against it.

Paper: From Demonstrations to Rewards, arXiv:2503.13538, Algorithm 1 and Sec. 6.1. Its PPO is that of "The N+ Implementation
Details of RLHF with PPO" (arXiv:2403.17031); N+ 1 to N+ 34 are its details, as docs/irl_ppo_tldr.md numbers them.

Maximum-likelihood inverse RL (Eq. 5): the expert's summaries are answers of the KL-regularised optimum of an unknown reward. In
each of T outer iterations the policy summarises the posts of the demonstrations, a reward made from the SFT model learns to
score the expert's summaries above these (Eq. 11), and PPO moves the policy towards pi_ref exp(r / beta) / Z (Eq. 9).

Not the papers: D1 whitening and means take the whole batch, where N+ takes a rank's micro-batch. D2 --value-warmup-ratio. D3
PPO's optimizer and schedule start anew in every iteration, and D4 pi_ref is the policy it starts from (docs/theory.md).

Dims: B sequences, T response tokens (T alone, as a flag, is the number of outer iterations), S = T or T + 1 steps of PPO.

Laptop CPU, minutes:   python irl_ppo_tldr.py

The paper's run, with the expert's weights in DIR (docs/irl_ppo_tldr.md):

accelerate launch --quiet irl_ppo_tldr.py --model pythia-1b-deduped --expert-model DIR --eval-preference-dataset tldr-preferences
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import demos, evals, models, rewards
from common.args import Auto, RunArgs, main, parse_args, require
from common.data import Frame, collate, encode, end_of_turn, pad_right, pair_length, pair_rows, row_length, tokenise
from common.engine import all_weights, evaluating
from common.generation import make_generator
from common.logprobs import masked_mean, masked_sum
from common.ranges import ANY_NUMBER, AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, UP_TO_1, ZERO_TO_1
from common.rewards import ActorCritic
from common.run import Run
from common.streams import data_order, learning_rate_at, make_optimizer, stream_seed
from extras import agreement, cost, gold, lazy, metrics, preference_data, records, two_cores


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


# ---- the maths: PPO. Tensors (B, S), aligned to the response; mask is True through EOS (tokens) or one beyond (steps) ----
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


def rescale(x: Tensor, mask: Tensor) -> Tensor:
    """x scaled to variance 1 over all True positions about its mean, which stays; 0 elsewhere (N+ 24)."""
    return torch.where(mask, whiten(x, mask) + masked_mean(x, mask), torch.zeros_like(x))


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


class IRL:
    """The models of a run, and the steps of Alg. 1. Every step skips what a resumed run has done already."""

    def __init__(self, run: Run, tokenizer, demonstrations, prompts, held_rows, preferences):  # lists of rows
        args = run.args
        self.run, self.args, self.tokenizer = run, args, tokenizer
        self.demonstrations, self.prompts, self.held_rows, self.held = demonstrations, prompts, held_rows, None
        self.preferences = preferences
        self.method, self.paper = "IRL", "arXiv:2503.13538, Alg. 1"
        self.steps = count_steps(len(demonstrations), args)
        policy = models.autocast_forward(run, models.prepare_policy(args))
        value, reward_model = (
            models.autocast_forward(run, rewards.prepare_scalar(args, args.model, "--model")) for _ in range(2)
        )
        adam = dict(eps=args.adam_epsilon, weight_decay=args.weight_decay)
        self.actor_critic, self.optimizer, self.reward_model, self.reward_optimizer = run.prepare(
            ActorCritic(policy, value), make_optimizer(args.optimizer, policy.parameters(), value.parameters(), **adam),
            reward_model, make_optimizer(args.optimizer, reward_model.parameters(), **adam),
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
        self.held = evals.prepare_held_out(
            run, self.raw.policy, self.generator, self.held_rows, self.tokenizer, args.eval_temperature
        )
        for t in range(run.position["outer_iteration"], args.T):
            self.reward_step(t)
            self.policy_step(t)

    def warm_start(self) -> None:
        """The SFT policy from --model. Kept in sft/ as reference, as start of every reward, and for comparison."""
        run, args, total, device = self.run, self.args, self.steps.sft, self.run.accelerator.device
        self.actor_critic.train()
        batches = run.epochs(len(self.demonstrations), args.sft_epochs, 0, SFT)
        for k, batch in run.updates("SFT", batches):
            rows = [self.demonstrations[i] for i in batch]
            scale = len(rows) / sum(len(learned_tokens(r, args)[1]) for r in rows)
            loss_fn = lambda part, scale=scale: sft_batch_loss(self.actor_critic, part, args, device, scale)  # noqa: E731
            lr = learning_rate_at(k, total, args.sft_learning_rate, args.warmup_ratio, "cosine")
            rates = (lr, 0.0)  # the value model rests
            row = run.step(self.actor_critic, self.optimizer, rows, loss_fn, row_length, rates, "sft_learning_rate")
            run.log_update({"sft/loss": row.pop("loss"), **row})
        if total and run.position["step"] == total:
            card = run.model_card("SFT", "arXiv:2503.13538, Sec. 6.1")
            run.save_final(self.actor_critic, self.tokenizer, card, "sft", "policy")

    def sample_pairs(self, t: int) -> list[dict]:
        """Alg. 1, data sample: (expert's, policy's) summaries of every demonstration's post, read if already made."""
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
        """Alg. 1, reward optimization: gradient steps on the pairs; then the reward is normalised and measured."""
        run, args, first, end = self.run, self.args, self.steps.before(t), self.steps.before_policy(t)
        pairs = self.sample_pairs(t)
        if args.pairs == "accumulated":
            pairs = [p for i in range(t) for p in self.sample_pairs(i)] + pairs
        if run.position["step"] <= first:
            self.optimizer.state.clear()  # D3; and its memory, until PPO
            self.start_reward(t)
        self.reward_model.train()
        model, device = self.reward_model, run.accelerator.device
        loss_fn = lambda part: reward_batch_loss(model, part, args, device)  # noqa: E731
        batches = run.epochs(len(pairs), args.num_train_epochs, t, REWARD)
        for k, batch in run.updates(f"iteration {t}: reward", batches, t, first):
            rows = [pairs[i] for i in batch]
            lr = learning_rate_at(k, len(batches), args.reward_learning_rate, args.warmup_ratio, "cosine")
            row = run.step(model, self.reward_optimizer, rows, loss_fn, pair_length, lr, "reward_learning_rate")
            run.log_update({"reward/loss": row.pop("loss"), **row})
        if run.position["step"] == end:
            row = self.normalise(t)
            row |= evals.evaluate_reward(run, self.raw_reward, self.held, t)
            row |= preference_data.evaluate_preferences(run, self.raw_reward, self.preferences, t)
            run.log(row, step=end, outer_iteration=t)

    def normalise(self, t: int) -> dict[str, float]:
        """N+ 9: the demonstrations' scores get mean 0, and with mean_std deviation 1 -> {metric: value}."""
        run, kind = self.run, self.args.reward_normalisation
        sequences = lazy.sequences(self.demonstrations, "response_ids")
        with run.phase(f"reward {t} on demonstrations", len(sequences), outer_iteration=t) as advance:
            scores = torch.tensor(evals.sequence_scores(run, self.raw_reward, sequences, advance), dtype=torch.float64)
        std = scores.std(correction=0).item()
        if kind != "none":
            with all_weights(self.raw_reward, cast=False):
                self.raw_reward.normalise(scores.mean().item(), std if kind == "mean_std" else 1.0)
                run.load_weights(self.reward_model, self.raw_reward)
        center = self.raw_reward.center.item()
        return {"eval/reward/center": center, "eval/reward/scale": 1.0 if kind == "mean_std" else std}

    def start_policy(self, t: int) -> str:
        """Before PPO: value from reward (N+ 12). Returns the reference's model or folder."""
        run, args = self.run, self.args
        previous = args.ref == "previous" and t > 0
        if run.position["step"] <= self.steps.before_policy(t):  # else PPO has begun already
            if previous:
                card = run.model_card(self.method, self.paper)
                run.save_final(self.actor_critic, self.tokenizer, card, f"policy_{t}", "policy")
            run.load_weights(self.actor_critic, self.raw_reward, "value")
        return str(run.dir / f"policy_{t}") if previous else self.sft_policy

    def policy_step(self, t: int) -> None:
        """Alg. 1, policy alignment: PPO on r - beta log pi/pi_ref, with an evaluation every --eval-updates updates."""
        run, args, steps = self.run, self.args, self.steps
        reference = models.open_reference(run, self.raw.policy, source := self.start_policy(t))
        initial = reference if source == self.sft_policy else None
        warmup = int(steps.updates * args.value_warmup_ratio)  # D2
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
        """Evaluation of the policy after so many PPO updates; for a KL against the initial policy, loaded unless it is given."""
        run, initial = self.run, None
        if self.args.eval_temperature == 1.0:
            initial = (reference or models.open_reference(run, self.raw.policy, self.sft_policy))()
        row = evals.evaluate(
            run, self.raw.policy, self.generator, self.held, self.tokenizer, self.args.beta, initial, updates,
            self.raw_reward, temperature=self.args.eval_temperature,
        )  # fmt: skip
        episodes = updates * self.args.rollout_batch_size
        run.log(row, step=run.position["step"], outer_iteration=t, updates=updates, episodes=episodes)


# ---- what is scored, by which model ----
def sft_batch_loss(actor_critic, rows: list[dict], args: Args, device, scale: float = 1.0) -> tuple[Tensor, dict]:
    """nll_loss of demonstrations, and of their queries where --sft-tokens says so, times scale -> ((B,), {})."""
    batch = collate([learned_tokens(r, args) for r in rows], pad_token_id=0).to(device)
    scores, nothing = actor_critic(batch, with_values=False)
    return (nll_loss(scores.logprobs, batch.response_mask) + nothing) * scale, {}


def learned_tokens(row: dict, args: Args) -> tuple[list[int], list[int]]:
    """(context, what SFT learns to say after it): the query's first token has no context to be learned from."""
    query, response = row["prompt_ids"], row["response_ids"]
    return (query, response) if args.sft_tokens == "response" else (query[:1], query[1:] + response)


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
    actor_critic, rows: list[dict], args: Args, device, scale: tuple[float, float], policy_weight: float = 1.0
) -> tuple[Tensor, dict]:
    """PPO's loss of stored answers -> ((B,), {metric: (sum, count)}).

    scale: answers over response tokens, and over steps, of the whole minibatch, so that the mean over answers is the mean over
    its tokens for the policy, over its steps for the value. policy_weight: 0 while the value model learns alone.
    """
    sequences = [with_last_step(r["prompt_ids"], r["response_ids"], args) for r in rows]
    batch = collate(sequences, pad_token_id=0).to(device)
    steps = batch.response_mask
    lengths = torch.tensor([len(r["response_ids"]) for r in rows], device=device)
    mask = torch.arange(steps.shape[1], device=device) < lengths[:, None]
    scores, values = actor_critic(batch, args.temperature)
    old_logprobs, old_values, advantages, returns = (
        pad(rows, name, values) for name in ("logprobs", "values", "advantages", "returns")
    )
    pg = policy_loss(scores.logprobs, old_logprobs, advantages, mask, args.cliprange)
    vf = value_loss(values, old_values, returns, steps, args.cliprange_value)
    losses = policy_weight * masked_sum(pg, mask) * scale[0] + args.vf_coef * masked_sum(vf, steps) * scale[1]
    with torch.no_grad():
        logratio = torch.where(mask, scores.logprobs - old_logprobs, torch.zeros_like(pg))
        ratio, tokens = logratio.exp(), mask.sum()
        stats = {
            "loss/policy_avg": (pg.sum(), tokens),
            "loss/value_avg": (vf.sum(), steps.sum()),
            "policy/approxkl_avg": (0.5 * (logratio**2).sum(), tokens),
            "policy/clipfrac_avg": ((((ratio - 1).abs() > args.cliprange) & mask).sum(), tokens),
            "policy/entropy_avg": (masked_sum(scores.entropy, mask).sum(), tokens),
            "val/ratio": (masked_sum(ratio, mask).sum(), tokens),
            "val/clipfrac_avg": ((((values - old_values).abs() > args.cliprange_value) & steps).sum(), steps.sum()),
            "sampling/logp_difference": (logratio.abs().sum(), tokens),
        }
    return losses, stats


def with_last_step(query: list[int], response: list[int], args: Args) -> tuple[list[int], list[int]]:
    """(query, steps): the answer and, where there is room, one token that nothing reads, for the value after EOS (N+ 20, 23)."""
    return query, (response + response[-1:])[: args.max_new_tokens]


def pad(rows: list[dict], name: str, like: Tensor) -> Tensor:
    """The rows' lists of that name as (B, S), 0 beyond each; S as the rows' values have it. Type and device of `like`."""
    width = max(len(r["values"]) for r in rows)
    return pad_right([r[name] + [0.0] * (width - len(r[name])) for r in rows], 0.0, like.dtype).to(like.device)


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
        stepped = [with_last_step(x, y, args) for x, y in sequences]
        with run.timed("value"), evaluating(actor_critic.value):
            values = run.score_batches(stepped, lambda batch: actor_critic.value(batch, every=True).tolist())
        return [
            {
                "prompt_ids": x, "response_ids": y, "finished": done, "logprobs": logp, "ref_logprobs": ref_logp,
                "values": value[: len(steps)], "score": score if done else args.missing_eos_score,
            }
            for (x, y), (_, steps), done, logp, score, (_, ref_logp), value in zip(
                sequences, stepped, rollout.finished, rollout.logprobs, scores, ref, values, strict=True
            )
        ]  # fmt: skip

    return run.map_rows(len(rows), work)


def add_advantages(rollouts: list[dict], args: Args) -> dict[str, float]:
    """Put advantages (whitened over all answers) and returns into the rollouts -> metrics of the batch."""
    like = torch.zeros((), dtype=torch.float64)
    logprobs, ref_logprobs, values = (pad(rollouts, name, like) for name in ("logprobs", "ref_logprobs", "values"))
    lengths, steps = (torch.tensor([len(r[name]) for r in rollouts]) for name in ("response_ids", "values"))
    columns = torch.arange(values.shape[1])
    tokens, steps = columns < lengths[:, None], columns < steps[:, None]
    scores = torch.tensor([r["score"] for r in rollouts], dtype=torch.float64)
    rewards_of_steps = token_rewards(scores, logprobs, ref_logprobs, steps, args.beta)
    if args.whiten_rewards:
        rewards_of_steps = rescale(rewards_of_steps, steps)
    advantages, returns = gae(rewards_of_steps, values, steps, args.gamma, args.lam)
    whitened = whiten(advantages, tokens)  # of the tokens alone: after EOS nothing is chosen
    for r, a, g, n in zip(rollouts, whitened.tolist(), returns.tolist(), lengths.tolist(), strict=True):
        r["advantages"], r["returns"] = a[:n], g[: len(r["values"])]
    kl = masked_sum(logprobs - ref_logprobs, tokens).mean()
    error, returned = (returns - values)[steps], returns[steps]
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
            scale = tuple(len(rows) / sum(len(r[name]) for r in rows) for name in ("response_ids", "values"))
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
    K: list[int]  # reward steps of each outer iteration
    updates: int  # PPO updates in one outer iteration
    per_update: int  # optimizer steps of one PPO update

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
    updates = math.ceil(args.total_episodes / args.rollout_batch_size)
    sft = args.sft_epochs * math.ceil(n / args.batch_size)
    return Steps(sft, reward, updates, args.num_ppo_epochs * args.num_mini_batches)


# ---- the text of TL;DR ----
TLDR_TEMPLATE = (  # of the saved tokenizers: other scripts then ask as this one does; their completions need a leading space
    "{% set text = messages[-1]['content'] %}{% if 'POST: ' in text and text.endswith('\n\nTL;DR:') %}{{ text }}"
    "{% else %}{{ 'POST: ' + text + '\n\nTL;DR:' }}{% endif %}"
)
COMPARISON_TOKENS = 169  # N+: the longest summary in people's comparisons, EOS included


def split_query(prompt, where: str) -> tuple[str, str, str]:
    """(what precedes the post, the post, what follows). A prompt that has not the form of TL;DR is itself the post."""
    if isinstance(prompt, list):
        require(len(prompt) == 1, where, f"a prompt of {len(prompt)} turns", "one text to summarise")
        prompt = prompt[0]["content"]
    head, mark, rest = prompt.partition("POST: ")
    if mark and rest.endswith("\n\nTL;DR:"):
        return head + mark, rest.removesuffix("\n\nTL;DR:"), "\n\nTL;DR:"
    return "POST: ", prompt, "\n\nTL;DR:"


def fit_query(prompt, tokenizer, longest: int, where: str = "dataset") -> str:
    """The query, its post cut at its last line break, or by one character, until the whole has `longest` tokens (N+ 1)."""
    head, post, tail = split_query(prompt, where)
    while post and len(tokenise(tokenizer, [head + post + tail])[0]) > longest:
        cut = post.rfind("\n")
        post = post[:cut] if cut >= 0 else post[:-1]
    return head + post + tail


def tldr_frame(tokenizer) -> Frame:
    """A space before the summary, and EOS after it."""
    return Frame(lead=" ", end=end_of_turn(tokenizer))


def encode_tldr(
    rows: list[dict], tokenizer, max_length: int, max_prompt_length: int, flag: str = "--dataset", **how
) -> list[dict]:
    """data.encode in the form of TL;DR: the bare query, and " " + summary + EOS cut to max_length - max_prompt_length (N+ 1).

    The leading space makes text and tokens the same whether query and summary are tokenised together or apart. `prompt`
    stays as it came. how: more of encode's arguments.
    """

    def render(_, prompt) -> str:
        return fit_query(prompt, tokenizer, max_prompt_length, flag.removeprefix("--"))

    longest = max_length - max_prompt_length
    how["longest_response"] = min(longest, how.get("longest_response") or longest)
    texts = ("response", "chosen", "rejected")
    stripped = lazy.mapped(rows, lambda row: {k: v.strip() if k in texts and v else v for k, v in row.items()})
    frame = tldr_frame(tokenizer)
    return encode(stripped, tokenizer, max_length, max_prompt_length, flag, render=render, frame=frame, **how)


def expert_rows(run: Run, tokenizer, rows: list[dict]) -> list[dict]:
    """gold.expert_rows in the form of TL;DR: the expert reads the same query."""
    args = run.args
    return gold.expert_rows(
        run, tokenizer, rows, args.greedy_temperature, lambda _: args.max_new_tokens, tldr_frame(tokenizer),
        lambda _, row: row["prompt_text"],
    )  # fmt: skip


# ---- a run, from data to the saved models ----
def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    tokenizer.chat_template = TLDR_TEMPLATE
    if args.expert_model:
        models.load_tokenizer(args, args.expert_model, "--expert-model")
    demonstrations = prompts = demos.load_demonstrations(args, tokenizer, encode_tldr)
    if args.dry_run:
        rows, size, tokens = demonstrations[: args.select_top_k or None], args.rollout_batch_size, args.max_new_tokens
        n, steps, expert = len(rows), count_steps(len(rows), args), args.expert_model or "the data set's own summaries"
        reward_steps = f"{steps.K[0]} to {steps.K[-1]}" if args.pairs == "accumulated" else steps.K[0]
        return cost.print_plan(
            args, "irl_ppo_tldr", cost.with_reward(args, rows, [], steps.updates),
            f"data {args.dataset}, demonstrations: {expert}, T = {args.T}",
            f"{steps.sft} SFT steps of {args.batch_size} demonstrations; then in each outer iteration",
            f"{n} answers of up to {tokens} tokens ({n * tokens} at most), K = {reward_steps} reward steps,",
            f"{steps.updates} PPO updates of {steps.per_update} optimizer steps on {size} answers,",
            f"in all {steps.before(args.T)} optimizer steps",
        )  # fmt: skip
    if args.prompts == "all":
        prompts = demos.load_demonstrations(dataclasses.replace(args, max_samples=0), tokenizer, encode_tldr)
    held_rows = demos.load_held_out(args, tokenizer, prompts, encode=encode_tldr)
    longer = dataclasses.replace(args, max_length=args.max_prompt_length + COMPARISON_TOKENS)
    preferences = preference_data.load_eval_preferences(longer, tokenizer, encode_tldr)

    run = Run(args, "irl_ppo_tldr", METRICS)
    if run.finished():
        return
    demonstrations = demos.select_demonstrations(run, expert_rows(run, tokenizer, demonstrations))
    posts = demonstrations if args.prompts == "demonstrations" else prompts
    irl = IRL(run, tokenizer, demonstrations, posts, expert_rows(run, tokenizer, held_rows), preferences)
    records.record_prompts(run, tokenizer, demonstrations, posts)
    run.print(
        f"irl_ppo_tldr: {len(demonstrations)} demonstrations, {len(posts)} posts for PPO, {irl.steps.sft} SFT steps,"
        f" T = {args.T}, K = {irl.steps.K[0]}, {irl.steps.updates} PPO updates of {args.rollout_batch_size} answers,"
        f" {run.world} process(es), {run.dir}"
    )
    irl.learn()
    reward_path = rewards.save_reward(run, irl.reward_model, irl.method, irl.paper, "demonstrations")
    path = run.save_final(irl.actor_critic, tokenizer, run.model_card(irl.method, irl.paper), part="policy")
    evals.print_table(run, "SFT" if args.sft_epochs else "start", irl.method)
    run.print(f"model: {path}   reward model: {reward_path}")
    run.end()


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    scalar_models: ClassVar[int] = 2

    T: Annotated[int, AT_LEAST_1] = 2
    """outer iterations, >= 1: how often the policy answers anew and a reward is learned. Released code: 11."""
    num_train_epochs: Annotated[int, AT_LEAST_1] = 1
    """passes of the reward model over its pairs in one outer iteration, >= 1. Paper: 1."""
    expert_model: str = ""
    """model whose answers are the demonstrations, training and held-out, kept in the cache folder; empty: --dataset's own.
    Paper: a 6.9B policy made by PPO from human preferences."""
    greedy_temperature: Annotated[float, POSITIVE] = 0.01
    """temperature of the expert's answers and of --negatives greedy, > 0. Released code: 0.01."""
    eval_temperature: Annotated[float | Auto, POSITIVE] = "auto"
    """temperature of the samples that evaluations measure, > 0. N+ 32: 0.01, at which a model as small as tiny repeats itself."""
    eval_preference_dataset: str = "none"
    """held-out preferences of people, on which every reward is measured (Fig. 2a); none, a file, folder, short name or hub id."""
    prompts: Literal["all", "demonstrations"] | Auto = "auto"
    """posts that PPO summarises: all of --dataset (paper), or those of the demonstrations."""
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
    """peak learning rate of the reward model, > 0. N+ 10: 3e-6."""
    reward_normalisation: Literal["mean", "mean_std", "none"] = "mean"
    """after its training a reward is shifted so that the demonstrations average 0 (N+ 9), and with mean_std scaled so that
    their scores have standard deviation 1 (released code)."""
    ref: Literal["initial", "previous"] = "previous"
    """reference policy of the KL penalty: that of the last iteration (released code), or the SFT one (Eq. 5; circles)."""
    sft_epochs: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """passes of supervised fine-tuning over the demonstrations before anything else, >= 0; 0: --model is fine-tuned already."""
    sft_learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of --sft-epochs, > 0. N+: 3e-6."""
    sft_tokens: Literal["all", "response"] = "all"
    """tokens SFT learns: query and response (N+ 5), or the response alone (Eq. 1)."""
    beta: Annotated[float, POSITIVE] = 0.05
    """weight of KL(pi || pi_ref) in PPO, reward units per nat, > 0. Paper: 0.05."""
    temperature: Annotated[float, POSITIVE] = 0.7
    """of sampled answers, > 0; it divides the logits of every log-prob PPO uses (N+ 16). Paper: 0.7."""
    total_episodes: Annotated[int | Auto, POSITIVE] = "auto"
    """answers PPO samples in one outer iteration, > 0. N+ 30: 1,000,000."""
    rollout_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """answers per PPO update over all devices, > 0. Paper: 512."""
    num_ppo_epochs: Annotated[int, AT_LEAST_1] = 4
    """passes of PPO over each batch of answers, >= 1. Paper: 4."""
    num_mini_batches: Annotated[int, AT_LEAST_1] = 1
    """optimizer steps per such pass, >= 1. Paper: 1."""
    cliprange: Annotated[float, POSITIVE] = 0.2
    """PPO's clip of the probability ratio, > 0. Paper: 0.2."""
    cliprange_value: Annotated[float, POSITIVE] = 0.2
    """clip of the change of a value, reward units, > 0. Paper: 0.2."""
    vf_coef: Annotated[float, NOT_NEGATIVE] = 0.1
    """weight of the value loss, >= 0. Paper: 0.1."""
    value_warmup_ratio: Annotated[float | Auto, BELOW_1] = "auto"
    """part of the PPO updates of an outer iteration, the first ones, in which the value model learns alone, in [0, 1). N+: 0."""
    gamma: Annotated[float, UP_TO_1] = 1.0
    """discount per token, in (0, 1]. Paper: 1."""
    lam: Annotated[float, ZERO_TO_1] = 0.95
    """lambda of generalised advantage estimation, in [0, 1]. Paper: 0.95."""
    missing_eos_score: Annotated[float, ANY_NUMBER] = -1.0
    """score of an answer without EOS, in place of the reward's, reward units. N+ 19: -1."""
    whiten_rewards: bool = False
    """scale the rewards of the steps to variance 1, keeping their mean. N+ 24: off."""
    eval_updates: Annotated[int | Auto, POSITIVE] = "auto"
    """PPO updates between evaluations, > 0; one is also made at the end. N+: 100."""
    optimizer: Literal["rmsprop", "adamw"] = "adamw"
    """rmsprop with the bias correction that torch's lacks. Paper: AdamW."""
    adam_epsilon: Annotated[float, POSITIVE] = 1e-5
    """of the optimizer, > 0. N+ 30: 1e-5."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """of the optimizer, >= 0. Released code: torch's 0.01."""
    warmup_ratio: Annotated[float, BELOW_1] = 0.0
    """part of the updates in which a learning rate rises; then it falls to 0, linearly in PPO, else as a cosine. N+: 0."""
    max_grad_norm: Annotated[float, POSITIVE] = math.inf
    """gradient norm is clipped at this value, > 0. N+ 30: not clipped."""
    judge_task: Literal["answer", "summary"] = "summary"
    """what the judge compares: answers to a request, or summaries of a post."""

    def check(self) -> None:
        super().check()
        require(
            self.rollout_batch_size % self.num_mini_batches == 0, "num_mini_batches", self.num_mini_batches,
            f"a divisor of --rollout-batch-size {self.rollout_batch_size}",
        )  # fmt: skip
        require(self.template == "auto", "template", self.template, "auto: the text of TL;DR is the one template here")


PAPER = dict(  # IRL paper, App. 8.1; the rates, which its text lost, and what else it leaves open are those of N+
    dataset="tldr-sft", max_samples=10_000, prompts="all", eval_samples=500, max_length=565, max_new_tokens=53,
    learning_rate=3e-6, reward_learning_rate=3e-6, sft_epochs=1, sft_learning_rate=3e-6, batch_size=64, eval_temperature=0.01,
    total_episodes=1_000_000, rollout_batch_size=512, value_warmup_ratio=0.0, eval_updates=100,
    per_device_train_batch_size=8, per_device_eval_batch_size=32,
)  # fmt: skip
SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=960, prompts="demonstrations", eval_samples=200, max_length=208, max_new_tokens=48,
        learning_rate=1e-4, reward_learning_rate=5e-4, sft_epochs=2, sft_learning_rate=5e-4, batch_size=32, eval_temperature=0.7,
        total_episodes=1024, rollout_batch_size=64, value_warmup_ratio=0.125, eval_updates=8,
        per_device_train_batch_size=32, per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args), "pythia": PAPER,
    "other": {**PAPER, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 16},
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "sft/loss": "NLL, nats per token that --sft-tokens names, of --sft-epochs",
    "reward/loss": "reward_loss, mean over pairs; logistic: near log 2 = 0.693 at the start, falls",
    "reward/accuracy": "share of pairs with r(demonstration) > r(answer), ties half; near 0.5 at the start, rises",
    "reward/margin": "mean of r(demonstration) - r(answer), reward units; rises",
    "reward/demonstrations": "mean reward of the demonstrations in the batch",
    "reward/answers": "mean reward of the policy's answers in the batch",
    "eval/reward/center": "what was subtracted so that the demonstrations average 0",
    "eval/reward/scale": "standard deviation of the demonstrations' scores; 1 after --reward-normalisation mean_std",
    **metrics.PPO_METRICS,
    "objective/scores": "mean score of the answers, --missing-eos-score for those without EOS; what PPO raises",
    "loss/value_avg": "clipped value loss, mean over response tokens and the step after EOS",
    "val/clipfrac_avg": "share of values that are clipped",
    "val/explained_variance": "1 - Var(return - value) / Var(return) over all steps; at most 1",
    **metrics.EVAL_METRICS,
    **metrics.REWARD_METRICS,
    **preference_data.PREFERENCE_METRICS,
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
