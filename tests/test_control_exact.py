"""The mathematics of aihf_mujoco.py on a decision process that can be solved (toy/mdp.py). float64, no environment."""

import math

import mdp
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from aihf_mujoco import (
    actor_loss,
    advantage_weights,
    critic_target,
    demonstration_loss,
    implied_reward,
    ipl_loss,
    segment_loss,
    squashed_logprob,
    squashed_sample,
    temperature_loss,
)

FALLS = mdp.random_mdp()  # trajectories end
LASTS = mdp.random_mdp(fall=0.0, stumble=0.0)  # none ends
N, A = FALLS.ends.shape
PRIORS = ["uniform", "kl"]
ALPHAS = [0.2, 1.0, 3.0]


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_prior(name):
    """SAC's entropy is the prior 1 of every action; Eq. 7's KL penalty has a policy."""
    return torch.zeros(N, A, dtype=torch.float64) if name == "uniform" else randn(N, A, seed=1).log_softmax(-1)


def minimise(loss, *shape):
    """(minimiser from 0, largest entry of the gradient there)."""
    x = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    return x.detach(), float(x.grad.abs().max())


def near(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


# ---- the solver itself ----
@pytest.mark.parametrize("process", [FALLS, LASTS], ids=["falls", "lasts"])
def test_occupancies_and_values_are_those_of_long_sums(process):
    policy, rewards, prior = randn(N, A, seed=2).log_softmax(-1), randn(N, A, seed=3), log_prior("kl")
    states, visits, ended, total = process.start, torch.zeros(N, A, dtype=torch.float64), 0.0, 0.0
    for t in range(300):  # 0.8^300 is below rounding
        now = states[:, None] * policy.exp()
        gone = 1 - float(states.sum())
        visits, ended = visits + process.gamma**t * now, ended + process.gamma**t * gone
        total += process.gamma**t * (float((now * (rewards - 0.5 * (policy - prior))).sum()) + 0.7 * gone)
        states = torch.einsum("ij,ijk->k", now, process.moves)
    found = mdp.occupancy(process, policy)
    near(found[0], visits)
    near(found[1], ended)
    q = mdp.policy_q(process, rewards, 0.7, policy, prior, 0.5)
    value = (policy.exp() * (q - 0.5 * (policy - prior))).sum(-1)
    near(process.start @ value, total)


# ---- 1. Lemma 4.1 ----
@pytest.mark.parametrize("end_reward", [None, 0.6], ids=["lasts", "absorbing"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_lemma_4_1(alpha, prior, end_reward):
    """The gradient of E_demonstrations[sum_t gamma^t log pi_r(a_t|s_t)] by autograd through soft value iteration.

    Where trajectories end, the learned reward of the absorbing state is one row more, and its weight is the time left.
    """
    process = LASTS if end_reward is None else FALLS
    table = torch.cat([randn(N * A, seed=4), f64([end_reward or 0.0])]).requires_grad_()
    expert = mdp.occupancy(process, randn(N, A, seed=5).log_softmax(-1))
    optimum = mdp.soft_policy(
        mdp.optimal_q(process, table[:-1].reshape(N, A), table[-1], log_prior(prior), alpha), log_prior(prior), alpha
    )
    (exact,) = torch.autograd.grad((expert[0] * optimum).sum(), table)
    assert exact.norm() > 0.1 and (end_reward is None or abs(exact[-1]) > 0.1)

    policy = mdp.occupancy(process, optimum.detach())
    demonstrated, sampled = (torch.cat([visits.flatten(), left[None]])[None] for visits, left in (expert, policy))
    loss = demonstration_loss(table[None], demonstrated, table[None], sampled)
    assert loss.shape == (1,)
    (gradient,) = torch.autograd.grad(loss.sum(), table)
    near(demonstrated.sum(), 1 / (1 - process.gamma))
    near(exact, -demonstrated.sum() / alpha * gradient, 1e-11)


def test_without_the_absorbing_row_the_loss_is_not_the_lemma():
    """A mean over the living steps forgets how long each side lived, so that its gradient points elsewhere."""
    rewards = randn(N, A, seed=4).requires_grad_()
    prior = log_prior("uniform")
    expert, _ = mdp.occupancy(FALLS, randn(N, A, seed=5).log_softmax(-1))
    optimum = mdp.soft_policy(mdp.optimal_q(FALLS, rewards, 0.0, prior, 1.0), prior, 1.0)
    (exact,) = torch.autograd.grad((expert * optimum).sum(), rewards)
    policy, _ = mdp.occupancy(FALLS, optimum.detach())
    rows = [x.flatten()[None] for x in (rewards, expert, rewards, policy)]
    (gradient,) = torch.autograd.grad(demonstration_loss(*rows).sum(), rewards)
    assert torch.cosine_similarity(-gradient.flatten(), exact.flatten(), 0) < 0.95


def test_seeds_and_weights_of_the_demonstration_loss_stay_apart():
    demonstrated, weights = randn(2, 3, seed=6), f64([[1.0, 0.9, 0.81], [1.0, 1.0, 5.0]])
    sampled, sampled_weights = randn(2, 2, seed=7), f64([[1.0, 3.0], [0.5, 0.5]])
    means = [np.average(r, weights=w, axis=1) for r, w in ((demonstrated, weights), (sampled, sampled_weights))]
    near(demonstration_loss(demonstrated, weights, sampled, sampled_weights), means[1] - means[0])


# ---- 2. the soft Bellman operator ----
def script_operator(process, q, policy, prior, alpha, rewards=None, end_value=None):
    """E[critic_target] over the next state and the next action of a policy, for every state and action.

    q: (S, N, A), policy: (S, N, A) log probabilities. The end terminates; with end_value it is a step to an absorbing state
    of that value, in which there is one action and so no entropy.
    """
    S = len(q)
    rewards = (randn(N, A, seed=3) if rewards is None else rewards).expand_as(q)
    now = rewards[:, :, :, None, None].expand(S, N, A, N, A).reshape(S, -1)
    pairs = [x[:, None, None].expand(S, N, A, N, A).reshape(S, -1) for x in (q, policy - prior)]
    alphas = torch.full((S, 1), alpha, dtype=torch.float64)
    lives = critic_target(now, torch.zeros_like(now), *pairs, alphas, process.gamma).reshape(S, N, A, N, A)
    flat = rewards.reshape(S, -1)
    one, zero = torch.ones_like(flat), torch.zeros_like(flat)
    if end_value is None:  # what the networks say of a terminal state is arbitrary
        ends = critic_target(flat, one, 7 * one, 5 * one, alphas, process.gamma)
    else:
        ends = critic_target(flat, zero, end_value * one, zero, alphas, process.gamma)
    mean = torch.einsum("ijk,skb,sijkb->sij", process.moves, policy.exp(), lives)
    return mean + process.ends * ends.reshape(S, N, A)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_lemma_a_3_contraction(alpha, prior):
    """Sup-norm distances of 1,000 random pairs and of 20 constant shifts, which shrink by gamma exactly if nothing ends."""
    prior = log_prior(prior)
    first, second = 3 * randn(1020, N, A, seed=8), 3 * randn(1020, N, A, seed=9)
    second[1000:] = first[1000:] + randn(20, 1, 1, seed=10)

    def apply(process, q):
        return script_operator(process, q, mdp.soft_policy(q, prior, alpha), prior, alpha)

    def norm(x):
        return x.abs().amax((-2, -1))

    before = norm(first - second)
    lasts = norm(apply(LASTS, first) - apply(LASTS, second)) / before
    falls = norm(apply(FALLS, first) - apply(FALLS, second)) / before
    assert lasts.max() < LASTS.gamma + 1e-12 and falls.max() < FALLS.gamma * 0.98 + 1e-12
    near(lasts[1000:], [LASTS.gamma] * 20, 1e-10)


@pytest.mark.parametrize("process", [FALLS, LASTS], ids=["falls", "lasts"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_lemma_a_3_fixed_point(alpha, prior, process):
    """The script's operator iterated to its end is the closed form; its value is that of its policy and of no better one."""
    prior, rewards = log_prior(prior), randn(N, A, seed=3)
    q = torch.zeros(1, N, A, dtype=torch.float64)
    for _ in range(200):
        q = script_operator(process, q, mdp.soft_policy(q, prior, alpha), prior, alpha)
    policy = prior + q / alpha - (prior + q / alpha).logsumexp(-1, keepdim=True)
    value = alpha * (prior.exp() * (q / alpha).exp()).sum(-1).log()
    near(q, rewards + process.gamma * process.next(value), 1e-10)
    near(q[0], mdp.optimal_q(process, rewards, 0.0, prior, alpha), 1e-10)
    near(q, mdp.policy_q(process, rewards, 0.0, policy, prior, alpha), 1e-10)
    others = torch.cat([policy + 0.1 * randn(50, N, A, seed=11), 2 * randn(50, N, A, seed=12)]).log_softmax(-1)
    worse = mdp.policy_q(process, rewards, 0.0, others, prior, alpha)
    assert (worse < q).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_the_target_of_a_given_policy_leads_to_its_soft_value(prior):
    """What SAC's critic converges to while the policy is held: AIHF Eq. 41."""
    prior, policy = log_prior(prior), randn(1, N, A, seed=5).log_softmax(-1)
    q = torch.zeros(1, N, A, dtype=torch.float64)
    for _ in range(200):
        q = script_operator(FALLS, q, policy, prior, 0.7)
    near(q, mdp.policy_q(FALLS, randn(N, A, seed=3), 0.0, policy, prior, 0.7), 1e-10)


# ---- 3. the end of an episode ----
def fixed_point(prior, alpha, rewards, end_value=None):
    q = torch.zeros(1, N, A, dtype=torch.float64)
    for _ in range(200):
        q = script_operator(FALLS, q, mdp.soft_policy(q, prior, alpha), prior, alpha, rewards, end_value)
    return q[0], mdp.soft_policy(q[0], prior, alpha)


def time_alive(policy):
    """Discounted share of the time before the end, between 1 - gamma = 0.2 and 1."""
    return float((1 - FALLS.gamma) * mdp.occupancy(FALLS, policy)[0].sum())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("end_reward", [-2.0, 0.0, 1.5])
def test_subtracting_the_absorbing_reward_replaces_the_absorbing_state(end_reward, alpha, prior):
    """r - r_absorbing without bootstrap at the end: the same policy, and Q lower by what standing still for ever pays."""
    prior, rewards, forever = log_prior(prior), randn(N, A, seed=3), end_reward / (1 - FALLS.gamma)
    explicit, policy = fixed_point(prior, alpha, rewards, end_value=forever)
    shifted, same = fixed_point(prior, alpha, rewards - end_reward)
    near(same, policy, 1e-10)
    near(shifted, explicit - forever, 1e-10)
    near(explicit, mdp.optimal_q(FALLS, rewards, end_reward, prior, alpha), 1e-10)
    if end_reward:
        _, naive = fixed_point(prior, alpha, rewards)
        assert (naive - policy).abs().max() > 0.2


def test_a_constant_decides_over_life_and_death_in_the_naive_reading_and_in_no_other():
    """Preferences between segments of one length fit a reward up to a constant. With --horizon terminate it decides alone."""
    prior, alpha = log_prior("uniform"), 0.2
    rewards, end_reward = randn(N, A, seed=3), 0.3
    first, second = torch.randint(0, N * A, (2, 50, 6), generator=torch.Generator().manual_seed(13))
    alive, shifted, losses = [], [], []
    for constant in (-5.0, 0.0, 5.0):
        table = rewards + constant
        losses.append(segment_loss(table.flatten()[first], table.flatten()[second]))
        alive.append(time_alive(fixed_point(prior, alpha, table)[1]))
        shifted.append(fixed_point(prior, alpha, table - (end_reward + constant))[1])
    near(losses[0], losses[1])
    near(losses[2], losses[1])
    assert alive[0] < 0.28 and alive[2] > 0.9
    near(shifted[0], shifted[1], 1e-10)
    near(shifted[2], shifted[1], 1e-10)


# ---- 4. preferences ----
def test_segment_loss_is_bradley_terry_on_sums():
    """Eq. 8 in numpy, its gradient (-sigmoid(-margin) for every preferred step, the opposite for a rejected one)."""
    preferred, rejected = (randn(2, 3, 4, seed=s).requires_grad_() for s in (14, 15))
    loss = segment_loss(preferred, rejected)
    assert loss.shape == (2, 3)
    margin = preferred.detach().numpy().sum(-1) - rejected.detach().numpy().sum(-1)
    near(loss.detach(), np.log1p(np.exp(-margin)))
    gradients = torch.autograd.grad(loss.sum(), (preferred, rejected))
    slope = np.repeat(1 / (1 + np.exp(margin))[..., None], 4, -1)
    near(gradients[0], -slope)
    near(gradients[1], slope)
    assert torch.autograd.gradcheck(segment_loss, (preferred, rejected))


def test_segment_loss_sees_a_constant_only_between_unequal_lengths():
    preferred, rejected = randn(5, 4, seed=14), randn(5, 6, seed=15)
    near(segment_loss(preferred + 3, rejected[:, :4] + 3), segment_loss(preferred, rejected[:, :4]))
    assert (segment_loss(preferred + 3, rejected + 3) > segment_loss(preferred, rejected) + 0.01).all()


# ---- 5. inverse preference learning ----
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("process", [FALLS, LASTS], ids=["falls", "lasts"])
def test_q_to_reward_and_reward_to_q_are_inverse(process, prior):
    """IPL's bijection at the soft optimum; the next value is the mean over the next state."""
    prior, alpha = log_prior(prior), 0.5
    rewards, q = randn(N, A, seed=3), 2 * randn(N, A, seed=16)

    def implied(q):
        return implied_reward(q, process.next(mdp.soft_value(q, prior, alpha)), process.gamma)

    near(implied(mdp.optimal_q(process, rewards, 0.0, prior, alpha)), rewards)
    near(mdp.optimal_q(process, implied(q), 0.0, prior, alpha), q, 1e-11)


def test_ipl_loss_by_hand():
    preferred, rejected = randn(2, 3, 4, seed=14), randn(2, 3, 4, seed=15)
    a, b = preferred.numpy(), rejected.numpy()
    expected = np.log1p(np.exp(b.sum(-1) - a.sum(-1))) + 0.3 * np.concatenate([a, b], -1).__pow__(2).mean(-1)
    near(ipl_loss(preferred, rejected, 0.3), expected)
    near(ipl_loss(preferred, rejected, 0.0), segment_loss(preferred, rejected))


@pytest.mark.parametrize("process", [FALLS, LASTS], ids=["falls", "lasts"])
def test_minimising_over_q_or_over_r_gives_one_reward_and_one_policy(process):
    """With l2 > 0 the minimiser over r is unique; the one over Q implies it, and is its soft-optimal Q."""
    prior, alpha, l2 = log_prior("uniform"), 0.5, 0.1
    true = randn(N * A, seed=3)
    first, second = torch.randint(0, N * A, (2, 200, 4), generator=torch.Generator().manual_seed(17))
    swap = (true[second].sum(-1) > true[first].sum(-1))[:, None]
    preferred, rejected = torch.where(swap, second, first), torch.where(swap, first, second)

    def loss(rewards):
        return ipl_loss(rewards.flatten()[preferred], rewards.flatten()[rejected], l2).mean()

    def implied(q):
        return implied_reward(q, process.next(mdp.soft_value(q, prior, alpha)), process.gamma)

    rewards, left = minimise(loss, N, A)
    q, left_q = minimise(lambda q: loss(implied(q)), N, A)
    assert left < 1e-9 and left_q < 1e-9
    near(implied(q), rewards, 1e-7)
    near(q, mdp.optimal_q(process, rewards, 0.0, prior, alpha), 1e-6)
    assert torch.corrcoef(torch.stack([rewards.flatten(), true]))[0, 1] > 0.9


# ---- 6. SAC ----
def test_truncation_bootstraps_and_termination_does_not():
    """The time limit leaves terminated 0. Each seed has its own alpha."""
    rewards, next_q = f64([[1.0, 2.0], [3.0, 4.0]]), f64([[10.0, 20.0], [30.0, 40.0]])
    terminated, log_ratio = f64([[0.0, 1.0], [1.0, 0.0]]), f64([[1.0, 2.0], [3.0, -4.0]])
    found = critic_target(rewards, terminated, next_q, log_ratio, f64([[0.5], [2.0]]), 0.9)
    near(found, [[1 + 0.9 * (10 - 0.5), 2.0], [3.0, 4 + 0.9 * (40 + 8)]])


@pytest.mark.parametrize("entropy, rises", [(-3.0, True), (-1.0, False)])
def test_alpha_rises_while_the_entropy_is_below_its_target(entropy, rises):
    """The slope in log alpha is the entropy above its target, for each seed."""
    log_alpha = torch.tensor([[-1.0], [0.5]], dtype=torch.float64, requires_grad=True)
    noise = 0.1 * randn(2, 1000, seed=18)
    logprobs = -entropy + noise - noise.mean(-1, keepdim=True)
    loss = temperature_loss(log_alpha, logprobs, target_entropy=-2.0)
    assert loss.shape == (2, 1000)
    loss.mean(-1).sum().backward()
    near(log_alpha.grad, [[entropy + 2.0]] * 2)
    moved = log_alpha.detach() - 0.1 * log_alpha.grad
    assert ((moved > log_alpha) == rises).all()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_actor_of_least_loss_is_the_soft_optimum(alpha, prior):
    """Over a few actions E_pi[loss] = alpha KL(pi || optimum) - V, for any policy; its slope at the optimum is 0."""
    prior, q = log_prior(prior), 2 * randn(N, A, seed=16)
    optimum, value = mdp.soft_policy(q, prior, alpha), mdp.soft_value(q, prior, alpha)

    def mean_loss(logits):
        policy = logits.log_softmax(-1)
        losses = actor_loss(q, policy - prior, alpha * torch.ones(N, 1).double())
        assert losses.shape[-2:] == (N, A)
        return (policy.exp() * losses).sum(-1)

    policies = 2 * randn(100, N, A, seed=12)
    others = policies.log_softmax(-1)
    kl = (others.exp() * (others - optimum)).sum(-1)
    assert kl.min() > 0
    near(mean_loss(policies), alpha * kl - value)
    (slope,) = torch.autograd.grad(mean_loss(optimum.requires_grad_()).sum(), optimum)
    near(slope, torch.zeros(N, A))


def test_the_squashed_gaussian_of_least_loss_is_the_soft_optimum():
    """One action, gradient through the sample: where Q / alpha is a squashed Gaussian's log density, that is the minimiser."""
    alpha, mean, std = 0.4, 0.3, 0.5
    points, weights = map(f64, np.polynomial.hermite_e.hermegauss(20))
    best = TransformedDistribution(Normal(f64(mean), f64(std)), TanhTransform())

    def mean_loss(x):
        actions, logprobs = squashed_sample(x[:1].expand(20, 1), x[1:].expand(20, 1), points[:, None])
        losses = actor_loss(alpha * best.log_prob(actions[:, 0]), logprobs, f64(alpha))
        return (weights / weights.sum() * losses).sum()

    found, left = minimise(mean_loss, 2)
    assert left < 1e-8
    near(found, [mean, math.log(std)], 1e-6)
    near(mean_loss(found), 0.0)


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.8, -1.0), (-1.5, -0.3)])
def test_the_squashed_density_integrates_to_one(mean, log_std):
    noise = torch.linspace(-9, 9, 40001, dtype=torch.float64)[:, None]
    one = f64([1.0])
    actions, logprobs = squashed_sample(mean * one, log_std * one, noise)
    assert actions.min() > -1 - 1e-12 and actions.max() < 1 + 1e-12
    assert abs(float(torch.trapezoid(logprobs.exp(), actions[:, 0])) - 1) < 1e-5


def test_the_squashed_density_is_that_of_torch_and_its_inverse_finds_it():
    mean, log_std, noise = 0.5 * randn(2, 5, 2, seed=19), 0.3 * randn(2, 5, 2, seed=20) - 0.5, randn(2, 5, 2, seed=21)
    actions, logprobs = squashed_sample(mean, log_std, noise)
    assert logprobs.shape == (2, 5)
    near(actions, torch.tanh(mean + log_std.exp() * noise))
    other = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    near(logprobs, other.log_prob(actions), 1e-9)
    near(squashed_logprob(mean, log_std, actions), logprobs, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [30.0, -30.0])
def test_a_saturated_action_keeps_a_finite_density_and_gradient(u, dtype):
    """1 - tanh(u)^2 = 4 exp(-60) at |u| = 30, which float32 rounds to 0. At the border an action counts as 1e-5 inside."""
    mean = torch.tensor([u], dtype=dtype, requires_grad=True)
    log_std = torch.zeros(1, dtype=dtype, requires_grad=True)
    actions, logprob = squashed_sample(mean, log_std, torch.zeros(1, dtype=dtype))
    near(logprob.detach(), -0.5 * math.log(2 * math.pi) - math.log(4) + 60, 1e-5)
    gradients = torch.autograd.grad(logprob, (mean, log_std))
    near(gradients[0], [math.copysign(2.0, u)], 1e-5)
    assert all(torch.isfinite(g).all() for g in gradients)
    border = torch.tensor([math.copysign(1.0, u)], dtype=dtype)
    mean = torch.zeros(1, dtype=dtype)
    near(squashed_logprob(mean, mean, border), squashed_logprob(mean, mean, border * (1 - 1e-5)), 1e-3)
    inside = math.atanh(1 - 1e-5)
    expected = -0.5 * inside**2 - 0.5 * math.log(2 * math.pi) - math.log(1 - (1 - 1e-5) ** 2)
    near(squashed_logprob(mean, mean, border), expected, 5e-2 if dtype == torch.float32 else 1e-9)


def test_advantage_weighted_regression_ends_at_the_prior_times_exp_of_the_advantage():
    """One state: the maximiser of E_data[w log pi] is data * exp(A / temperature) / Z while no weight reaches its bound."""
    data, q, v, temperature = randn(6, seed=22).softmax(-1), randn(6, seed=23), 0.4, 0.7
    weights = advantage_weights(q, v * torch.ones_like(q), temperature)
    assert weights.max() < 100
    logits, left = minimise(lambda x: -(data * weights * x.log_softmax(-1)).sum(), 6)
    assert left < 1e-9
    near(logits.log_softmax(-1), (data.log() + q / temperature).log_softmax(-1), 1e-7)
    near(weights.log() * temperature, q - v)
    near(advantage_weights(f64([10.0, 4.0]), f64([0.0, 0.0]), 1.0), [100.0, math.exp(4.0)])


# ---- 7. Theorem 4.1 ----
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_policy_step_brings_q_nearer_by_gamma(alpha, prior):
    """The inequalities of the proof for 200 rewards and policies: Eq. 39a, 62, 68, and 68 for one Bellman update."""
    prior, rewards, policy = log_prior(prior), randn(200, N, A, seed=3), 2 * randn(200, N, A, seed=5)
    policy = policy.log_softmax(-1)

    def norm(x):
        return x.abs().amax((-2, -1))

    best = mdp.optimal_q(LASTS, rewards, 0.0, prior, alpha)
    q = mdp.policy_q(LASTS, rewards, 0.0, policy, prior, alpha)
    improved = mdp.soft_policy(q, prior, alpha)
    evaluated = mdp.policy_q(LASTS, rewards, 0.0, improved, prior, alpha)
    updated = mdp.soft_bellman(LASTS, rewards, 0.0, q, prior, alpha)
    distance, rounding = norm(q - best), 1e-10
    assert (norm(improved - mdp.soft_policy(best, prior, alpha)) < 2 / alpha * distance + rounding).all()
    assert (norm(evaluated - best) < LASTS.gamma * distance + rounding).all()
    assert (norm(updated - best) < LASTS.gamma * distance + rounding).all()
    assert (norm(best[1:] - best[:-1]) < norm(rewards[1:] - rewards[:-1]) / (1 - LASTS.gamma) + rounding).all()


class Joint:
    """AIHF's upper level, Eq. 5a: demonstrations of one policy, and preferences between 40 fixed pairs of segments.

    Of S runs the first has exact expectations. Each other draws one step of both sides and one labelled pair, Eq. 19.
    """

    alpha, prior = 1.0, log_prior("kl")

    def __init__(self):
        self.generator = torch.Generator().manual_seed(24)
        self.expert, _ = mdp.occupancy(LASTS, (1.5 * randn(N, A, seed=5)).log_softmax(-1))
        self.first, self.second = torch.randint(0, N * A, (2, 40, 3), generator=self.generator)
        counts = torch.nn.functional.one_hot(torch.stack([self.first, self.second]), N * A).sum(2).double()
        self.differences = counts[0] - counts[1]  # (40, N A): times the rewards, the margins
        self.prefers = torch.sigmoid(self.differences @ randn(N * A, seed=3))  # how often the first wins

    def drawn(self, weights):
        """(S, n): the first row as it is, each other with weight 1 on one entry, drawn in proportion to the weights."""
        chosen = torch.multinomial(weights, 1, generator=self.generator)
        return torch.cat([weights[:1], torch.zeros_like(weights).scatter(1, chosen, 1.0)[1:]])

    def estimate(self, rewards, policy):
        """Minus the gradient of the script's losses; the demonstrations' has the factor of Lemma 4.1."""
        table = rewards.flatten(1).requires_grad_()
        visits = mdp.occupancy(LASTS, policy)[0].flatten(1)
        expert = self.drawn(self.expert.flatten().expand_as(table))
        demonstrations = demonstration_loss(table, expert, table, self.drawn(visits)) / (1 - LASTS.gamma) / self.alpha
        labels = torch.cat([self.prefers, 1 - self.prefers]).expand(len(table), -1) / 40
        first, second = table[:, self.first], table[:, self.second]
        losses = torch.cat([segment_loss(first, second), segment_loss(second, first)], -1)
        loss = demonstrations + (self.drawn(labels) * losses).sum(-1)
        return -torch.autograd.grad(loss.sum(), table)[0].reshape_as(rewards)

    def gradient(self, rewards, optimum):
        """(S, N, A) gradient of the likelihood in closed form."""
        demonstrations = (self.expert - mdp.occupancy(LASTS, optimum)[0]) / self.alpha
        preferences = (self.prefers - torch.sigmoid(rewards.flatten(1) @ self.differences.T)) @ self.differences / 40
        return demonstrations + preferences.reshape_as(rewards)

    def optimum(self, rewards):
        return mdp.soft_policy(mdp.optimal_q(LASTS, rewards, 0.0, self.prior, self.alpha), self.prior, self.alpha)

    def likelihood(self, rewards):
        """(S,) E_demonstrations[sum_t gamma^t log pi_r] + the mean log-likelihood of a label, nats."""
        wins = torch.sigmoid(rewards.flatten(1) @ self.differences.T)
        pairs = self.prefers * wins.log() + (1 - self.prefers) * (1 - wins).log()
        return (self.expert * self.optimum(rewards)).sum((-2, -1)) + pairs.mean(-1)

    def run(self, T, policy_step, estimate=None, eta=None):
        """33 runs of T iterations with the theorem's step size at sigma = 1/2 and eta_0 = 1."""
        eta = 1 / math.sqrt(T) if eta is None else eta
        estimate = estimate or self.estimate
        return mdp.algorithm_1(LASTS, estimate, self.gradient, 33, T, eta, self.prior, self.alpha, policy_step)


def scaled(T, run):
    """sqrt(T) times [Eq. 20a, 20b], each [with exact expectations, mean of the runs that sample]."""
    _, *quantities = run
    return math.sqrt(T) * torch.stack([torch.stack([x[0], x[1:].mean()]) for x in quantities])


def test_the_estimate_of_algorithm_1_is_the_gradient_of_its_likelihood():
    """Closed form, autograd through soft value iteration, and the script's losses give one gradient. Draws are unbiased."""
    joint = Joint()
    rewards = randn(1, N, A, seed=25).requires_grad_()
    (exact,) = torch.autograd.grad(joint.likelihood(rewards).sum(), rewards)
    rewards = rewards.detach()
    optimum = joint.optimum(rewards)
    near(joint.gradient(rewards, optimum), exact, 1e-11)
    found = joint.estimate(rewards.expand(20001, N, A), optimum.expand(20001, N, A))
    near(found[:1], exact, 1e-11)
    error = found[1:].std(0) / math.sqrt(20000)
    assert ((found[1:].mean(0) - exact[0]).abs() < 4 * error).all() and error.max() < 0.05


@pytest.mark.parametrize("policy_step", ["improvement", "update"])
def test_theorem_4_1(policy_step):
    """Both quantities of Eq. 20 fall like 1 / sqrt(T) or faster while T grows 16-fold.

    The theorem: with a reward step of eta_0 / T^sigma, the mean error of log pi is O(1/T) + O(T^-sigma), and the mean square
    gradient O(1/T) + O(T^-sigma) + O(T^(sigma-1)); sigma = 1/2 gives 1 / sqrt(T) for both. Tested: sqrt(T) times each stays
    below 1.4 times its value at the smallest T, with exact expectations and with one sample a step.
    Also, the rates found. One soft policy improvement is a Newton step, so its error goes like the square of the reward step:
    1/T when sampling. One Bellman update reaches the bound. Exact gradients climb by sum_k eta |gradient|^2 up to O(eta).
    """
    joint, sizes = Joint(), (100, 400, 1600)
    runs = {T: joint.run(T, policy_step) for T in sizes}
    found = {T: scaled(T, run) for T, run in runs.items()}
    assert (found[400] < 1.4 * found[100]).all() and (found[1600] < 1.4 * found[100]).all()
    exact_error, error = (found[1600] / found[100])[0]
    if policy_step == "improvement":
        assert error == pytest.approx(1 / 4, rel=0.3) and exact_error == pytest.approx(1 / 16, rel=0.3)
    else:
        assert error == pytest.approx(1, rel=0.25) and exact_error < 0.6
    for T, (rewards, _, squares) in runs.items():
        gain = (joint.likelihood(rewards) - joint.likelihood(torch.zeros_like(rewards)))[0]
        assert gain > 2
        near(math.sqrt(T) * squares[0], gain, 1 / math.sqrt(T))


@pytest.mark.parametrize("wrong", ["step of one size", "downhill", "samples of the first policy"])
def test_a_wrong_algorithm_1_does_not_have_the_rate(wrong):
    joint = Joint()
    change = {
        "step of one size": (None, 0.1),
        "downhill": (lambda rewards, policy: -joint.estimate(rewards, policy),),
        "samples of the first policy": (
            lambda rewards, policy: joint.estimate(rewards, joint.prior.expand_as(policy)),
        ),
    }[wrong]
    few, many = (scaled(T, joint.run(T, "update", *change)) for T in (50, 400))
    assert (many > 2 * few).any()
