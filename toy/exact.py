"""A language small enough to list: every expectation of the papers is a finite sum here.

Three letters and EOS, at most four tokens: 121 responses, those that end in EOS and those cut at four letters, under a real
transformers model in float64. The scripts' own functions are held against these sums in tests/test_exact.py; run as a
program, this file checks the mathematics itself and measures the two statements of the papers that are bounds.

RFT = arXiv:2405.17888, IRL = arXiv:2503.13538.  Dims: Y responses, T tokens.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, during the imports too, without a traceback

import itertools
from dataclasses import dataclass

import bandit
import numpy as np
import torch
from torch import Tensor

LETTERS, EOS, LENGTH = 3, 3, 4
PROMPTS = [[0], [1, 2], [2, 0, 1]]


def all_responses() -> list[list[int]]:
    """Every response: up to three letters and EOS, or four letters without one."""
    ended = [[*word, EOS] for n in range(LENGTH) for word in itertools.product(range(LETTERS), repeat=n)]
    return ended + [list(word) for word in itertools.product(range(LETTERS), repeat=LENGTH)]


RESPONSES = all_responses()


def make_model(architecture: str = "gpt_neox", seed: int = 0, scale: float = 3.0):
    """A random two-layer GPT-NeoX or Mistral in float64 over the four tokens; `scale` spreads its logits."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    size = dict(vocab_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    size |= dict(max_position_embeddings=32, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)
    if architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(num_key_value_heads=1, head_dim=8, sliding_window=None, **size))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**size))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def response_logprobs(model, prompt: list[int], responses: list[list[int]] | None = None) -> Tensor:
    """(Y,) log pi(y | x) of every response, one unpadded forward pass each length; carries gradient."""
    responses = RESPONSES if responses is None else responses
    out: list[Tensor | None] = [None] * len(responses)
    for length in {len(r) for r in responses}:
        index = [i for i, r in enumerate(responses) if len(r) == length]
        ids = torch.tensor([prompt + responses[i] for i in index])
        logp = model(input_ids=ids).logits.log_softmax(-1)  # (y, P + T, V)
        picked = logp[:, len(prompt) - 1 : -1].gather(-1, ids[:, len(prompt) :, None])[..., 0]
        for i, value in zip(index, picked.sum(-1), strict=True):
            out[i] = value
    return torch.stack(out)


