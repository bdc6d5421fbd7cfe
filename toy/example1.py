"""Three actions, one demonstration: why IRL does not forget what the reference knows.

Paper: Getting More Juice Out of the SFT Data, arXiv:2405.17888, Example 1 and Table 1. Uniform pi_ref, D = {y3},
rewards in [0, R]. SFT puts everything on y3; ML-IRL (Eq. 4) gives (1, 1, e^(R/beta)) / (2 + e^(R/beta)).
"""

from dataclasses import dataclass

import bandit
import numpy as np
import tyro

REF = np.full(3, 1 / 3)
DEMONSTRATED = 2


@dataclass
class Args:
    output_dir: str = "runs/toy"
    """folder of the figure."""


def irl_policy(ratio: float) -> np.ndarray:
    """(3,) Table 1, last line, as a function of R/beta."""
    weights = np.array([1.0, 1.0, np.exp(ratio)])
    return weights / weights.sum()


def induced_policy(rewards: np.ndarray, beta: float) -> np.ndarray:
    """pi proportional to pi_ref exp(r / beta). Eq. 9."""
    weights = REF * np.exp((rewards - rewards.max()) / beta)
    return weights / weights.sum()


def maximise_likelihood(bound: float, beta: float, steps: int = 4000) -> np.ndarray:
    """(3,) rewards in [0, bound] that maximise log pi_r(y3), by projected gradient ascent on Eq. 4 (gradient: Eq. 13)."""
    rewards = np.full(3, bound / 2)
    for _ in range(steps):
        slope = (np.eye(3)[DEMONSTRATED] - induced_policy(rewards, beta)) / beta
        rewards = np.clip(rewards + 0.5 * beta**2 * slope, 0, bound)
    return rewards


def inner_value(rewards: np.ndarray, policy: np.ndarray, beta: float) -> float:
    """The objective of Lemma 3.1: (r(y3) - E_pi r) / beta + KL(pi || pi_ref), nats."""
    return float((rewards[DEMONSTRATED] - policy @ rewards) / beta + policy @ np.log(policy / REF))


def example(args: Args) -> bool:
    rng = np.random.default_rng(0)
    checks = {}
    print("   R/beta   pi(y1)   pi(y2)   pi(y3)      SFT: 0, 0, 1")
    for bound, beta in ((0.1, 0.1), (0.3, 0.1), (0.5, 0.1), (1.0, 0.5), (2.0, 1.0)):
        closed = irl_policy(bound / beta)
        print(f"  {bound / beta:7.1f}  {closed[0]:7.4f}  {closed[1]:7.4f}  {closed[2]:7.4f}")
        found = maximise_likelihood(bound, beta)
        case = f"R = {bound}, beta = {beta}"
        checks[f"{case}: optimum of Eq. 4 = Table 1"] = (np.abs(induced_policy(found, beta) - closed).max(), 1e-9)
        at_optimum = inner_value(found, closed, beta)
        likelihood = np.log(closed[DEMONSTRATED]) - np.log(REF[DEMONSTRATED])
        checks[f"{case}: Lemma 3.1, min over pi = log pi(y3) / pi_ref(y3)"] = (abs(at_optimum - likelihood), 1e-12)
        below = max(at_optimum - inner_value(found, p, beta) for p in rng.dirichlet(np.ones(3), 2000))
        checks[f"{case}: Lemma 3.1, no other policy is lower"] = (max(below, 0.0), 1e-12)
    ok = bandit.report(checks)

    fig, ax = bandit.new_figure(5.4, 3.4)
    ratios = np.linspace(0, 8, 200)
    curves = np.array([irl_policy(r) for r in ratios])
    ax.plot(ratios, curves[:, 2], color="#228833", lw=2, label="IRL, demonstrated y3")
    ax.plot(ratios, curves[:, 0], color="#228833", lw=2, ls="--", label="IRL, y1 and y2 each")
    ax.axhline(1, color="#ee6677", lw=2, label="SFT, y3")
    ax.axhline(0, color="#ee6677", lw=2, ls="--", label="SFT, y1 and y2")
    ax.axhline(1 / 3, color="#888888", lw=1, ls=":", label="reference")
    ax.set(xlabel="reward bound over KL weight, R / beta", ylabel="probability", ylim=(-0.03, 1.05), xlim=(0, 8))
    ax.set_title("One demonstration among three actions", loc="left")
    ax.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.52))
    bandit.save_figure(fig, args.output_dir, "example1.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(tyro.cli(Args, description=__doc__)))
