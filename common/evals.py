"""Measurements on held-out data, shared by the hooks in the scripts.

Every measure is kept per row (evals/<iteration>.parquet), so that intervals and paired comparisons can be made later.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.data import collate, encode, load_rows, read_pairs, write_pairs
from common.generation import Generator, Rollout
from common.logprobs import masked_sum, response_logprobs
from common.run import data_order

EVAL_SEED = 20_240_528  # sampling seed of every evaluation: runs that are compared share their random streams
SHOWN = 8  # prompts sampled in samples/ at every evaluation

EVAL_METRICS = {  # name -> meaning, unit, range
    "eval/nll": "-log pi of the demonstration, nats per response; lower is better",
    "eval/logps/gap": "log pi(chosen) - log pi(rejected), nats per pair (RFT Example 2, Fig. 1 right)",
    "eval/rewards/margins": "mean of r(chosen) - r(rejected), r = beta log pi/pi_ref; 0 at the start",
    "eval/rewards/accuracies": "share of pairs with r(chosen) > r(rejected), ties half (RFT Table 8); 0.5 at the start",
    "eval/rewards/accuracies_shuffled": "the same with another row's demonstration as rejected; 0.5 at the start",
    "eval/rouge_l": "ROUGE-L F1 of one sample at temperature 1 with the demonstration; in [0, 1]",
    "eval/completions/mean_length": "tokens of that sample, EOS included",
    "eval/completions/clipped_ratio": "share of samples cut at --max-new-tokens",
    "eval/kl_k1": "mean of log pi/pi_ref over the samples: KL(pi || pi_ref), nats per response; >= 0 in expectation",
    "eval/kl_k3": "sum over tokens of exp(-u) - 1 + u, u = log pi/pi_ref: the same in expectation, never negative",
    "eval/lengths/demonstrations": "tokens of the demonstrations, EOS included",
}


@dataclass
class HeldOut:
    """Held-out rows with what the reference policy says about them; made once, before training.

    rejected: the row's own rejected response where the data set has one, else a sample of the reference policy.
    shuffled: the demonstration of the next row.
    """

    rows: list[dict]
    rejected: list[list[int]]
    ref: dict[str, list[float]]  # chosen, rejected, shuffled -> log pi_ref, nats

    def responses(self, kind: str) -> list[list[int]]:
        chosen = [r["response_ids"] for r in self.rows]
        return {"chosen": chosen, "rejected": self.rejected, "shuffled": chosen[1:] + chosen[:1]}[kind]


def load_demonstrations(args, tokenizer) -> list[dict]:
    """--max-samples training rows of --dataset, encoded; which ones depends on the seed, their order does not matter."""
    rows = load_rows(args.dataset, "train")
    picked = sorted(data_order(len(rows), args.seed)[: args.max_samples or len(rows)])
    return encode([rows[i] for i in picked], tokenizer, args.max_length, args.max_prompt_length)


def load_held_out(args, tokenizer) -> list[dict]:
    """--eval-samples held-out rows, encoded; the same ones for every seed."""
    if args.eval_dataset == "auto":
        rows = load_rows(args.dataset, "test")
    else:
        rows = load_rows(args.eval_dataset, "all", flag="--eval-dataset")
    picked = sorted(data_order(len(rows), EVAL_SEED)[: args.eval_samples])
    return encode([rows[i] for i in picked], tokenizer, args.max_length, args.max_prompt_length, flag="--eval-dataset")


def sequence_logprobs(
    run, model, sequences, temperature: float = 1.0, advance=lambda n: None
) -> list[tuple[float, list]]:
    """[(log pi of the response, its token log-probs)] without gradient, shared over ranks, in length-sorted batches."""
    size = run.args.per_device_eval_batch_size
    pad = 0  # never read: masks come from lengths

    def work(indices: list[int]) -> list:
        order = sorted(range(len(indices)), key=lambda j: -sum(map(len, sequences[indices[j]])))
        out: list = [None] * len(indices)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for i in range(0, len(order), size):
                part = order[i : i + size]
                batch = collate([sequences[indices[j]] for j in part], pad).to(run.accelerator.device)
                scores = response_logprobs(model, batch, temperature)
                sums = masked_sum(scores.logprobs, batch.response_mask).tolist()
                tokens = scores.logprobs.tolist()
                for k, j in enumerate(part):
                    out[j] = (sums[k], tokens[k][: len(sequences[indices[j]][1])])
                advance(len(part))
        model.train(was_training)
        return out

    return run.map_rows(len(sequences), work)


def sample_rows(run, generator: Generator, rows, seed: int, temperature: float, advance=lambda n: None) -> Rollout:
    """One response per row, shared over ranks; row ids name the random streams."""

    def work(indices: list[int]) -> list:
        prompts, ids = [rows[i]["prompt_ids"] for i in indices], [rows[i]["row"] for i in indices]
        part = generator.sample(prompts, ids, seed, temperature, advance)
        return list(zip(part.response_ids, part.finished, part.logprobs, strict=True))

    results = run.map_rows(len(rows), work)
    ids, finished, logprobs = (list(column) for column in zip(*results, strict=True))
    return Rollout([r["prompt_ids"] for r in rows], ids, finished, logprobs)


def prepare_held_out(run, reference, generator: Generator, rows: list[dict]) -> HeldOut:
    """Rejected responses and reference log-probs of the held-out rows. `reference` is the model `generator` samples from."""
    path = run.dir / "evals" / "reference.parquet"
    if path.exists():
        stored = read_pairs(path)
        ref = {kind: [s[f"ref_{kind}"] for s in stored] for kind in ("chosen", "rejected", "shuffled")}
        return HeldOut(rows, [s["rejected_ids"] for s in stored], ref)
    missing = [r for r in rows if "rejected_ids" not in r]
    with run.phase("reference on held-out rows", len(rows) * 3 + len(missing), step=0) as advance:
        sampled = iter(sample_rows(run, generator, missing, EVAL_SEED, 1.0, advance).response_ids if missing else [])
        held = HeldOut(rows, [r["rejected_ids"] if "rejected_ids" in r else next(sampled) for r in rows], {})
        for kind in ("chosen", "rejected", "shuffled"):
            sequences = [(r["prompt_ids"], y) for r, y in zip(rows, held.responses(kind), strict=True)]
            held.ref[kind] = [total for total, _ in sequence_logprobs(run, reference, sequences, advance=advance)]
    if run.is_main:
        columns = zip([r["row"] for r in rows], held.rejected, *held.ref.values(), strict=True)
        names = ("row", "rejected_ids", *(f"ref_{kind}" for kind in held.ref))
        write_pairs(path, [dict(zip(names, values, strict=True)) for values in columns])
    run.accelerator.wait_for_everyone()
    return held


def evaluate(run, policy, generator: Generator, held: HeldOut, tokenizer, beta: float, reference, iteration: int):
    """All of EVAL_METRICS for the policy -> {name: mean}. `reference` is a context that yields the reference policy."""
    rows = held.rows
    with run.phase(f"evaluation {iteration}", 5 * len(rows), outer_iteration=iteration) as advance:
        logp = {}
        for kind in ("chosen", "rejected", "shuffled"):
            sequences = [(r["prompt_ids"], y) for r, y in zip(rows, held.responses(kind), strict=True)]
            scored = sequence_logprobs(run, policy, sequences, advance=advance)
            logp[kind] = np.array([total for total, _ in scored])
        rollout = sample_rows(run, generator, rows, EVAL_SEED, 1.0, advance)
        sequences = list(zip(rollout.prompt_ids, rollout.response_ids, strict=True))
        ours = sequence_logprobs(run, policy, sequences, advance=advance)
    with reference as ref_policy:
        theirs = sequence_logprobs(run, ref_policy, sequences)
    kl_k1, kl_k3 = kl_estimates([tokens for _, tokens in ours], [tokens for _, tokens in theirs])
    reward = {kind: beta * (logp[kind] - np.array(held.ref[kind])) for kind in logp}
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rollout.response_ids]
    table = {
        "nll": -logp["chosen"],
        "logps/gap": logp["chosen"] - logp["rejected"],
        "rewards/margins": reward["chosen"] - reward["rejected"],
        "rewards/accuracies": wins(reward["chosen"], reward["rejected"]),
        "rewards/accuracies_shuffled": wins(reward["chosen"], reward["shuffled"]),
        "rouge_l": np.array([rouge_l(t, r["response_text"]) for t, r in zip(texts, rows, strict=True)]),
        "completions/mean_length": np.array([float(len(ids)) for ids in rollout.response_ids]),
        "completions/clipped_ratio": 1.0 - np.array(rollout.finished, dtype=float),
        "kl_k1": kl_k1,
        "kl_k3": kl_k3,
        "lengths/demonstrations": np.array([float(len(r["response_ids"])) for r in rows]),
    }
    if run.is_main:
        save_evaluation(run.dir, iteration, rows, texts, table)
    return {f"eval/{name}": float(values.mean()) for name, values in table.items()}


def kl_estimates(policy: list[list[float]], ref: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """(k1, k3) of KL(pi || pi_ref) for each response sampled from pi, from its token log-probs; each (B,), nats.

    With u = log pi/pi_ref of a token: k1 sums u, k3 sums exp(-u) - 1 + u, which is never negative. Both are unbiased.
    """
    logratio = [np.array(a) - np.array(b) for a, b in zip(policy, ref, strict=True)]
    return np.array([u.sum() for u in logratio]), np.array([(np.exp(-u) - 1 + u).sum() for u in logratio])


def save_evaluation(folder: Path, iteration: int, rows, texts, table) -> None:
    """evals/<iteration>.parquet: a row per held-out row; samples/<iteration>.md: the same eight prompts every time."""
    write_pairs(
        folder / "evals" / f"{iteration:04d}.parquet",
        [
            {"row": r["row"], "sample": t, **{k: float(v[i]) for k, v in table.items()}}
            for i, (r, t) in enumerate(zip(rows, texts, strict=True))
        ],
    )
    lines = [f"# Samples after outer iteration {iteration}\n"]
    for row, text in list(zip(rows, texts, strict=True))[:SHOWN]:
        lines.append(f"## Row {row['row']}\n\n```\n{row['prompt_text'].strip()}\n```\n")
        lines.append(f"Demonstration: {row['response_text']}\n\nSample: {text}\n")
    (folder / "samples" / f"{iteration:04d}.md").write_text("\n".join(lines))


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where a > b, 1/2 where equal, else 0."""
    return (a > b) + 0.5 * (a == b)


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 of Lin (2004), as the rouge-score package computes it, no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    if not hasattr(rouge_l, "scorer"):
        rouge_l.scorer = RougeScorer(["rougeL"])
    return rouge_l.scorer.score(reference, candidate)["rougeL"].fmeasure


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (n,), resampling rows."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


TABLE = {  # column of the printed table -> metric, digits
    "NLL": ("eval/nll", 2),
    "logp gap": ("eval/logps/gap", 2),
    "accuracy": ("eval/rewards/accuracies", 3),
    "acc. shuffled": ("eval/rewards/accuracies_shuffled", 3),
    "ROUGE-L": ("eval/rouge_l", 3),
    "length": ("eval/completions/mean_length", 1),
    "KL k1": ("eval/kl_k1", 3),
    "KL k3": ("eval/kl_k3", 3),
}


def print_table(run) -> None:
    """Every evaluation of the run, one line each, on the console."""
    if not run.is_main:
        return
    from rich.console import Console
    from rich.table import Table

    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    table = Table(title=f"held-out measures, {run.dir}")
    for column in ("iteration", "step", *TABLE):
        table.add_column(column, justify="right")
    for row in rows:
        if "eval/nll" in row:
            cells = [f"{row[name]:.{digits}f}" for name, digits in TABLE.values()]
            table.add_row(str(row["outer_iteration"]), str(row["step"]), *cells)
    Console(width=120).print(table)
