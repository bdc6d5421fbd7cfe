"""Where SFT, IRFT, SPIN and the IRL loop go, and why: gradients, limits and fixed points as finite sums.

The language is that of toy/exact.py. The expert D is the KL-regularised optimum of a hidden reward, the number of different
letters in a response. docs/theory.md explains the tables that this program prints and shows its three figures;
tests/test_theory.py holds the losses and the loops of the scripts against the functions of this file.

RFT = arXiv:2405.17888, IRL = arXiv:2503.13538.  Dims: X prompts, Y responses, P parameters. Logarithms in nats.
"""

from dataclasses import dataclass

import bandit
import exact
import torch
import tyro
from torch import Tensor

BETAS = (1.0, 0.3, 0.1, 0.05)
STOCK, STOCK_SHARE = [2, 2, 2, 2], 0.05  # one answer that the second expert gives to every prompt, and how often


# ---- the setting ----
def hidden_reward() -> Tensor:
    """(Y,) different letters in each response, 0 to 3."""
    return torch.tensor([float(len(set(y) - {exact.EOS})) for y in exact.RESPONSES], dtype=torch.float64)


def reference_and_expert(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(X, Y) log pi_ref of a random GPT-NeoX and log D, the optimum of the hidden reward at a KL weight of 1."""
    model = exact.make_model("gpt_neox", seed)
    ref = torch.stack([exact.response_logprobs(model, prompt).detach() for prompt in exact.PROMPTS])
    return ref, torch.stack([exact.optimal_policy(q, hidden_reward(), 1.0) for q in ref])


def with_stock_answer(expert: Tensor) -> Tensor:
    """(X, Y) log of an expert that gives the answer STOCK instead of its own in STOCK_SHARE of the cases."""
    share = (1 - STOCK_SHARE) * expert.exp()
    share[..., exact.RESPONSES.index(STOCK)] += STOCK_SHARE
    return share.log()


def mean_kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q), nats per response, mean over the prompts. (X, Y) log-probs."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def mean_reward(policy: Tensor) -> float:
    """E_policy of the hidden reward, mean over the prompts. (X, Y) log-probs."""
    return float((policy.exp() * hidden_reward()).sum(-1).mean())


def normalise(weights: Tensor) -> Tensor:
    """Log-weights shifted so that the probabilities over the last dimension sum to 1."""
    return weights - weights.logsumexp(-1, keepdim=True)


# ---- 1. the gradient of one update ----
def jacobian(model, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """((Y,) log pi, (Y, P) its gradient in the parameters) for one prompt."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logp, rows = exact.response_logprobs(model, prompt), []
    for value in logp:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in found if g is not None]))
    return logp.detach(), torch.stack(rows)


def pair_slopes(policy: Tensor, ref: Tensor, beta: float, kind: str) -> Tensor:
    """(Y, Y) minus the slope of irft_loss in a pair's margin d: 1 (linear), beta sigma(-beta d) (logistic)."""
    ratio = policy - ref
    d = ratio[:, None] - ratio[None, :]
    return torch.ones_like(d) if kind == "linear" else beta * torch.sigmoid(-beta * d)


def ascent_weights(expert: Tensor, answers: Tensor, slopes: Tensor) -> Tensor:
    """(Y,) w with sum_y w(y) grad log pi(y) = minus the gradient of the mean loss. expert, answers: (Y,) probabilities."""
    return expert * (slopes @ answers) - answers * (expert @ slopes)


def one_sample_variance(expert: Tensor, answers: Tensor, slopes: Tensor, gram: Tensor) -> float:
    """Trace of the covariance of one pair's gradient, slope (grad log pi(y) - grad log pi(y~)). gram: (Y, Y) of the Jacobian."""
    squares = gram.diag()[:, None] + gram.diag()[None, :] - 2 * gram
    w = ascent_weights(expert, answers, slopes)
    return float(expert @ (slopes**2 * squares) @ answers - w @ gram @ w)


def nll_variance(expert: Tensor, gram: Tensor) -> float:
    """Trace of the covariance of one demonstration's grad log pi(y), the gradient of SFT."""
    return float(expert @ gram.diag() - expert @ gram @ expert)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def rescaled_reference(policy: Tensor, other: Tensor, expert: Tensor, deviation: float) -> Tensor:
    """(Y,) log of a reference on the line through two policies; its margins d over (demonstration, answer) pairs have the
    standard deviation `deviation`, in nats. expert: (Y,) probabilities."""
    ratio = policy - other
    spread = sum((p * ratio**2).sum() - (p * ratio).sum() ** 2 for p in (expert, policy.exp())).sqrt()
    return normalise(policy - deviation * ratio / spread)


