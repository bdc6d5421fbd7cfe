"""What docs/theory.md says of gradients, limits and loops, with the scripts' own losses and loops on the enumerable language."""

import contextlib
import itertools
import math
import signal
import sys
import types

import covariate_shift as shift
import exact
import numpy as np
import pytest
import theory
import torch
from helpers import ROOT
from test_aihf import language  # noqa: F401 (fixture)
from test_exact import flat_gradient, scored
from test_rft import all_logprobs
from test_toy import naive_log_likelihood

import irft
import irl_dpo_ultrachat
import irl_ppo_tldr
from common import models
from common.args import resolve_auto
from common.data import collate
from common.logprobs import response_logprobs
from common.run import Run
from irft import irft_loss
from sft import nll_loss

Y = len(exact.RESPONSES)
FIRST, SECOND = (i.flatten() for i in torch.meshgrid(torch.arange(Y), torch.arange(Y), indexing="ij"))
PROMPT = exact.PROMPTS[1]


@pytest.fixture(scope="module")
def setting():
    """(X, Y) log pi_ref and log D of the page's setting."""
    return theory.reference_and_expert()


@pytest.fixture(scope="module")
def expert():
    """(Y,) D of test_exact.py: drawn at random, unrelated to any policy."""
    weights = torch.rand(Y, generator=torch.Generator().manual_seed(7), dtype=torch.float64) ** 3
    return weights / weights.sum()


def mean_loss(loss, expert, answers, logp, ref, beta, kind):
    """The loss of the whole language: mean over demonstrations from `expert` and answers from `answers`, (Y,) probabilities."""
    losses = loss(logp[FIRST], logp[SECOND], ref[FIRST], ref[SECOND], beta, kind)
    return (expert[FIRST] * answers[SECOND] * losses).sum()


