"""AIHF on continuous control: one reward from demonstrations and preferences, and soft actor-critic (SAC) against it.

Paper: Learning Reward and Policy Jointly from Demonstration and Preference Improves Alignment, arXiv:2406.06874, App. A.1.1, Fig. 5.

The paper's Algorithm 1 in a Markov decision process: every --reward-every environment steps the reward is trained to score
demonstrations above what the policy does now (weight w1, Lemma 4.1) and preferred above rejected segments (Eq. 8); between
these times SAC moves the policy towards the soft optimum of that reward (Eq. 7). The true reward makes the data and judges the
result; the methods never see it. --demo-weight 0 is RLHF, --preference-weight 0 is inverse RL alone.

Not the paper: D1 the values its text lacks are flags, listed in docs/aihf_mujoco.md. D2 -v5 environments, since -v2 cannot be
installed any more. D3 --horizon absorbing gives the end of an episode a learned reward of its own. D4 --reward-l2 bounds the
reward, which the linear term alone would let grow without end.

Dims: S seeds, trained at once, the leading dimension of every network and buffer; B rows of a batch; L steps of a segment;
O numbers of an observation, A of an action, in [-1, 1].

Smoke, two minutes, without MuJoCo:   python aihf_mujoco.py --env Pendulum-v1

The paper's Figure 5:                 bash benchmark/control.sh
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import terminal

    terminal.catch()  # before torch is imported: Ctrl-C ends every phase in one line

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
    Times the sum of the weights over alpha, the gradient is minus that of the demonstrations' log-likelihood under the soft optimum.
    """
    policy = (sampled_weights * sampled).sum(-1) / sampled_weights.sum(-1)
    return policy - (demonstrated_weights * demonstrated).sum(-1) / demonstrated_weights.sum(-1)


def preference_loss(preferred: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(sum_L r(preferred) - sum_L r(rejected)), Bradley-Terry on segments, Eq. 8. (..., L) each -> (...)."""
    return -F.logsigmoid(preferred.sum(-1) - rejected.sum(-1))


# ---- the maths: inverse preference learning, a baseline (Hejna and Sadigh, arXiv:2305.15363) ----
def implied_reward(q: Tensor, next_v: Tensor, gamma: float) -> Tensor:
    """r_Q = Q(s, a) - gamma V(s'), the inverse soft Bellman operator, IPL's Eq. 2. Any shape."""
    return q - gamma * next_v


def ipl_loss(preferred: Tensor, rejected: Tensor, l2: float) -> Tensor:
    """preference_loss of implied rewards plus l2 times their mean square, IPL's Eq. 4. (..., L) each -> (...)."""
    square = (preferred**2).mean(-1) + (rejected**2).mean(-1)
    return preference_loss(preferred, rejected) + l2 * square / 2


def advantage_weights(q: Tensor, v: Tensor, temperature: float) -> Tensor:
    """exp((Q - V) / temperature), at most 100: weights of the log-likelihood in advantage-weighted regression."""
    return torch.exp((q - v) / temperature).clamp(max=100.0)