SEEDS = 5


def jacobians(architecture: str, first: int = 0) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For SEEDS models and every prompt: (log pi, log of the next model, D, Jacobian). D is the optimum of the hidden reward
    with reference pi."""
    found = []
    for seed in range(first, first + SEEDS):
        model, other = exact.make_model(architecture, seed), exact.make_model(architecture, seed + 1)
        for prompt in exact.PROMPTS:
            logp, rows = jacobian(model, prompt)
            expert = exact.optimal_policy(logp, hidden_reward(), 1.0).exp()
            found.append((logp, exact.response_logprobs(other, prompt).detach(), expert, rows))
    return found


def variance_ratios(models: list) -> list[float]:
    """One-sample variance of the linear IRFT gradient over that of SFT, with fresh answers."""
    found = []
    for logp, _, expert, rows in models:
        gram = rows @ rows.T
        found.append(one_sample_variance(expert, logp.exp(), torch.ones_like(gram), gram) / nll_variance(expert, gram))
    return found


def cosines(models: list, deviation: float, beta: float) -> list[float]:
    """Cosine of the logistic gradient with that of SFT: fresh answers, and a reference that is another policy."""
    found = []
    for logp, other, expert, rows in models:
        ref = rescaled_reference(logp, other, expert, deviation)
        w = ascent_weights(expert, logp.exp(), pair_slopes(logp, ref, beta, "logistic"))
        found.append(cosine(w @ rows, expert @ rows))
    return found


# ---- 2. where T = 1 ends ----
def spin_limit(ref: Tensor, expert: Tensor, beta: float) -> Tensor:
    """log pi_ref (D / pi_ref)^(1 / beta) / Z: the minimiser of the logistic irft_loss while the answers stay those of pi_ref."""
    return normalise(ref + (expert - ref) / beta)


# ---- 3. the outer loop of IRL ----
def reward_optimum(expert: Tensor, answers: Tensor) -> Tensor:
    """log D / pi_answers, up to a constant: the minimiser of Eq. 11, mean of -log sigma(r(y) - r(y~)). IRL Eq. 11."""
    return expert - answers


def likelihood_slope(expert: Tensor, policy: Tensor) -> Tensor:
    """(X, Y) D - pi: minus the gradient of the linear reward loss, times beta. RFT Eq. 13, IRL Eq. 10."""
    return expert.exp() - policy.exp()


def eq_11_slope(expert: Tensor, answers: Tensor, rewards: Tensor) -> Tensor:
    """(X, Y) minus the gradient of the logistic reward loss in a tabular reward. IRL Eq. 11."""
    wrong = torch.sigmoid(
        rewards[..., None, :] - rewards[..., :, None]
    )  # (X, Y, Y): chance that the model errs on (y, y~)
    p, q = expert.exp(), answers.exp()
    return p * (wrong * q[..., None, :]).sum(-1) - q * (wrong * p[..., :, None]).sum(-2)


def loop(
    ref: Tensor,
    expert: Tensor,
    beta: float,
    iterations: int,
    reference: str = "initial",
    pairs: str = "current",
    reward: str = "eq_11",
    reward_step: float = 1.0,
    policy_step: float = 1.0,
) -> list[Tensor]:
    """[log pi_0, ..., log pi_T] of IRL's Alg. 1 with tabular rewards, (X, Y) each; pi_0 is the reference.

    reference: initial or previous (--ref). pairs: current or accumulated (--pairs); what the reward learns from.
    reward: eq_11: a new one, all the way to the optimum of Eq. 11, times reward_step. carried_linear, carried_logistic: the
    last one plus reward_step times one gradient of that loss, from 0 (--reward-init previous).
    policy_step: how far the policy goes to the best response pi_ref exp(r / beta) / Z, from where it is, in log pi: 1 is all
    the way, less is one step of mirror descent on E r - beta KL.
    """
    path, rewards = [ref], torch.zeros_like(ref)
    for _ in range(iterations):
        policy = path[-1]
        answers = policy
        if pairs == "accumulated":
            answers = torch.stack(path).logsumexp(0) - torch.tensor(len(path)).log()
        if reward == "eq_11":
            rewards = reward_step * reward_optimum(expert, answers)
        elif reward == "carried_linear":
            rewards = rewards + reward_step * likelihood_slope(expert, answers)
        else:
            rewards = rewards + reward_step * eq_11_slope(expert, answers, rewards)
        best = normalise((ref if reference == "initial" else policy) + rewards / beta)
        path.append(normalise((1 - policy_step) * policy + policy_step * best))
    return path


def between(ref: Tensor, expert: Tensor, beta: float) -> Tensor:
    """log pi_ref^(beta / (1 + beta)) D^(1 / (1 + beta)) / Z: where Eq. 11 and a fixed reference rest, with policy and reward at
    their optima for each other."""
    return normalise((beta * ref + expert) / (1 + beta))


def largest_policy_step(beta: float, reference: str) -> float:
    """Policy steps below this converge, above they diverge, with a new reward at its optimum every time.

    log pi_t less its resting point is multiplied by 1 - s (1 + 1 / beta) (initial) or 1 - s / beta (previous) in each iteration.
    """
    return 2 / (1 + 1 / beta) if reference == "initial" else 2 * beta


# ---- the program ----
@dataclass
class Args:
    seed: int = 0
    """of the model that is the reference, >= 0."""
    output_dir: str = "runs/toy"
    """folder of the figures."""


def example(args: Args) -> bool:
    torch.set_num_threads(1)
    ref, expert = reference_and_expert(args.seed)
    checks: dict[str, tuple[float, float]] = {}
    gradients(args, checks)
    limits(args, ref, expert, checks)
    loops(args, ref, expert, checks)
    return bandit.report(checks)


def gradients(args: Args, checks: dict) -> None:
    """Tables, checks and figure of section 1."""
    models = {name: jacobians(name, args.seed) for name in ("gpt_neox", "mistral")}
    worst = dict.fromkeys(("linear", "logistic", "stale", "rest"), 0.0)

    def gap(found: Tensor, expected: Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    for logp, other, expert, rows in models["gpt_neox"]:
        sft, pi, old = expert @ rows, logp.exp(), other.exp()
        linear = pair_slopes(logp, other, 1.0, "linear")
        worst["linear"] = max(worst["linear"], gap(ascent_weights(expert, pi, linear) @ rows, sft))
        w = ascent_weights(expert, pi, pair_slopes(logp, logp, 0.1, "logistic"))
        worst["logistic"] = max(worst["logistic"], gap(w @ rows, 0.05 * sft))
        push = ascent_weights(expert, old, linear) @ rows - sft
        worst["stale"] = max(worst["stale"], gap(push, -(old @ rows)))  # grad KL(pi_old || pi) = -E_old grad log pi
        rest = between(other, expert.log(), 0.5)
        w = ascent_weights(expert, rest.exp(), pair_slopes(rest, other, 0.5, "logistic"))
        worst["rest"] = max(worst["rest"], float(w.abs().max()))
    checks["1. fresh answers: linear IRFT gradient = SFT gradient"] = (worst["linear"], 1e-12)
    checks["1. fresh answers, reference = policy: logistic = beta / 2 of it"] = (worst["logistic"], 1e-12)
    checks["1. stale answers add grad KL(pi_old || pi) to the ascent"] = (worst["stale"], 1e-12)
    checks["1. fresh answers, fixed reference: logistic rests at the weighted mean"] = (worst["rest"], 1e-12)

    betas, deviations = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.35, 0.7, 1.4)
    table = {s: [cosines(models["gpt_neox"], s, b) for b in betas] for s in deviations}
    print(
        f"1. Cosine of the logistic IRFT gradient with SFT's, another reference: mean (lowest) of {SEEDS} models x 3 prompts"
    )
    print("   sd of the margin  " + "".join(f"beta {b:<11g}" for b in betas))
    for s, found in table.items():
        print(f"   {s:<4} nats         " + "".join(f"{sum(v) / len(v):.3f} ({min(v):.3f})   " for v in found))
    print("   One-sample variance of the linear IRFT gradient over that of SFT")
    for name, found in models.items():
        ratios = variance_ratios(found)
        print(f"   {name:<9} {min(ratios):.2f} to {max(ratios):.2f}, mean {sum(ratios) / len(ratios):.2f}")

    fig, ax = bandit.new_figure(5.4, 3.4)
    for (s, found), color in zip(table.items(), ("#4477aa", "#228833", "#ee6677"), strict=True):
        ax.semilogx(betas, [sum(v) / len(v) for v in found], marker="o", ms=4, lw=1.8, color=color, label=f"{s} nats")
        ax.fill_between(betas, list(map(min, found)), list(map(max, found)), color=color, alpha=0.15, lw=0)
    ax.axhline(1, color="#888888", lw=1, ls=":")
    ax.set(xlabel=r"$\beta$, reward units per nat", ylabel="cosine with the SFT gradient", ylim=(-0.8, 1.05))
    ax.set_title(
        f"Logistic IRFT against SFT (line: mean, band: range of {len(models['gpt_neox'])})", loc="left", size=9.5
    )
    ax.legend(frameon=False, title="sd of the margin", loc="lower left")
    bandit.save_figure(fig, args.output_dir, "theory_gradient.png")


def limits(args: Args, ref: Tensor, expert: Tensor, checks: dict) -> None:
    """Table, checks and figure of section 2."""
    experts = {"expert": expert, f"expert, {STOCK_SHARE:.0%} stock answers": with_stock_answer(expert)}
    print("2. Where T = 1 ends, pi_ref (D / pi_ref)^(1 / beta): KL(D || pi), nats; hidden reward, 0 to 3")
    print(f"   {'':<28} reference  expert   " + "  ".join(f"beta {b:<8g}" for b in BETAS))
    for name, d in experts.items():
        ends = [spin_limit(ref, d, b) for b in BETAS]
        kls, rewards = ([f(p) for p in ends] for f in (lambda p, d=d: mean_kl(d, p), mean_reward))
        print(f"   {name:<23} KL   {mean_kl(d, ref):9.2f}  {0:6.2f}   " + "  ".join(f"{v:<13.2f}" for v in kls))
        print(
            f"   {'':<23} gold {mean_reward(ref):9.2f}  {mean_reward(d):6.2f}   "
            + "  ".join(f"{v:<13.2f}" for v in rewards)
        )
    checks["2. beta = 1: the end is the expert"] = (mean_kl(expert, spin_limit(ref, expert, 1.0)), 1e-12)
    sharper = torch.stack([exact.optimal_policy(q, hidden_reward(), 0.1) for q in ref])
    checks["2. beta = 0.1: the end is the optimum of the hidden reward at a tenth of the expert's KL weight"] = (
        float((spin_limit(ref, expert, 0.1) - sharper).abs().max()), 1e-10,
    )  # fmt: skip

    grid = torch.logspace(-2, 1, 61, dtype=torch.float64).tolist()
    fig, (left, right) = bandit.new_figure(8.4, 3.4, columns=2)
    for (name, d), color in zip(experts.items(), (bandit.COLORS["AIHF"], bandit.COLORS["SFT"]), strict=True):
        ends = [spin_limit(ref, d, b) for b in grid]
        left.loglog(grid, [max(mean_kl(d, p), 1e-4) for p in ends], lw=1.8, color=color, label=name)
        right.semilogx(grid, [mean_reward(p) for p in ends], lw=1.8, color=color, label=name)
        right.axhline(mean_reward(d), color=color, lw=1, ls="--")
    left.axhline(mean_kl(expert, ref), color="#888888", lw=1, ls=":")
    left.text(0.011, mean_kl(expert, ref) * 1.1, "reference", color="#666666", va="bottom")
    right.axhline(mean_reward(ref), color="#888888", lw=1, ls=":")
    right.text(0.011, mean_reward(ref) + 0.02, "reference", color="#666666", va="bottom")
    right.text(10, mean_reward(expert) + 0.02, "the experts themselves", color="#666666", ha="right", va="bottom")
    left.set(xlabel=r"$\beta$, reward units per nat", ylabel="KL(D || π), nats per response", ylim=(1e-4, 200))
    right.set(xlabel=r"$\beta$, reward units per nat", ylabel="hidden reward, different letters", ylim=(0, 3.1))
    left.set_title("Imitation: best at β = 1", loc="left", size=9.5)
    right.set_title("Quality: beyond the expert below β = 1", loc="left", size=9.5)
    left.legend(frameon=False, loc="upper right")
    bandit.save_figure(fig, args.output_dir, "theory_limit.png")


SMALL = 0.05  # policy step of the loops that do not go all the way to the best response
LOOPS = {  # name -> what loop is given
    "--ref initial": dict(),
    "--ref previous": dict(reference="previous"),
    "--ref initial --pairs accumulated": dict(pairs="accumulated"),
    f"--ref initial, policy steps of {SMALL:.0%}": dict(policy_step=SMALL),
    f"--ref previous, policy steps of {SMALL:.0%}": dict(reference="previous", policy_step=SMALL),
}
CARRIED = {
    "linear, --ref initial": dict(reward="carried_linear"),
    "logistic, --ref initial": dict(reward="carried_logistic"),
    "linear, --ref previous": dict(reward="carried_linear", reference="previous"),
}


def loops(args: Args, ref: Tensor, expert: Tensor, checks: dict) -> None:
    """Tables, checks and figure of section 3."""
    print("3. IRL's loop, a new reward at the optimum of Eq. 11 in every iteration: KL(D || pi_t), nats")
    print(f"   {'':<48}t = " + "".join(f"{t:<10}" for t in (0, 1, 2, 3, 4, 200)))
    for beta in BETAS:
        for name, given in LOOPS.items():
            path = loop(ref, expert, beta, 200, **given)
            values = [mean_kl(expert, path[t]) for t in (0, 1, 2, 3, 4, 200)]
            print(f"   beta {beta:<5g} {name:<41}" + "".join(f"{max(v, 0):<10.3g}" for v in values))
    print("   Resting point of --ref initial: KL(D || pi), nats; and the policy step below which each loop converges")
    for beta in BETAS:
        rest = mean_kl(expert, between(ref, expert, beta))
        initial, previous = (largest_policy_step(beta, r) for r in ("initial", "previous"))
        print(f"   beta {beta:<5g} {rest:<10.3g} initial {initial:<8.3g} previous {previous:<8.3g}")
        path = loop(ref, expert, beta, 400, policy_step=SMALL)
        gap = (path[-1] - between(ref, expert, beta)).abs().max()
        checks[f"3. beta = {beta:g}, --ref initial, small steps: ends at the resting point"] = (float(gap), 1e-6)
        path = loop(ref, expert, beta, 400, reference="previous", policy_step=SMALL)
        checks[f"3. beta = {beta:g}, --ref previous, small steps: ends at the expert"] = (
            mean_kl(expert, path[-1]),
            1e-6,
        )
    circle = loop(ref, expert, 1.0, 2)
    checks["3. beta = 1, --ref initial: iteration 2 is back at the reference"] = (mean_kl(circle[2], ref), 1e-12)
    print(
        "   --reward-init previous, one gradient step of the reward and a best response in turn, beta = 0.1: KL(D || pi_t)"
    )
    print(f"   {'':<37}t = " + "".join(f"{t:<10}" for t in (0, 1, 10, 100, 1000, 3000)))
    for name, given in CARRIED.items():
        path = loop(ref, expert, 0.1, 3000, reward_step=1.0, **given)
        values = [mean_kl(expert, path[t]) for t in (0, 1, 10, 100, 1000, 3000)]
        print(f"   reward loss {name:<29}" + "".join(f"{max(v, 0):<10.3g}" for v in values))

    fig, axes = bandit.new_figure(8.4, 3.8, columns=2, sharey=True)
    colors = ("#ee6677", "#4477aa", "#c9a600", "#aa3377", "#228833")
    for ax, beta in zip(axes, (1.0, 0.1), strict=True):
        for (name, given), color in zip(LOOPS.items(), colors, strict=True):
            values = [max(mean_kl(expert, p), 1e-6) for p in loop(ref, expert, beta, 24, **given)]
            ax.semilogy(values, marker="o", ms=2.5, lw=1.4, color=color, label=name)
        ax.set(xlabel="outer iteration", xlim=(0, 24), ylim=(5e-7, 1e4))
        ax.set_title(f"β = {beta:g}", loc="left", size=9.5)
    axes[0].set_ylabel("KL(D || π), nats per response")
    axes[0].legend(frameon=False, loc="upper right", fontsize=7.5)
    bandit.save_figure(fig, args.output_dir, "theory_loop.png")


if __name__ == "__main__":
    bandit.run(lambda: example(tyro.cli(Args, description=__doc__)))
