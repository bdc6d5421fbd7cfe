"""The static softmax bandit: one state, n actions, pi = softmax(R). Closed forms and a solver for the toy examples.

demonstrations: (n,) d_i, how often action i was demonstrated. preferences: (n, n) p_ij, how often i was preferred to j.
Rewards are identified up to a constant; the solver returns the ones of mean 0.

Paper: AIHF = Learning Reward and Policy Jointly from Demonstration and Preference, arXiv:2406.06874, Sec. 3.3 and A.2.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


class FordError(Exception):
    """The likelihood has no finite maximiser: some actions never lose to, or never win over, the others."""


def softmax(rewards: np.ndarray) -> np.ndarray:
    weights = np.exp(rewards - rewards.max())
    return weights / weights.sum()


def log_likelihood(rewards: np.ndarray, demonstrations: np.ndarray, preferences: np.ndarray) -> float:
    """sum_i d_i log pi_i + sum_ij p_ij log sigmoid(R_i - R_j), nats; concave in the rewards. AIHF Eq. 12, 14, 15."""
    log_z = np.logaddexp.reduce(rewards)
    pairs = np.logaddexp(rewards[:, None], rewards[None, :])
    return float(demonstrations @ (rewards - log_z) + (preferences * (rewards[:, None] - pairs)).sum())


def gradient(rewards: np.ndarray, demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """(n,) d_i + sum_j p_ij - |D| pi_i - sum_j n_ij sigmoid(R_i - R_j): AIHF's stationarity condition (before Eq. 36)."""
    n = preferences + preferences.T
    wins = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
    return demonstrations + preferences.sum(1) - demonstrations.sum() * softmax(rewards) - (n * wins).sum(1)


