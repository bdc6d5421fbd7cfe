"""Preferences about one region, demonstrations from another: whose reward is right where the policy goes?

Paper: AIHF, arXiv:2406.06874, Sec. 3.1, and "Distribution Mismatch" in A.1.2 (Fig. 6). The paper shows it on film reviews; here
are 21 actions x = 0..20, a true reward that is a cubic in x with its maximum at 13, and learned rewards that are cubics
too, so that a reward must extrapolate. 50 demonstrations come from the true softmax, the two answers of each comparison
from x <= 8 alone. RLHF learns its reward from the comparisons, AIHF from both sources together. Averages of 30 draws.

Rewards and values are in nats: the KL weight is 1 everywhere, and pi_ref is uniform.
"""

from dataclasses import dataclass

import bandit
import numpy as np
import tyro

ACTIONS = 21
X = np.arange(ACTIONS)
Z = (X - 10) / 10
POWERS = np.stack([Z, Z**2, Z**3], 1)
FEATURES = POWERS - POWERS.mean(0)  # a constant in the reward changes nothing
TRUTH = POWERS @ np.array([6.0, -8.0, -4.0])
TRUTH = TRUTH - TRUTH.max()
PRIOR = (
    1e-3  # precision of a Gaussian prior on the three coefficients: comparisons that all agree have no finite maximiser
)
COMPARISONS = (50, 200, 1000, 5000)


@dataclass
class Args:
    compared: int = 9
    """comparisons are between actions below this one, 2 to 21."""
    demonstrations: int = 50
    """draws from the true policy, >= 1."""
    draws: int = 30
    """data sets behind every average, >= 2."""
    seed: int = 0
    """of the draws, >= 0."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def validate(args: Args) -> None:
    for flag, value, low, high in (
        ("--compared", args.compared, 2, ACTIONS),
        ("--demonstrations", args.demonstrations, 1, 10**9),
        ("--draws", args.draws, 2, 10**6),
        ("--seed", args.seed, 0, 2**63),
    ):
        if not low <= value <= high:
            raise bandit.InputError(f"{flag} is {value}, expected {low} to {high}")


def draw(
    rng: np.random.Generator, compared: int, demonstrations: int, comparisons: int
) -> tuple[np.ndarray, np.ndarray]:
    """(demonstrations (n,), preferences (n, n)): counts of the true policy, and Bradley-Terry choices between x < compared."""
    shown = rng.multinomial(demonstrations, bandit.softmax(TRUTH)).astype(float)
    first, second = np.triu_indices(compared, 1)
    pair = rng.integers(len(first), size=comparisons)
    wins = rng.random(comparisons) < bandit.win_probability(TRUTH)[first[pair], second[pair]]
    preferences = np.zeros((ACTIONS, ACTIONS))
    np.add.at(preferences, (np.where(wins, first[pair], second[pair]), np.where(wins, second[pair], first[pair])), 1)
    return shown, preferences


def fit(demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """(n,) the cubic that maximises bandit.log_likelihood less PRIOR / 2 times its squared coefficients.

    bandit.newton's method in three coefficients: what it says of the shortened step holds along any direction.
    """
    coefficients = np.zeros(FEATURES.shape[1])
    for _ in range(200):
        rewards = FEATURES @ coefficients
        slope = FEATURES.T @ bandit.gradient(rewards, demonstrations, preferences) - PRIOR * coefficients
        bend = FEATURES.T @ bandit.curvature(rewards, demonstrations, preferences) @ FEATURES + PRIOR * np.eye(3)
        step = np.linalg.solve(bend, slope)
        spread = np.ptp(FEATURES @ step)
        coefficients = coefficients + step * (np.log1p(spread) / spread if spread > 0 else 1)
        if spread <= 1e-9:
            return FEATURES @ coefficients
    raise RuntimeError(f"fit did not converge: last step {spread:.2e}")


def accuracy(rewards: np.ndarray, among: np.ndarray) -> float:
    """Share of the pairs of the actions `among` that the reward puts in the true order, ties half."""
    i, j = (among[k] for k in np.triu_indices(len(among), 1))
    agreement = np.sign(rewards[i] - rewards[j]) * np.sign(TRUTH[i] - TRUTH[j])
    return float((agreement + 1).mean() / 2)


def rank_correlation(policy: np.ndarray, rewards: np.ndarray) -> float:
    """Spearman's correlation of the reward with the truth over samples of the policy, in the limit of many samples."""
    ranks = [np.array([policy[a < v].sum() + policy[a == v].sum() / 2 for v in a]) for a in (rewards, TRUTH)]
    (a, b) = (r - policy @ r for r in ranks)
    return float(policy @ (a * b) / np.sqrt((policy @ a**2) * (policy @ b**2)))


