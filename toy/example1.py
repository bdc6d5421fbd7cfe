"""Three actions, one demonstration: why IRL does not forget what the reference knows.

Paper: RFT = Getting More Juice Out of the SFT Data, arXiv:2405.17888, Example 1 and Table 1. Uniform pi_ref, D = {y3},
rewards in [0, R]. SFT puts everything on y3; ML-IRL (Eq. 4) gives (1, 1, e^(R/beta)) / (2 + e^(R/beta)).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, during the imports too, without a traceback

from dataclasses import dataclass

import bandit
import numpy as np

REF = np.full(3, 1 / 3)
DEMONSTRATED = 2
CASES = ((0.1, 0.1), (0.3, 0.1), (0.5, 0.1), (1.0, 0.5), (2.0, 1.0))  # R, beta; the last two share R / beta


@dataclass
class Args:
    seed: int = 0
    """of the rewards and policies tried against the optimum, >= 0."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def irl_policy(ratio: float) -> np.ndarray:
    """(3,) the closed form as a function of R / beta. RFT Table 1, last line."""
    weights = np.array([1.0, 1.0, np.exp(ratio)])
    return weights / weights.sum()


def induced_policy(rewards: np.ndarray, beta: float) -> np.ndarray:
    """pi proportional to pi_ref exp(r / beta), the lower level of Eq. 4. RFT Eq. 9."""
    weights = REF * np.exp((rewards - rewards.max()) / beta)
    return weights / weights.sum()


def likelihood(rewards: np.ndarray, beta: float) -> float:
    """log pi_r(y3), nats: the upper level. RFT Eq. 4."""
    return float(np.log(induced_policy(rewards, beta)[DEMONSTRATED]))


def bilevel(bound: float, beta: float, steps: int = 2000) -> np.ndarray:
    """(3,) rewards in [0, bound] that maximise the likelihood: projected ascent on RFT Eq. 4, gradient of Eq. 13."""
    rewards = np.full(3, bound / 2)
    for _ in range(steps):
        slope = (np.eye(3)[DEMONSTRATED] - induced_policy(rewards, beta)) / beta
        rewards = np.clip(rewards + beta**2 * slope, 0, bound)
    return rewards


def inner_value(rewards: np.ndarray, policy: np.ndarray, beta: float) -> float:
    """(r(y3) - E_pi r) / beta + KL(pi || pi_ref), nats. RFT Lemma 3.1."""
    return float((rewards[DEMONSTRATED] - policy @ rewards) / beta + policy @ np.log(policy / REF))


def minimax(bound: float, beta: float, steps: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """(rewards, policy) of max_r min_pi inner_value by alternating steps; the closed form of the policy is not used.

    Policy: exponentiated gradient descent, stays on the simplex. Reward: projected ascent. RFT Lemma 3.1, Eq. 5.
    """
    rewards, log_policy = np.full(3, bound / 2), np.log(REF)
    for _ in range(steps):
        log_policy = log_policy - 0.3 * (log_policy - np.log(REF) - rewards / beta)
        log_policy = log_policy - np.logaddexp.reduce(log_policy)
        slope = (np.eye(3)[DEMONSTRATED] - np.exp(log_policy)) / beta
        rewards = np.clip(rewards + beta**2 * slope, 0, bound)
    return rewards, np.exp(log_policy)


def check(bound: float, beta: float, rng: np.random.Generator) -> dict[str, float]:
    """{statement: violation} for one reward bound and KL weight."""
    closed, corner = irl_policy(bound / beta), np.eye(3)[DEMONSTRATED] * bound
    best = bilevel(bound, beta)
    saddle_rewards, saddle_policy = minimax(bound, beta)
    tried = max(likelihood(r, beta) for r in rng.uniform(0, bound, (2000, 3)))
    value = inner_value(best, closed, beta)
    lowest = min(inner_value(best, p, beta) for p in rng.dirichlet(np.ones(3), 2000))
    return {
        "Eq. 4: the optimum is r = (0, 0, R)": np.abs(best - corner).max(),
        "Eq. 4: its policy is Table 1": np.abs(induced_policy(best, beta) - closed).max(),
        "Eq. 4: none of 2000 rewards in [0, R] does better": max(tried - likelihood(best, beta), 0.0),
        "Lemma 3.1: the saddle point has r = (0, 0, R)": np.abs(saddle_rewards - corner).max(),
        "Lemma 3.1: its policy is Table 1": np.abs(saddle_policy - closed).max(),
        "Lemma 3.1: min over pi = log pi(y3) / pi_ref(y3)": abs(value - np.log(closed / REF)[DEMONSTRATED]),
        "Lemma 3.1: none of 2000 policies is lower": max(value - lowest, 0.0),
    }


def example(args: Args) -> bool:
    rng = np.random.default_rng(args.seed)
    found = [check(bound, beta, rng) for bound, beta in CASES]
    print("       R    beta   R/beta       y1       y2       y3")
    print(f"  SFT{' ' * 21} {0:8.4f} {0:8.4f} {1:8.4f}")
    for bound, beta in CASES:
        values = " ".join(f"{p:8.4f}" for p in irl_policy(bound / beta))
        print(f"  IRL {bound:4.1f}  {beta:4.1f}   {bound / beta:6.1f} {values}")
    print("largest violation over these five")
    ok = bandit.report({name: (max(f[name] for f in found), bandit.ROUNDING) for name in found[0]})

    fig, ax = bandit.new_figure(6, 3.6)
    ratios, (sft, irl) = np.linspace(0, 8, 200), (bandit.COLORS["SFT"], bandit.COLORS["AIHF"])
    curves = np.array([irl_policy(r) for r in ratios])
    ax.axhline(1 / 3, color="#888888", lw=1, ls=":")
    ax.plot([0, 8], [1, 1], color=sft, lw=2)
    ax.plot([0, 8], [0, 0], color=sft, lw=2)
    ax.plot(ratios, curves[:, 2], color=irl, lw=2)
    ax.plot(ratios, curves[:, 0], color=irl, lw=2)
    points = sorted({bound / beta for bound, beta in CASES})
    for action in (0, 2):
        solved = [induced_policy(bilevel(p, 1.0), 1.0)[action] for p in points]
        ax.plot(points, solved, "o", color=irl, ms=5, mec="white", mew=0.8, zorder=3)
    ax.text(0.15, 1.02, "SFT, the demonstrated $y_3$", color=sft, va="bottom")
    ax.text(0.15, -0.02, "SFT, $y_1$ and $y_2$", color=sft, va="top")
    ax.text(1.55, 0.62, "IRL, the demonstrated $y_3$", color=irl)
    ax.text(1.55, 0.19, "IRL, $y_1$ and $y_2$ each", color=irl)
    ax.text(7.95, 1 / 3 + 0.012, r"reference $\pi_{\mathrm{ref}} = 1/3$", color="#666666", ha="right", va="bottom")
    ax.set(xlabel=r"reward bound over KL weight, $R/\beta$", ylabel="probability", ylim=(-0.09, 1.1), xlim=(0, 8))
    ax.set_title("One demonstration among three actions (dots: Eq. 4 solved numerically)", loc="left", size=9.5)
    bandit.save_figure(fig, args.output_dir, "example1.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(bandit.parse_args(Args, __doc__)))
