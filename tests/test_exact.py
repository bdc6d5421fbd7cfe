"""The papers' statements on the enumerable language, with the scripts' own loss functions. float64, to rounding."""

import math

import exact
import numpy as np
import pytest
import torch

from common.data import collate
from common.logprobs import masked_sum, response_logprobs
from irft import irft_loss
from sft import nll_loss

ARCHITECTURES = ["gpt_neox", "mistral"]
BETA = 0.3


def scored(model, prompt, responses=None):
    """(Y,) log pi(y|x) by the scripts' own path: collate, forward, shift, mask, sum."""
    responses = exact.RESPONSES if responses is None else responses
    batch = collate([(prompt, y) for y in responses], pad_token_id=exact.EOS)
    return masked_sum(response_logprobs(model, batch).logprobs, batch.response_mask)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request):
    return exact.make_model(request.param, 0), exact.make_model(request.param, 1)


@pytest.fixture(scope="module")
def expert():
    generator = torch.Generator().manual_seed(7)
    weights = torch.rand(len(exact.RESPONSES), generator=generator, dtype=torch.float64) ** 3
    return weights / weights.sum()


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_every_response_is_listed_once():
    assert len(exact.RESPONSES) == 1 + 3 + 9 + 27 + 81 == len({tuple(r) for r in exact.RESPONSES})


@pytest.mark.parametrize("prompt", exact.PROMPTS)
def test_log_probs_of_all_responses_sum_to_one(models, prompt):
    ours = scored(models[0], prompt)
    assert abs(ours.exp().sum().item() - 1) < 1e-12
    torch.testing.assert_close(ours, exact.response_logprobs(models[0], prompt), rtol=0, atol=1e-12)


def test_scores_do_not_depend_on_the_batch_they_travel_in(models):
    mixed = [(p, y) for p in exact.PROMPTS for y in exact.RESPONSES[::7]]
    batch = collate(mixed, pad_token_id=0)
    together = masked_sum(response_logprobs(models[0], batch).logprobs, batch.response_mask)
    alone = torch.stack([scored(models[0], p, [y])[0] for p, y in mixed])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompt", exact.PROMPTS)
def test_lemma_3_1_minimax_equals_likelihood(models, expert, prompt):
    ref, other = (
        exact.response_logprobs(models[1], prompt).detach(),
        exact.response_logprobs(models[0], prompt).detach(),
    )
    rewards = torch.linspace(-1, 1, len(ref), dtype=torch.float64)
    optimum = exact.optimal_policy(ref, rewards, BETA)
    inner = exact.minimax_value(expert, optimum, ref, rewards, BETA)
    outer = exact.likelihood(expert, ref, rewards, BETA) - (expert * ref).sum()
    assert abs((inner - outer).item()) < 1e-10
    assert exact.minimax_value(expert, other, ref, rewards, BETA) > inner + 1e-3
    for mix in (0.01, 0.1):  # near the optimum too
        nearby = torch.log((1 - mix) * optimum.exp() + mix * other.exp())
        assert exact.minimax_value(expert, nearby, ref, rewards, BETA) > inner


def test_lemma_5_1_gradient_with_a_neural_reward(models, expert):
    """grad l = (E_D grad r - E_pi grad r) / beta against autograd through log Z. IRL Lemma 5.1, RFT Eq. 13."""
    ref = exact.response_logprobs(models[1], exact.PROMPTS[1]).detach()
    rewards = torch.tanh(
        exact.response_logprobs(models[0], exact.PROMPTS[1])
    )  # any differentiable function of the weights
    truth = flat_gradient(exact.likelihood(expert, ref, rewards, BETA), models[0])
    policy = exact.optimal_policy(ref, rewards, BETA).exp().detach()
    formula = flat_gradient(((expert - policy) * rewards).sum() / BETA, models[0])
    assert truth.norm() > 1e-3
    torch.testing.assert_close(formula, truth, rtol=0, atol=1e-10)


