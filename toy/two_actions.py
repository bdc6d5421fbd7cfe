"""Two actions: RLHF adds two rewards, AIHF pools the counts.

Paper: AIHF, arXiv:2406.06874, A.2.3. Its numbers did not survive in the text we have: the counts here are ours. The
truth is (1/2, 1/2). (a) many demonstrations that happen to be balanced, few preferences that are not; (b) roles
exchanged: RLHF follows the wrong source alone. (a') and (b'): the good source is slightly off to the same side, and
RLHF is worse than either source. Then, over many draws, the variance of each estimate beside its exact binomial value.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, during the imports too, without a traceback

from dataclasses import dataclass

import bandit
import numpy as np

TRUTH = 0.5
CASES = {  # demonstrations (d1, d2), preferences (p12, p21)
    "(a)": ((10, 10), (3, 1)),
    "(b)": ((3, 1), (10, 10)),
    "(a')": ((11, 9), (3, 1)),
    "(b')": ((3, 1), (11, 9)),
}
SETTINGS = ((0.5, 20, 4), (0.5, 4, 20), (0.5, 20, 20), (0.8, 20, 20))  # truth, |D|, |P|


@dataclass
class Args:
    draws: int = 20_000
    """data sets drawn for the variances, 5000 to 10,000,000."""
    seed: int = 0
    """of the draws, >= 0."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def arrays(d: tuple[int, int], p: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(d, float), np.array([[0, p[0]], [p[1], 0]], float)


def estimates(d: tuple[int, int], p: tuple[int, int]) -> dict[str, float]:
    """Probability of action 1 under each method, from the general solver."""
    demonstrations, preferences = arrays(d, p)
    return {
        "SFT": bandit.sft_policy(demonstrations)[0],
        "BTL": bandit.softmax(bandit.btl_rewards(preferences))[0],
        "RLHF": bandit.rlhf_policy(demonstrations, preferences)[0],
        "AIHF": bandit.aihf_policy(demonstrations, preferences)[0],
    }


def closed_forms(d, p) -> dict[str, float | np.ndarray]:
    """The same with n = 2 worked out: shares, normalised product, pooled share. AIHF A.2.3."""
    product = d[0] * p[0], d[1] * p[1]
    return {
        "SFT": d[0] / (d[0] + d[1]),
        "BTL": p[0] / (p[0] + p[1]),
        "RLHF": product[0] / (product[0] + product[1]),
        "AIHF": (d[0] + p[0]) / (d[0] + d[1] + p[0] + p[1]),
    }


