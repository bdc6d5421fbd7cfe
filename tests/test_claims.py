"""The ledger docs/claims.md names what exists and counts what it says; and statements of the papers that no other file tests."""

import ast
import copy
import functools
import math
import re
from collections import Counter
from pathlib import Path

import bandit
import exact
import mdp
import numpy as np
import pytest
import torch
from helpers import ROOT
from test_aihf import language  # noqa: F401 (fixture)
from test_exact import BETA, flat_gradient, scored
from test_rft import all_logprobs, noise
from test_theory import irft_path, setting  # noqa: F401 (fixtures)
from test_toy import D, P

import irft
from aihf import dpo_loss, preference_loss
from common.data import collate
from common.logprobs import response_logprobs
from irft import irft_loss
from rft import reward_loss, token_rewards
from sft import nll_loss

Y, PROMPT = len(exact.RESPONSES), exact.PROMPTS[1]


@pytest.fixture(scope="module")
def expert():
    return noise(Y, seed=3).softmax(0)


# ---- Eq. 1 (RFT, IRL), Eq. 2 (AIHF): SFT is the projection of the expert onto the model ----
def check_sft(loss, expert) -> bool:
    """The mean loss is KL(D || pi) + H(D), and has its gradient, so that both have one minimum."""
    model = exact.make_model()
    batch = collate([(PROMPT, y) for y in exact.RESPONSES], pad_token_id=exact.EOS)
    tokens = response_logprobs(model, batch).logprobs.masked_fill(~batch.response_mask, math.nan)
    mean = (expert * loss(tokens, batch.response_mask)).sum()
    distance = exact.kl(expert.log(), exact.response_logprobs(model, PROMPT))
    entropy = -(expert * expert.log()).sum()
    same = abs((mean - distance - entropy).item()) < 1e-12
    return same and torch.allclose(flat_gradient(mean, model), flat_gradient(distance, model), rtol=0, atol=1e-12)


def test_sft_minimises_the_kl_from_the_expert(expert):
    assert check_sft(nll_loss, expert)
    assert not check_sft(lambda x, m: -nll_loss(x, m), expert)
    assert not check_sft(lambda x, m: -x.sum(-1), expert)
    assert not check_sft(lambda x, m: nll_loss(x, m) / m.sum(-1), expert)
    assert not check_sft(lambda x, m: nll_loss(x[:, :-1], m[:, :-1]), expert)


# ---- Eq. 2 and 9 (RFT), 4, 7 and 42 (AIHF), 3, 5b and 9 (IRL): the KL-regularised optimum ----
def check_optimum(rewarding, beta: float) -> bool:
    """The mean of a script's summed token rewards is beta log Z - beta KL(pi || pi_r) for every pi: pi_r alone is the best.

    rewarding: token_rewards, or a mutant.
    """
    policy, reference = exact.make_model(), exact.make_model(seed=1)
    batch = collate([(PROMPT, y) for y in exact.RESPONSES], pad_token_id=exact.EOS)
    scores, mask = noise(Y, seed=5), batch.response_mask
    logp, ref = (
        response_logprobs(model, batch).logprobs.detach().masked_fill(~mask, padding)
        for model, padding in ((policy, math.nan), (reference, 1e9))
    )
    total_logp, total_ref = scored(policy, PROMPT).detach(), scored(reference, PROMPT).detach()
    value = (total_logp.exp() * rewarding(scores, logp, ref, mask, beta).sum(-1)).sum()
    best = exact.optimal_policy(total_ref, scores, beta)
    bound = beta * (exact.log_partition(total_ref, scores, beta) - exact.kl(total_logp, best))
    is_policy = abs(best.exp().sum().item() - 1) < 1e-12  # then KL >= 0, and nothing is above beta log Z
    return is_policy and exact.kl(total_logp, best) > 0.1 and abs((value - bound).item()) < 1e-11


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
    """With log Z added up here: a wrong one in toy/exact.py would cancel between the policy and the reward."""
    rewards, ref = noise(Y, seed=5), exact.response_logprobs(exact.make_model(), PROMPT).detach()
    for beta in (0.1, 2.0):
        log_z = math.log(sum(math.exp(q + r / beta) for q, r in zip(ref.tolist(), rewards.tolist(), strict=True)))
        back = beta * (exact.optimal_policy(ref, rewards, beta) - ref + log_z)
        torch.testing.assert_close(back, rewards, rtol=0, atol=1e-12)
        assert abs(exact.log_partition(ref, rewards, beta).item() - log_z) < 1e-12


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


