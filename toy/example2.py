"""Fifty actions, demonstrations of only forty-five: what RLHF loses and AIHF keeps.

Paper: AIHF, arXiv:2406.06874, Example 2 and Fig. 9. 2,000 demonstrations are drawn from the true softmax restricted to
actions 1..45, and 200 comparisons for every pair of all 50. The text we have lost the paper's reward; here it is
R_i = sin(2 pi i / 50).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, during the imports too, without a traceback

from dataclasses import dataclass

import bandit
import numpy as np


@dataclass
class Args:
    actions: int = 50
    """number of actions, >= 3."""
    covered: int = 45
    """actions 1..covered are demonstrated, 1 to the number of actions."""
    demonstrations: int = 2000
    """draws from the true policy restricted to the covered actions, >= 1."""
    comparisons: int = 200
    """comparisons per pair of actions, >= 0; too few break Ford's condition."""
    seed: int = 0
    """of the draws, >= 0."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def validate(args: Args) -> None:
    for flag, value, low, high in (
        ("--actions", args.actions, 3, 1000),
        ("--covered", args.covered, 1, args.actions),
        ("--demonstrations", args.demonstrations, 1, 10**9),
        ("--comparisons", args.comparisons, 0, 10**9),
    ):
        bandit.check_range(flag, value, low, high)


def draw(args: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true policy (n,), demonstrations (n,), preferences (n, n))."""
    rng = np.random.default_rng(args.seed)
    rewards = np.sin(2 * np.pi * np.arange(1, args.actions + 1) / args.actions)
    truth = bandit.softmax(rewards)
    shown = np.where(np.arange(args.actions) < args.covered, truth, 0)
    demonstrations = rng.multinomial(args.demonstrations, shown / shown.sum()).astype(float)
    i, j = np.triu_indices(args.actions, 1)
    wins = rng.binomial(args.comparisons, bandit.win_probability(rewards)[i, j])
    preferences = np.zeros((args.actions, args.actions))
    preferences[i, j], preferences[j, i] = wins, args.comparisons - wins
    return truth, demonstrations, preferences


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


def solve(demonstrations: np.ndarray, preferences: np.ndarray) -> dict[str, np.ndarray]:
    """The four policies. FordError says for each reward that has no finite estimate which actions are at fault."""
    sources = {"BTL (and so RLHF)": np.zeros_like(demonstrations), "AIHF": demonstrations}
    faults = [f"{name}: {f}" for name, d in sources.items() if (f := bandit.ford_fault(d, preferences))]
    if faults:
        raise bandit.FordError("no finite reward fits these counts (Ford's condition). " + ". ".join(faults))
    return {
        "SFT": bandit.sft_policy(demonstrations),
        "BTL": bandit.softmax(bandit.btl_rewards(preferences)),
        "RLHF": bandit.rlhf_policy(demonstrations, preferences),
        "AIHF": bandit.aihf_policy(demonstrations, preferences),
    }


def example(args: Args) -> bool:
    validate(args)
    truth, demonstrations, preferences = draw(args)
    policies = solve(demonstrations, preferences)
    distance = {name: total_variation(policy, truth) for name, policy in policies.items()}
    last = bandit.spans(list(range(args.covered, args.actions))) or "none"
    print(f"  policy  TV to the truth  mass on the uncovered actions ({last})")
    for name, policy in {"truth": truth, **policies}.items():
        print(f"  {name:<6} {distance.get(name, 0.0):16.4f} {policy[args.covered :].sum():10.4f}")
    found = bandit.residuals(demonstrations, preferences)
    ok = bandit.report({name: (value, bandit.ROUNDING) for name, value in found.items()})

    fig, (top, bottom) = bandit.new_figure(8.4, 5.6, rows=2, sharex=True, height_ratios=[2, 1])
    x = np.arange(1, args.actions + 1)
    looks = {
        "SFT": {"lw": 1.4, "marker": "s", "ms": 2.5},
        "RLHF": {"lw": 1.4, "marker": "^", "ms": 3.2},
        "BTL": {"lw": 0, "marker": "o", "ms": 5.5, "mfc": "none", "mew": 1.1},
        "AIHF": {"lw": 1.6, "marker": "o", "ms": 2.2},
    }
    for ax in (top, bottom):
        if args.covered < args.actions:
            ax.axvspan(args.covered + 0.5, args.actions + 0.5, color="#e4e4e4", lw=0)
    top.fill_between(x, truth, color="#bbbbbb", alpha=0.35, lw=0)
    top.plot(x, truth, color=bandit.COLORS["truth"], lw=2, label="truth")
    bottom.axhline(0, color=bandit.COLORS["truth"], lw=1.2)
    for name, look in looks.items():
        color = bandit.COLORS[name]
        top.plot(x, policies[name], color=color, label=f"{name}  (TV {distance[name]:.3f})", **look)
        bottom.plot(x, policies[name] - truth, color=color, **look)
    if args.covered < args.actions:
        top.text(args.covered + 0.3, 0.97, "never\ndemonstrated", ha="right", va="top", size=8, color="#555555",
                 transform=top.get_xaxis_transform())  # fmt: skip
    top.set(ylabel="probability", xlim=(0.5, args.actions + 0.5), ylim=(0, None))
    bottom.set(xlabel="action", ylabel="policy − truth")
    fig.align_ylabels()
    top.set_title(
        f"{args.demonstrations:,} demonstrations of actions 1..{args.covered}, "
        f"{args.comparisons:,} comparisons per pair of {args.actions}, seed {args.seed}",
        loc="left",
        size=10,
    )
    top.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.62, 1.0))
    bandit.save_figure(fig, args.output_dir, "example2.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(bandit.parse_args(Args, __doc__)))
