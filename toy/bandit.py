"""The static softmax bandit: one state, n actions, pi = softmax(R). Closed forms and a solver for the toy examples.

demonstrations: (n,) d_i, how often action i was demonstrated. preferences: (n, n) p_ij, how often i was preferred to j.
Rewards are identified up to a constant; the solver returns the ones of mean 0.

Paper: AIHF = Learning Reward and Policy Jointly from Demonstration and Preference, arXiv:2406.06874, Sec. 3.3 and A.2.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROUNDING = 1e-12
"""what an identity between probabilities may miss at a computed solution."""


class InputError(Exception):
    """A mistake in the user's input, in one line."""


class FordError(InputError):
    """The likelihood has no finite maximiser; the message names the actions at fault."""


def softmax(rewards: np.ndarray) -> np.ndarray:
    weights = np.exp(rewards - rewards.max())
    return weights / weights.sum()


def win_probability(rewards: np.ndarray) -> np.ndarray:
    """(n, n) sigmoid(R_i - R_j), the chance that i is preferred to j."""
    return 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))


def log_likelihood(rewards: np.ndarray, demonstrations: np.ndarray, preferences: np.ndarray) -> float:
    """sum_i d_i log pi_i + sum_ij p_ij log sigmoid(R_i - R_j), nats; concave in the rewards. AIHF Eq. 23, 28."""
    log_z = np.logaddexp.reduce(rewards)
    pairs = np.logaddexp(rewards[:, None], rewards[None, :])
    return float(demonstrations @ (rewards - log_z) + (preferences * (rewards[:, None] - pairs)).sum())