def relative(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


WRONG_LOSSES = {
    "sign": lambda c, g, rc, rg, b, k: irft_loss(g, c, rg, rc, b, k),
    "no_beta": lambda c, g, rc, rg, b, k: irft_loss(c, g, rc, rg, 1.0, k),
    "no_reference": lambda c, g, rc, rg, b, k: irft_loss(c, g, 0 * rc, 0 * rg, b, k),
    "references_swapped": lambda c, g, rc, rg, b, k: irft_loss(c, g, rg, rc, b, k),
    "negative_without_gradient": lambda c, g, rc, rg, b, k: irft_loss(c, g.detach(), rc, rg, b, k),
}


# ---- 1. the gradient of one update ----
def mean_scores(model, prompt):
    """scored, with means over tokens for sums: a mutant."""
    return scored(model, prompt) / torch.tensor([len(y) for y in exact.RESPONSES])


def check_gradient(loss, score, expert, architecture="gpt_neox") -> bool:
    """Fresh answers: linear = SFT whatever the reference, logistic = beta / 2 of it at reference = policy. Stale ones add
    minus the gradient of KL(pi_old || pi) to the loss's."""
    policy, old = exact.make_model(architecture, 0), exact.make_model(architecture, 1)
    batch = collate([(PROMPT, y) for y in exact.RESPONSES], pad_token_id=exact.EOS)
    nll = nll_loss(response_logprobs(policy, batch).logprobs, batch.response_mask)
    sft = flat_gradient((expert * nll).sum(), policy)
    logp, stale, ok = score(policy, PROMPT), exact.response_logprobs(old, PROMPT).detach(), True
    now = exact.response_logprobs(policy, PROMPT).detach().exp()
    rounding = 1e-12 if architecture == "gpt_neox" else 1e-6  # Mistral's norms compute in float32
    for beta in (0.1, 2.0):
        fresh = flat_gradient(mean_loss(loss, expert, now, logp, stale, beta, "linear"), policy)
        logistic = flat_gradient(mean_loss(loss, expert, now, logp, logp.detach(), beta, "logistic"), policy)
        ok &= relative(fresh, sft) < rounding and relative(logistic, beta / 2 * sft) < rounding
    kept = flat_gradient(mean_loss(loss, expert, stale.exp(), logp, stale, 0.1, "linear"), policy)
    push = flat_gradient(exact.kl(stale, exact.response_logprobs(policy, PROMPT)), policy)
    return ok and push.norm() > 0.1 and relative(kept - sft, -push) < rounding


@pytest.mark.parametrize("architecture", ["gpt_neox", "mistral"])
def test_fresh_answers_give_the_sft_gradient_and_stale_ones_a_push_away(expert, architecture):
    assert check_gradient(irft_loss, scored, expert, architecture)


@pytest.mark.parametrize("name", [*WRONG_LOSSES, "mean_for_sum"])
def test_another_gradient_is_told_apart(expert, name):
    loss, score = WRONG_LOSSES.get(name, irft_loss), mean_scores if name == "mean_for_sum" else scored
    assert not check_gradient(loss, score, expert)


def check_weights(loss, expert) -> bool:
    """The page's tables: toy/theory.py's weights are minus the slopes of the script's mean loss in log pi."""
    logp, ref = (exact.response_logprobs(exact.make_model(seed=s), PROMPT).detach() for s in (0, 1))
    leaf, ok = logp.clone().requires_grad_(), True
    for kind, beta in (("linear", 1.0), ("logistic", 0.3), ("logistic", 3.0)):
        (slope,) = torch.autograd.grad(mean_loss(loss, expert, ref.exp(), leaf, ref, beta, kind), leaf)
        found = theory.ascent_weights(expert, ref.exp(), theory.pair_slopes(logp, ref, beta, kind))
        ok &= relative(found, -slope) < 1e-12
    return ok


def test_the_pages_weights_are_those_of_the_scripts_loss(expert):
    assert check_weights(irft_loss, expert)
    assert not any(check_weights(WRONG_LOSSES[name], expert) for name in WRONG_LOSSES)


def test_another_reference_turns_the_logistic_gradient_away(expert):
    """Margins with a standard deviation of 0.7 nats: cosine 0.999 at beta 0.1, 0.92 at 1, 0.73 at 3."""
    logp, rows = theory.jacobian(exact.make_model(), exact.PROMPTS[0])
    other = exact.response_logprobs(exact.make_model(seed=1), exact.PROMPTS[0]).detach()
    ref = theory.rescaled_reference(logp, other, expert, 0.7)
    d = (logp - ref)[FIRST] - (logp - ref)[SECOND]
    weight = expert[FIRST] * logp.exp()[SECOND]
    assert ((weight * d**2).sum() - (weight * d).sum() ** 2).sqrt().item() == pytest.approx(0.7)
    found = []
    for beta in (0.1, 1.0, 3.0):
        leaf = logp.clone().requires_grad_()
        (slope,) = torch.autograd.grad(mean_loss(irft_loss, expert, logp.exp(), leaf, ref, beta, "logistic"), leaf)
        found.append(theory.cosine(-slope @ rows, expert @ rows))
    assert found == pytest.approx([0.999, 0.923, 0.728], abs=2e-3)


def test_one_sample_variance_by_enumeration():
    """Covariances of single gradients over all pairs of ten responses, from the script's loss, against the formula."""
    logp, rows = theory.jacobian(exact.make_model(), PROMPT)
    few = slice(0, Y, 12)
    logp, rows = theory.normalise(logp[few]), rows[few]
    ref, generator = theory.normalise(logp - 0.3 * torch.arange(len(logp))), torch.Generator().manual_seed(0)
    expert = torch.rand(len(logp), generator=generator, dtype=torch.float64).softmax(0)
    for kind, beta in (("linear", 1.0), ("logistic", 0.7)):
        singles, chance = [], []
        for i in range(len(logp)):
            for j in range(len(logp)):
                leaf = logp.clone().requires_grad_()
                loss = irft_loss(leaf[i : i + 1], leaf[j : j + 1], ref[i : i + 1], ref[j : j + 1], beta, kind)
                singles.append(torch.autograd.grad(loss.sum(), leaf)[0] @ rows)
                chance.append(expert[i] * logp[j].exp())
        singles, chance = torch.stack(singles), torch.stack(chance)
        spread = (chance @ (singles - chance @ singles) ** 2).sum().item()
        slopes = theory.pair_slopes(logp, ref, beta, kind)
        assert theory.one_sample_variance(expert, logp.exp(), slopes, rows @ rows.T) == pytest.approx(spread, rel=1e-10)
    nll = (expert @ (rows - expert @ rows) ** 2).sum().item()
    assert theory.nll_variance(expert, rows @ rows.T) == pytest.approx(nll, rel=1e-10)


def test_a_pair_has_about_twice_the_variance_of_a_demonstration(monkeypatch):
    monkeypatch.setattr(theory, "SEEDS", 1)
    for architecture in ("gpt_neox", "mistral"):
        ratios = theory.variance_ratios(theory.jacobians(architecture))
        assert len(ratios) == 3 and 1.6 < min(ratios) and max(ratios) < 2.8


def check_rest(loss, ref, expert) -> bool:
    """Fresh answers and a fixed reference: the logistic loss rests at pi_ref^(beta/(1+beta)) D^(1/(1+beta)), not at D."""
    ok = True
    for beta in (0.1, 1.0):
        slopes = []
        for place in (theory.between(ref, expert, beta), expert, ref):
            leaf = place.clone().requires_grad_()
            value = mean_loss(loss, expert.exp(), place.exp(), leaf, ref, beta, "logistic")
            slopes.append(torch.autograd.grad(value, leaf)[0].norm().item() / beta)
        ok &= slopes[0] < 1e-12 and min(slopes[1:]) > 1e-3
    return ok


def test_the_logistic_loss_rests_between_reference_and_expert(setting):
    ref, expert = (x[1] for x in setting)
    assert check_rest(irft_loss, ref, expert)
    caught = [name for name in WRONG_LOSSES if not check_rest(WRONG_LOSSES[name], ref, expert)]
    assert caught == list(WRONG_LOSSES)
    leaf = expert.clone().requires_grad_()  # --ref previous: reference = policy, and it rests at D
    value = mean_loss(irft_loss, expert.exp(), expert.exp(), leaf, expert, 1.0, "logistic")
    assert torch.autograd.grad(value, leaf)[0].norm() < 1e-12


# ---- 2. where T = 1 ends ----
def minimise(value, start: torch.Tensor, scale: float) -> torch.Tensor:
    """The minimiser of a convex function of logits, up to a constant, by Newton steps that are damped as in bandit.newton."""
    logits = start.clone()
    for _ in range(60):
        hessian = torch.autograd.functional.hessian(value, logits, vectorize=True)
        leaf = logits.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf), leaf)
        step = -torch.linalg.solve(hessian + hessian.diag().mean(), slope)
        spread = scale * (step.max() - step.min())
        logits = logits + step * (torch.log1p(spread) / spread)
        if spread < 1e-9:
            break
    return logits