# ---- Eq. 24, 30 and 35 (AIHF) ----
def check_gradient(gradient, d: np.ndarray, p: np.ndarray) -> bool:
    """Autograd through sum_i d_i log pi_i + sum_ij p_ij log sigmoid(R_i - R_j), of Eq. 23, 28 and 34."""
    leaf = torch.tensor([-1.0, 0.4, 0.1, -0.3, 1.2], dtype=torch.float64, requires_grad=True)
    choices = torch.nn.functional.logsigmoid(leaf[:, None] - leaf[None, :])
    value = (torch.from_numpy(d) * leaf.log_softmax(0)).sum() + (torch.from_numpy(p) * choices).sum()
    (expected,) = torch.autograd.grad(value, leaf)
    return np.allclose(gradient(leaf.detach().numpy(), d, p), expected.numpy(), rtol=0, atol=1e-10)


def test_the_gradients_among_actions_by_autograd():
    """They are also zero at the rewards log d_i of Eq. 25, and at the solution of Eq. 31."""
    assert np.abs(bandit.gradient(np.log(D + 1), D + 1, 0 * P)).max() < 1e-12
    assert np.abs(bandit.gradient(bandit.btl_rewards(P), 0 * D, P)).max() < 1e-9
    for d, p in ((D, 0 * P), (0 * D, P), (D, P)):
        assert check_gradient(bandit.gradient, d, p)
        for wrong in (
            lambda r, d, p: -bandit.gradient(r, d, p),
            lambda r, d, p: bandit.gradient(r, d, p.T) if p.any() else bandit.gradient(r, d + 1, p),
            lambda r, d, p: bandit.gradient(r, d, p) / (d.sum() + p.sum()),
        ):
            assert not check_gradient(wrong, d, p)


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
        np.testing.assert_allclose(bandit.rlhf_policy(*counts(1e3)), rlhf, atol=1e-9, rtol=0)


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
        np.testing.assert_allclose(averaged(shown, wins), bandit.aihf_policy(shown, wins), atol=1e-12, rtol=0)
    shown, wins = np.array([11, 2, 24.0]), np.array([[0, 1, 22], [3, 0, 10], [5, 1, 0]], float)
    sft, btl, aihf = bandit.sft_policy(shown), bandit.softmax(bandit.btl_rewards(wins)), bandit.aihf_policy(shown, wins)
    assert [sft[0], btl[0], aihf[0]] == pytest.approx([0.297, 0.259, 0.433], abs=1e-3)
    assert averaged(shown, wins)[0] < 0.3


# ---- Algorithm 2 (RFT), line 5 ----
def check_answers(train, monkeypatch) -> bool:
    """irft.train's answers have the log-probs of the policy at the start of their iteration, and go to the prompts of its chunk."""
    seen, policies, make_pairs, sample_rows = [], [], irft.make_pairs, irft.evals.sample_rows

    def noted(run, t, plan, demonstrations, policy, *rest):
        policies.append(all_logprobs(policy))
        pairs = make_pairs(run, t, plan, demonstrations, policy, *rest)
        assert [p["prompt_ids"] for p in pairs] == [demonstrations[i]["prompt_ids"] for i in plan.chunks[t]]
        return pairs

    def sampled(run, generator, rows, *rest):
        rollout = sample_rows(run, generator, rows, *rest)
        seen.append((rows, rollout))
        return rollout

    monkeypatch.setattr(irft, "make_pairs", noted)
    monkeypatch.setattr(irft.evals, "sample_rows", sampled)
    train(T=2, num_chunks=2, num_train_epochs=1, beta=0.1)
    gaps = []
    for rows, rollout in seen:
        found = torch.tensor([sum(tokens) for tokens in rollout.logprobs])
        places = [
            (exact.PROMPTS.index(r["prompt_ids"]), exact.RESPONSES.index(y))
            for r, y in zip(rows, rollout.response_ids, strict=True)
        ]
        gaps.append(
            [max(abs(float(table[i]) - float(f)) for i, f in zip(places, found, strict=True)) for table in policies]
        )
    assert len(seen) == 2 and (policies[0] - policies[1]).abs().max() > 0.1
    return max(gaps[0][0], gaps[1][1]) < 1e-4 and gaps[1][0] > 0.01