def test_lemma_3_2_gradient_through_the_policy(models, expert):
    """With r = beta log pi/pi_ref + beta log Z the gradient of Eq. 4 is E_D grad log pi - E_pi grad log pi. RFT Eq. 6."""
    policy, ref = models
    prompt = exact.PROMPTS[2]
    logp, ref_logp = exact.response_logprobs(policy, prompt), exact.response_logprobs(ref, prompt).detach()
    rewards = BETA * (logp - ref_logp)
    torch.testing.assert_close(exact.optimal_policy(ref_logp, rewards, BETA), logp, rtol=0, atol=1e-12)
    truth = flat_gradient(exact.likelihood(expert, ref_logp, rewards, BETA), policy)
    formula = flat_gradient(((expert - logp.exp().detach()) * (logp - ref_logp)).sum(), policy)
    torch.testing.assert_close(formula, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_linear_irft_loss_averaged_over_responses_is_the_exact_gradient(models, expert, beta):
    policy, ref = models
    prompt = exact.PROMPTS[0]
    logp, ref_logp = scored(policy, prompt), scored(ref, prompt).detach()
    pi = logp.exp().detach()
    y, generated = torch.meshgrid(torch.arange(len(pi)), torch.arange(len(pi)), indexing="ij")
    y, generated = y.flatten(), generated.flatten()
    losses = irft_loss(logp[y], logp[generated], ref_logp[y], ref_logp[generated], beta, "linear")
    averaged = flat_gradient((expert[y] * pi[generated] * losses).sum(), policy)
    truth = flat_gradient(exact.likelihood(expert, ref_logp, BETA * (logp - ref_logp), BETA), policy)
    torch.testing.assert_close(averaged, -truth, rtol=0, atol=1e-10)


def test_sampled_linear_gradient_is_unbiased_within_four_standard_errors(models, expert):
    policy, ref = models
    prompt, n = exact.PROMPTS[0], 4000
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp = scored(policy, prompt), scored(ref, prompt).detach()
    weight = torch.zeros(len(expert), dtype=torch.float64)  # a fixed random direction in weight space makes it a scalar
    direction = torch.randn(sum(p.numel() for p in policy.parameters()), generator=generator, dtype=torch.float64)
    truth = flat_gradient(((expert - logp.exp().detach()) * logp).sum(), policy)
    per_response = torch.stack([flat_gradient(logp[i], policy) @ direction[: len(truth)] for i in range(len(expert))])
    y = torch.multinomial(expert, n, replacement=True, generator=generator)
    generated = torch.multinomial(logp.exp().detach(), n, replacement=True, generator=generator)
    leaf_y = per_response[y]
    estimates = -(leaf_y - per_response[generated])
    base = logp.detach().requires_grad_()
    loss = irft_loss(base[y], base[generated], ref_logp[y], ref_logp[generated], 1.0, "linear").sum()
    (weight,) = torch.autograd.grad(loss, base)  # d loss / d log pi of each response, by the script's own function
    torch.testing.assert_close((weight @ per_response), estimates.sum(), rtol=1e-9, atol=1e-9)
    error = estimates.std() / math.sqrt(n)
    assert abs(estimates.mean() + truth @ direction[: len(truth)]) < 4 * error
    assert error < 0.2 * abs(estimates.mean())


def logistic_by_hand(chosen, generated, ref_chosen, ref_generated, beta):
    """SPIN's loss in plain numpy: l(lambda (log-ratio of the real) - lambda (log-ratio of the generated)), l = log(1 + e^-t)."""
    t = beta * ((chosen - ref_chosen) - (generated - ref_generated))
    return np.log1p(np.exp(-t))


def check_irft_loss(loss) -> bool:
    """Value and gradient of a pair loss against numpy and finite differences. Used on the real one and on mutants."""
    rng = np.random.default_rng(0)
    values = [rng.normal(-5, 2, 8) for _ in range(4)]
    tensors = [torch.tensor(v, requires_grad=True) for v in values[:2]] + [torch.tensor(v) for v in values[2:]]
    expected = logistic_by_hand(*values, BETA)
    found = loss(*tensors, BETA)
    if found.shape != (8,) or not np.allclose(found.detach().numpy(), expected, atol=1e-12, rtol=0):
        return False
    gradients = torch.autograd.grad(found.sum(), tensors[:2])
    for k, gradient in enumerate(gradients):
        for i in range(8):
            up, down = [v.copy() for v in values], [v.copy() for v in values]
            up[k][i] += 1e-6
            down[k][i] -= 1e-6
            slope = (logistic_by_hand(*up, BETA).sum() - logistic_by_hand(*down, BETA).sum()) / 2e-6
            if abs(slope - gradient[i].item()) > 1e-8:
                return False
    return True


def test_logistic_loss_equals_spin_in_value_and_gradient():
    assert check_irft_loss(irft_loss)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda c, g, rc, rg, b: irft_loss(g, c, rg, rc, b),
        lambda c, g, rc, rg, b: irft_loss(c, g, rc, rg, 1.0),
        lambda c, g, rc, rg, b: irft_loss(c, g, 0 * rc, 0 * rg, b),
        lambda c, g, rc, rg, b: irft_loss(c / 3, g / 3, rc / 3, rg / 3, b),
        lambda c, g, rc, rg, b: irft_loss(c, g, rg, rc, b),
        lambda c, g, rc, rg, b: irft_loss(c, g.detach(), rc, rg, b) + 0 * g,
    ],
    ids=["sign", "no_beta", "no_reference", "mean_for_sum", "references_swapped", "negative_without_gradient"],
)
def test_a_wrong_loss_is_told_apart(mutant):
    assert not check_irft_loss(mutant)


