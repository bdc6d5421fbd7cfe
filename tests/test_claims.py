"""The ledger docs/claims.md names what exists and counts what it says; and statements of the papers that no other file tests."""

import bandit
import exact
import numpy as np
import pytest
import torch
from test_exact import BETA, flat_gradient, scored
from test_rft import noise
from test_toy import D, P

from aihf import dpo_loss, preference_loss
from common.data import collate
from common.logprobs import response_logprobs
from irft import irft_loss
from rft import nll_loss, reward_loss, token_rewards

Y, PROMPT = len(exact.RESPONSES), exact.PROMPTS[1]


@pytest.fixture(scope="module")
def expert():
    return noise(Y, seed=3).softmax(0)


# ---- Eq. 1 (RFT, IRL), Eq. 2 (AIHF): SFT is the projection of the expert onto the model ----
def check_sft(loss, expert) -> bool:
    """The mean loss is KL(D || pi) + H(D), and has its gradient, so that both have one minimum."""
    model = exact.make_model()
    batch = collate([(PROMPT, y) for y in exact.RESPONSES], pad_token_id=exact.EOS)
    mean = (expert * loss(response_logprobs(model, batch).logprobs, batch.response_mask)).sum()
    distance = exact.kl(expert.log(), exact.response_logprobs(model, PROMPT))
    entropy = -(expert * expert.log()).sum()
    same = abs((mean - distance - entropy).item()) < 1e-12
    return same and torch.allclose(flat_gradient(mean, model), flat_gradient(distance, model), rtol=0, atol=1e-12)


def test_sft_minimises_the_kl_from_the_expert(expert):
    assert check_sft(nll_loss, expert)
    assert not check_sft(lambda x, m: -nll_loss(x, m), expert)
    assert not check_sft(lambda x, m: nll_loss(x, m) / m.sum(-1), expert)
    assert not check_sft(lambda x, m: nll_loss(x[:, :-1], m[:, :-1]), expert)


# ---- Eq. 2 and 9 (RFT), 4, 7 and 42 (AIHF), 3, 5b and 9 (IRL): the KL-regularised optimum ----
def check_optimum(rewarding, beta: float) -> bool:
    """The mean of a script's summed token rewards is beta log Z - beta KL(pi || pi_r) for every pi: pi_r alone is the best.

    rewarding: token_rewards, or a mutant.
    """
    policy, reference = exact.make_model(), exact.make_model(seed=1)
    batch = collate([(PROMPT, y) for y in exact.RESPONSES], pad_token_id=exact.EOS)
    logp, ref = (response_logprobs(model, batch).logprobs.detach() for model in (policy, reference))
    scores, mask = noise(Y, seed=5), batch.response_mask
    total_logp, total_ref = scored(policy, PROMPT).detach(), scored(reference, PROMPT).detach()
    value = (total_logp.exp() * rewarding(scores, logp, ref, mask, beta).sum(-1)).sum()
    best = exact.optimal_policy(total_ref, scores, beta)
    bound = beta * (exact.log_partition(total_ref, scores, beta) - exact.kl(total_logp, best))
    return exact.kl(total_logp, best) > 0.1 and abs((value - bound).item()) < 1e-11


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_value_of_a_policy_is_that_of_the_optimum_less_beta_times_its_distance(beta):
    assert check_optimum(token_rewards, beta)
    mutants = {
        "sign of the KL": lambda s, p, r, m, b: token_rewards(s, r, p, m, b),
        "no beta": lambda s, p, r, m, b: token_rewards(s, p, r, m, 1.0),
        "no reference": lambda s, p, r, m, b: token_rewards(s, p, 0 * r, m, b),
        "score at every token": lambda s, p, r, m, b: token_rewards(0 * s, p, r, m, b) + s[:, None] * m,
        "score lost": lambda s, p, r, m, b: token_rewards(0 * s, p, r, m, b),
        "last token lost": lambda s, p, r, m, b: token_rewards(s, p[:, :-1], r[:, :-1], m[:, :-1], b),
    }
    assert not [name for name, mutant in mutants.items() if check_optimum(mutant, beta)]


# ---- Eq. 14 (RFT): the reward is the log-ratio of its optimum, up to a constant ----
def test_the_reward_is_beta_times_the_log_ratio_and_log_z():
    rewards, ref = noise(Y, seed=5), exact.response_logprobs(exact.make_model(), PROMPT).detach()
    for beta in (0.1, 2.0):
        ratio = exact.optimal_policy(ref, rewards, beta) - ref
        back = beta * (ratio + exact.log_partition(ref, rewards, beta))
        torch.testing.assert_close(back, rewards, rtol=0, atol=1e-12)


# ---- Sec. 3.2 (AIHF): Eq. 8 is the choice of the optimum between two answers ----
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_optimum_chooses_between_two_answers_by_equation_8(beta):
    """pi_r of all answers, reduced to two of them: sigmoid((r_w - r_l) / beta) if the prior is uniform, and else not."""
    rewards = noise(Y, seed=5)
    i, j = (k.flatten() for k in torch.meshgrid(torch.arange(Y), torch.arange(Y), indexing="ij"))

    def likelihood(ref: torch.Tensor) -> torch.Tensor:
        best = exact.optimal_policy(ref, rewards, beta)
        return best[i] - torch.logaddexp(best[i], best[j])

    found = -preference_loss(rewards[i], rewards[j], beta, "linear")
    torch.testing.assert_close(found, likelihood(torch.full_like(rewards, -np.log(Y))), rtol=0, atol=1e-11)
    prior = exact.response_logprobs(exact.make_model(), PROMPT).detach()
    assert (found - likelihood(prior)).abs().max() > 1
    assert (-preference_loss(rewards[i], rewards[j], 3 * beta, "linear") - found).abs().max() > 0.1


