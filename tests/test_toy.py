"""The closed forms of the bandit against independent computations, and the examples as programs."""

import bandit
import example1
import example2
import numpy as np
import pytest
import two_actions
from helpers import ROOT, run


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(3)
    demonstrations = rng.integers(1, 30, 6).astype(float)
    preferences = rng.integers(1, 20, (6, 6)).astype(float)
    np.fill_diagonal(preferences, 0)
    return demonstrations, preferences


def test_gradient_by_finite_differences(counts):
    rewards = np.linspace(-1, 1, 6)
    found = bandit.gradient(rewards, *counts)
    for i in range(6):
        e = np.eye(6)[i] * 1e-5
        slope = (bandit.log_likelihood(rewards + e, *counts) - bandit.log_likelihood(rewards - e, *counts)) / 2e-5
        assert abs(slope - found[i]) < 1e-5


def test_newton_agrees_with_gradient_ascent_and_no_neighbour_is_better(counts):
    rewards = np.zeros(6)
    for _ in range(20_000):
        rewards += 0.005 * bandit.gradient(rewards, *counts)
    solved = bandit.newton(*counts)
    np.testing.assert_allclose(rewards - rewards.mean(), solved, atol=1e-9)
    best = bandit.log_likelihood(solved, *counts)
    rng = np.random.default_rng(0)
    assert all(bandit.log_likelihood(solved + rng.normal(0, 0.05, 6), *counts) < best for _ in range(50))


def test_identities_hold_at_the_solutions(counts):
    assert max(bandit.residuals(*counts).values()) < 1e-9


def test_minorize_maximize_fixed_point_is_the_aihf_policy(counts):
    """Eq. 15 iterated as a map converges to the same policy, without any derivative."""
    d, p = counts
    n = p + p.T
    policy = np.full(6, 1 / 6)
    for _ in range(3000):
        policy = (d + p.sum(1)) / (d.sum() + (n / (policy[:, None] + policy[None, :])).sum(1))
        policy /= policy.sum()
    np.testing.assert_allclose(policy, bandit.aihf_policy(d, p), atol=1e-9)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda d, p, pi: (d - p.sum(1)) / (d.sum() + ((p + p.T) * bandit.expected_draws(pi)).sum(1)),
        lambda d, p, pi: (d + p.sum(1)) / (d.sum() + (p * bandit.expected_draws(pi)).sum(1)),
        lambda d, p, pi: (d + p.sum(0)) / (d.sum() + ((p + p.T) * bandit.expected_draws(pi)).sum(1)),
        lambda d, p, pi: (d + p.sum(1)) / (1 + ((p + p.T) * bandit.expected_draws(pi)).sum(1)),
    ],
    ids=["sign", "n_is_p", "transposed", "no_D"],
)
def test_a_wrong_eq_15_is_told_apart(counts, mutant):
    policy = bandit.aihf_policy(*counts)
    assert np.abs(mutant(*counts, policy) - policy).max() > 1e-3


def test_two_actions_have_the_textbook_answers():
    for d, p in two_actions.CASES.values():
        solver, exact = two_actions.estimates(d, p), two_actions.closed_forms(d, p)
        assert solver == pytest.approx(exact, abs=1e-10)
        distance = {k: abs(v - two_actions.TRUTH) for k, v in solver.items()}
        assert max(distance, key=distance.get) == "RLHF"


def test_table_1_of_the_rft_paper():
    np.testing.assert_allclose(example1.irl_policy(2.0), np.array([1, 1, np.exp(2)]) / (2 + np.exp(2)), atol=1e-15)
    found = example1.induced_policy(example1.maximise_likelihood(0.4, 0.2), 0.2)
    np.testing.assert_allclose(found, example1.irl_policy(2.0), atol=1e-9)


def test_example_2_reproduces_the_paper_qualitatively():
    args = example2.Args()
    truth, d, p = example2.draw(args)
    distance = {
        "SFT": example2.total_variation(bandit.sft_policy(d), truth),
        "RLHF": example2.total_variation(bandit.rlhf_policy(d, p), truth),
        "AIHF": example2.total_variation(bandit.aihf_policy(d, p), truth),
    }
    assert distance["AIHF"] < 0.2 * distance["SFT"] < 0.2 * distance["RLHF"]
    assert bandit.rlhf_policy(d, p)[45:].sum() == 0.0
    assert abs(bandit.aihf_policy(d, p)[45:].sum() - truth[45:].sum()) < 0.005


def test_ford_names_the_actions_at_fault():
    p = np.zeros((4, 4))
    p[0, 1] = p[1, 0] = p[2, 3] = p[3, 2] = p[0, 2] = 1  # 3 and 4 never win over 1 and 2
    with pytest.raises(bandit.FordError, match=r"actions 3-4 never win .* actions 1-2 never lose"):
        bandit.newton(np.zeros(4), p)
    with pytest.raises(bandit.FordError, match=r"actions 2, 4 never win"):
        bandit.newton(np.array([1.0, 0, 1, 0]), np.zeros((4, 4)))
    p[2, 0] = 1
    bandit.newton(np.zeros(4), p)


def test_demonstrations_of_every_action_meet_fords_condition():
    np.testing.assert_allclose(
        bandit.softmax(bandit.newton(np.array([1.0, 2, 5]), np.zeros((3, 3)))), [1 / 8, 2 / 8, 5 / 8]
    )


@pytest.mark.parametrize("name", ["example1", "two_actions", "example2"])
def test_examples_run_and_draw(tmp_path, name):
    import sys

    done = run([sys.executable, f"toy/{name}.py", "--output-dir", str(tmp_path)])
    assert "PASS" in done.stdout and "FAIL" not in done.stdout
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_example_2_says_in_one_line_who_breaks_fords_condition(tmp_path):
    import sys

    done = run([sys.executable, "toy/example2.py", "--comparisons", "0", "--output-dir", str(tmp_path)], check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "actions 1-50" in done.stderr
    assert not list(tmp_path.iterdir()) and ROOT.exists()
