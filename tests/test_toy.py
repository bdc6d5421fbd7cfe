"""The bandit against independent computations, mutants of it, and the examples as programs."""

import itertools
import re
import sys
import types

import bandit
import example1
import example2
import numpy as np
import pytest
import two_actions
from helpers import ROOT, run


# ---- the same mathematics, written a second time: loops, no derivative, no solver ----
def naive_log_likelihood(rewards, d, p) -> float:
    actions = range(len(d))
    z = sum(np.exp(rewards[k]) for k in actions)
    total = sum(d[i] * np.log(np.exp(rewards[i]) / z) for i in actions)
    for i, j in itertools.permutations(actions, 2):
        total += p[i, j] * np.log(np.exp(rewards[i]) / (np.exp(rewards[i]) + np.exp(rewards[j])))
    return total


def fixed_point(d, p, steps=4000) -> np.ndarray:
    """The policy of Eq. 15 (Eq. 14 for d = 0) by iterating the equation itself (Hunter's minorize-maximize)."""
    n, policy = p + p.T, np.full(len(d), 1 / len(d))
    for _ in range(steps):
        policy = (d + p.sum(1)) / (d.sum() + (n / (policy[:, None] + policy[None, :])).sum(1))
        policy /= policy.sum()
    return policy


def make_counts():
    rng = np.random.default_rng(3)
    d, p = rng.integers(1, 30, 5).astype(float), rng.integers(1, 20, (5, 5)).astype(float)
    d[3] = 0  # never demonstrated
    p[1, 2] = p[2, 1] = 0  # never compared
    np.fill_diagonal(p, 0)
    return d, p


D, P = make_counts()
JOINT, FROM_PREFERENCES = fixed_point(D, P), fixed_point(np.zeros(5), P)
REWARDS = np.array([-1.0, 0.4, 0.1, -0.3, 1.2])


def verify_likelihood(b) -> None:
    assert abs(b.log_likelihood(REWARDS, D, P) - naive_log_likelihood(REWARDS, D, P)) < 1e-10
    slope, bend, h = b.gradient(REWARDS, D, P), b.curvature(REWARDS, D, P), 1e-5
    for i, e in enumerate(np.eye(5) * h):
        difference = naive_log_likelihood(REWARDS + e, D, P) - naive_log_likelihood(REWARDS - e, D, P)
        assert abs(difference / (2 * h) - slope[i]) < 1e-6
        np.testing.assert_allclose(
            (b.gradient(REWARDS - e, D, P) - b.gradient(REWARDS + e, D, P)) / (2 * h), bend[i], atol=1e-6, rtol=0
        )


def verify_newton(b) -> None:
    solved = b.newton(D, P)
    assert abs(solved.mean()) < 1e-13
    np.testing.assert_allclose(np.exp(solved) / np.exp(solved).sum(), JOINT, atol=1e-9, rtol=0)
    p = np.array([[0, 1.0], [1e6, 0]])
    np.testing.assert_allclose(np.diff(b.newton(np.zeros(2), p)), np.log(1e6), atol=1e-9, rtol=0)
    p = np.array([[0, 1e8, 0], [1, 0, 1e8], [0, 1, 0.0]])
    np.testing.assert_allclose(b.newton(np.zeros(3), p), np.log(1e8) * np.array([1, 0, -1]), atol=1e-7, rtol=0)
    d, uneven = (
        np.array([0, 0, 0, 1.0, 1]),
        np.array(  # an undamped step leaves for infinity here
            [[0, 200, 9e4, 0, 60], [0, 0, 1, 0, 8e4], [0, 0, 0, 2, 6], [3, 20, 9e3, 0, 4e3], [0, 0, 4, 9e4, 0]]
        ),
    )
    policy = np.exp(b.newton(d, uneven))
    policy /= policy.sum()
    drawn = ((uneven + uneven.T) / (policy[:, None] + policy[None, :])).sum(1)
    np.testing.assert_allclose((d + uneven.sum(1)) / (d.sum() + drawn), policy, rtol=1e-9)


def verify_policies(b) -> None:
    rewards = np.log(FROM_PREFERENCES)
    np.testing.assert_allclose(b.sft_policy(D), [x / sum(D) for x in D], atol=1e-15, rtol=0)
    np.testing.assert_allclose(b.softmax(b.btl_rewards(P)), FROM_PREFERENCES, atol=1e-9, rtol=0)
    np.testing.assert_allclose(b.aihf_policy(D, P), JOINT, atol=1e-9, rtol=0)
    rlhf = b.rlhf_policy(D, P)
    assert abs(rlhf.sum() - 1) < 1e-14 and rlhf[3] == 0
    shown, sft = D > 0, D[D > 0] / D.sum()

    def objective(policy):
        return policy @ rewards[shown] - policy @ np.log(policy / sft)

    best = np.log((D * FROM_PREFERENCES).sum() / D.sum())  # the maximum is log E_SFT[e^R]
    assert abs(objective(rlhf[shown]) - best) < 1e-9
    assert all(objective(q) < best for q in np.random.default_rng(0).dirichlet(np.ones(4), 200))