def test_answers_come_from_the_policy_at_the_start_of_their_iteration(irft_path, monkeypatch):  # noqa: F811
    assert check_answers(irft_path, monkeypatch)


def test_answers_of_the_first_policy_are_told_apart(irft_path, monkeypatch):  # noqa: F811
    make_generator = irft.make_generator
    monkeypatch.setattr(
        irft, "make_generator", lambda run, policy, *rest: make_generator(run, copy.deepcopy(policy), *rest)
    )
    assert not check_answers(irft_path, monkeypatch)


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


# ---- Lemma A.1, Eq. 39b, and Lemma A.2, Eq. 79 (AIHF) ----
def check_smoothness(occupancy, alpha: float) -> bool:
    """Visits, and so the gradient of the demonstrations' likelihood, are Lipschitz in a table of rewards; the constants are ours.

    With |Q - Q'| <= |r - r'| / (1 - gamma) (Eq. 39a), and |pi - pi'|_1 <= |Q - Q'| / alpha for the policies of each state:
    |d - d'|_1 <= max_s |pi - pi'|_1 / (1 - gamma)^2 <= |r - r'| / (alpha (1 - gamma)^3). The gradient is (d_E - d) / alpha.
    """
    process, prior = mdp.random_mdp(fall=0.0, stumble=0.0), noise(4, 3, seed=1).log_softmax(-1)
    rewards, steps = 2 * noise(200, 4, 3, seed=3), noise(200, 4, 3, seed=4)
    steps *= torch.logspace(-4, 1, 200, dtype=torch.float64)[:, None, None]
    norm, left = (lambda x: x.abs().amax((-2, -1))), 1 - process.gamma
    policies = [
        mdp.soft_policy(mdp.optimal_q(process, r, 0.0, prior, alpha), prior, alpha) for r in (rewards, rewards + steps)
    ]
    visits = [occupancy(process, policy) for policy in policies]
    moved = (visits[0] - visits[1]).abs().sum((-2, -1))
    turned = (policies[0].exp() - policies[1].exp()).abs().sum(-1).amax(-1)
    within = (moved <= turned / left**2 + 1e-12) & (turned <= norm(steps) / alpha / left + 1e-12)
    return bool(within.all()) and bool((moved > 0.01 * turned / left**2).any())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_visits_and_gradient_are_lipschitz_in_the_rewards(alpha):
    assert check_smoothness(lambda process, policy: mdp.occupancy(process, policy)[0], alpha)
    assert not check_smoothness(lambda process, policy: 30 * mdp.occupancy(process, policy)[0], alpha)
    assert not check_smoothness(
        lambda process, policy: mdp.occupancy(process, policy)[0].sign() * policy.argmax(-1, True), alpha
    )
    assert not check_smoothness(lambda process, policy: 0 * policy, alpha)


# ---- the ledger ----
WORDS = ("exact", "shown", "not shown", "not run")


def numbers(*parts: str) -> set[str]:
    """{"Eq. 1", ...} of parts such as "Eq. 1, 3 to 5" and "Lemma B.1"; the letters of 5a and 5b are dropped."""
    found = set()
    for part in parts:
        part = re.sub(r"\[.*?\]", "", part)  # the draft's numbers
        number = r"(?:[A-Z]\.)?\d+(?:\.\d+)?[a-z]?"
        for kind, listed in re.findall(
            rf"(Eq\.|Lemma|Theorem|Assumption|Algorithm|Example|Table|Fig\.) ({number}(?:\s*(?:,|to)\s*{number})*)",
            part,
        ):
            for item in re.split(r"\s*,\s*", listed):
                first, *last = (n.rstrip("abc") for n in re.split(r"\s*to\s*", item))
                names = [str(n) for n in range(int(first), int(last[0]) + 1)] if last else [first]
                found |= {f"{kind} {n}" for n in names}
    return found