def variances(truth: float, size_d: int, size_p: int, draws: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """{estimate: (variance over draws, its standard error, truth (1 - truth) / counts)} of pi_1."""
    rng = np.random.default_rng(seed)
    d = rng.binomial(size_d, truth, draws)
    p = rng.binomial(size_p, truth, draws)  # with two actions, sigmoid(R1 - R2) is pi_1 itself
    with np.errstate(invalid="ignore"):  # RLHF has no value when the two sources rule out different actions: not used
        drawn = closed_forms((d, size_d - d), (p, size_p - p))
    out = {}
    for name, counts in (("SFT", size_d), ("BTL", size_p), ("AIHF", size_d + size_p)):
        square = (drawn[name] - drawn[name].mean()) ** 2
        out[name] = (square.sum() / (draws - 1), square.std() / np.sqrt(draws), truth * (1 - truth) / counts)
    return out


def example(args: Args) -> bool:
    bandit.check_range("--draws", args.draws, 5000, 10**7)  # fewer do not tell the variances apart
    checks, identities, found = {}, [], {}
    print("probability of action 1 (truth 0.5)")
    print(f"  {'':<5}{'d':>9} {'p12, p21':>10} {'SFT':>8} {'BTL':>8} {'RLHF':>8} {'AIHF':>8}")
    for case, (d, p) in CASES.items():
        found[case] = estimates(d, p)
        print(f"  {case:<5}{d!s:>9} {p!s:>10} " + " ".join(f"{v:8.4f}" for v in found[case].values()))
        distance = {k: abs(v - TRUTH) for k, v in found[case].items()}
        exact = closed_forms(d, p)
        checks[f"{case} solver = closed form"] = (
            max(abs(exact[k] - v) for k, v in found[case].items()),
            bandit.ROUNDING,
        )
        farther = distance["RLHF"] - max(v for k, v in distance.items() if k != "RLHF")
        checks[f"{case} RLHF is the farthest from the truth (others minus RLHF)"] = (-farther, bandit.ROUNDING)
        checks[f"{case} AIHF is closer than RLHF (AIHF minus RLHF)"] = (distance["AIHF"] - distance["RLHF"], -0.1)
        identities.append(bandit.residuals(*arrays(d, p)))
    for name in identities[0]:
        checks[name] = (max(r[name] for r in identities), bandit.ROUNDING)

    print(f"variance of the estimate of action 1 over {args.draws} draws ± standard error, and the exact value")
    simulated = {}
    for setting in SETTINGS:
        truth, size_d, size_p = setting
        where = f"truth {truth}, |D| = {size_d}, |P| = {size_p}"
        result = simulated[setting] = variances(truth, size_d, size_p, args.draws, args.seed)
        for name, (measured, error, exact) in result.items():
            print(f"  {where:<29} {name:<5} {measured:.5f} ± {error:.5f}   {exact:.5f}")
        off = max(abs(measured - exact) / error for measured, error, exact in result.values())
        checks[f"{where}: off the exact variances, standard errors"] = (off, 4.0)
        for source in ("SFT", "BTL"):
            gap = (result["AIHF"][0] - result[source][0]) / np.hypot(result["AIHF"][1], result[source][1])
            checks[f"{where}: AIHF minus {source}, standard errors"] = (gap, -3.0)
    ok = bandit.report(checks)

    fig, (left, right) = bandit.new_figure(9.6, 4.3, 2, width_ratios=[1.25, 1])
    names, height = list(bandit.COLORS)[1:], 0.19
    for row, values in enumerate(found.values()):
        for i, name in enumerate(names):
            y = row + (i - 1.5) * height
            left.barh(y, values[name] - TRUTH, height * 0.9, left=TRUTH, color=bandit.COLORS[name],
                      label=name if row == 0 else None)  # fmt: skip
            left.text(max(values[name], TRUTH) + 0.005, y, f"{values[name]:.3f}", va="center", size=7.5)
    left.axvline(TRUTH, color=bandit.COLORS["truth"], lw=1.5)
    left.set_yticks(range(len(CASES)), [f"{c}  d = {d[0]}, {d[1]}\np = {p[0]}, {p[1]}" for c, (d, p) in CASES.items()])
    left.invert_yaxis()
    left.set(xlim=(0.485, 0.85), xlabel="estimated probability of action 1 (black line: truth 0.5)")
    left.set_title("RLHF is as wrong as the worse source, or worse", loc="left", size=10)
    sources, width = ("SFT", "BTL", "AIHF"), 0.26
    for i, name in enumerate(sources):
        x = np.arange(len(SETTINGS)) + (i - 1) * width
        measured, error, exact = np.array([simulated[s][name] for s in SETTINGS]).T
        right.bar(x, measured, width * 0.9, color=bandit.COLORS[name])
        right.errorbar(x, measured, 2 * error, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        right.plot(x + width * 0.27, exact, "<", ms=3.5, color="black", label="exact value" if i == 0 else None)
    right.set_xticks(range(len(SETTINGS)), [f"truth {t}\n|D| = {n}\n|P| = {m}" for t, n, m in SETTINGS])
    right.legend(frameon=False)
    right.set_ylabel("variance of the estimate")
    right.set_title(f"{args.draws:,} simulated data sets, ±2 standard errors", loc="left", size=10)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    bandit.save_figure(fig, args.output_dir, "two_actions.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(bandit.parse_args(Args, __doc__)))