def newton(demonstrations: np.ndarray, preferences: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """(n,) maximiser of log_likelihood with mean 0, by damped Newton; gradient at most tolerance times the counts.

    FordError if there is no finite maximiser.
    """
    check_ford(demonstrations, preferences)
    size = len(demonstrations)
    total = demonstrations.sum() + preferences.sum()
    n = preferences + preferences.T
    rewards = np.zeros(size)
    for _ in range(100):
        slope = gradient(rewards, demonstrations, preferences)
        if np.abs(slope).max() <= tolerance * total:
            return rewards - rewards.mean()
        policy = softmax(rewards)
        wins = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
        pair = n * wins * wins.T
        curvature = demonstrations.sum() * (np.diag(policy) - np.outer(policy, policy)) + np.diag(pair.sum(1)) - pair
        step = np.linalg.solve(curvature + np.ones((size, size)), slope)  # the ones fix the constant
        scale, value = 1.0, log_likelihood(rewards, demonstrations, preferences)
        gain = slope @ step
        while (
            scale > 1e-8
            and log_likelihood(rewards + scale * step, demonstrations, preferences) < value + 1e-4 * scale * gain
        ):
            if gain < 1e-12 * abs(value):  # at rounding: the likelihood no longer resolves the step, the gradient does
                break
            scale /= 2
        rewards = rewards + scale * step
    raise RuntimeError(f"newton did not converge: gradient {np.abs(slope).max():.2e}")


def check_ford(demonstrations: np.ndarray, preferences: np.ndarray) -> None:
    """Ford's condition: the graph `i was preferred to j, or demonstrated when j could have been` is strongly connected.

    FordError names the actions (counted from 1) whose reward would run to plus or minus infinity.
    """
    size = len(demonstrations)
    reach = (preferences > 0) | (demonstrations > 0)[:, None] | np.eye(size, dtype=bool)
    for k in range(size):  # transitive closure
        reach |= reach[:, k : k + 1] & reach[k : k + 1, :]
    mutual = reach & reach.T
    never_win = [i for i in range(size) if (reach[i] == mutual[i]).all() and not mutual[i].all()]
    never_lose = [i for i in range(size) if (reach[:, i] == mutual[i]).all() and not mutual[i].all()]
    if never_win or never_lose:
        parts = []
        if never_win:
            parts.append(
                f"actions {spans(never_win)} never win over an action outside their group (reward to minus infinity)"
            )
        if never_lose:
            parts.append(
                f"actions {spans(never_lose)} never lose to an action outside their group (reward to plus infinity)"
            )
        raise FordError("no finite reward fits these counts (Ford's condition): " + "; ".join(parts))


def spans(actions: list[int]) -> str:
    """[0, 1, 2, 6] -> '1-3, 7'."""
    groups: list[list[int]] = []
    for a in actions:
        if groups and a == groups[-1][-1] + 1:
            groups[-1].append(a)
        else:
            groups.append([a])
    return ", ".join(f"{g[0] + 1}" if len(g) == 1 else f"{g[0] + 1}-{g[-1] + 1}" for g in groups)


# ---- the four policies ----
def sft_policy(demonstrations: np.ndarray) -> np.ndarray:
    """pi_i = d_i / |D|. AIHF Eq. 12, 26."""
    return demonstrations / demonstrations.sum()


def btl_rewards(preferences: np.ndarray) -> np.ndarray:
    """Maximum-likelihood rewards of the preferences alone. AIHF Eq. 14, 32."""
    return newton(np.zeros(len(preferences)), preferences)


def rlhf_policy(demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """pi_i proportional to pi_i^SFT exp(R_i^BTL): the softmax of the sum of two separately learned rewards. AIHF Eq. 33."""
    weights = sft_policy(demonstrations) * np.exp(btl_rewards(preferences))
    return weights / weights.sum()


def aihf_policy(demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """softmax of the reward that maximises both likelihoods together. AIHF Eq. 15, 36."""
    return softmax(newton(demonstrations, preferences))


# ---- the identities that hold at the solutions ----
def expected_draws(policy: np.ndarray) -> np.ndarray:
    """(n, n) rho_ij = 1 / (pi_i + pi_j): expected draws from the policy until i or j comes up."""
    return 1 / (policy[:, None] + policy[None, :])


def residuals(demonstrations: np.ndarray, preferences: np.ndarray) -> dict[str, float]:
    """{identity: largest violation, as a probability or relative to the counts} at the computed solutions."""
    n = preferences + preferences.T
    shown = demonstrations > 0
    sft = sft_policy(demonstrations)
    fitted = newton(demonstrations[shown], np.zeros((shown.sum(), shown.sum())))
    r_btl, r_aihf = btl_rewards(preferences), newton(demonstrations, preferences)
    btl, aihf = softmax(r_btl), softmax(r_aihf)
    with np.errstate(divide="ignore"):
        rlhf = softmax(np.log(sft) + r_btl)
    joint = (demonstrations + preferences.sum(1)) / (demonstrations.sum() + (n * expected_draws(aihf)).sum(1))
    return {
        "SFT, Eq. 12: the counts maximise the demonstration likelihood": np.abs(softmax(fitted) - sft[shown]).max(),
        "BTL, Eq. 14: pi_i = sum_j p_ij / sum_j n_ij rho_ij": np.abs(
            preferences.sum(1) / (n * expected_draws(btl)).sum(1) - btl
        ).max(),
        "RLHF, Eq. 33: product form = softmax of the summed rewards": np.abs(
            rlhf_policy(demonstrations, preferences) - rlhf
        ).max(),
        "AIHF, Eq. 15: pi_i = (d_i + sum_j p_ij) / (|D| + sum_j n_ij rho_ij)": np.abs(joint - aihf).max(),
        "AIHF, stationarity (relative to the counts)": np.abs(gradient(r_aihf, demonstrations, preferences)).max()
        / (demonstrations.sum() + preferences.sum()),
    }


# ---- for the command lines ----
def report(checks: dict[str, tuple[float, float]]) -> bool:
    """Print {what: (residual, bound)} as a table with PASS or FAIL. Returns whether all passed."""
    width = max(map(len, checks))
    ok = True
    for name, (residual, bound) in checks.items():
        passed = bool(residual <= bound)
        ok &= passed
        print(f"  {name:<{width}}  {residual:10.2e} <= {bound:.2g}  {'PASS' if passed else 'FAIL'}")
    return ok


def run(example: Callable[[], bool]) -> None:
    """Exit 0 if all checks passed, 1 if one failed, 2 with one line if the data admit no solution."""
    try:
        sys.exit(0 if example() else 1)
    except FordError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def save_figure(fig, output_dir: str, name: str) -> Path:
    path = Path(output_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    print(f"figure: {path}")
    return path


def new_figure(width: float, height: float, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


COLORS = {"truth": "#222222", "SFT": "#ee6677", "BTL": "#ccbb44", "RLHF": "#4477aa", "AIHF": "#228833"}