PAPERS = {  # all that is numbered in each, but for diagrams
    "RFT": numbers(
        "Eq. 1 to 19", "Lemma 3.1, 3.2, B.1, B.2, B.3", "Theorem 3.1, B.1", "Assumption B.1, B.2", "Algorithm 1, 2", "Example 1, 2",
        "Table 1 to 8", "Fig. 1, 2",
    ),
    "AIHF": numbers(
        "Eq. 1 to 88", "Lemma 4.1, A.1, A.2, A.3", "Theorem 4.1", "Assumption 1, 2", "Algorithm 1", "Example 2", "Table 1 to 6",
        "Fig. 2 to 9",
    ),
    "IRL": numbers("Eq. 1 to 14", "Lemma 1, 2", "Assumption 1", "Algorithm 1", "Table 1 to 3", "Fig. 2, 3"),
}  # fmt: skip


def ledger(text: str) -> dict[str, list[list[str]]]:
    """{paper: rows of its table, six cells each}."""
    found = {}
    for section in text.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")][2:]
        cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        found[section.split(":")[0].splitlines()[0]] = cells
    return {paper: found.get(paper, []) for paper in PAPERS}


@functools.cache
def names_of(path: Path) -> set[str]:
    """Functions, classes and constants at a file's top, and methods as Class.name."""
    found = set()
    for node in ast.parse(path.read_text()).body if path.is_file() else []:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return found


@functools.cache
def flags_of(path: Path) -> set[str]:
    """Flags of a program: the fields of its class Args, and of the classes of common/args.py if that has one as its base."""

    def fields(file: Path, name: str) -> set[str]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                own = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
                return own.union(
                    *(fields(ROOT / "common" / "args.py", b.id) for b in node.bases if isinstance(b, ast.Name))
                )
        return set()

    return {f"--{name.replace('_', '-')}" for name in fields(path, "Args")} if path.suffix == ".py" else set()


def command_fault(command: str) -> str:
    match = re.fullmatch(
        r"(?:python|bash|accelerate launch --quiet|pytest -n 0) ([\w/]+\.(?:py|sh))((?: .*)?)", command
    )
    if not match or not (ROOT / match[1]).is_file():
        return f"no such program: {command}"
    unknown = set(re.findall(r"--[\w-]+", match[2])) - flags_of(ROOT / match[1])
    return f"no such flag: {command}: {sorted(unknown)}" if unknown else ""


def faults(text: str) -> list[str]:
    """What is wrong with the text of docs/claims.md; empty if nothing is."""
    found = []
    letters = set(re.findall(r"^\| ([A-Z]) \|", text, re.M))
    for paper, rows in ledger(text).items():
        covered = numbers(*(row[0] for row in rows))
        found += [f"{paper}: no row for {name}" for name in sorted(PAPERS[paper] - covered)]
        found += [f"{paper}: {name} is not in the paper" for name in sorted(covered - PAPERS[paper])]
        for row in rows:
            where = f"{paper}, {row[0]}"
            if len(row) != 6 or row[2] not in WORDS or not row[1]:
                found.append(f"{where}: not six cells with one of {WORDS} in the third")
                continue
            _, _, word, symbols, tests, result = row
            for cell, of_tests in ((symbols, False), (tests, True)):
                quoted = re.findall("`([^`]+)`", cell)
                for name in quoted:
                    path, _, symbol = name.partition("::")
                    right = (
                        path.startswith("tests/test_") and symbol.startswith("test_")
                        if of_tests
                        else "test" not in path
                    )
                    if not right or symbol not in names_of(ROOT / path):
                        found.append(f"{where}: no such {'test' if of_tests else 'symbol'}: {name}")
                if cell != ", ".join(f"`{name}`" for name in quoted):
                    found.append(f"{where}: names only are listed, not {cell}")
            for quoted in re.findall("`([^`]+)`", result):
                if re.match("python|bash|accelerate|pytest|make", quoted) and (fault := command_fault(quoted)):
                    found.append(f"{where}: {fault}")
            if word == "exact" and not (symbols and tests):
                found.append(f"{where}: exact without a symbol or a test")
            if word == "exact" and re.search(r"(_runs|_scripts|_launch)\.py::", tests):
                found.append(f"{where}: a test of a whole run proves no equation")
            if word in ("shown", "not shown") and not (tests and re.search(r"\d", result)):
                found.append(f"{where}: {word} without a test or a number")
            if word == "not shown" and len(re.findall(r"\w{3,}[^.]*[.:](?: |$)", re.sub("`.*?`", "", result))) < 2:
                found.append(f"{where}: what was measured, or why it was not shown, is missing")
            if word == "not run" and not re.search(r"\([A-Z]\) below|in work: \w+|takes \w+", result):
                found.append(f"{where}: does not say what it would take")
            found += [
                f"{where}: ({x}) is not below" for x in re.findall(r"\(([A-Z])\) below", result) if x not in letters
            ]
    for line in (counts_line(text), *counts_table(text)):
        if line not in text:
            found.append(f"the sum is not up to date: {line}")
    return found