def measure(demonstrations: np.ndarray, preferences: np.ndarray, compared: int) -> dict[str, float]:
    """{quantity: value} of one data set. Policies are pi_ref exp(r) or pi_SFT exp(r), pi_SFT = d / |D|; their value is E r*."""
    nothing = np.zeros_like(demonstrations)
    aihf, rlhf = fit(demonstrations, preferences), fit(nothing, preferences)
    sft = bandit.sft_policy(demonstrations)
    both = sft * np.exp(rlhf - rlhf[sft > 0].max())
    policies = {"AIHF": bandit.softmax(aihf), "RLHF": bandit.softmax(rlhf), "RLHF, SFT": both / both.sum(), "SFT": sft}
    outside = X[compared:] if compared < ACTIONS - 1 else X
    found = {f"value {name}": float(policy @ TRUTH) for name, policy in policies.items()}
    for name, rewards in (("AIHF", aihf), ("RLHF", rlhf)):
        found[f"accuracy {name}"] = accuracy(rewards, X)
        found[f"outside {name}"] = accuracy(rewards, outside)
        found[f"rank {name}"] = rank_correlation(policies[name], rewards)
    return found


def study(args: Args, compared: int, comparisons: int) -> dict[str, tuple[float, float]]:
    """{quantity: (mean over the draws, its standard error)}."""
    rows = []
    for k in range(args.draws):
        rng = np.random.default_rng([args.seed, k])
        rows.append(measure(*draw(rng, compared, args.demonstrations, comparisons), compared))
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: (v.mean(), v.std(ddof=1) / np.sqrt(len(v))) for name, v in table.items()}


