"""Two actions: RLHF adds two rewards, AIHF pools the counts.

Paper: AIHF, arXiv:2406.06874, A.2.3 (its numbers did not survive in the text we have; the counts here are ours). The truth
is (1/2, 1/2). (a) many demonstrations, few preferences: the demonstrations are nearly balanced, the preferences are not.
(b) roles exchanged. Then, over many draws, the variance of each estimate against its exact binomial value.
"""

from dataclasses import dataclass

import bandit
import numpy as np
import tyro

TRUTH = 0.5
CASES = {  # demonstrations (d1, d2), preferences (p12, p21)
    "(a) 20 demonstrations, 4 preferences": ((11, 9), (3, 1)),
    "(b) 4 demonstrations, 20 preferences": ((3, 1), (11, 9)),
}


@dataclass
class Args:
    draws: int = 20_000
    """data sets drawn for the variances."""
    seed: int = 0
    """of the draws."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def estimates(d: tuple[int, int], p: tuple[int, int]) -> dict[str, float]:
    """Probability of action 1 under each method, from the general solver."""
    demonstrations, preferences = np.array(d, float), np.array([[0, p[0]], [p[1], 0]], float)
    return {
        "SFT": bandit.sft_policy(demonstrations)[0],
        "BTL": bandit.softmax(bandit.btl_rewards(preferences))[0],
        "RLHF": bandit.rlhf_policy(demonstrations, preferences)[0],
        "AIHF": bandit.aihf_policy(demonstrations, preferences)[0],
    }


def closed_forms(d: tuple[int, int], p: tuple[int, int]) -> dict[str, float]:
    """The same with n = 2 worked out: shares, normalised product, pooled share."""
    product = d[0] * p[0], d[1] * p[1]
    return {
        "SFT": d[0] / sum(d),
        "BTL": p[0] / sum(p),
        "RLHF": product[0] / sum(product),
        "AIHF": (d[0] + p[0]) / (sum(d) + sum(p)),
    }


def variances(
    truth: float, demonstrations: int, preferences: int, draws: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """{estimate: (variance over draws, its standard error, exact binomial variance)} of the probability of action 1."""
    rng = np.random.default_rng(seed)
    d = rng.binomial(demonstrations, truth, draws)
    p = rng.binomial(preferences, truth, draws)  # with two actions, sigmoid(R1 - R2) is pi_1 itself
    both = demonstrations + preferences
    samples = {
        "SFT": (d / demonstrations, demonstrations),
        "BTL": (p / preferences, preferences),
        "AIHF": ((d + p) / both, both),
    }
    out = {}
    for name, (x, n) in samples.items():
        centred = (x - x.mean()) ** 2
        out[name] = (centred.mean(), centred.std() / np.sqrt(draws), truth * (1 - truth) / n)
    return out


def example(args: Args) -> bool:
    checks = {}
    found = {}
    for case, (d, p) in CASES.items():
        found[case] = estimates(d, p)
        exact = closed_forms(d, p)
        print(f"{case}: d = {d}, p12, p21 = {p}")
        for name, value in found[case].items():
            print(f"    {name:<5} {value:.4f}   distance from the truth {abs(value - TRUTH):.4f}")
        checks[f"{case[:3]} solver = closed form"] = (max(abs(exact[k] - v) for k, v in found[case].items()), 1e-10)
        others = max(abs(v - TRUTH) for k, v in found[case].items() if k != "RLHF")
        checks[f"{case[:3]} RLHF is the farthest (excess of the others)"] = (
            others - abs(found[case]["RLHF"] - TRUTH),
            0.0,
        )
    print(f"variance of the estimate of action 1 over {args.draws} draws")
    for n_d, n_p in ((20, 4), (4, 20), (20, 20)):
        result = variances(TRUTH, n_d, n_p, args.draws, args.seed)
        for name, (measured, error, exact) in result.items():
            print(f"    |D| = {n_d:<3} |P| = {n_p:<3} {name:<5} {measured:.5f} ± {error:.5f}   exact {exact:.5f}")
            checks[f"|D| = {n_d}, |P| = {n_p}: {name} variance, in standard errors"] = (
                abs(measured - exact) / error,
                4.0,
            )
        best = min(result["SFT"][0], result["BTL"][0])
        checks[f"|D| = {n_d}, |P| = {n_p}: AIHF below both sources (ratio)"] = (result["AIHF"][0] / best, 0.99)
    ok = bandit.report(checks)

    fig, axes = bandit.new_figure(8, 3.2, 2)
    for ax, (case, values) in zip(axes, found.items(), strict=True):
        ax.barh(
            list(values), [v - TRUTH for v in values.values()], left=TRUTH, color=[bandit.COLORS[k] for k in values]
        )
        ax.axvline(TRUTH, color=bandit.COLORS["truth"], lw=1.5)
        for i, v in enumerate(values.values()):
            ax.text(v + 0.006, i, f"{v:.3f}", va="center", size=8)
        ax.set(xlim=(0.48, 0.85), xlabel="estimated probability of action 1 (truth 0.5)")
        ax.invert_yaxis()
        ax.set_title(case, loc="left", size=9)
    bandit.save_figure(fig, args.output_dir, "two_actions.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(tyro.cli(Args, description=__doc__)))
