"""A Markov decision process small enough to solve: values, policies and occupancies are finite sums or linear systems here.

Four living states and three actions. Action 0 mostly ends the trajectory ("falls"); an ended trajectory stays in an absorbing
state, where nothing is chosen and the same reward is paid for ever. The functions of aihf_mujoco.py are held against this file
in tests/test_control_exact.py. Everything is float64.

The soft optimum of a reward r at temperature alpha > 0, AIHF Eq. 40, 41, 81:

    Q(s, a) = r(s, a) + gamma E[V(s')]        V(s) = alpha log sum_a pi_0(a|s) exp(Q(s, a) / alpha)
    pi(a|s) = pi_0(a|s) exp((Q(s, a) - V(s)) / alpha)

log_prior is log pi_0, the policy that the KL penalty of AIHF Eq. 7 keeps close to; log_prior = 0 is the entropy bonus of SAC.

Paper: AIHF = arXiv:2406.06874, Sec. 4 and App. A.3 to A.5.  Dims: N living states, A actions; "..." are leading dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MDP:
    start: Tensor
    """(N,) probability that a trajectory starts in each living state."""
    moves: Tensor
    """(N, A, N) probability of each living next state; what is missing to 1 ends the trajectory."""
    gamma: float
    """discount, 0 < gamma < 1."""

    @property
    def ends(self) -> Tensor:
        """(N, A) probability that the trajectory ends."""
        return 1 - self.moves.sum(-1)

    def next(self, values: Tensor, end_value: Tensor | float = 0.0) -> Tensor:
        """(..., N, A) mean of V(s') over the next state. values: (..., N), end_value: V of the absorbing state."""
        return (self.moves @ values[..., None, :, None])[..., 0] + self.ends * end_value


def random_mdp(seed: int = 0, gamma: float = 0.8, fall: float = 0.9, stumble: float = 0.02) -> MDP:
    """Random moves. Action 0 ends the trajectory with probability `fall`, the others with probability `stumble`."""
    generator = torch.Generator().manual_seed(seed)
    start, moves = (torch.rand(n, generator=generator, dtype=torch.float64) for n in ((4,), (4, 3, 4)))
    goes_on = 1 - torch.tensor([fall, stumble, stumble], dtype=torch.float64)
    return MDP(start / start.sum(), moves / moves.sum(-1, keepdim=True) * goes_on[:, None], gamma)


# ---- the soft optimum ----
def soft_value(q: Tensor, log_prior: Tensor, alpha: float) -> Tensor:
    """(..., N) alpha log sum_a pi_0 exp(Q / alpha), the largest E_pi[Q - alpha log pi/pi_0]. AIHF Eq. 84."""
    return alpha * (log_prior + q / alpha).logsumexp(-1)


def soft_policy(q: Tensor, log_prior: Tensor, alpha: float) -> Tensor:
    """(..., N, A) log of the policy that reaches soft_value. AIHF Eq. 40."""
    return log_prior + (q - soft_value(q, log_prior, alpha)[..., None]) / alpha


def soft_bellman(mdp: MDP, rewards: Tensor, end_reward: Tensor | float, q: Tensor, log_prior: Tensor, alpha: float):
    """(..., N, A) the soft Bellman operator of Lemma A.3 applied to q. rewards: (..., N, A); end_reward: paid for ever."""
    return rewards + mdp.gamma * mdp.next(soft_value(q, log_prior, alpha), end_reward / (1 - mdp.gamma))


def optimal_q(mdp: MDP, rewards: Tensor, end_reward: Tensor | float, log_prior: Tensor, alpha: float) -> Tensor:
    """(..., N, A) soft-optimal Q by value iteration from 0 until gamma^n is below rounding. Carries gradient."""
    q = torch.zeros_like(rewards)
    for _ in range(math.ceil(math.log(1e-18) / math.log(mdp.gamma))):
        q = soft_bellman(mdp, rewards, end_reward, q, log_prior, alpha)
    return q


# ---- any policy ----
def transitions(mdp: MDP, log_policy: Tensor) -> Tensor:
    """(..., N, N) probability of the living next state under the policy (..., N, A)."""
    return (log_policy.exp()[..., None] * mdp.moves).sum(-2)


def policy_q(
    mdp: MDP, rewards: Tensor, end_reward: Tensor | float, log_policy: Tensor, log_prior: Tensor, alpha: float
) -> Tensor:
    """(..., N, A) soft Q of a given policy, by a linear system in V(s) = E_pi[Q - alpha log pi/pi_0]. AIHF Eq. 41."""
    end_value = end_reward / (1 - mdp.gamma)
    now = rewards - alpha * (log_policy - log_prior) + mdp.gamma * mdp.ends * end_value
    rest = torch.eye(len(mdp.start), dtype=torch.float64) - mdp.gamma * transitions(mdp, log_policy)
    values = torch.linalg.solve(rest, (log_policy.exp() * now).sum(-1))
    return rewards + mdp.gamma * mdp.next(values, end_value)


def occupancy(mdp: MDP, log_policy: Tensor) -> tuple[Tensor, Tensor]:
    """(visits (..., N, A), time ended (...)): sum_t gamma^t P(s_t, a_t), and sum_t gamma^t P(ended by t).

    Together they sum to 1 / (1 - gamma).
    """
    rest = torch.eye(len(mdp.start), dtype=torch.float64) - mdp.gamma * transitions(mdp, log_policy)
    states = torch.linalg.solve(rest.mT, mdp.start.expand(rest.shape[:-1]))
    visits = states[..., None] * log_policy.exp()
    return visits, 1 / (1 - mdp.gamma) - visits.sum((-2, -1))


# ---- AIHF's Algorithm 1 ----
Step = Callable[[Tensor, Tensor], Tensor]
"""(rewards (S, N, A), log_policy (S, N, A)) -> direction (S, N, A)."""


def algorithm_1(
    mdp: MDP,
    estimate: Step,
    gradient: Step,
    S: int,
    T: int,
    eta: float,
    log_prior: Tensor,
    alpha: float,
    policy_step: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards (S, N, A), errors (S,), squares (S,)) of S runs of T iterations from rewards 0, where no trajectory ends.

    Iteration k: pi_{k+1} = pi_0 exp(Q_{k+1} / alpha) / Z, then theta_{k+1} = theta_k + eta * estimate(theta_k, pi_{k+1}), where
    theta is the table of rewards. policy_step "improvement": Q_{k+1} is the soft Q of pi_k, as in the proof of Theorem 4.1;
    "update": Q_{k+1} is the soft Bellman operator applied to Q_k, which is what a critic can afford.
    errors: mean over k of max_{s,a} |log pi_{k+1} - log pi_{theta_k}|, AIHF Eq. 20a, with pi_theta the soft optimum of theta.
    squares: mean over k of |gradient(theta_k, pi_{theta_k})|^2, Eq. 20b.
    """
    rewards = q = torch.zeros(S, *log_prior.shape, dtype=torch.float64)
    errors = squares = torch.zeros(S, dtype=torch.float64)
    policy = best = log_prior.log_softmax(-1).expand_as(rewards)
    for _ in range(T):
        if policy_step == "improvement":
            q = policy_q(mdp, rewards, 0.0, policy, log_prior, alpha)
        else:
            q = soft_bellman(mdp, rewards, 0.0, q, log_prior, alpha)
        policy = soft_policy(q, log_prior, alpha)
        for _ in range(20):  # soft policy iteration is Newton's method: what is left is the square of the last change
            last, best = best, soft_policy(policy_q(mdp, rewards, 0.0, best, log_prior, alpha), log_prior, alpha)
            if (best - last).abs().max() < 1e-6:
                break
        errors = errors + (policy - best).abs().amax((-2, -1)) / T
        squares = squares + (gradient(rewards, best) ** 2).sum((-2, -1)) / T
        rewards = rewards + eta * estimate(rewards, policy)
    return rewards, errors, squares