def check_limit(loss, ref, expert) -> bool:
    """The minimum over all policies, found without the formula, while the answers are those of the reference."""
    few = slice(0, Y, 3)  # 41 responses
    ref, expert = theory.normalise(ref[few]), theory.normalise(expert[few])
    i, j = (k.flatten() for k in torch.meshgrid(torch.arange(len(ref)), torch.arange(len(ref)), indexing="ij"))
    weight, ok = expert.exp()[i] * ref.exp()[j], True
    for beta in (1.0, 0.3, 0.05):

        def value(logits, beta=beta):
            logp = theory.normalise(logits)
            return (weight * loss(logp[i], logp[j], ref[i], ref[j], beta, "logistic")).sum()

        found = theory.normalise(minimise(value, ref, beta))
        ok &= torch.allclose(found, theory.spin_limit(ref, expert, beta), rtol=0, atol=1e-6)
    return bool(ok)


def test_t_1_ends_at_the_power_of_the_ratio(setting):
    ref, expert = (x[1] for x in setting)
    assert check_limit(irft_loss, ref, expert)


@pytest.mark.parametrize("name", ["sign", "no_beta", "no_reference", "mean_for_sum"])
def test_another_limit_is_told_apart(setting, name):
    lengths = torch.tensor([len(y) for y in exact.RESPONSES])[::3]
    i, j = (k.flatten() for k in torch.meshgrid(torch.arange(41), torch.arange(41), indexing="ij"))
    mean = lambda c, g, rc, rg, b, k: irft_loss(c / lengths[i], g / lengths[j], rc / lengths[i], rg / lengths[j], b, k)  # noqa: E731
    with contextlib.suppress(torch.linalg.LinAlgError):
        assert not check_limit(mean if name == "mean_for_sum" else WRONG_LOSSES[name], *(x[1] for x in setting))