def gradient(rewards: np.ndarray, demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """(n,) d_i + sum_j p_ij - |D| pi_i - sum_j n_ij sigmoid(R_i - R_j): zero is AIHF's stationarity. Eq. 24, 30, 35."""
    n = preferences + preferences.T
    expected = demonstrations.sum() * softmax(rewards) + (n * win_probability(rewards)).sum(1)
    return demonstrations + preferences.sum(1) - expected


def curvature(rewards: np.ndarray, demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """(n, n) minus the Hessian of log_likelihood; its null space is the constant vector."""
    policy, wins = softmax(rewards), win_probability(rewards)
    pair = (preferences + preferences.T) * wins * wins.T
    np.fill_diagonal(pair, 0)
    return demonstrations.sum() * (np.diag(policy) - np.outer(policy, policy)) + np.diag(pair.sum(1)) - pair


def newton(demonstrations: np.ndarray, preferences: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """(n,) maximiser of log_likelihood with mean 0. FordError if there is no finite one.

    Damped Newton: a step whose entries range over s is shortened to log(1 + s) / s of itself. Along it the curvature
    grows at most like e^(s t), so the likelihood rises all the way there and no line search is needed. Stops when the
    norm of the gradient is at most tolerance times the counts and the square of the last step is rounding.
    """
    if fault := ford_fault(demonstrations, preferences):
        raise FordError(f"no finite reward maximises this likelihood (Ford's condition): {fault}")
    size, total = len(demonstrations), demonstrations.sum() + preferences.sum()
    gauge = np.full((size, size), total / size**2)  # makes the matrix invertible; the step keeps mean 0
    rewards = np.zeros(size)
    for _ in range(200):
        slope = gradient(rewards, demonstrations, preferences)
        step = np.linalg.solve(curvature(rewards, demonstrations, preferences) + gauge, slope)
        spread = np.ptp(step)
        rewards = rewards + step * (np.log1p(spread) / spread if spread > 0 else 1)
        if np.linalg.norm(slope) <= tolerance * total and spread <= 1e-6:
            return rewards - rewards.mean()
    raise RuntimeError(f"newton did not converge: gradient {np.linalg.norm(slope):.2e} for {total:.0f} counts")


# ---- Ford's condition ----
def reachable(demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """(n, n) whether a chain of `beats` leads from i to j. i beats j if it was once preferred to j; an action that was
    demonstrated beats all the others, since each of them could have been demonstrated in its place."""
    reach = (preferences > 0) | (demonstrations > 0)[:, None] | np.eye(len(demonstrations), dtype=bool)
    for k in range(len(demonstrations)):
        reach |= reach[:, k : k + 1] & reach[k : k + 1, :]
    return reach


def strong_components(reach: np.ndarray) -> list[list[int]]:
    """Groups of actions that reach each other, ordered by their first action."""
    mutual = reach & reach.T
    return [np.flatnonzero(row).tolist() for i, row in enumerate(mutual) if row.argmax() == i]


def ford_fault(demonstrations: np.ndarray, preferences: np.ndarray) -> str:
    """Empty if a finite maximiser exists, that is if the graph `beats` is strongly connected; else who breaks it.

    Actions are counted from 1. A group that beats nobody outside it has rewards that run to minus infinity against the
    rest, a group that nobody outside beats to plus infinity.
    """
    reach = reachable(demonstrations, preferences)
    groups = strong_components(reach)
    if len(groups) == 1:
        return ""
    alone, losers, winners = [], [], []
    for group in groups:
        outside = np.setdiff1d(np.arange(len(reach)), group)
        wins, loses = reach[np.ix_(group, outside)].any(), reach[np.ix_(outside, group)].any()
        if not wins and not loses:
            alone += group
        elif not wins:
            losers += group
        elif not loses:
            winners += group
    found = [
        (alone, "neither won nor lost against another group (not comparable)"),
        (losers, "never won against another group (reward to minus infinity)"),
        (winners, "never lost to another group (reward to plus infinity)"),
    ]
    listed = ": " + " | ".join(map(spans, groups)) if len(groups) <= 6 else ""
    named = "; ".join(f"{'actions' if len(a) > 1 else 'action'} {spans(a)} {what}" for a, what in found if a)
    return f"{named}; {len(groups)} groups{listed}"


def spans(actions: list[int]) -> str:
    """[0, 1, 2, 6] -> '1-3, 7'."""
    runs: list[list[int]] = []
    for a in sorted(actions):
        if runs and a == runs[-1][-1] + 1:
            runs[-1].append(a)
        else:
            runs.append([a])
    return ", ".join(f"{r[0] + 1}" if len(r) == 1 else f"{r[0] + 1}-{r[-1] + 1}" for r in runs)


# ---- the four policies ----
def sft_policy(demonstrations: np.ndarray) -> np.ndarray:
    """pi_i = d_i / |D|; an action without demonstrations gets exactly 0. AIHF Eq. 12, 26."""
    return demonstrations / demonstrations.sum()


def btl_rewards(preferences: np.ndarray) -> np.ndarray:
    """Maximum-likelihood rewards of the preferences alone. AIHF Eq. 14, 32."""
    return newton(np.zeros(len(preferences)), preferences)


def rlhf_policy(demonstrations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """pi_i ~ pi_i^SFT exp(R_i^BTL): best for the BTL reward minus KL to the SFT policy. AIHF Eq. 33."""
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
    """{identity: its largest violation, in probability, nats or relative to the counts} at the computed solutions."""
    n, shown = preferences + preferences.T, demonstrations > 0
    r_sft = newton(demonstrations[shown], np.zeros((shown.sum(), shown.sum())))
    r_btl, r_aihf = btl_rewards(preferences), newton(demonstrations, preferences)
    sft, btl, aihf = sft_policy(demonstrations), softmax(r_btl), softmax(r_aihf)
    rlhf = rlhf_policy(demonstrations, preferences)
    implied_btl = preferences.sum(1) / (n * expected_draws(btl)).sum(1)
    implied_aihf = (demonstrations + preferences.sum(1)) / (demonstrations.sum() + (n * expected_draws(aihf)).sum(1))
    advantage = r_btl[shown] - np.log(rlhf[shown] / sft[shown])
    slope = gradient(r_aihf, demonstrations, preferences)
    return {
        "SFT   Eq. 12, 26  softmax(R^SFT) = d_i / |D|": np.abs(softmax(r_sft) - sft[shown]).max(),
        "BTL   Eq. 14, 32  pi_i = sum_j p_ij / sum_j n_ij rho_ij": np.abs(implied_btl - btl).max(),
        "RLHF  Eq. 33      pi = softmax(R^SFT + R^BTL)": np.abs(softmax(r_sft + r_btl[shown]) - rlhf[shown]).max(),
        "RLHF  Eq. 33      R^BTL - log(pi / pi^SFT) is constant (KKT)": np.ptp(advantage),
        "RLHF  Eq. 33      no mass where SFT has none": rlhf[~shown].sum(),
        "AIHF  Eq. 15, 36  pi_i = (d_i + sum_j p_ij) / (|D| + sum_j n_ij rho_ij)": np.abs(implied_aihf - aihf).max(),
        "AIHF  Eq. 35      gradient = 0 (relative to the counts)": np.linalg.norm(slope)
        / (demonstrations.sum() + preferences.sum()),
    }


# ---- for the command lines ----
def parse_args(cls, description: str):
    """Command line -> cls, which has a seed or an output_dir or both. InputError, one line, for what cannot be used."""
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            args = tyro.cli(cls, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        said = re.split("[-─]{4,}", re.sub("[│╭╮╰╯]", "", printed.getvalue()))  # its heading, what is wrong, help
        raise InputError(" ".join(said[:2][-1].split())) from None
    if hasattr(args, "seed"):
        check_range("--seed", args.seed, 0, 2**63)
    folder = Path(args.output_dir)
    if not args.output_dir.strip() or any(p.exists() and not p.is_dir() for p in (folder, *folder.parents)):
        raise InputError(f"--output-dir is {args.output_dir!r}, expected a folder, or one that can be made")
    return args


def check_range(flag: str, value: int, low: int, high: int) -> None:
    """InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{flag} is {value}, expected {low} to {high}")


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
    """Exit 0 if all checks passed, 1 if one failed, 2 with one line if the input admits no solution."""
    try:
        passed = example()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk, a reader of stdout that has gone
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # past what stdout may still hold
    sys.exit(0 if passed else 1)


def save_figure(fig, output_dir: str, name: str) -> Path:
    path = Path(output_dir) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=130)
    except OSError as error:
        raise InputError(f"--output-dir is {output_dir}, where {name} cannot be written: {error}") from None
    print(f"figure: {path}")
    return path


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1, **keywords):
    """(figure, axes) as matplotlib's subplots gives them, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **keywords)


COLORS = {"truth": "#222222", "SFT": "#ee6677", "BTL": "#c9a600", "RLHF": "#4477aa", "AIHF": "#228833"}