@pytest.mark.parametrize("loss_type", ["logistic", "linear"])
def test_gradcheck(loss_type):
    values = [
        torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(i), requires_grad=True)
        for i in range(4)
    ]
    assert torch.autograd.gradcheck(lambda *v: irft_loss(*v, BETA, loss_type), values)


def test_where_policy_is_reference_the_loss_is_log_2_and_half_beta_of_the_linear_gradient():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, dtype=torch.float64, requires_grad=True)
    loss = irft_loss(x, y, x.detach(), y.detach(), BETA)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-15)
    logistic = torch.autograd.grad(loss.sum(), (x, y))
    linear = torch.autograd.grad(irft_loss(x, y, x.detach(), y.detach(), BETA, "linear").sum(), (x, y))
    for a, b in zip(logistic, linear, strict=True):
        torch.testing.assert_close(a, BETA / 2 * b, rtol=0, atol=1e-15)


def test_beta_must_be_positive():
    x = torch.zeros(2)
    for beta in (0.0, -0.1):
        with pytest.raises(ValueError, match="beta must be > 0"):
            irft_loss(x, x, x, x, beta)


def check_nll(loss) -> bool:
    """nll_loss against the oracle's log-probs, response by response; padded positions hold NaN."""
    model = exact.make_model("gpt_neox", 0)
    batch = collate([(exact.PROMPTS[0], y) for y in exact.RESPONSES[::11]], pad_token_id=exact.EOS)
    tokens = response_logprobs(model, batch).logprobs.detach()
    poisoned = torch.where(batch.response_mask, tokens, torch.nan)
    expected = -exact.response_logprobs(model, exact.PROMPTS[0], exact.RESPONSES[::11]).detach()
    return torch.allclose(loss(poisoned, batch.response_mask), expected, rtol=0, atol=1e-12)


def test_nll_is_minus_the_log_prob_of_the_response():
    assert check_nll(nll_loss)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x, m: -nll_loss(x, m),
        lambda x, m: nll_loss(x, m) / m.sum(-1),
        lambda x, m: -x.sum(-1),
        lambda x, m: nll_loss(x[:, :-1], m[:, :-1]),
    ],
    ids=["sign", "mean_for_sum", "no_mask", "last_token_lost"],
)
def test_a_wrong_nll_is_told_apart(mutant):
    assert not check_nll(mutant)


@pytest.mark.parametrize("size", [4, 32])
def test_lemma_4_1_bound_over_many_data_sets(size):
    violated, tightness = exact.lemma_4_1(size, 2000, delta=0.1)
    assert violated <= 0.1
    assert tightness > 0.01  # the bound is not vacuous: the gap is a visible part of it
    doubled, _ = exact.lemma_4_1(
        size, 2000, delta=2.0 - 1e-9
    )  # with delta near 2 the bound shrinks to 0 and must break
    assert doubled > 0.9


def test_theorem_3_1_decay_in_T_and_K():
    measured = exact.rates(seeds=32, sizes=(4, 16))
    assert measured[16, 4] < measured[4, 4] and measured[16, 16] < measured[4, 16]  # in T at fixed K
    assert measured[4, 16] < measured[4, 4] and measured[16, 16] < measured[16, 4]  # in K at fixed T
    for (T, K), value in measured.items():
        assert value <= exact.theorem_bound(T, K)
    assert exact.slope(measured) <= -0.4