def test_a_small_beta_passes_the_expert_as_far_as_the_reward_is_right(setting):
    """Quality rises and imitation fails as beta falls; with 5% of stock answers quality falls too."""
    ref, expert = setting
    ends = [theory.spin_limit(ref, expert, b) for b in theory.BETAS]
    kls, rewards = [theory.mean_kl(expert, p) for p in ends], [theory.mean_reward(p) for p in ends]
    assert kls == pytest.approx([0, 0.905, 5.16, 11.65], rel=1e-2, abs=1e-12)
    assert rewards == pytest.approx([2.35, 2.93, 3.0, 3.0], abs=1e-2) and rewards[0] == pytest.approx(
        theory.mean_reward(expert)
    )
    assert theory.mean_reward(ref) == pytest.approx(1.49, abs=1e-2)
    faulty = theory.with_stock_answer(expert)
    torch.testing.assert_close(faulty.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    assert (
        theory.mean_reward(theory.spin_limit(ref, faulty, 0.05)) < theory.mean_reward(ref) < theory.mean_reward(faulty)
    )
    for beta in (0.3, 0.05):  # the optimum of the hidden reward at beta times the expert's KL weight
        best = torch.stack([exact.optimal_policy(q, theory.hidden_reward(), beta) for q in ref])
        torch.testing.assert_close(theory.spin_limit(ref, expert, beta), best, rtol=0, atol=1e-9)


# ---- 3. the outer loop of both IRL scripts ----
def reward_at_the_optimum(script, expert, answers) -> torch.Tensor:
    """(Y,) r = log D / pi_answers, after a check that the script's own logistic loss has its minimum there (it is convex)."""
    best = theory.reward_optimum(expert, answers)
    weight = expert.exp()[FIRST] * answers.exp()[SECOND]

    def value(r):
        return (weight * script.reward_loss(r[FIRST], r[SECOND], 1.0, "logistic")).sum()

    leaf = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(leaf), leaf)
    nearby = best + 0.1 * torch.randn(Y, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert slope.norm() < 1e-12 and value(best) < value(nearby)
    return best


def carried_reward(script, expert, policy, rewards, beta) -> torch.Tensor:
    """(Y,) the reward after one gradient step of the script's own linear loss, of size beta."""
    leaf, weight = rewards.clone().requires_grad_(), expert.exp()[FIRST] * policy.exp()[SECOND]
    loss = (weight * script.reward_loss(leaf[FIRST], leaf[SECOND], beta, "linear")).sum()
    return rewards - beta * torch.autograd.grad(loss, leaf)[0]


def best_response(script, ref, rewards, beta) -> torch.Tensor:
    """(Y,) log pi_ref exp(r / beta) / Z, after a check that the script's own policy objective has its optimum there.

    PPO: the mean of the summed token_rewards. DPO: the mean of dpo_loss over Bradley-Terry choices by r.
    """
    best = exact.optimal_policy(ref, rewards, beta)

    def value(logits):
        logp = theory.normalise(logits)
        if script is irl_ppo_tldr:
            mask = torch.ones(Y, 1, dtype=torch.bool)
            return -(logp.exp() * script.token_rewards(rewards, logp[:, None], ref[:, None], mask, beta).sum(-1)).sum()
        chosen = torch.sigmoid(rewards[FIRST] - rewards[SECOND]) / Y**2
        return (chosen * script.dpo_loss(logp[FIRST], logp[SECOND], ref[FIRST], ref[SECOND], beta)).sum()

    leaf = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(leaf), leaf)
    nearby = best + 0.1 * torch.randn(Y, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert slope.norm() < 1e-10 and value(best) < value(nearby)
    return best


SIZES = dict(
    batch_size=8, rollout_batch_size=4, max_length=16, max_new_tokens=exact.LENGTH, sft_epochs=0, eval_updates=100, save_steps=1000,
    per_device_train_batch_size=8, per_device_eval_batch_size=8, mixed_precision="no",
)  # fmt: skip
SCRIPTS = {
    irl_ppo_tldr: dict(total_episodes=4, max_prompt_length=8),
    irl_dpo_ultrachat: dict(total_prompts=4, num_generations=2, policy_objective="dpo"),
}


@pytest.fixture
def exact_loop(tmp_path, language, monkeypatch, setting):  # noqa: F811
    """Maker of [log pi_0, ..., log pi_T] from a script's learn(): it decides which reference, which pairs and which start of the
    reward count in every iteration; rewards and policies are tables at the optima of the script's own losses."""
    model, tokenizer, row = language
    handler = signal.getsignal(signal.SIGTERM)

    def make(script, T: int, beta: float, reward: str = "eq_11", **given) -> list[torch.Tensor]:
        args = script.Args(
            model=model, T=T, beta=beta, output_dir=str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"),
            **{**SIZES, **SCRIPTS[script], **given},
        )  # fmt: skip
        resolve_auto(args, script.SETTINGS)
        run = Run(args, script.__name__, script.METRICS)
        rows = [row(i, exact.PROMPTS[0], response_ids=exact.RESPONSES[5 + i]) for i in range(2)]
        prompts = [rows[:1]] if script is irl_ppo_tldr else []
        learner = script.IRL(run, tokenizer, rows[:1], *prompts, rows[1:], [])
        ref, expert = (x[0] for x in setting)
        path, table, events = [ref], {"r": torch.zeros(Y, dtype=torch.float64)}, []

        def step(self, module, optimizer, pairs, *rest):
            events.append([p["iteration"] for p in pairs])
            return {"loss": 0.0}

        def load_weights(self, module, *rest):
            if module is learner.reward_model:  # a new reward
                table["r"] = torch.zeros(Y, dtype=torch.float64)

        def policy_step(t: int) -> None:
            (seen,) = events
            answers = torch.stack([path[i] for i in seen]).logsumexp(0) - math.log(len(seen))
            if reward == "eq_11":
                table["r"] = reward_at_the_optimum(script, expert, answers)
            else:
                table["r"] = carried_reward(script, expert, answers, table["r"], beta)
            source = learner.start_policy(t)
            start = ref if source == learner.sft_policy else path[int(source.rpartition("_")[2])]
            path.append(best_response(script, start, table["r"], beta))
            events.clear()
            run.position.update(outer_iteration=t + 1, step=learner.steps.before(t + 1))

        monkeypatch.setattr(Run, "step", step)
        monkeypatch.setattr(Run, "load_weights", load_weights)
        monkeypatch.setattr(Run, "log", lambda *a, **k: None)
        monkeypatch.setattr(script.evals, "prepare_held_out", lambda *a, **k: None)
        monkeypatch.setattr(script.evals, "evaluate_reward", lambda *a, **k: {"eval/reward/demonstrations": 0.0})
        monkeypatch.setattr(script.preference_data, "evaluate_preferences", lambda *a, **k: {})
        monkeypatch.setattr(learner, "normalise", lambda t: {}, raising=False)
        monkeypatch.setattr(learner, "sample_pairs", lambda t: [{"iteration": t}])
        monkeypatch.setattr(Run, "save_checkpoint", lambda *_: None)
        monkeypatch.setattr(learner, "policy_step", policy_step)
        learner.learn()
        return path

    yield make
    signal.signal(signal.SIGTERM, handler)


FLAGS = {  # name -> (the script's flags, what toy/theory.py's loop is given)
    "initial": (dict(ref="initial"), dict()),
    "previous": (dict(), dict(reference="previous")),
    "accumulated": (dict(ref="initial", pairs="accumulated"), dict(pairs="accumulated")),
    "carried": (
        dict(ref="initial", reward_init="previous", reward_loss="linear"),
        dict(reward="carried_linear", reward_step=1.0),
    ),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_the_scripts_loop_is_the_pages(exact_loop, setting, script, name):
    """Three outer iterations with exact best responses at beta = 0.3: each flag gives its own path, that of theory.loop."""
    flags, given = FLAGS[name]
    ref, expert = (x[:1] for x in setting)
    path = exact_loop(script, 3, 0.3, reward=given.get("reward", "eq_11"), **flags)
    expected = [p[0] for p in theory.loop(ref, expert, 0.3, 3, **given)]
    assert len(path) == 4
    for found, wanted in zip(path, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    others = [theory.loop(ref, expert, 0.3, 3, **g)[3][0] for n, (_, g) in FLAGS.items() if n != name]
    assert min((path[3] - other).abs().max() for other in others) > 0.1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_the_default_stays_at_the_expert_and_a_fixed_reference_forgets_it(exact_loop, setting, script):
    """beta = 1: the first iteration is at the expert. The default stays there, the papers' reference ends where it began."""
    ref, expert = (x[0] for x in setting)
    assert script.Args().T == 2
    for flags, end in ((dict(ref="initial"), ref), ({}, expert)):
        path = exact_loop(script, 2, 1.0, **flags)
        torch.testing.assert_close(path[1], expert, rtol=0, atol=1e-9)
        torch.testing.assert_close(path[2], end, rtol=0, atol=1e-9)


def test_what_each_loop_converges_to(setting):
    """Small policy steps: --ref previous ends at D, --ref initial at the weighted mean; larger ones than the bound diverge."""
    ref, expert = setting
    for beta in (1.0, 0.1):
        ends = {"initial": theory.between(ref, expert, beta), "previous": expert}
        for reference, end in ends.items():
            bound = theory.largest_policy_step(beta, reference)
            for size, converges in ((0.5 * bound, True), (0.9 * bound, True), (1.1 * bound, False)):
                path = theory.loop(ref, expert, beta, 60, reference=reference, policy_step=size)
                first, last = ((path[t] - end).abs().max() for t in (0, 60))
                assert (last < 1e-2 * first) == converges and (last > 10 * first) != converges
    kls = [theory.mean_kl(expert, p) for p in theory.loop(ref, expert, 1.0, 4)]
    assert kls == pytest.approx([0.389, 0, 0.389, 0, 0.389], abs=1e-3)  # circles
    kls = [theory.mean_kl(expert, p) for p in theory.loop(ref, expert, 0.05, 3)]
    assert kls == pytest.approx([0.389, 11.65, 892, 4940], rel=1e-2)  # diverges
    accumulated = theory.loop(ref, expert, 0.1, 200, pairs="accumulated")
    assert theory.mean_kl(expert, accumulated[-1]) < 0.003 < 5 < theory.mean_kl(expert, accumulated[2])


def test_a_carried_reward_ends_at_the_expert_with_the_linear_loss_alone(setting):
    ref, expert = setting
    linear = theory.loop(ref, expert, 0.1, 1000, reward="carried_linear")
    logistic = theory.loop(ref, expert, 0.1, 1000, reward="carried_logistic")
    moving = theory.loop(ref, expert, 0.1, 1000, reward="carried_linear", reference="previous")
    assert theory.mean_kl(expert, linear[-1]) < 1e-6
    assert (
        theory.mean_kl(theory.between(ref, expert, 0.1), logistic[-1])
        < 1e-5
        < 2e-3
        < theory.mean_kl(expert, logistic[-1])
    )
    assert min(theory.mean_kl(expert, p) for p in moving[-200:]) > 0.1
    rewards = torch.randn(1, Y, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p, q = expert[:1].exp(), ref[:1].exp()
    losses = irl_dpo_ultrachat.reward_loss(rewards[0][FIRST], rewards[0][SECOND], 0.1, "logistic")
    (slope,) = torch.autograd.grad((p[0][FIRST] * q[0][SECOND] * losses).sum(), rewards)
    torch.testing.assert_close(theory.eq_11_slope(p.log(), q.log(), rewards.detach()), -slope, rtol=0, atol=1e-14)


# ---- 5. irft.train's own loop ----
@pytest.fixture
def irft_path(tmp_path, language, monkeypatch, setting):  # noqa: F811
    """Maker of [(E_D log pi, hidden reward)], exact, at the start and after every outer iteration of irft.train."""
    model, tokenizer, row = language
    handler = signal.getsignal(signal.SIGTERM)
    picked = torch.multinomial(setting[1].exp(), 128, True, generator=torch.Generator().manual_seed(0))  # (3, 128)
    texts = [(x, exact.RESPONSES[j]) for x, js in zip(exact.PROMPTS, picked.tolist(), strict=True) for j in js]
    rows = [row(i, x, response_ids=y) for i, (x, y) in enumerate(texts)]

    def make(**given) -> list[tuple[float, float]]:
        args = irft.Args(
            model=model, output_dir=str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), mixed_precision="no", optimizer="adamw",
            max_length=16, max_new_tokens=exact.LENGTH, per_device_train_batch_size=64,
            per_device_eval_batch_size=1024, warmup_ratio=0.0, save_steps=10_000,
            **{"num_chunks": 1, "batch_size": 64, "learning_rate": 3e-3, "later_learning_rate": 3e-3, **given},
        )  # fmt: skip
        resolve_auto(args, irft.SETTINGS)
        path = []

        def evaluate(run, policy, *rest):
            logp = all_logprobs(policy).double()
            path.append(((setting[1].exp() * logp).sum(1).mean().item(), theory.mean_reward(logp)))
            return {}

        monkeypatch.setattr(models, "load_tokenizer", lambda *a: tokenizer)
        monkeypatch.setattr(irft.demos, "load_demonstrations", lambda *a, **k: rows)
        monkeypatch.setattr(irft.demos, "load_held_out", lambda *a, **k: [])
        monkeypatch.setattr(irft.evals, "prepare_held_out", lambda *a, **k: None)
        monkeypatch.setattr(irft.evals, "evaluate", evaluate)
        monkeypatch.setattr(irft.evals, "print_table", lambda *a: None)
        irft.train(args)
        return path

    yield make
    signal.signal(signal.SIGTERM, handler)


def check_rise(path, setting) -> bool:
    """From -KL(D || pi_ref) - H(D) up in every outer iteration, and less than half of the gap to -H(D) is left."""
    ref, expert = setting
    entropy, start = -(expert.exp() * expert).sum(1).mean().item(), theory.mean_kl(expert, ref)
    gaps = [-likelihood - entropy for likelihood, _ in path]
    assert gaps[0] == pytest.approx(start, abs=1e-4)
    return all(b < a for a, b in itertools.pairwise(gaps)) and gaps[-1] < start / 2


def test_every_outer_iteration_of_irft_raises_the_likelihood(irft_path, setting):
    path = irft_path(T=4, num_train_epochs=1, beta=0.1, learning_rate=6e-4, later_learning_rate=6e-4)
    assert len(path) == 5 and check_rise(path, setting)


def test_an_irft_loop_that_goes_the_wrong_way_is_told_apart(irft_path, setting, monkeypatch):
    monkeypatch.setattr(irft, "irft_loss", WRONG_LOSSES["sign"])
    assert not check_rise(irft_path(T=1, beta=0.1, learning_rate=1e-3, later_learning_rate=1e-3), setting)


@pytest.mark.slow
def test_t_chooses_between_imitation_and_sharpening(irft_path, setting):
    """72 updates at beta = 0.1. T = 1 passes the expert's hidden reward and loses likelihood; T = 12 stays below and gains it."""
    (start, gold), (sharp, sharp_gold) = irft_path(T=1, num_train_epochs=12, beta=0.1)
    *_, (close_by, close_gold) = irft_path(T=12, num_train_epochs=1, beta=0.1)
    assert sharp < start - 0.1 and close_by > start + 0.2
    assert gold + 0.3 < close_gold < theory.mean_reward(setting[1]) < sharp_gold


# ---- 4. preferences and demonstrations from different regions ----
def verify_fit(s) -> None:
    """No other cubic has a higher penalised likelihood, by loops and finite differences; the counts are those drawn."""
    shown, preferences = s.draw(np.random.default_rng(0), 9, 50, 300)
    assert shown.sum() == 50 and preferences.sum() == 300 and not preferences[9:].any() and not preferences[:, 9:].any()
    assert preferences[8, 0] > preferences[0, 8] and shown[10:17].sum() > 30
    for d in (shown, 0 * shown):
        rewards = s.fit(d, preferences)
        coefficients, residual, *_ = np.linalg.lstsq(np.stack([s.X**k for k in range(4)], 1), rewards, rcond=None)
        assert residual.size == 0 or residual[0] < 1e-16 * np.abs(rewards).max() ** 2 + 1e-18
        coefficients = np.linalg.lstsq(s.FEATURES, rewards, rcond=None)[0]

        def objective(c, d=d):
            return naive_log_likelihood(s.FEATURES @ c, d, preferences) - s.PRIOR / 2 * c @ c

        for step in np.eye(3) * 1e-4:
            up, down = objective(coefficients + step), objective(coefficients - step)
            assert abs(up - down) / 2e-4 < 1e-3 and max(up, down) < objective(coefficients)


def verify_measures(s) -> None:
    counts, rewards = np.arange(s.ACTIONS) % 4, np.round(np.sin(s.X) * 3)  # with ties
    samples = np.repeat(s.X, counts)
    ranks = [[(a[samples] < a[x]).sum() + (a[samples] == a[x]).sum() / 2 for x in samples] for a in (rewards, s.TRUTH)]
    assert s.rank_correlation(counts / counts.sum(), rewards) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    among, right = s.X[7:], 0.0
    for i, j in itertools.combinations(among, 2):
        gap = (rewards[i] - rewards[j]) * (s.TRUTH[i] - s.TRUTH[j])
        right += (gap > 0) + 0.5 * (gap == 0)
    assert s.accuracy(rewards, among) == pytest.approx(right / math.comb(len(among), 2))
    shown, preferences = s.draw(np.random.default_rng(1), 9, 50, 300)
    found, rlhf = s.measure(shown, preferences, 9), s.fit(0 * shown, preferences)
    weights = shown * np.exp(rlhf)
    assert found["value RLHF, SFT"] == pytest.approx(weights @ s.TRUTH / weights.sum())
    assert found["value RLHF"] == pytest.approx(np.exp(rlhf) @ s.TRUTH / np.exp(rlhf).sum())
    assert found["value SFT"] == pytest.approx(shown @ s.TRUTH / 50)
    joint = s.fit(shown, preferences)
    assert found["value AIHF"] == pytest.approx(np.exp(joint) @ s.TRUTH / np.exp(joint).sum())
    assert found["outside AIHF"] == s.accuracy(joint, s.X[9:]) and found["accuracy RLHF"] == s.accuracy(rlhf, s.X)


def verify_claims(s) -> None:
    """The page's claims, on fewer draws: where nothing was compared RLHF's reward is hardly better than chance."""
    for seed in (1, 2):
        args = s.Args(seed=seed, draws=12)
        for comparisons in (50, 1000):
            found = {k: v[0] for k, v in s.study(args, 9, comparisons).items()}
            assert found["outside AIHF"] > 0.93 > 0.75 > found["outside RLHF"] and found["accuracy AIHF"] > 0.95
            assert found["rank AIHF"] > 0.85 > 0.2 > found["rank RLHF"]
            assert found["value AIHF"] > -0.65 > -1.5 > found["value RLHF"]
        everywhere = {k: v[0] for k, v in s.study(args, s.ACTIONS, 1000).items()}
        assert min(everywhere["outside RLHF"], everywhere["outside AIHF"]) > 0.96
        assert everywhere["value RLHF, SFT"] > everywhere["value AIHF"] + 0.15  # both sources at full strength


VERIFY = (verify_fit, verify_measures, verify_claims)


@pytest.mark.parametrize("verify", VERIFY)
def test_covariate_shift(verify):
    verify(shift)


MUTANTS = {
    "choices reversed": ("TRUTH)[first[pair], second[pair]]", "TRUTH)[second[pair], first[pair]]"),
    "demonstrations compared too": ("np.triu_indices(compared, 1)", "np.triu_indices(ACTIONS, 1)"),
    "prior's sign": (
        "preferences) - PRIOR * coefficients\n        bend",
        "preferences) + PRIOR * coefficients\n        bend",
    ),
    "another prior": ("- PRIOR * coefficients", "- 100 * coefficients"),
    "RLHF sees the demonstrations": ("fit(nothing, preferences)", "fit(demonstrations, preferences)"),
    "AIHF does not": ("aihf, rlhf = fit(demonstrations, preferences)", "aihf, rlhf = fit(nothing, preferences)"),
    "RLHF from SFT adds": ("both = sft * np.exp(", "both = sft + np.exp("),
    "sign of the reward": ("both = sft * np.exp(rlhf", "both = sft * np.exp(-rlhf"),
    "ties count as wrong": ("+ policy[a == v].sum() / 2", ""),
    "accuracy of one order": ("(agreement + 1).mean() / 2", "(agreement > 0).mean()"),
    "inside for outside": ("X[compared:] if", "X[:compared] if"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_covariate_shift_is_caught(name):
    old, new = MUTANTS[name]
    source = (ROOT / "toy" / "covariate_shift.py").read_text()
    assert source.count(old) >= 1, name
    mutant = types.ModuleType("mutant")
    sys.modules["mutant"] = mutant  # its dataclass looks itself up
    exec(compile(source.replace(old, new, 1), "mutant", "exec"), mutant.__dict__)
    caught = []
    for verify in VERIFY:
        try:
            with np.errstate(all="ignore"):
                verify(mutant)
        except (AssertionError, RuntimeError, np.linalg.LinAlgError):
            caught.append(verify.__name__)
            break
    assert caught


# ---- as programs ----
@pytest.mark.slow
def test_the_programs_run_and_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "SEEDS", 1)
    assert theory.example(theory.Args(output_dir=str(tmp_path)))
    assert shift.example(shift.Args(output_dir=str(tmp_path), draws=4))
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 19 and "FAIL" not in printed
    for name in ("theory_gradient", "theory_limit", "theory_loop", "covariate_shift"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("flag, value", [("compared", 1), ("compared", 22), ("demonstrations", 0), ("draws", 1)])
def test_bad_input_names_the_flag(flag, value):
    with pytest.raises(shift.bandit.InputError, match=f"--{flag} is {value}, expected"):
        shift.validate(shift.Args(**{flag: value}))
