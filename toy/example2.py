"""Fifty actions, demonstrations of only forty-five: what RLHF loses and AIHF keeps.

Paper: AIHF, arXiv:2406.06874, Example 2 and Fig. 9. 2,000 demonstrations are drawn from the true softmax restricted to
actions 1..45, and 200 comparisons for every pair of all 50. The text we have lost the paper's reward; here it is
R_i = sin(2 pi i / 50).
"""

from dataclasses import dataclass

import bandit
import numpy as np
import tyro


@dataclass
class Args:
    actions: int = 50
    """number of actions, >= 3."""
    covered: int = 45
    """actions 1..covered are demonstrated."""
    demonstrations: int = 2000
    """draws from the true policy restricted to the covered actions."""
    comparisons: int = 200
    """comparisons per pair of actions."""
    seed: int = 0
    """of the draws."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def draw(args: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true policy (n,), demonstrations (n,), preferences (n, n))."""
    rng = np.random.default_rng(args.seed)
    rewards = np.sin(2 * np.pi * np.arange(1, args.actions + 1) / args.actions)
    truth = bandit.softmax(rewards)
    shown = np.where(np.arange(args.actions) < args.covered, truth, 0)
    demonstrations = rng.multinomial(args.demonstrations, shown / shown.sum()).astype(float)
    i, j = np.triu_indices(args.actions, 1)
    wins = rng.binomial(args.comparisons, 1 / (1 + np.exp(rewards[j] - rewards[i])))
    preferences = np.zeros((args.actions, args.actions))
    preferences[i, j], preferences[j, i] = wins, args.comparisons - wins
    return truth, demonstrations, preferences


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


def example(args: Args) -> bool:
    truth, demonstrations, preferences = draw(args)
    policies = {
        "SFT": bandit.sft_policy(demonstrations),
        "BTL": bandit.softmax(bandit.btl_rewards(preferences)),
        "RLHF": bandit.rlhf_policy(demonstrations, preferences),
        "AIHF": bandit.aihf_policy(demonstrations, preferences),
    }
    uncovered = f"mass on {args.covered + 1}..{args.actions}"
    print(f"  policy   TV to the truth   {uncovered}")
    for name, policy in {"truth": truth, **policies}.items():
        print(f"  {name:<6}   {total_variation(policy, truth):15.4f}   {policy[args.covered :].sum():.4f}")
    ok = bandit.report({name: (value, 1e-9) for name, value in bandit.residuals(demonstrations, preferences).items()})

    fig, ax = bandit.new_figure(8, 3.6)
    x = np.arange(1, args.actions + 1)
    ax.axvspan(args.covered + 0.5, args.actions + 0.5, color="#dddddd", lw=0)
    ax.text(args.covered + 0.2, 0.07, "never demonstrated", ha="right", size=8, color="#555555")
    ax.plot(x, truth, color=bandit.COLORS["truth"], lw=2.5, label="truth")
    for name in ("SFT", "RLHF", "BTL", "AIHF"):
        style = {
            "lw": 1.6,
            "color": bandit.COLORS[name],
            "label": f"{name}, TV {total_variation(policies[name], truth):.3f}",
        }
        ax.plot(x, policies[name], **style)
    ax.set(xlabel="action", ylabel="probability", xlim=(0.5, args.actions + 0.5), ylim=(0, None))
    ax.set_title(
        f"{args.demonstrations} demonstrations of actions 1..{args.covered}, {args.comparisons} comparisons per pair",
        loc="left",
    )
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.62, 1.0))
    bandit.save_figure(fig, args.output_dir, "example2.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(tyro.cli(Args, description=__doc__)))