def verify_identities(b) -> None:
    found = b.residuals(D, P)
    assert len(found) == 7 and max(found.values()) < b.ROUNDING
    s = JOINT[0] + JOINT[2]
    waiting = sum(k * (1 - s) ** (k - 1) * s for k in range(1, 2000))
    assert abs(b.expected_draws(JOINT)[0, 2] - waiting) < 1e-9


def verify_ford(b) -> None:
    p = np.zeros((5, 5))
    p[0, 1] = p[1, 0] = p[2, 3] = p[3, 2] = p[0, 2] = 1  # 3 and 4 never win over 1 and 2; nobody meets 5
    with pytest.raises(b.FordError) as caught:
        b.newton(np.zeros(5), p)
    message = str(caught.value)
    assert "action 5 neither won nor lost" in message and "actions 3-4 never won" in message
    assert "actions 1-2 never lost" in message and "3 groups: 1-2 | 3-4 | 5" in message and "\n" not in message
    chain = np.diag(np.ones(3), 1)  # 1 > 2 > 3 > 4: the middle is broken too, by groups of its own
    assert b.ford_fault(np.zeros(4), chain) == (
        "action 4 never won against another group (reward to minus infinity); "
        "action 1 never lost to another group (reward to plus infinity); 4 groups: 1 | 2 | 3 | 4"
    )
    shown = np.array([1.0, 0, 1, 0])
    assert "actions 2, 4 never won" in b.ford_fault(shown, np.zeros((4, 4)))  # demonstrations alone
    assert "actions 1, 3 never lost" in b.ford_fault(shown, np.zeros((4, 4)))
    assert b.ford_fault(shown, chain).startswith("action 4 never won")  # 2 > 3 and 3 demonstrated: 1-3 are one group
    chain[3, 0] = 1
    assert not b.ford_fault(np.zeros(4), chain)  # a cycle is enough
    assert not b.ford_fault(np.ones(4), np.zeros((4, 4)))  # every action shown is enough
    assert not b.ford_fault(np.array([1.0, 0, 0]), np.array([[0, 0, 0], [1, 0, 0], [1.0, 0, 0]]))


VERIFY = [verify_likelihood, verify_newton, verify_policies, verify_identities, verify_ford]


@pytest.mark.parametrize("verify", VERIFY)
def test_bandit(verify):
    verify(bandit)