def counts(text: str) -> dict[str, Counter]:
    return {paper: Counter(row[2] for row in rows if len(row) > 2) for paper, rows in ledger(text).items()}


def counts_line(text: str) -> str:
    total = sum(counts(text).values(), Counter())
    return ", ".join(f"{total[word]} {word}" for word in WORDS)


def counts_table(text: str) -> list[str]:
    return [f"| {paper} | " + " | ".join(str(n[word]) for word in WORDS) + " |" for paper, n in counts(text).items()]


def test_the_ledger_names_what_exists_and_has_a_row_for_everything():
    assert not faults((ROOT / "docs" / "claims.md").read_text())


@pytest.mark.parametrize("page", ["README.md", "docs/status.md"])
def test_the_sum_of_the_ledger_is_told_where_readers_look(page):
    line = counts_line((ROOT / "docs" / "claims.md").read_text())
    assert line in (ROOT / page).read_text(), f"{page} should say: {line}"


CHANGES = {  # in the ledger: old, new
    "a function that is gone": ("`irft.py::irft_loss`", "`irft.py::irft_lose`"),
    "a method that is gone": ("`aihf.py::AIHF.reward_step`", "`aihf.py::AIHF.reward_stop`"),
    "a file that is gone": ("`toy/bandit.py::softmax`", "`toy/bandits.py::softmax`"),
    "a test that is gone": ("::test_dpo_loss_by_hand`", "::test_dpo_loss_by_foot`"),
    "a test in another file": ("`tests/test_aihf.py::test_dpo_loss_by_hand`", "`tests/test_rft.py::test_dpo_loss_by_hand`"),
    "a helper for a test": ("`tests/test_toy.py::test_bandit`", "`tests/test_toy.py::verify_bandit`"),
    "a program that is gone": ("`python toy/example1.py`", "`python toy/example0.py`"),
    "a script that is gone": ("`bash benchmark/film.sh`", "`bash benchmark/films.sh`"),
    "a flag that is gone": ("`python irft.py --T 1`", "`python irft.py --U 1`"),
    "a flag of another program": ("`python toy/example2.py --comparisons 0`", "`python toy/example2.py --compared 0`"),
    "a word of our own": ("| exact | `sft.py::nll_loss` |", "| proved | `sft.py::nll_loss` |"),
    "exact without a test": ("| `tests/test_claims.py::test_the_reward_is_beta_times_the_log_ratio_and_log_z` |", "| |"),
    "exact by a run": (
        "`tests/test_claims.py::test_the_reward_is_beta_times_the_log_ratio_and_log_z`",
        "`tests/test_rft_runs.py::test_a_run_leaves_what_it_promises`",
    ),
    "a row less": ("| Table 7 | ", "| Table 6 | "),
    "a row too many": ("| Table 7 | ", "| Table 7, Table 9 | "),
    "no reason": ("It takes the models of Table 4. Every run prints samples.", "Later."),
    "measured and no reason": (" The reward knows length and tidiness, not the post.", ""),
    "a letter that is not below": ("(D) below: `acc", "(H) below: `acc"),
    "another sum": (" exact, ", "0 exact, "),
    "another word": ("| Table 7 | Two versions of the base model differ on the leaderboard. | not run |", "| Table 7 | Two versions. | shown |"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_ledger_is_told_apart(name):
    text, (old, new) = (ROOT / "docs" / "claims.md").read_text(), CHANGES[name]
    assert old in text
    assert faults(text.replace(old, new, 1))
