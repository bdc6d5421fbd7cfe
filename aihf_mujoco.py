"""AIHF on continuous control: one reward from demonstrations and preferences, and soft actor-critic (SAC) against it.

Paper: Learning Reward and Policy Jointly from Demonstration and Preference Improves Alignment, arXiv:2406.06874, App. A.1.1.

The paper's Algorithm 1 in a Markov decision process: every --reward-every environment steps the reward is trained to score
demonstrations above what the policy does now (weight w1, Lemma 4.1) and preferred above rejected segments (Eq. 8); between
these times SAC moves the policy towards the soft optimum of that reward (Eq. 7). The true reward makes the data and judges the
result; the methods never see it. --demo-weight 0 is RLHF, --preference-weight 0 is inverse RL alone.

Not the paper: D1 the values its text lacks are flags, listed in docs/aihf_mujoco.md. D2 -v5 environments, since -v2 cannot be
installed any more. D3 --horizon absorbing gives the end of an episode a learned reward of its own. D4 --reward-l2 bounds the
reward, which the linear term alone would let grow without end. D5 RLHF's frozen reward is scaled to --rlhf-reward-std, since
preferences that can be told apart leave its scale open.

Dims: S seeds, trained at once, the leading dimension of every network and buffer; B rows of a batch; L steps of a segment;
O numbers of an observation, A of an action, in [-1, 1].

Smoke, two minutes, without MuJoCo:   python aihf_mujoco.py --env Pendulum-v1

The paper's Figure 5:                 bash benchmark/control.sh
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from common.args import Auto, check_values, main, require
from common.ranges import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE, UP_TO_1, ZERO_TO_1
from common.store import read_metrics, write_json
from common.streams import stream_seed
from extras import control
from extras.command_line import given_args
from extras.control import ControlRun, Environments
from extras.ending import finish
from extras.episodes import Episodes, cache_key, draw_pairs, read_episodes, sort_episodes, steps_of, write_episodes
from extras.flags import TrainingFlags
from extras.phases import stop_after


# ---- the maths: the policy step, SAC (Haarnoja et al., arXiv:1812.05905) ----
def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(actions tanh(u) with u = mean + std noise, their log density). All (..., A) in and out, the density (...), nats.

    log density = sum_A [log N(u) - log(1 - tanh(u)^2)], App. C, with the second term in the form that cannot overflow.
    """
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(u), (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def squashed_logprob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """(...) log density of given actions (..., A) in [-1, 1], nats; one at the border counts as 1e-5 inside."""
    u = torch.atanh(actions.clamp(-1 + 1e-5, 1 - 1e-5))
    return squashed_sample(mean, log_std, (u - mean) / log_std.exp())[1]


def critic_target(
    rewards: Tensor, terminated: Tensor, next_q: Tensor, next_log_ratio: Tensor, alpha: Tensor, gamma: float
) -> Tensor:
    """y = r + gamma (1 - terminated) (Q(s', a') - alpha log pi/pi_0(a'|s')), Eq. 5 of SAC. All (S, B), alpha (S, 1).

    terminated: 1 where the environment ended the episode, 0 where the time limit did: the limit is no property of the state.
    next_log_ratio: log pi(a'|s'), or log pi/pi_BC(a'|s') with --prior bc (Eq. 7 of the AIHF paper).
    """
    return rewards + gamma * (1 - terminated) * (next_q - alpha * next_log_ratio)


def actor_loss(q: Tensor, log_ratio: Tensor, alpha: Tensor) -> Tensor:
    """alpha log pi/pi_0(a|s) - Q(s, a), Eq. 9 of SAC, for actions that carry the policy's gradient. (S, B) -> (S, B)."""
    return alpha * log_ratio - q


def temperature_loss(log_alpha: Tensor, logprobs: Tensor, target_entropy: float) -> Tensor:
    """-log alpha (log pi + target entropy), Eq. 18 of SAC: alpha rises while the entropy is below its target. (S, B)."""
    return -log_alpha * (logprobs + target_entropy)


# ---- the maths: the reward step ----
def demonstration_loss(
    demonstrated: Tensor, demonstrated_weights: Tensor, sampled: Tensor, sampled_weights: Tensor
) -> Tensor:
    """Weighted mean reward of the policy's steps minus that of the demonstrations' steps, Lemma 4.1. Returns (S,).

    demonstrated, sampled: (S, n) and (S, m) rewards; weights of the same shapes, the time a step counts for: 1, or gamma^t
    for the lemma's discounted sum, and in the row of the absorbing state the time that was left.
    Times the sum of the weights over alpha, the gradient is minus that of the demonstrations' log-likelihood under the soft
    optimum.
    """
    policy = (sampled_weights * sampled).sum(-1) / sampled_weights.sum(-1)
    return policy - (demonstrated_weights * demonstrated).sum(-1) / demonstrated_weights.sum(-1)


def segment_loss(preferred: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(sum_L r(preferred) - sum_L r(rejected)), Bradley-Terry on segments, Eq. 8. (..., L) each -> (...)."""
    return -F.logsigmoid(preferred.sum(-1) - rejected.sum(-1))


# ---- the maths: inverse preference learning, a baseline (Hejna and Sadigh, arXiv:2305.15363) ----
def implied_reward(q: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """r_Q = Q(s, a) - gamma V(s'), the inverse soft Bellman operator, IPL's Eq. 2. Any shape."""
    return q - gamma * next_v


def ipl_loss(preferred: Tensor, rejected: Tensor, l2: float) -> Tensor:
    """segment_loss of implied rewards plus l2 times their mean square, IPL's Eq. 4. (..., L) each -> (...)."""
    square = (preferred**2).mean(-1) + (rejected**2).mean(-1)
    return segment_loss(preferred, rejected) + l2 * square / 2


def advantage_weights(q: Tensor, v: Tensor, temperature: float) -> Tensor:
    """exp((Q - V) / temperature), at most 100: weights of the log-likelihood in advantage-weighted regression."""
    return torch.exp((q - v) / temperature).clamp(max=100.0)


# ---- networks: one for each seed, side by side ----
class MLP(nn.Module):
    """M networks of one shape: (M, B, in) -> (M, B, out), ReLU between layers, each as torch.nn.Linear would begin it."""

    def __init__(self, sizes: tuple[int, ...], generators: list[torch.Generator]):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            drawn = torch.stack([torch.rand(fan_in + 1, fan_out, generator=g) for g in generators])
            drawn = (2 * drawn - 1) / math.sqrt(fan_in)
            self.weights.append(nn.Parameter(drawn[:, :-1].contiguous()))
            self.biases.append(nn.Parameter(drawn[:, -1:].contiguous()))

    def forward(self, x: Tensor, constant: bool = False) -> Tensor:
        """constant: no gradient to the weights, only through x."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight, bias = (weight.detach(), bias.detach()) if constant else (weight, bias)
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x


class Policy(MLP):
    """Squashed Gaussian policies: (S, B, O) -> mean and log standard deviation, (S, B, A) each."""

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = super().forward(observations).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    def best(self, observations: Tensor) -> Tensor:
        """The deterministic policy, tanh of the mean."""
        with torch.no_grad():
            return torch.tanh(self(observations)[0])


BOUND = 10.0  # of a learned reward, either way, as in the base code


class Reward(MLP):
    """(S, B, O + A + 1) rows of Episodes.rows -> (S, B), within +-BOUND."""

    scale: Tensor  # (S, 1): 1, until RLHF's reward is trained (D5)

    def __init__(self, sizes: tuple[int, ...], generators: list[torch.Generator]):
        super().__init__(sizes, generators)
        self.register_buffer("scale", torch.ones(len(generators), 1))

    def forward(self, rows: Tensor) -> Tensor:
        return (super().forward(rows)[..., 0] * self.scale).clamp(-BOUND, BOUND)


# ---- the policy step ----
class SAC:
    """Policy, twin Q, their targets and the temperature of each seed."""

    def __init__(self, observation: int, action: int, args: Args, generators: list[torch.Generator]):
        self.args, self.target_entropy, hidden = args, -float(action), args.hidden
        self.policy = Policy((observation, hidden, hidden, 2 * action), generators)
        self.critic = MLP((observation + action, hidden, hidden, 1), generators * 2)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((len(generators), 1), math.log(args.alpha or 0.2)))
        self.prior: Policy | None = None  # pi_0 of Eq. 7; None is the uniform one
        adam = lambda parameters: torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)  # noqa: E731
        self.policy_optimizer, self.critic_optimizer = adam(self.policy.parameters()), adam(self.critic.parameters())
        self.alpha_optimizer = adam([self.log_alpha])

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(actions (S, B, A), log pi/pi_0 (S, B), log pi (S, B)) from noise (S, B, A); a uniform pi_0 counts as 1."""
        mean, log_std = self.policy(observations)
        actions, logprobs = squashed_sample(mean, log_std, noise)
        if self.prior is None:
            return actions, logprobs, logprobs
        prior_mean, prior_log_std = self.prior(observations)
        same = (mean + log_std.exp() * noise - prior_mean) / prior_log_std.exp()
        return actions, logprobs - squashed_sample(prior_mean, prior_log_std, same)[1], logprobs

    def q(self, critic: MLP, observations: Tensor, actions: Tensor, constant: bool = False) -> Tensor:
        """(2, S, B): both Q of every seed."""
        rows = torch.cat([observations, actions], -1)
        return critic(rows.repeat(2, 1, 1), constant)[..., 0].view(2, *rows.shape[:2])

    def update(self, batch: tuple[Tensor, ...], noise: Tensor, train_policy: bool) -> dict[str, Tensor]:
        """One step of critic, policy and temperature. noise (2, S, B, A). Returns {metric: (S,)}."""
        observations, actions, following, rewards, terminated = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_ratio, _ = self.sample(following, noise[0])
            next_q = self.q(self.target, following, next_actions).amin(0)
            y = critic_target(rewards, terminated, next_q, next_log_ratio, alpha, self.args.gamma)
        q = self.q(self.critic, observations, actions)
        critic_loss = ((q - y) ** 2).mean(-1)
        descend(self.critic_optimizer, critic_loss.sum())
        if train_policy:
            new_actions, log_ratio, logprobs = self.sample(observations, noise[1])
            new_q = self.q(self.critic, observations, new_actions, constant=True).amin(0)
            descend(self.policy_optimizer, actor_loss(new_q, log_ratio, alpha).mean(-1).sum())
            if not self.args.alpha:
                loss = temperature_loss(self.log_alpha, logprobs.detach(), self.target_entropy)
                descend(self.alpha_optimizer, loss.mean(-1).sum())
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.args.tau)
        return {
            "sac/q": q.detach().mean((0, 2)),
            "sac/critic_loss": critic_loss.detach().mean(0),
            "sac/alpha": alpha[:, 0],
        }


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer on a loss that is a sum over seeds, which share no weight."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# ---- the data ----
EXPERT = (  # settings that make an expert and its episodes
    "env", "total_steps", "random_steps", "hidden", "learning_rate", "batch_size", "alpha", "gamma", "tau", "num_envs", "seed",
    "num_seeds", "eval_every", "eval_episodes", "checkpoint_episodes",
)  # fmt: skip


class Data:
    """Demonstrations and preferences, made from checkpoints of an expert (App. A.1.1, after Brown et al., arXiv:1904.06387)."""

    def __init__(self, args: Args, run: ControlRun | None = None):
        episodes, checkpoint, self.made_in = expert_episodes(args, run)
        self.low, self.medium, high = sort_episodes(episodes, checkpoint, args)
        order = np.random.default_rng(stream_seed(args.expert_seed, DEMONSTRATIONS)).permutation(len(high))
        require(
            len(high) >= args.num_demonstrations, "num_demonstrations", args.num_demonstrations, f"at most {len(high)}"
        )
        self.demonstrations = high[order[: args.num_demonstrations]].cut(args.demonstration_steps or 10**9)
        self.known = [self.low, self.medium, high]
        self.pairs = draw_pairs(self.medium, self.low, args.num_preferences, args, PAIRS)
        clean = dataclasses.replace(args, flip_labels=0.0)
        self.held = draw_pairs(self.medium, self.low, 500, clean, HELD)
        self.rows, self.weights = steps_of(self.demonstrations, args)

    def table(self) -> str:
        """Tab. 1: mean and standard deviation of the true returns of each class."""
        classes = {"non-preferred": self.low, "preferred": self.medium, "demonstrations": self.demonstrations}
        return "   ".join(f"{k} {e.returns.mean():.0f} ± {e.returns.std():.0f} ({len(e)})" for k, e in classes.items())


def expert_episodes(args: Args, run: ControlRun | None = None) -> tuple[Episodes, np.ndarray, Path]:
    """(--checkpoint-episodes of each checkpoint, the checkpoint of each, their folder), made once for all methods and seeds."""
    expert = dataclasses.replace(
        args, method="sac", num_seeds=args.expert_seeds, seed=args.expert_seed, total_steps=args.expert_steps,
        random_steps=args.expert_steps // 10, alpha=args.expert_alpha, eval_every=args.checkpoint_every, resume="",
        render=False,
    )  # fmt: skip
    made_by = {name: getattr(expert, name) for name in EXPERT} | control.versions()
    folder = Path(args.data_dir) / f"{args.env}__{cache_key(made_by)}"
    path = folder / "episodes.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "made_by.json", made_by)
        own = str(folder / "expert")
        begun = (folder / "expert" / "args.json").exists()
        learner = train(dataclasses.replace(expert, output_dir=own, resume=own if begun else ""), run)
        played, checkpoint = learner.play_checkpoints()
        write_episodes(path, played, checkpoint=checkpoint)
    episodes, more = read_episodes(path)
    return episodes, more["checkpoint"], folder


# ---- the loop: Algorithm 1 ----
# what the random streams of a run are for
NETWORKS, ENVIRONMENT, EVALUATION, DEMONSTRATIONS, PAIRS, HELD, CHECKPOINTS = range(7)


class Learner:
    """A method's networks, environments and replay buffers, S seeds side by side."""

    def __init__(self, run: ControlRun, data: Data | None):
        args = run.args
        self.run, self.args, self.data, self.filled = run, args, data, 0
        self.seeds = [args.seed + s for s in range(args.num_seeds)]
        self.generators = [torch.Generator().manual_seed(stream_seed(s, NETWORKS)) for s in self.seeds]
        self.environments = Environments(args.env, self.episode_seeds(args.num_envs, ENVIRONMENT))
        self.examined: Environments | None = None
        o, a = self.environments.sizes
        self.split = (o, a, o, 1, 1, 1)  # observation, action, following, true reward, terminated, step in the episode
        self.sac = SAC(o, a, args, self.generators)
        self.reward = Reward((o + a + 1, 64, 64, 1), self.generators)
        self.reward_optimizer = torch.optim.Adam(self.reward.parameters(), lr=args.reward_learning_rate, fused=True)
        self.implied = MLP((o + a + 1, args.hidden, args.hidden, 1), self.generators)  # Q of IPL
        self.implied_optimizer = torch.optim.Adam(self.implied.parameters(), lr=args.learning_rate, fused=True)
        self.replay = torch.empty(args.num_seeds, args.env_steps, sum(self.split))
        self.end = torch.zeros(1, o + a + 1)  # the absorbing state, as a row
        self.end[0, -1] = 1.0
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def learn(self) -> None:
        """Run the method to its end, or on from the last checkpoint."""
        run, args = self.run, self.args
        if not run.load_checkpoint():
            self.warm_start()
        work = {"aihf": self.interact, "sac": self.interact, "bc": self.clone, "ipl": self.learn_offline}[args.method]
        per_update = args.num_envs if args.method in ("aihf", "sac") else 1
        for k, _ in run.updates(args.method, range(args.updates), per_update=per_update, evaluate=self.evaluate):
            work(k)

    def warm_start(self) -> None:
        """Start of AIHF and of its baselines: a cloned policy; for RLHF the whole reward."""
        args = self.args
        if args.method != "aihf":
            return
        if args.start == "bc":
            with self.run.phase("behaviour cloning", args.bc_steps) as advance:
                for k in range(args.bc_steps):
                    self.clone(k)
                    advance(1)
        if args.prior == "bc":
            self.sac.prior = copy.deepcopy(self.sac.policy).requires_grad_(False)
        if not args.demo_weight:  # RLHF: to the end, then frozen
            with self.run.phase("reward from preferences", args.preference_steps) as advance:
                for _ in range(args.preference_steps):
                    self.reward_step()
                    advance(1)
            with torch.no_grad():
                pairs = self.data.pairs
                rewards = self.reward(self.each(pairs.rows[pairs.counted > 0]))
                self.reward.scale.copy_(args.rlhf_reward_std / rewards.std(1, keepdim=True))

    # ---- the environment ----
    def interact(self, k: int) -> None:
        """--num-envs environment steps of every seed, as many SAC updates, and the reward's steps where they are due."""
        args, before = self.args, self.filled
        self.act()
        if self.filled <= args.random_steps:
            return
        warmup = args.critic_warmup if args.method == "aihf" and args.start == "bc" else 0
        for _ in range(args.num_envs):
            noise = self.noise(2 * args.batch_size).unflatten(1, (2, args.batch_size)).transpose(0, 1)
            self.count(self.sac.update(self.draw(), noise, self.filled > args.random_steps + warmup))
        learns = args.method == "aihf" and args.demo_weight
        if learns and self.filled // args.reward_every > before // args.reward_every:
            for _ in range(args.reward_steps):
                self.reward_step()

    def act(self) -> None:
        """One step in every environment, kept in the replay buffers."""
        args, environments = self.args, self.environments
        observations = torch.from_numpy(environments.observations.copy())
        noise = self.noise(args.num_envs)
        if self.filled < args.random_steps and not (args.method == "aihf" and args.start == "bc"):
            actions = torch.special.ndtr(noise) * 2 - 1  # uniform
        else:
            with torch.no_grad():
                actions = self.sac.sample(observations, noise)[0]
        following, *numbers = environments.step(actions.numpy())
        parts = [torch.from_numpy(np.ascontiguousarray(x)).float() for x in (following, *numbers)]
        rows = torch.cat([observations, actions, parts[0], *(p[..., None] for p in parts[1:])], -1)
        self.replay[:, self.filled : self.filled + args.num_envs] = rows
        self.filled += args.num_envs

    def draw(self) -> tuple[Tensor, ...]:
        """A batch of each seed's buffer, with the reward as it is now: (S, B, ...) as SAC.update takes it."""
        size = (self.args.batch_size,)
        which = [torch.randint(self.filled, size, generator=g) for g in self.generators]
        rows = torch.stack([buffer[i] for buffer, i in zip(self.replay, which, strict=True)])
        observations, actions, following, true, terminated, _ = rows.split(self.split, -1)
        rewards = true[..., 0] if self.args.method == "sac" else self.rewards(observations, actions)
        return observations, actions, following, rewards, terminated[..., 0]

    @torch.no_grad()
    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(S, B) learned rewards; --horizon absorbing: minus that of the absorbing state, which is then worth 0 for ever."""
        rewards = self.reward(F.pad(torch.cat([observations, actions], -1), (0, 1)))
        return rewards - self.reward(self.each(self.end)) if self.args.horizon == "absorbing" else rewards

    # ---- the reward step ----
    def reward_step(self) -> None:
        """One gradient step on w1 demonstration_loss + segment_loss + --reward-l2 r^2 (Eq. 19)."""
        args, data, loss = self.args, self.data, 0.0
        if args.demo_weight:
            rows, weights = self.recent_steps()
            sampled, demonstrated = self.reward(rows), self.reward(self.each(data.rows))
            gap = demonstration_loss(demonstrated, self.each(data.weights), sampled, weights)
            square = mean_square(demonstrated, self.each(data.weights)) + mean_square(sampled, weights)
            loss = args.demo_weight * gap + args.reward_l2 * square
            clamped = (torch.cat([sampled, demonstrated], -1).abs() >= BOUND).float().mean(-1)
            self.count({"reward/demonstration_gap": -gap.detach(), "reward/square": square.detach() / 2})
            self.count({"reward/clamped": clamped})
        if args.preference_weight:
            count = min(args.preference_batch_size, args.num_preferences)
            which = torch.stack([torch.randint(args.num_preferences, (count,), generator=g) for g in self.generators])
            counted = data.pairs.counted[which]
            rewards = self.reward(data.pairs.rows[which].flatten(1, 3)).view(counted.shape) * counted
            losses = segment_loss(rewards[:, :, 0], rewards[:, :, 1]).mean(-1)
            square = mean_square(rewards.flatten(1), counted.flatten(1))
            loss = loss + args.preference_weight * losses + args.reward_l2 * square
            self.count({"reward/preference_loss": losses.detach()})
        descend(self.reward_optimizer, loss.sum())

    def recent_steps(self) -> tuple[Tensor, Tensor]:
        """Rows (S, n + 1, O + A + 1) and weights (S, n + 1) of the policy's last --policy-window steps.

        The last row is the absorbing state, with the time that was left in the episodes that terminated there.
        """
        args, limit = self.args, self.environments.limit
        last = self.replay[:, max(self.filled - args.policy_window, 0) : self.filled]
        observations, actions, _, _, terminated, at = last.split(self.split, -1)
        rows = torch.cat([F.pad(torch.cat([observations, actions], -1), (0, 1)), self.each(self.end)], 1)
        discount = args.gamma if args.discount_demo else 1.0
        weights = discount ** torch.arange(limit + 1.0)
        left = weights.sum() - weights.cumsum(0) - weights[-1]  # of the steps t + 1, ..., T - 1
        at, gone = at[..., 0].long(), terminated[..., 0] * (args.horizon == "absorbing")
        return rows, torch.cat([weights[at], (gone * left[at]).sum(1, keepdim=True)], 1)

    # ---- offline ----
    def clone(self, k: int) -> None:
        """Behaviour cloning: a step on the demonstrations' negative log-likelihood."""
        o, a = self.environments.sizes
        alive = self.data.rows[self.data.rows[:, -1] == 0]
        which = torch.stack([torch.randint(len(alive), (self.args.batch_size,), generator=g) for g in self.generators])
        observations, actions, _ = alive[which].split((o, a, 1), -1)
        loss = -squashed_logprob(*self.sac.policy(observations), actions).mean(-1)
        descend(self.sac.policy_optimizer, loss.sum())
        self.count({"bc/loss": loss.detach()})

    def learn_offline(self, k: int) -> None:
        """IPL: a step of Q on the preferences' loss of its implied reward, and one of the policy towards exp(advantage)."""
        args, pairs, (o, a) = self.args, self.data.pairs, self.environments.sizes
        count = min(args.preference_batch_size, args.num_preferences)
        which = torch.stack([torch.randint(args.num_preferences, (count,), generator=g) for g in self.generators])
        shape, flat = pairs.counted[which].shape, pairs.rows[which].flatten(1, 3)
        q = self.implied(flat)[..., 0]
        counted, ended = pairs.counted[which].flatten(1), pairs.ended[which].flatten(1)
        next_v = self.value(pairs.following[which].flatten(1, 3), (counted.shape[1], a))
        after = self.implied(self.each(self.end))[..., 0] if args.horizon == "absorbing" else torch.zeros(1)
        rewards = implied_reward(q, torch.where(ended > 0, after, next_v), args.gamma) * counted
        rewards = rewards.view(shape)
        descend(self.implied_optimizer, ipl_loss(rewards[:, :, 0], rewards[:, :, 1], args.ipl_l2).mean(-1).sum())
        observations, actions, gone = flat.split((o, a, 1), -1)
        with torch.no_grad():
            advantage = advantage_weights(q, self.value(observations, (counted.shape[1], a)), args.ipl_temperature)
        alive = counted * (1 - gone[..., 0])
        logprobs = squashed_logprob(*self.sac.policy(observations), actions)
        descend(self.sac.policy_optimizer, -((alive * advantage * logprobs).sum(-1) / alive.sum(-1)).sum())
        self.count({"ipl/preference_loss": segment_loss(rewards[:, :, 0], rewards[:, :, 1]).detach().mean(-1)})

    def value(self, observations: Tensor, shape: tuple[int, int]) -> Tensor:
        """V(s) = E_pi[Q(s, a)] from one action, which carries no gradient to the policy. (S, B, O) -> (S, B)."""
        with torch.no_grad():
            actions = squashed_sample(*self.sac.policy(observations), self.noise(shape[0]))[0]
        return self.implied(F.pad(torch.cat([observations, actions], -1), (0, 1)))[..., 0]

    # ---- what is measured ----
    def evaluate(self, k: int) -> None:
        """The true return of the deterministic policy, which no method sees, and what the learned reward says of it."""
        args, step = self.args, self.run.position["step"]
        played = self.examine(self.episode_seeds(args.eval_episodes, EVALUATION), self.sac.policy.best)
        rows = [{"eval/return": e.returns.mean(), "eval/length": e.lengths.mean()} for e in played]
        if args.method == "aihf":
            for s, row in enumerate(rows):
                row |= self.judge(s, played[s])
        means = {name: (total / self.counts[name]).tolist() for name, total in self.totals.items()}
        self.totals, self.counts = {}, {}
        for s, row in enumerate(rows):
            measured = {name: float(x) for name, x in row.items()} | {name: values[s] for name, values in means.items()}
            self.run.log(measured, step=step, seed=self.seeds[s])
            if wrong := [name for name, value in measured.items() if not math.isfinite(value)]:
                raise UserError(f"found {wrong[0]} of seed {self.seeds[s]} not finite at step {step}: it has diverged")
        if args.method == "sac":
            self.run.save_weights(f"policies/{step:08d}", {"policy": self.sac.policy})

    @torch.no_grad()
    def judge(self, s: int, own: Episodes) -> dict[str, float]:
        """The learned reward of seed s on its policy's and the data's episodes, as means over the steps up to the time limit."""

        def scores(episodes: Episodes) -> Tensor:
            rows, counted = (torch.from_numpy(x) for x in episodes.rows(self.args.horizon == "absorbing"))
            flat = rows.flatten(0, 1).expand(len(self.seeds), -1, -1)
            rewards = self.reward(flat)[s].view(counted.shape) * counted
            return rewards.mean(1)

        low, medium, _ = known = [scores(e) for e in self.data.known]
        returns = torch.cat([torch.from_numpy(e.returns) for e in self.data.known])
        held, shape = self.data.held, self.data.held.counted.shape
        rewards = self.reward(held.rows.flatten(0, 2).expand(len(self.seeds), -1, -1))[s].view(shape) * held.counted
        return {
            "eval/reward/policy": scores(own).mean(),
            "eval/reward/demonstrations": scores(self.data.demonstrations).mean(),
            "eval/reward/preferred": medium.mean(),
            "eval/reward/non_preferred": low.mean(),
            "eval/reward/rank_correlation": rank_correlation(torch.cat(known), returns),
            "eval/reward/accuracy": (rewards[:, 0].sum(-1) > rewards[:, 1].sum(-1)).float().mean(),
        }

    def examine(self, seeds: list[list[int]], act) -> list[Episodes]:
        """Play an episode for each seed in environments that are kept for it."""
        if self.examined is None or len(self.examined.envs[0]) != len(seeds[0]):
            self.examined = Environments(self.args.env, seeds)
        return control.play(self.examined, seeds, act)

    def play_checkpoints(self) -> tuple[Episodes, np.ndarray]:
        """(--checkpoint-episodes of each policy that a sac run has saved, sampled as it explored, the checkpoint of each).

        They are those of the seed with the highest mean return in the last three evaluations.
        """
        from safetensors.torch import load_file

        returns = [[row["eval/return"] for row in self.run.logged() if row["seed"] == s][-3:] for s in self.seeds]
        best = int(np.mean(returns, axis=1).argmax())
        paths, played = sorted((self.run.dir / "policies").glob("*.safetensors")), []
        with self.run.phase("episodes of the checkpoints", len(paths)) as advance:
            for c, path in enumerate(paths):
                weights = {name.removeprefix("policy."): value for name, value in load_file(path).items()}
                self.sac.policy.load_state_dict(weights)
                act = lambda observations: self.sac.sample(observations, self.noise(observations.shape[1]))[0]  # noqa: E731
                with torch.no_grad():
                    seeds = self.episode_seeds(self.args.checkpoint_episodes, CHECKPOINTS, c)
                    played.append(self.examine(seeds, act)[best])
                advance(1)
        fields = Episodes.__dataclass_fields__
        episodes = Episodes(*(np.concatenate([getattr(e, name) for e in played]) for name in fields))
        return episodes, np.repeat(np.arange(len(paths)), self.args.checkpoint_episodes)

    def count(self, measured: dict[str, Tensor]) -> None:
        """Add {metric: (S,)} to the means of the next evaluation."""
        for name, value in measured.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    # ---- random numbers, and checkpoints ----
    def noise(self, rows: int) -> Tensor:
        """(S, rows, A) standard normal numbers, each seed's from its own stream."""
        return torch.stack([torch.randn(rows, self.environments.sizes[1], generator=g) for g in self.generators])

    def each(self, x: Tensor) -> Tensor:
        """The same for every seed: (...) -> (S, ...)."""
        return x.expand(len(self.seeds), *x.shape)

    def episode_seeds(self, count: int, *key: int) -> list[list[int]]:
        return [[stream_seed(s, *key, n) % 2**31 for n in range(count)] for s in self.seeds]

    def parts(self) -> dict:
        sac, prior = self.sac, self.sac.prior
        return {
            "policy": sac.policy, "critic": sac.critic, "target": sac.target, "reward": self.reward, "implied": self.implied,
            "policy_optimizer": sac.policy_optimizer, "critic_optimizer": sac.critic_optimizer,
            "alpha_optimizer": sac.alpha_optimizer, "reward_optimizer": self.reward_optimizer,
            "implied_optimizer": self.implied_optimizer, **({"prior": prior} if prior is not None else {}),
        }  # fmt: skip

    def state(self) -> dict:
        """All that the next steps depend on, as tensors, numbers and text."""
        return {
            "parts": {name: part.state_dict() for name, part in self.parts().items()},
            "log_alpha": self.sac.log_alpha.detach(),
            "generators": [g.get_state() for g in self.generators],
            "environments": self.environments.state(),
            "replay": self.replay[:, : self.filled].clone(),
            "totals": self.totals,
            "counts": self.counts,
        }

    def load_state(self, state: dict) -> None:
        if "prior" in state["parts"]:
            self.sac.prior = copy.deepcopy(self.sac.policy).requires_grad_(False)
        for name, part in self.parts().items():
            part.load_state_dict(state["parts"][name])
        self.sac.log_alpha.data.copy_(state["log_alpha"])
        for generator, stored in zip(self.generators, state["generators"], strict=True):
            generator.set_state(stored)
        self.environments.load_state(state["environments"])
        self.filled = state["replay"].shape[1]
        self.replay[:, : self.filled] = state["replay"]
        self.totals, self.counts = state["totals"], state["counts"]


def mean_square(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of r^2. (S, n) each -> (S,)."""
    return (weights * rewards**2).sum(-1) / weights.sum(-1)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's, of two (n,) without ties."""
    ranks = torch.stack([x.argsort().argsort().double(), y.argsort().argsort().double()])
    return torch.corrcoef(ranks)[0, 1]


# ---- a run, from the expert to the curves ----
def train(args: Args, within: ControlRun | None = None) -> Learner:
    """within: the run that waits for this one, an expert."""
    torch.set_num_threads(1)  # matrices of 64 columns: a second thread only costs
    screen = control.drawing(args.env) if args.render and not args.dry_run else None
    control.make_environment(args.env)
    if args.dry_run:
        print("\n  ".join(plan(args)))
        return None
    run = ControlRun(args, "aihf_mujoco", METRICS, within)
    data = None if args.method == "sac" else Data(args, run)
    stop_after(run, "data", data is not None and not args.resume)
    run.listen()
    learner = run.learner = Learner(run, data)
    name = args.method if args.method != "aihf" or args.demo_weight else "rlhf"
    run.print(f"aihf_mujoco: {name} on {args.env}, seeds {learner.seeds}, {args.updates} updates, {run.dir}")
    if data is not None:
        run.print(f"  true returns: {data.table()}   {data.made_in}")
    learner.learn()
    path = run.save_weights("final", {"policy": learner.sac.policy, "reward": learner.reward})
    if screen is not None:
        control.draw(
            screen, args.seed, lambda o: learner.sac.policy.best(learner.each(o[0]))[:1], run.dir / "frames.png"
        )
    last = [row for row in read_metrics(run.dir / "metrics.jsonl") if row["step"] == run.position["step"]]
    run.print(f"{name}: true return " + ", ".join(f"{row['eval/return']:.0f}" for row in last) + f"   weights: {path}")
    if within is None:
        finish(run)
    return learner


def plan(args: Args) -> list[str]:
    """Lines of --dry-run."""
    expert = (
        f"{args.expert_seeds} expert(s) of {args.expert_steps} environment steps and updates, once, in {args.data_dir}"
    )
    steps = {"bc": args.bc_steps, "ipl": args.ipl_steps}.get(args.method)
    if steps:
        return [f"aihf_mujoco --dry-run: {args.method} on {args.env}", expert, f"{steps} updates"]
    rounds = args.total_steps // args.reward_every - args.random_steps // args.reward_every
    rounds *= args.method == "aihf" and args.demo_weight > 0
    return [
        f"aihf_mujoco --dry-run: {args.method} on {args.env}, w1 = {args.demo_weight:g}, {args.num_seeds} seed(s)",
        *([expert] if args.method == "aihf" else []),
        f"{args.total_steps} environment steps and SAC updates a seed, {rounds} reward rounds of {args.reward_steps} steps",
        f"{args.total_steps // args.eval_every + 1} evaluations of {args.eval_episodes} episodes a seed",
    ]


# ---- what flags mean and what is logged ----
@dataclass
class Args(TrainingFlags):
    may_be_infinite: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[dict] = {}
    report_to: ClassVar[str] = "none"

    env: str = "HalfCheetah-v5"
    """environment of gymnasium with numbers as observations and actions. Paper: Hopper, HalfCheetah and Walker2d, -v2."""
    method: Literal["aihf", "bc", "ipl", "sac"] = "aihf"
    """aihf, with --demo-weight 0 RLHF; bc: behaviour cloning; ipl: inverse preference learning; sac: on the true reward."""
    demo_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """w1 of Eq. 5, >= 0: weight of the demonstrations. 0 is RLHF: the reward is learned from preferences first, then frozen."""
    preference_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight of the preferences, >= 0. 0 is inverse RL alone."""
    num_demonstrations: Annotated[int, AT_LEAST_1] = 2
    """episodes of the high class to learn from, >= 1."""
    demonstration_steps: Annotated[int, NOT_NEGATIVE] = 0
    """cut demonstrations after this many steps; 0: whole."""
    num_preferences: Annotated[int, AT_LEAST_1] = 200
    """pairs of segments, medium over low, >= 1."""
    segment_length: Annotated[int, AT_LEAST_1] = 50
    """steps of a segment, >= 1."""
    flip_labels: Annotated[float, ZERO_TO_1] = 0.0
    """share of the pairs whose order is wrong, in [0, 1]."""
    low_most: Annotated[float, SHARE] = 0.4
    """checkpoints up to this level are the low class: 0 is the untrained policy's mean return, 1 the best checkpoint's."""
    medium_most: Annotated[float, SHARE] = 0.7
    """checkpoints above --low-most and up to this level are the medium class."""
    high_least: Annotated[float, SHARE] = 0.9
    """checkpoints from this level on are the high class, of which the demonstrations are."""
    horizon: Literal["absorbing", "terminate"] = "absorbing"
    """absorbing: an episode that terminates goes on to the time limit in a state whose reward is learned; terminate: it ends."""
    start: Literal["bc", "scratch"] = "bc"
    """where AIHF, IRL and RLHF start: from the cloned policy (paper, for RLHF), or from random weights and actions."""
    prior: Literal["uniform", "bc"] = "uniform"
    """pi_0 of Eq. 7: uniform, the entropy of SAC (paper), or the cloned policy, whose KL is the cost then."""
    total_steps: Annotated[int | Auto, POSITIVE] = "auto"
    """environment steps of a seed, as many SAC updates, > 0."""
    num_seeds: Annotated[int, AT_LEAST_1] = 1
    """seeds that are run at once, side by side in each network: --seed, --seed + 1, ..."""
    num_envs: Annotated[int, AT_LEAST_1] = 4
    """environments of a seed that step together, >= 1."""
    random_steps: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """environment steps before the first update; from scratch with random actions. Base code: 1 episode."""
    critic_warmup: Annotated[int, NOT_NEGATIVE] = 5000
    """environment steps in which the critic learns alone, before it moves a cloned policy; not with sac."""
    reward_every: Annotated[int, AT_LEAST_1] = 1000
    """environment steps between reward rounds, >= 1. Base code: 5000."""
    reward_steps: Annotated[int, AT_LEAST_1] = 20
    """gradient steps of a reward round, >= 1. Base code: 1."""
    reward_learning_rate: Annotated[float, POSITIVE] = 1e-3
    """of the reward's Adam, > 0. Base code: 1e-4."""
    reward_l2: Annotated[float, NOT_NEGATIVE] = 0.1
    """weight of the mean r^2 over both samples of each term, >= 0: the linear term alone would grow without end."""
    preference_batch_size: Annotated[int, AT_LEAST_1] = 32
    """pairs of a reward step, >= 1."""
    preference_steps: Annotated[int, AT_LEAST_1] = 2000
    """reward steps of RLHF, all before its policy step, >= 1."""
    rlhf_reward_std: Annotated[float, POSITIVE] = 1.0
    """D5: standard deviation of RLHF's frozen reward over the preferences' steps, > 0. Christiano et al., 2017: constant too."""
    policy_window: Annotated[int, AT_LEAST_1] = 4000
    """last environment steps of the policy that a reward step compares with, >= 1."""
    discount_demo: bool = False
    """weigh step t of an episode with gamma^t, as Lemma 4.1; off: all alike, as the base code."""
    bc_steps: Annotated[int, AT_LEAST_1] = 10_000
    """gradient steps of behaviour cloning, >= 1."""
    ipl_steps: Annotated[int, AT_LEAST_1] = 5000
    """gradient steps of IPL, >= 1."""
    ipl_l2: Annotated[float, NOT_NEGATIVE] = 0.5
    """lambda of IPL: weight of the mean square of the implied reward."""
    ipl_temperature: Annotated[float, POSITIVE] = 0.33
    """temperature of the advantage weights, > 0."""
    hidden: Annotated[int, AT_LEAST_1] = 64
    """width of both hidden layers of policy and Q. Paper: 64."""
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    """of the Adams of policy and Q, > 0. Base code: 1e-3."""
    batch_size: Annotated[int, AT_LEAST_1] = 100
    """rows of a SAC update, >= 1. Base code: 100."""
    alpha: Annotated[float, NOT_NEGATIVE] = 0.2
    """temperature of Eq. 7, >= 0; 0: learned from 0.2, towards an entropy of -A nats. Base code: 0.2."""
    gamma: Annotated[float, UP_TO_1] = 0.99
    """discount, in (0, 1]."""
    tau: Annotated[float, UP_TO_1] = 0.005
    """part of the way that the target network moves in an update, in (0, 1]."""
    eval_every: Annotated[int | Auto, POSITIVE] = "auto"
    """environment steps between evaluations (updates, for bc and ipl), > 0."""
    eval_episodes: Annotated[int, AT_LEAST_1] = 10
    """episodes of an evaluation, >= 1."""
    expert_steps: Annotated[int | Auto, POSITIVE] = "auto"
    """environment steps of the expert that makes the data, > 0."""
    expert_alpha: Annotated[float | Auto, NOT_NEGATIVE] = "auto"
    """temperature of the expert, >= 0; 0: learned."""
    expert_seeds: Annotated[int | Auto, POSITIVE] = "auto"
    """experts that are trained at once; the one with the highest return at the end makes the data."""
    expert_seed: Annotated[int, NOT_NEGATIVE] = 0
    """first seed of the experts; also that of the episodes of the checkpoints, and of the choice of pairs and demonstrations."""
    checkpoint_every: Annotated[int | Auto, POSITIVE] = "auto"
    """environment steps of the expert between its checkpoints, > 0."""
    checkpoint_episodes: Annotated[int, AT_LEAST_1] = 5
    """k, episodes of each checkpoint, >= 1."""
    data_dir: str = "runs/control_data"
    """folder of experts and their episodes, one for each setting that made them; used again by every method and seed."""
    seed: Annotated[int, NOT_NEGATIVE] = 1
    """first seed."""
    output_dir: str = "auto"
    """run directory; auto: runs/aihf_mujoco__<seed>__<time>. One that holds another run is refused."""
    save_steps: Annotated[int, POSITIVE] = 20_000
    """environment steps between checkpoints of the run, > 0."""
    render: bool = False
    """draw the first tenth of an episode of the final policy to frames.png."""
    resume: str = ""
    """run directory to continue; its own settings are used."""
    dry_run: bool = False
    """print the plan and exit."""

    def check(self) -> None:
        """Raise UserError, naming the flag, for values outside their range. Called after auto values are resolved."""
        check_values(self)
        require(
            self.low_most < self.medium_most, "medium_most", self.medium_most, f"more than --low-most {self.low_most}"
        )
        require(
            self.medium_most < self.high_least,
            "high_least",
            self.high_least,
            f"more than --medium-most {self.medium_most}",
        )
        require(
            self.demo_weight > 0 or self.preference_weight > 0,
            "preference_weight",
            0,
            "above 0 where --demo-weight is 0",
        )
        require(self.start == "bc" or self.prior == "uniform", "prior", self.prior, "uniform where --start is scratch")
        require(
            self.alpha > 0 or self.prior == "uniform",
            "alpha",
            self.alpha,
            "above 0 with --prior bc, whose KL it weighs",
        )

    @property
    def updates(self) -> int:
        """Passes of the loop: --num-envs environment steps each, or an offline step."""
        return {"bc": self.bc_steps, "ipl": self.ipl_steps}.get(
            self.method, math.ceil(self.total_steps / self.num_envs)
        )

    @property
    def env_steps(self) -> int:
        """Rows of a replay buffer."""
        return 0 if self.method in ("bc", "ipl") else self.updates * self.num_envs

    @property
    def eval_updates(self) -> int:
        return max(self.eval_every // (1 if self.method in ("bc", "ipl") else self.num_envs), 1)


SETTINGS = {  # what auto means, by --env
    "HalfCheetah-v5": dict(
        total_steps=100_000, random_steps=1000, eval_every=5000, expert_steps=100_000, checkpoint_every=5000, expert_alpha=0.2,
        expert_seeds=1,
    ),
    "Hopper-v5": dict(
        total_steps=200_000, random_steps=1000, eval_every=5000, expert_steps=200_000, checkpoint_every=5000, expert_alpha=0.0,
        expert_seeds=3,
    ),
    "Walker2d-v5": dict(
        total_steps=300_000, random_steps=1000, eval_every=10_000, expert_steps=200_000, checkpoint_every=5000, expert_alpha=0.0,
        expert_seeds=3,
    ),
    "Pendulum-v1": dict(
        total_steps=8000, random_steps=400, eval_every=1000, expert_steps=8000, checkpoint_every=500, expert_alpha=0.2,
        expert_seeds=1,
    ),
    "other": dict(
        total_steps=200_000, random_steps=1000, eval_every=5000, expert_steps=200_000, checkpoint_every=10_000, expert_alpha=0.0,
        expert_seeds=3,
    ),
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "eval/return": "mean true return of the deterministic policy over --eval-episodes episodes, which no method sees",
    "eval/length": "mean steps of these episodes",
    "eval/reward/policy": "learned reward a step, mean over these episodes up to the time limit",
    "eval/reward/demonstrations": "the same of the demonstrations",
    "eval/reward/preferred": "the same of the episodes of the medium class",
    "eval/reward/non_preferred": "the same of the episodes of the low class",
    "eval/reward/rank_correlation": "Spearman's, learned and true return over the episodes of all classes, in [-1, 1]",
    "eval/reward/accuracy": "share of 500 other pairs of segments, medium over low, that the reward orders so",
    "reward/demonstration_gap": "mean reward of the demonstrations' steps minus that of the policy's; falls to 0 as they meet",
    "reward/square": "mean r^2 of both",
    "reward/clamped": "share of both whose reward is at a bound, +-10",
    "reward/preference_loss": "-log sigmoid of the difference of the segments' sums; near log 2 = 0.693 at the start",
    "sac/q": "mean Q of the batch",
    "sac/critic_loss": "mean squared error of Q",
    "sac/alpha": "temperature",
    "bc/loss": "negative log density of the demonstrations' actions, nats",
    "ipl/preference_loss": "segment_loss of the implied rewards; near log 2 = 0.693 at the start",
}


def parse() -> Args:
    """Command line -> args with every auto resolved from SETTINGS."""
    args = given_args(Args, __doc__)
    for name, value in SETTINGS.get(args.env, SETTINGS["other"]).items():
        if getattr(args, name) == "auto":
            setattr(args, name, value)
    args.check()
    return args


if __name__ == "__main__":
    main(lambda: train(parse()))