# ---- the direct losses are those of a reward model, at the reward of the policy itself ----
def test_irft_is_the_reward_loss_of_irl_and_dpo_that_of_preferences():
    """At r = beta log pi/pi_ref: Eq. 7 of RFT is the reward loss of IRL, and DPO (Eq. 4 of IRL) is Bradley-Terry (Eq. 2)."""
    c, g, rc, rg = (noise(9, seed=s) for s in range(4))
    rewards = BETA * (c - rc), BETA * (g - rg)
    torch.testing.assert_close(irft_loss(c, g, rc, rg, BETA), reward_loss(*rewards, BETA), rtol=0, atol=1e-14)
    torch.testing.assert_close(dpo_loss(c, g, rc, rg, BETA), preference_loss(*rewards, BETA), rtol=0, atol=1e-14)
    linear = irft_loss(c, g, rc, rg, BETA, "linear"), reward_loss(*rewards, BETA, "linear")
    torch.testing.assert_close(*linear, rtol=0, atol=1e-12)
    for other in ((rewards[1], rewards[0]), (c - rc, g - rg), (BETA * c, BETA * g)):
        assert (irft_loss(c, g, rc, rg, BETA) - reward_loss(*other, BETA)).abs().max() > 1e-2


# ---- App. A.2.2 (AIHF): one source is much larger than the other ----
def test_the_larger_source_rules_aihf_and_not_rlhf():
    """AIHF's policy comes as 1 / c near that of the source that has c times the counts; RLHF's does not move at all."""
    shown, wins = D + 1, P  # every action is demonstrated
    sft, btl = bandit.sft_policy(shown), bandit.softmax(bandit.btl_rewards(wins))
    rlhf = bandit.rlhf_policy(shown, wins)
    assert min(np.abs(rlhf - sft).max(), np.abs(rlhf - btl).max()) > 0.1
    for limit, counts in ((sft, lambda c: (c * shown, wins)), (btl, lambda c: (shown, c * wins))):
        distances = [c * np.abs(bandit.aihf_policy(*counts(c)) - limit).max() for c in (1e3, 1e5)]
        assert distances[0] > 1e-3 and distances[1] == pytest.approx(distances[0], rel=0.05)
        np.testing.assert_allclose(bandit.rlhf_policy(*counts(1e3)), rlhf, atol=1e-9)


# ---- Sec. 3.4 (AIHF): a weighted average of the two policies ----
def averaged(d: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(|D| pi_SFT + w pi_BTL) / (|D| + w) with w_i = sum_j n_ij rho_ij, rho at the AIHF solution."""
    weight = ((p + p.T) * bandit.expected_draws(bandit.aihf_policy(d, p))).sum(1)
    policies = bandit.sft_policy(d), bandit.softmax(bandit.btl_rewards(p))
    return (d.sum() * policies[0] + weight * policies[1]) / (d.sum() + weight)


def test_aihf_is_the_weighted_average_of_sft_and_btl_for_two_actions_alone():
    """With two, rho = 1. With more, rho in Eq. 14 and in Eq. 15 is that of another policy, and AIHF can leave the range of both."""
    for d, p in (((10, 10), (3, 1)), ((3, 1), (11, 9)), ((7, 2), (5, 30))):
        shown, wins = np.array(d, float), np.array([[0, p[0]], [p[1], 0]], float)
        np.testing.assert_allclose(averaged(shown, wins), bandit.aihf_policy(shown, wins), atol=1e-12)
    shown, wins = np.array([11, 2, 24.0]), np.array([[0, 1, 22], [3, 0, 10], [5, 1, 0]], float)
    sft, btl, aihf = bandit.sft_policy(shown), bandit.softmax(bandit.btl_rewards(wins)), bandit.aihf_policy(shown, wins)
    assert [sft[0], btl[0], aihf[0]] == pytest.approx([0.297, 0.259, 0.433], abs=1e-3)
    assert averaged(shown, wins)[0] < 0.3


# ---- Lemma B.3 (RFT) ----
def test_lemma_b_3_holds_with_the_constant_of_its_proof_and_not_with_the_printed_one():
    """Near the top of a reward, where L0 vanishes and L1 does not, the printed L is 35 times too small."""
    for reach in (0.01, 0.1, 1.0, 2.0):
        for seed in range(3):
            found = exact.lemma_b_3(reach, seed)
            assert found["needed"] <= found["proved"] and found["jump"] <= found["G"]
            assert found["needed"] > 0.01 * found["proved"] and found["jump"] > 0.2 * found["G"]
            assert (found["needed"] > found["printed"]) == (reach < 0.5)
    found = exact.lemma_b_3(0.01)
    assert found["needed"] / found["printed"] == pytest.approx(34.6, abs=0.5)
