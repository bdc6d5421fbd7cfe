"""Rewards on labelled pairs in RewardBench's format: accuracy by subset, and the mean over subsets.

RewardBench (arXiv:2403.13787) has rows of prompt, chosen, rejected and subset. Every reward is measured on the same pairs: the
learned one (--reward-model), the implicit one of the policy, beta log pi/pi_ref (--ref-model), and two that cost nothing: log pi
alone, and the shorter response, which tells how far length alone decides.

Dims: n pairs.
"""

from pathlib import Path

import numpy as np

from common import UserError, evals, models, rewards
from common.data import encode
from common.run import Run
from common.store import write_json, write_pairs
from extras.sources import load_rows, read_file
from extras.table import print_table
from extras.tokenizers import check_same_tokenizer

REWARDS = {  # name -> what a higher score means
    "learned": "the reward of --reward-model",
    "implicit": "beta (log pi - log pi_ref), with --ref-model",
    "log_prob": "log pi, summed over the response",
    "shorter": "fewer tokens",
}
MEAN, ALL = "mean over subsets", "all pairs"
KINDS = ("chosen", "rejected")


def measure(args) -> dict:
    """Measure every reward that the flags name on --reward-pairs; table, JSON and scores of each pair -> what the JSON holds."""
    tokenizer = models.load_tokenizer(args)
    for name, flag in ((args.ref_model, "--ref-model"), (args.reward_model, "--reward-model")):
        if name:
            check_same_tokenizer(args, tokenizer, name, flag)
    pairs = load_pairs(args, tokenizer)
    run = Run(args, "evaluate", {})
    run.print(f"reward pairs: {len(pairs)} of {args.reward_pairs}, {run.world} process(es), {run.dir}")
    scores = score_pairs(run, pairs)
    subsets = [pair["subset"] for pair in pairs]
    found = {name: accuracies(evals.pairwise_wins(*both), subsets) for name, both in scores.items()}
    names = ("model", "ref_model", "reward_model", "reward_pairs", "beta")
    result = {**{name: getattr(args, name) for name in names}, "pairs": len(pairs), "accuracy": found}
    if run.is_main:
        columns = {f"{name}_{kind}": s for name, both in scores.items() for kind, s in zip(KINDS, both, strict=True)}
        stored = [
            {"row": p["row"], "subset": p["subset"], **{name: float(column[i]) for name, column in columns.items()}}
            for i, p in enumerate(pairs)
        ]
        write_pairs(run.dir / "evals" / "reward_pairs.parquet", stored)
        write_json(run.dir / "reward_pairs.json", result)
        show(f"{args.model}, {len(pairs)} pairs of {Path(args.reward_pairs).name}", found)
        print(f"values: {run.dir / 'reward_pairs.json'}   rows: {run.dir / 'evals'}")
    run.end()
    return result


def load_pairs(args, tokenizer) -> list[dict]:
    """Rows of --reward-pairs, encoded as any preference is, each with its subset ("all" without that column)."""
    path, flag = Path(args.reward_pairs), "--reward-pairs"
    if not path.is_file():
        raise UserError(
            f"{flag}: found no file {path}, expected one with prompt, chosen, rejected and subset in each row"
        )
    raw = read_file(path, flag)
    rows = load_rows(str(path), "all", "preferences", flag)
    pairs = encode(list(rows), tokenizer, args.max_length, args.max_prompt_length, flag)
    return [{**pair, "subset": str(raw[pair["row"]].get("subset", "all"))} for pair in pairs]


def score_pairs(run, pairs: list[dict]) -> dict[str, np.ndarray]:
    """{name of a reward: its scores of the chosen and of the rejected responses (2, n)}, for those that the flags name."""
    args, n = run.args, len(pairs)
    sequences = [(p["prompt_ids"], p[kind]) for kind in ("response_ids", "rejected_ids") for p in pairs]

    def logprobs(name: str, flag: str) -> np.ndarray:
        model = models.for_inference(run, models.load_model(args, name, flag))
        with run.phase(f"log-probs of {flag}", 2 * n, step=0) as advance:
            scored = evals.sequence_logprobs(run, model, sequences, advance=advance)
        return np.array([total for total, _ in scored]).reshape(2, n)

    scores = {}
    if args.reward_model:
        scalar = models.for_inference(run, rewards.load_scalar_model(args, args.reward_model, "--reward-model"))
        with run.phase("rewards", 2 * n, step=0) as advance:
            scores["learned"] = np.array(evals.sequence_scores(run, scalar, sequences, advance)).reshape(2, n)
        del scalar  # its memory, before another model comes
    ours = logprobs(args.model, "--model")
    if args.ref_model:
        scores["implicit"] = args.beta * (ours - logprobs(args.ref_model, "--ref-model"))
    scores["log_prob"] = ours
    scores["shorter"] = -np.array([float(len(y)) for _, y in sequences]).reshape(2, n)
    return scores


def accuracies(wins: np.ndarray, subsets: list[str], draws: int = 2000, seed: int = 0) -> dict[str, dict[str, float]]:
    """{subset: value, low, high, pairs} of wins (n,), 1, 1/2 for a tie or 0; then the same of MEAN and of ALL.

    Intervals are 95% percentile bootstrap intervals over pairs, drawn within each subset. MEAN weighs every subset alike, ALL
    every pair.
    """
    stream, drawn, table = np.random.default_rng(seed), {}, {}
    names = list(dict.fromkeys(subsets))
    for name in names:
        own = wins[np.array(subsets) == name]
        drawn[name] = own[stream.integers(0, len(own), (draws, len(own)))].mean(1)
        table[name] = entry(float(own.mean()), drawn[name], len(own))
    every, sizes = np.stack([drawn[name] for name in names]), np.array([table[name]["pairs"] for name in names])
    table[MEAN] = entry(float(np.mean([table[name]["value"] for name in names])), every.mean(0), len(wins))
    table[ALL] = entry(float(wins.mean()), np.average(every, axis=0, weights=sizes), len(wins))
    return table


def entry(value: float, drawn: np.ndarray, pairs: int) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high), "pairs": pairs}


def show(title: str, found: dict[str, dict]) -> None:
    """A line per subset, a column per reward."""
    rows = []
    for subset, own in next(iter(found.values())).items():
        cells = (table[subset] for table in found.values())
        rows.append([subset, str(own["pairs"]), *(f"{c['value']:.3f}\n{c['low']:.3f}..{c['high']:.3f}" for c in cells)])
    title += ": share of pairs with the chosen response higher, ties half, 95% interval"
    print_table(title, ["subset", "pairs", *found], rows, "reward_pairs.json", show_lines=True)