def example(args: Args) -> bool:
    validate(args)
    regions = {f"x < {args.compared}": args.compared, "all x": ACTIONS}
    found = {(name, m): study(args, region, m) for name, region in regions.items() for m in COMPARISONS}
    print(f"{args.demonstrations} demonstrations, {args.draws} draws, seed {args.seed}; mean ± standard error")
    print("                        reward: right order of pairs, all / outside       rank correlation, own samples")
    print("  compared  comparisons        AIHF               RLHF                      AIHF        RLHF")
    for (name, m), f in found.items():
        cells = [
            f"{f[f'accuracy {a}'][0]:.2f} / {f[f'outside {a}'][0]:.2f} ± {f[f'outside {a}'][1]:.2f}"
            for a in ("AIHF", "RLHF")
        ]
        ranks = [f"{f[f'rank {a}'][0]:5.2f} ± {f[f'rank {a}'][1]:.2f}" for a in ("AIHF", "RLHF")]
        print(f"  {name:<8} {m:>8}    {'    '.join(cells)}        {'  '.join(ranks)}")
    expert = float(bandit.softmax(TRUTH) @ TRUTH)
    print(f"  value of the policy, E r*; the expert's is {expert:.2f}, the maximum 0")
    names = ("AIHF", "RLHF", "RLHF, SFT", "SFT")
    print("  compared  comparisons  AIHF             RLHF from pi_ref RLHF from SFT    SFT")
    for (name, m), f in found.items():
        cells = [f"{f[f'value {n}'][0]:6.2f} ± {f[f'value {n}'][1]:.2f} " for n in names]
        print(f"  {name:<8} {m:>8}     {'   '.join(cells)}")

    shown, compared = draw(np.random.default_rng([args.seed, 0]), args.compared, args.demonstrations, 200)
    rewards = {"AIHF": fit(shown, compared), "RLHF": fit(np.zeros(ACTIONS), compared)}
    checks: dict[str, tuple[float, float]] = {}
    for name, d in (("AIHF", shown), ("RLHF", np.zeros(ACTIONS))):
        coefficients = np.linalg.lstsq(FEATURES, rewards[name], rcond=None)[0]
        slope = FEATURES.T @ bandit.gradient(rewards[name], d, compared) - PRIOR * coefficients
        checks[f"{name}: the gradient vanishes at the solution, relative to the counts"] = (
            float(np.abs(slope).max() / (d.sum() + compared.sum())), 1e-9,
        )  # fmt: skip
    few = [found[f"x < {args.compared}", m] for m in COMPARISONS]
    for quantity, what in (("outside", "orders the pairs outside better"), ("value", "policy is better")):
        gap = max(f[f"{quantity} RLHF"][0] - f[f"{quantity} AIHF"][0] for f in few)
        checks[f"AIHF's {what} than RLHF's from pi_ref, at every number of comparisons"] = (float(gap), 0.0)
    ok = bandit.report(checks)
    plot(args, shown, rewards)
    return ok


def plot(args: Args, shown: np.ndarray, rewards: dict[str, np.ndarray]) -> None:
    """Rewards and policies of one draw with 200 comparisons."""
    fig, (top, bottom) = bandit.new_figure(6.4, 5.2, rows=2, sharex=True)
    sft = bandit.sft_policy(shown)
    for ax in (top, bottom):
        ax.axvspan(-0.5, args.compared - 0.5, color="#e4e4e4", lw=0)
    top.plot(X, TRUTH - TRUTH[0], color=bandit.COLORS["truth"], lw=2, label="truth")
    bottom.fill_between(X, bandit.softmax(TRUTH), color="#bbbbbb", alpha=0.5, lw=0, label="expert")
    for name, r in rewards.items():
        top.plot(X, r - r[0], color=bandit.COLORS[name], lw=1.8, label=name)
        bottom.plot(X, bandit.softmax(r), color=bandit.COLORS[name], lw=1.8, label=f"{name} from uniform π_ref")
    both = sft * np.exp(rewards["RLHF"] - rewards["RLHF"][sft > 0].max())
    bottom.plot(X, both / both.sum(), color=bandit.COLORS["RLHF"], lw=1.4, ls="--", label="RLHF from SFT")
    bottom.plot(X, sft, color=bandit.COLORS["SFT"], lw=1, marker="s", ms=3, label="SFT")
    low = min(np.min(TRUTH - TRUTH[0]), -2.0)
    top.set(ylabel="reward − reward at 0, nats", ylim=(low - 1, np.max(TRUTH - TRUTH[0]) * 1.8))
    top.text(0.01, 0.96, "compared", transform=top.transAxes, va="top", size=8, color="#555555")
    bottom.set(xlabel="action x", ylabel="probability", xlim=(-0.5, ACTIONS - 0.5), ylim=(0, None), xticks=X[::2])
    top.set_title(
        f"{args.demonstrations} demonstrations, 200 comparisons among x < {args.compared}", loc="left", size=10
    )
    top.legend(frameon=False, loc="lower center")
    bottom.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.98), fontsize=8)
    fig.align_ylabels()
    bandit.save_figure(fig, args.output_dir, "covariate_shift.png")


if __name__ == "__main__":
    bandit.run(lambda: example(tyro.cli(Args, description=__doc__)))