# ---- the mathematics, as sums ----
def log_partition(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z = log sum_y pi_ref(y) exp(r(y) / beta)."""
    return (ref_logprobs + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(Y,) log pi_r: the KL-regularised optimum. RFT Eq. 9."""
    return ref_logprobs + rewards / beta - log_partition(ref_logprobs, rewards, beta)


def likelihood(expert: Tensor, ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """E_expert[log pi_r(y)]: the upper-level objective. RFT Eq. 4."""
    return (expert * optimal_policy(ref_logprobs, rewards, beta)).sum()


def minimax_value(
    expert: Tensor, policy_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, beta: float
) -> Tensor:
    """(E_expert r - E_pi r) / beta + KL(pi || pi_ref). RFT Lemma 3.1."""
    policy = policy_logprobs.exp()
    return ((expert - policy) * rewards).sum() / beta + kl(policy_logprobs, ref_logprobs)


def kl(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """KL(p || q) over all responses, nats."""
    return (p_logprobs.exp() * (p_logprobs - q_logprobs)).sum()


# ---- IRL Lemma 4.1: how far the likelihood on a data set is from the true one ----
def lemma_4_1(size: int, draws: int, delta: float, seed: int = 0, reward_bound: float = 2.0) -> tuple[float, float]:
    """(share of drawn data sets that violate the bound, mean gap over bound) for data sets of `size` demonstrations."""
    rng = np.random.default_rng(seed)
    ref = response_logprobs(make_model(seed=seed, scale=2.0), PROMPTS[0]).detach()
    rewards = torch.from_numpy(rng.uniform(0, reward_bound, len(RESPONSES)))
    log_policy = optimal_policy(ref, rewards, 1.0).numpy()
    expert = rng.dirichlet(np.ones(len(RESPONSES)))
    true = expert @ log_policy
    samples = rng.choice(len(RESPONSES), p=expert, size=(draws, size))
    gaps = np.abs(log_policy[samples].mean(1) - true)
    bound = (reward_bound - float(ref.min())) * np.sqrt(np.log(2 / delta) / (2 * size))
    return float((gaps > bound).mean()), float(gaps.mean() / bound)


# ---- RFT Theorem 3.1: the rate of Alg. 1 and 2 ----
def smallest_gradient(T: int, K: int, seeds: int, eta: float = 4.0, seed: int = 0) -> float:
    """min over (t, k) of E ||grad l||^2 for stochastic updates of a tabular reward, responses sampled at theta_{t,0}.

    The policy is the one the reward induces (RFT Eq. 9, beta = 1), as in the theorem; the step is eta / sqrt(T K); the
    expectation is a mean over `seeds` independent runs.
    """
    rng = np.random.default_rng(seed)
    ref = response_logprobs(make_model(seed=1, scale=2.0), PROMPTS[0]).detach().numpy()
    expert = rng.dirichlet(np.full(len(ref), 0.3))
    cdf = expert.cumsum()
    theta = np.zeros((seeds, len(ref)))
    rows = np.arange(seeds)
    best = np.inf

    def policy() -> np.ndarray:
        weights = np.exp(ref + theta - (ref + theta).max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    step = eta / np.sqrt(T * K)
    for _ in range(T):
        old = policy().cumsum(1)
        for _ in range(K):
            best = min(best, float(((expert - policy()) ** 2).sum(1).mean()))
            demonstrated = np.minimum(np.searchsorted(cdf, rng.random(seeds)), len(ref) - 1)
            generated = np.minimum((old < rng.random((seeds, 1)) * old[:, -1:]).sum(1), len(ref) - 1)
            theta[rows, demonstrated] += step
            theta[rows, generated] -= step
    return best


def theorem_bound(T: int, K: int, eta: float = 4.0, seed: int = 0) -> float:
    """The proof's bound with its constants, for the tabular softmax and a step of h = eta / sqrt(T K):

    2 (l* - l(theta_0)) / (h T K) + h L G^2 + h^2 L~^2 G^2 (K - 1), with smoothness L = 1/2 (the log-sum-exp's), gradient
    norm G = sqrt 2, and L~ = 1/2 (how fast the policy, so the bias, moves with theta). RFT App. B, proof of Theorem B.1.
    """
    ref = response_logprobs(make_model(seed=1, scale=2.0), PROMPTS[0]).detach().numpy()
    expert = np.random.default_rng(seed).dirichlet(np.full(len(ref), 0.3))
    gap = float(expert @ (np.log(np.maximum(expert, 1e-300)) - ref))  # l* is reached at pi = expert
    step = eta / np.sqrt(T * K)
    return 2 * gap / (step * T * K) + step * 0.5 * 2 + step**2 * 0.25 * 2 * (K - 1)


# ---- RFT Lemma B.3: how smooth the likelihood is ----
def lemma_b_3(reach: float, seed: int = 0) -> dict[str, float]:
    """Constants for three responses and the reward r_y(theta) = a_y theta^2 / 2, |theta| <= reach, beta = 1, pi_ref uniform.

    needed: the largest slope of grad l over the interval. printed: L0 (3 L0 + L1) / pi_min^2, the lemma's L. proved: 2
    (pi_max L1 + 2 L0^2) / pi_min^2, the last line of its proof. jump and G: the largest |g| of one pair and the lemma's bound.
    L0, L1, pi_min and pi_max are those of Assumption B.1, the smallest that hold on a grid. RFT App. B.
    """
    curvature = torch.from_numpy(np.random.default_rng(seed).normal(size=3))
    theta = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    expert = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    def policy(t: Tensor) -> Tensor:
        return (curvature * t**2 / 2).softmax(-1)

    def slope(t: Tensor) -> Tensor:
        return torch.func.jacfwd(policy)(t)

    pi, first, second = (torch.func.vmap(f)(theta) for f in (policy, slope, torch.func.jacfwd(slope)))
    scores = first / pi  # grad log pi of each response
    gradient = (scores * expert).sum(-1)  # of the likelihood; E_pi grad log pi = 0
    low, high, L0, L1 = pi.min(), pi.max(), first.norm(dim=-1).max(), second.abs().max()
    return {
        "needed": float((gradient.diff() / theta.diff()).abs().max()),
        "printed": float(L0 * (3 * L0 + L1) / low**2),
        "proved": float(2 * (high * L1 + 2 * L0**2) / low**2),
        "jump": float((scores[:, :, None] - scores[:, None, :]).abs().max()),
        "G": float(2 * L0 / low),
    }


@dataclass
class Args:
    seeds: int = 64
    """independent runs behind every point of the rate, 1 to 100,000."""
    draws: int = 2000
    """data sets drawn for Lemma 4.1, 100 to 1,000,000."""
    output_dir: str = "runs/toy"
    """folder of the figure."""


def rates(seeds: int, sizes=(4, 16, 64)) -> dict[tuple[int, int], float]:
    return {(T, K): smallest_gradient(T, K, seeds) for T in sizes for K in sizes}


def slope(values: dict[tuple[int, int], float]) -> float:
    """Least-squares slope of log value against log (T K)."""
    x = np.log([T * K for T, K in values])
    return float(np.polyfit(x, np.log(list(values.values())), 1)[0])


def identities() -> dict[str, tuple[float, float]]:
    """{statement: (residual, bound)} for both architectures and every prompt."""
    out: dict[str, tuple[float, float]] = {}
    beta = 0.5
    for architecture in ("gpt_neox", "mistral"):
        model, reference = make_model(architecture, 0), make_model(architecture, 1)
        generator = torch.Generator().manual_seed(0)
        worst = dict.fromkeys(("sum", "value", "lower", "tabular"), 0.0)
        for prompt in PROMPTS:
            logp, ref = response_logprobs(model, prompt).detach(), response_logprobs(reference, prompt).detach()
            expert = torch.rand(len(ref), generator=generator, dtype=torch.float64)
            expert /= expert.sum()
            rewards = torch.randn(len(ref), generator=generator, dtype=torch.float64).requires_grad_()
            optimum = optimal_policy(ref, rewards, beta)
            inner = minimax_value(expert, optimum, ref, rewards, beta)
            outer = likelihood(expert, ref, rewards, beta) - (expert * ref).sum()
            (exact,) = torch.autograd.grad(likelihood(expert, ref, rewards, beta), rewards)
            worst["sum"] = max(worst["sum"], abs(float(logp.exp().sum()) - 1))
            worst["value"] = max(worst["value"], abs(float((inner - outer).detach())))
            worst["lower"] = max(
                worst["lower"], float((inner - minimax_value(expert, logp, ref, rewards, beta)).detach())
            )
            worst["tabular"] = max(
                worst["tabular"], float((exact - (expert - optimum.detach().exp()) / beta).abs().max())
            )
        out[f"{architecture}: probabilities of all {len(RESPONSES)} responses sum to 1"] = (worst["sum"], 1e-12)
        out[f"{architecture}: Lemma 3.1, inner minimum = likelihood - E log pi_ref"] = (worst["value"], 1e-10)
        out[f"{architecture}: Lemma 3.1, another policy is not lower"] = (worst["lower"], 0.0)
        out[f"{architecture}: Lemma 5.1 / Eq. 13 against autograd through log Z"] = (worst["tabular"], 1e-10)
    return out


def example(args: Args) -> bool:
    bandit.check_range("--seeds", args.seeds, 1, 10**5)
    bandit.check_range("--draws", args.draws, 100, 10**6)  # fewer cannot show a share of 0.1
    torch.set_num_threads(1)
    checks = identities()
    print(f"IRL Lemma 4.1: |L - L^| <= (C_r - C_p) sqrt(ln(2/delta) / 2|D|), delta = 0.1, {args.draws} data sets each")
    for size in (4, 16, 64, 256):
        violated, tightness = lemma_4_1(size, args.draws, 0.1)
        print(f"    |D| = {size:<4} violated in {violated:.4f} of the draws; mean gap / bound = {tightness:.3f}")
        checks[f"Lemma 4.1, |D| = {size}: violations at most delta"] = (violated, 0.1)
    smooth = {reach: lemma_b_3(reach) for reach in (0.01, 0.1, 1.0)}
    print("RFT Lemma B.3: the slope of grad l, the printed L, and the last line of the proof, for |theta| below")
    for reach, found in smooth.items():
        print(f"    {reach:<4} {found['needed']:.4f}   printed {found['printed']:.4f}   proof {found['proved']:.4f}")
        checks[f"Lemma B.3, |theta| <= {reach}: slope over the proof's L"] = (found["needed"] / found["proved"], 1.0)
        checks[f"Lemma B.3, |theta| <= {reach}: |g| over G"] = (found["jump"] / found["G"], 1.0)
    print("RFT Theorem 3.1: min over (t, k) of E ||grad||^2, bound O(1/sqrt(TK) + 1/T)")
    measured = rates(args.seeds)
    for (T, K), value in measured.items():
        bound = theorem_bound(T, K)
        print(f"    T = {T:<3} K = {K:<3} {value:.5f}   bound with the proof's constants {bound:.3f}")
        checks[f"Theorem 3.1, T = {T}, K = {K}: measured over bound"] = (value / bound, 1.0)
    found = slope(measured)
    print(f"    slope of the measured log against log(TK): {found:.2f} (that of 1/sqrt(TK): -0.5)")
    ok = bandit.report(checks)

    fig, ax = bandit.new_figure(5.4, 3.6)
    sizes = sorted({K for _, K in measured})
    for K, color in zip(sizes, ("#4477aa", "#ee6677", "#228833"), strict=True):
        points = [(T * K, v) for (T, k), v in measured.items() if k == K]
        ax.loglog(*zip(*points, strict=True), marker="o", lw=1.8, color=color, label=f"K = {K}, T = 4, 16, 64")
    x = np.array([16, 4096])
    top = measured[sizes[0], sizes[0]]
    ax.loglog(x, top * (x / x[0]) ** -0.5, color="#888888", ls="--", lw=1, label="slope -1/2, the bound")
    ax.set(xlabel="updates T K", ylabel="smallest E ||grad l||²")
    ax.set_title("Alg. 2 on the enumerable language", loc="left")
    ax.legend(frameon=False, loc="lower left")
    bandit.save_figure(fig, args.output_dir, "rate.png")
    return ok


if __name__ == "__main__":
    bandit.run(lambda: example(bandit.parse_args(Args, __doc__)))