MUTANTS = {
    "gradient: sign of the wins": ("return demonstrations + preferences.sum(1) - exp",
                                   "return demonstrations - preferences.sum(1) - exp"),
    "gradient: losses for wins": ("return demonstrations + preferences.sum(1) - exp",
                                  "return demonstrations + preferences.sum(0) - exp"),
    "gradient: |D| dropped": ("expected = demonstrations.sum() * softmax(rewards)", "expected = softmax(rewards)"),
    "gradient: n_ij dropped": ("(n * win_probability(rewards))", "win_probability(rewards)"),
    "gradient: p_ij for n_ij": ("(n * win_probability(rewards))", "(preferences * win_probability(rewards))"),
    "sigmoid: sign": ("np.exp(rewards[None, :] - rewards[:, None])", "np.exp(rewards[:, None] - rewards[None, :])"),
    "likelihood: log Z dropped": ("demonstrations @ (rewards - log_z)", "demonstrations @ rewards"),
    "likelihood: preferences transposed": ("(preferences * (rewards[:, None] - pairs))",
                                           "(preferences.T * (rewards[:, None] - pairs))"),
    "curvature: n_ij dropped": ("pair = (preferences + preferences.T) * wins", "pair = wins"),
    "curvature: outer product dropped": ("(np.diag(policy) - np.outer(policy, policy))", "np.diag(policy)"),
    "newton: downhill": ("rewards = rewards + step *", "rewards = rewards - step *"),
    "newton: undamped": ("(np.log1p(spread) / spread if spread > 0 else 1)", "1"),
    "newton: gauge": ("return rewards - rewards.mean()", "return rewards - rewards[0]"),
    "newton: stops early": ("* total and spread <= 1e-6", "* total"),
    "SFT: not normalised by |D|": ("return demonstrations / demonstrations.sum()", "return demonstrations / 50"),
    "SFT: smoothed": ("return demonstrations / demonstrations.sum()",
                      "return (demonstrations + 1) / (demonstrations + 1).sum()"),
    "BTL: demonstrations leak in": ("newton(np.zeros(len(", "newton(np.ones(len("),
    "RLHF: sign of the reward": ("* np.exp(btl_rewards(preferences))", "* np.exp(-btl_rewards(preferences))"),
    "RLHF: sum of policies": ("sft_policy(demonstrations) * np.exp(", "sft_policy(demonstrations) + np.exp("),
    "AIHF: demonstrations dropped": ("return softmax(newton(demonstrations, preferences))",
                                     "return softmax(btl_rewards(preferences))"),
    "rho: not inverted": ("return 1 / (policy[:, None] + policy[None, :])", "return policy[:, None] + policy[None, :]"),
    "Eq. 15: |D| dropped": ("demonstrations.sum() + (n * expected_draws(aihf))", "(n * expected_draws(aihf))"),
    "Eq. 14: rho at the wrong policy": ("(n * expected_draws(btl))", "(n * expected_draws(aihf))"),
    "Ford: direction": ("reach = (preferences > 0)", "reach = (preferences.T > 0)"),
    "Ford: demonstrations ignored": (" | (demonstrations > 0)[:, None]", ""),
    "Ford: demonstrations as losses": ("(demonstrations > 0)[:, None]", "(demonstrations > 0)[None, :]"),
    "Ford: no transitive closure": ("reach |= reach[:, k : k + 1] & reach[k : k + 1, :]", "pass"),
    "Ford: weakly connected is enough": ("mutual = reach & reach.T", "mutual = reach | reach.T"),
    "Ford: winners and losers exchanged": ("reach[np.ix_(group, outside)].any(), reach[np.ix_(outside, group)].any()",
                                           "reach[np.ix_(outside, group)].any(), reach[np.ix_(group, outside)].any()"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_bandit_is_caught(name):
    old, new = MUTANTS[name]
    source = (ROOT / "toy" / "bandit.py").read_text()
    assert source.count(old) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    caught = []
    for verify in VERIFY:
        try:
            with np.errstate(all="ignore"):
                verify(mutant)
        except (AssertionError, RuntimeError, np.linalg.LinAlgError, pytest.fail.Exception, mutant.FordError):
            caught.append(verify.__name__)
    assert caught


@pytest.mark.parametrize("seed", range(5))
def test_the_identities_hold_for_any_counts_that_have_a_solution(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        size = int(rng.integers(2, 9))
        d = np.where(rng.random(size) < 0.4, 0, 10 ** rng.uniform(0, 4, size)).round()
        p = np.where(rng.random((size, size)) < 0.3, 0, 10 ** rng.uniform(0, 4, (size, size))).round()
        np.fill_diagonal(p, 0)
        if d.any() and not bandit.ford_fault(np.zeros(size), p):
            assert max(bandit.residuals(d, p).values()) < 1e-9


def test_the_likelihood_rises_at_every_newton_step(monkeypatch):
    visited, gradient = [], bandit.gradient
    monkeypatch.setattr(bandit, "gradient", lambda r, *counts: visited.append(r) or gradient(r, *counts))
    d, p = np.array([1e5, 1.0, 3.0]), np.array([[0, 1, 0], [1e4, 0, 1], [0, 1e4, 0.0]])
    bandit.newton(d, p)
    values = [bandit.log_likelihood(r, d, p) for r in visited]
    assert len(values) > 5 and all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(values))


# ---- the examples ----
def test_two_actions_have_the_textbook_answers():
    expected = {
        "(a)": {"SFT": 1 / 2, "BTL": 3 / 4, "RLHF": 3 / 4, "AIHF": 13 / 24},
        "(b)": {"SFT": 3 / 4, "BTL": 1 / 2, "RLHF": 3 / 4, "AIHF": 13 / 24},
        "(a')": {"SFT": 11 / 20, "BTL": 3 / 4, "RLHF": 33 / 42, "AIHF": 14 / 24},
        "(b')": {"SFT": 3 / 4, "BTL": 11 / 20, "RLHF": 33 / 42, "AIHF": 14 / 24},
    }
    for case, (d, p) in two_actions.CASES.items():
        assert two_actions.estimates(d, p) == pytest.approx(expected[case], abs=1e-12)
        assert two_actions.closed_forms(d, p) == pytest.approx(expected[case], abs=1e-15)


def test_pooling_has_the_variance_of_the_pooled_counts():
    for truth, size_d, size_p in two_actions.SETTINGS:
        found = two_actions.variances(truth, size_d, size_p, 20_000, seed=7)
        for name, counts in (("SFT", size_d), ("BTL", size_p), ("AIHF", size_d + size_p)):
            measured, error, exact = found[name]
            assert exact == pytest.approx(truth * (1 - truth) / counts)
            assert abs(measured - exact) < 4.5 * error < 0.06 * exact
        for name in ("SFT", "BTL"):
            assert found["AIHF"][0] + 3 * np.hypot(found["AIHF"][1], found[name][1]) < found[name][0]


def test_table_1_of_the_rft_paper():
    np.testing.assert_allclose(
        example1.irl_policy(2.0), np.array([1, 1, np.exp(2)]) / (2 + np.exp(2)), atol=1e-15, rtol=0
    )
    for bound, beta in ((0.4, 0.2), (3.0, 0.5)):
        best, (rewards, policy) = example1.bilevel(bound, beta), example1.minimax(bound, beta)
        np.testing.assert_allclose(best, [0, 0, bound], atol=1e-12, rtol=0)
        np.testing.assert_allclose(rewards, [0, 0, bound], atol=1e-12, rtol=0)
        np.testing.assert_allclose(
            example1.induced_policy(best, beta), example1.irl_policy(bound / beta), atol=1e-12, rtol=0
        )
        np.testing.assert_allclose(policy, example1.irl_policy(bound / beta), atol=1e-12, rtol=0)
        grid = itertools.product(np.linspace(0, bound, 7), repeat=3)
        likelihoods = {r: example1.likelihood(np.array(r), beta) for r in grid}
        assert max(likelihoods, key=likelihoods.get) == (0, 0, bound)


@pytest.mark.parametrize(
    "mutant",
    [
        ("induced_policy", lambda rewards, beta: np.exp(rewards / beta**2) / np.exp(rewards / beta**2).sum()),
        ("irl_policy", lambda ratio: np.array([1, 1, np.exp(-ratio)]) / (2 + np.exp(-ratio))),
        ("inner_value", lambda r, q, beta: float((r[2] - q @ r) / beta - q @ np.log(q * 3))),
        ("inner_value", lambda r, q, beta: float((r[2] - q @ r) + q @ np.log(q * 3))),
        ("minimax", lambda bound, beta: (np.array([0, 0, bound]), np.full(3, 1 / 3))),
    ],
    ids=["beta_squared", "sign", "kl_sign", "no_beta", "policy_not_moved"],
)
def test_example_1_fails_on_wrong_mathematics(monkeypatch, capsys, tmp_path, mutant):
    monkeypatch.setattr(example1, *mutant)
    assert example1.example(example1.Args(output_dir=str(tmp_path))) is False
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 1])
def test_example_2_reproduces_the_paper_qualitatively(seed):
    truth, d, p = example2.draw(example2.Args(seed=seed))
    assert d.sum() == 2000 and not d[45:].any() and d[:45].all()
    assert ((p + p.T)[~np.eye(50, dtype=bool)] == 200).all()
    policies = example2.solve(d, p)
    distance = {name: example2.total_variation(q, truth) for name, q in policies.items()}
    assert distance["AIHF"] < 0.015 < 0.08 < distance["SFT"] < 0.12 < 0.18 < distance["RLHF"] < 0.26
    assert policies["SFT"][45:].sum() == policies["RLHF"][45:].sum() == 0
    assert abs(policies["AIHF"][45:].sum() - truth[45:].sum()) < 0.003
    assert max(bandit.residuals(d, p).values()) < bandit.ROUNDING


def test_a_failed_check_is_printed_and_returned(capsys):
    assert bandit.report({"good": (0.0, 1e-9)}) is True
    assert bandit.report({"good": (0.0, 1e-9), "bad": (1e-8, 1e-9)}) is False
    assert bandit.report({"not a number": (float("nan"), 1e-9)}) is False
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["PASS", "PASS", "FAIL", "FAIL"]
    with pytest.raises(SystemExit, match="1"):
        bandit.run(lambda: False)


# ---- as programs ----
@pytest.mark.parametrize("name", ["example1", "two_actions", "example2"])
def test_an_example_runs_and_draws(tmp_path, name):
    done = run([sys.executable, "-W", "error", f"toy/{name}.py", "--output-dir", str(tmp_path / "new")])
    assert done.stdout.count("PASS") >= 7 and "FAIL" not in done.stdout
    assert (tmp_path / "new" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_default_figure_folder_is_below_the_current_one(tmp_path):
    run([sys.executable, str(ROOT / "toy" / "example1.py")], cwd=tmp_path)
    assert (tmp_path / "runs" / "toy" / "example1.png").is_file()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--comparisons 0",
            "BTL .*actions 1-50 neither won nor lost.* AIHF: actions 46-50 never won.*actions 1-45 never",
        ),
        ("--covered 51", "--covered is 51, expected 1 to 50"),
        ("--demonstrations 0", "--demonstrations is 0, expected 1"),
    ],
)
def test_input_without_a_solution_is_one_line_and_status_2(tmp_path, flags, line):
    done = run([sys.executable, "toy/example2.py", *flags.split(), "--output-dir", str(tmp_path)], check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(f"error: .*{line}.*", done.stderr.strip())
    assert not list(tmp_path.iterdir())
