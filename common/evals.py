"""Measurements on held-out data, shared by the hooks in the scripts.

Every measure is kept per row (evals/<iteration>.parquet), so that intervals and paired comparisons can be made later.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError
from common.demos import EVAL_SEED
from common.engine import evaluating
from common.generation import Generator, Rollout
from common.logprobs import masked_sum, response_logprobs
from common.store import write_pairs

KINDS = ("chosen", "rejected", "shuffled")
SHOWN = 8  # prompts sampled in samples/ at every evaluation


@dataclass
class HeldOut:
    """Held-out rows with their scores by the reference policy and the gold reward. Made once, before training.

    rejected: the row's own rejected response where the data set has one, else a sample of the reference policy.
    shuffled: the demonstration of the next row.
    """

    rows: list[dict]
    rejected: list[list[int]]
    ref: dict[str, list[float]]  # chosen, rejected, shuffled -> log pi_ref, nats
    gold: dict[str, list[float]]  # demonstrations, base, baseline -> gold reward; empty without --gold-reward-model

    def responses(self, kind: str) -> list[list[int]]:
        chosen = [r["response_ids"] for r in self.rows]
        return {"chosen": chosen, "rejected": self.rejected, "shuffled": chosen[1:] + chosen[:1]}[kind]

    def sequences(self, kind: str) -> list[tuple[list[int], list[int]]]:
        return [(r["prompt_ids"], y) for r, y in zip(self.rows, self.responses(kind), strict=True)]


def sequence_logprobs(
    run, model, sequences, temperature: float = 1.0, advance=lambda n: None
) -> list[tuple[float, list]]:
    """[(log pi of the response, its token log-probs)] without gradient, shared over ranks, in length-sorted batches."""
    with evaluating(model):
        return run.map_sequences(sequences, lambda batch: batch_logprobs(model, batch, temperature), advance)


def score_groups(groups: dict[str, list[tuple]], score: Callable[[list[tuple]], list]) -> dict[str, list]:
    """{name: results of its sequences}, from one call of `score` for all groups, in which answers to one prompt share it."""
    every = iter(score(list(itertools.chain(*groups.values()))))
    return {name: list(itertools.islice(every, len(group))) for name, group in groups.items()}


def batch_logprobs(model, batch, temperature: float = 1.0) -> list[tuple[float, list[float]]]:
    scores = response_logprobs(model, batch, temperature)
    sums, lengths = masked_sum(scores.logprobs, batch.response_mask).tolist(), batch.response_mask.sum(-1).tolist()
    return [(s, t[:n]) for s, t, n in zip(sums, scores.logprobs.tolist(), lengths, strict=True)]


def sample_rows(run, generator: Generator, rows, seed: int, temperature: float, advance=lambda n: None) -> Rollout:
    """One response per row, shared over ranks; row ids name the random streams."""

    def work(indices: list[int]) -> list:
        prompts, ids = [rows[i]["prompt_ids"] for i in indices], [rows[i]["row"] for i in indices]
        part = generator.sample(prompts, ids, seed, temperature, run.shared(advance))
        return list(zip(part.response_ids, part.finished, part.logprobs, strict=True))

    results = run.map_rows(len(rows), work)
    ids, finished, logprobs = (list(column) for column in zip(*results, strict=True))
    return Rollout([r["prompt_ids"] for r in rows], ids, finished, logprobs)


def prepare_held_out(
    run, reference, generator: Generator, rows: list[dict], tokenizer, temperature: float = 1.0
) -> HeldOut:
    """Rejected responses, reference log-probs and gold rewards. `reference` is the model `generator` samples from."""
    path = run.dir / "evals" / "reference.parquet"

    def make() -> list[dict]:
        from extras.gold import gold_columns

        if run.is_main and any("eval/nll" in row for row in run.logged()):
            raise UserError(
                f"--resume: found no {path}, expected what the first policy said of the held-out rows; this one has been trained"
                " since, so it cannot be made again: start a new run"
            )
        with_gold = bool(run.args.gold_reward_model)
        sampled_rows = rows if with_gold else [r for r in rows if "rejected_ids" not in r]
        with run.phase("reference on held-out rows", len(rows) * 3 + len(sampled_rows), step=0) as advance:
            samples, texts, finished = {}, {}, []
            if sampled_rows:
                rollout = sample_rows(run, generator, sampled_rows, EVAL_SEED, temperature, advance)
                samples = dict(zip((r["row"] for r in sampled_rows), rollout.response_ids, strict=True))
                texts = dict(zip(samples, sampled_texts(tokenizer, rollout), strict=True))
                finished = rollout.finished
            rejected = [r["rejected_ids"] if "rejected_ids" in r else samples[r["row"]] for r in rows]
            held = HeldOut(rows, rejected, {}, {})
            columns = {"row": [r["row"] for r in rows], "rejected_ids": rejected}
            with evaluating(reference):
                groups = {kind: held.sequences(kind) for kind in KINDS}
                scores = score_groups(groups, lambda s: sequence_logprobs(run, reference, s, advance=advance))
                for kind, scored in scores.items():
                    columns[f"ref_{kind}"] = [total for total, _ in scored]
        if with_gold:
            base = [(texts[r["row"]], done) for r, done in zip(rows, finished, strict=True)]
            columns |= gold_columns(run, rows, base, temperature)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    stored = run.stored(path, make)
    ref = {kind: [s[f"ref_{kind}"] for s in stored] for kind in KINDS}
    gold = {name[5:]: [s[name] for s in stored] for name in stored[0] if name.startswith("gold_")}
    return HeldOut(rows, [s["rejected_ids"] for s in stored], ref, gold)


def sampled_texts(tokenizer, rollout: Rollout) -> list[str]:
    """The texts of samples, without the token that ended them, which not every tokenizer counts as special."""
    ids = [y[:-1] if done else y for y, done in zip(rollout.response_ids, rollout.finished, strict=True)]
    return [tokenizer.decode(y, skip_special_tokens=True).strip() for y in ids]


def evaluate(
    run,
    policy,
    generator: Generator,
    held: HeldOut,
    tokenizer,
    beta: float,
    reference,
    iteration: int,
    reward_model=None,
    rollout: Rollout | None = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Measure all EVAL_METRICS of the policy -> {name: mean}. `reference` is a context that yields the reference policy.

    With a reward model also eval/reward/samples. `iteration` names the files of this evaluation. Without a reference
    (None) there is no KL; without its log-probs in `held` there is no implicit reward. rollout: the policy's samples, if they
    are drawn already. temperature: the one they are drawn at; unless it is 1 they do not estimate the KL, which is left out.
    """
    from extras.gold import gold_measures
    from extras.judge import judge_measures
    from extras.samples import show_samples

    rows, with_kl = held.rows, reference is not None and temperature == 1.0
    passes = len(KINDS) + (rollout is None) + with_kl
    with run.phase(f"evaluation {iteration}", passes * len(rows), evaluation=iteration) as advance:
        rollout = rollout or sample_rows(run, generator, rows, EVAL_SEED, temperature, advance)
        sequences = list(zip(rollout.prompt_ids, rollout.response_ids, strict=True))
        logp, kl = {}, {}
        with evaluating(policy):
            groups = {kind: held.sequences(kind) for kind in KINDS}  # the reference's batches, so its rounding too
            scores = score_groups(groups, lambda s: sequence_logprobs(run, policy, s, advance=advance))
            for kind, scored in scores.items():
                logp[kind] = np.array([total for total, _ in scored])
            if with_kl:  # the policy's own again, as the reference does it: rounding differs with a cache
                ours = sequence_logprobs(run, policy, sequences, advance=advance)
                with reference as ref_policy:
                    theirs = sequence_logprobs(run, ref_policy, sequences)
                k1, k3 = kl_estimates([tokens for _, tokens in ours], [tokens for _, tokens in theirs])
                kl = {"kl_k1": k1, "kl_k3": k3}
    implicit = {}
    if held.ref:
        reward = {kind: beta * (logp[kind] - np.array(held.ref[kind])) for kind in logp}
        implicit = {
            "rewards/margins": reward["chosen"] - reward["rejected"],
            "rewards/accuracies": pairwise_wins(reward["chosen"], reward["rejected"]),
            "rewards/accuracies_shuffled": pairwise_wins(reward["chosen"], reward["shuffled"]),
        }
    texts = sampled_texts(tokenizer, rollout)
    table = {
        "nll": -logp["chosen"],
        "logps/gap": logp["chosen"] - logp["rejected"],
        **implicit,
        **kl,
        "rouge_l": np.array([rouge_l(t, r["response_text"]) for t, r in zip(texts, rows, strict=True)]),
        "completions/mean_length": np.array([float(len(ids)) for ids in rollout.response_ids]),
        "completions/clipped_ratio": 1.0 - np.array(rollout.finished, dtype=float),
        "lengths/demonstrations": np.array([float(len(r["response_ids"])) for r in rows]),
    }
    if reward_model is not None:
        table["reward/samples"] = np.array(sequence_scores(run, reward_model, sequences))
    table |= gold_measures(run, held, texts, rollout.finished)
    judged, columns = judge_measures(run, rows, texts, iteration)
    if run.is_main:
        save_evaluation(run.dir, iteration, rows, texts, table | columns)
        show_samples(run, tokenizer, rows, rollout, texts, iteration)
    return {f"eval/{name}": float(values.mean()) for name, values in table.items()} | judged


def sequence_scores(run, reward_model, sequences, advance=lambda n: None) -> list[float]:
    """Scalar reward of each (prompt ids, response ids), shared over ranks, without gradient."""
    with evaluating(reward_model):
        return run.map_sequences(sequences, lambda batch: reward_model(batch).tolist(), advance)


def evaluate_reward(
    run, reward_model, held: HeldOut, iteration: int, samples: list[list[int]] | None = None
) -> dict[str, float]:
    """REWARD_METRICS of a reward model -> {name: value}; eval/reward/samples only with the policy's samples, a response a row.

    Scores of every row go to evals/reward_<iteration>.parquet.
    """
    from extras.statistics import calibration

    sequences = {kind: held.sequences(kind) for kind in KINDS}
    if samples is not None and samples != held.rejected:
        sequences["samples"] = [(r["prompt_ids"], y) for r, y in zip(held.rows, samples, strict=True)]
    total = sum(map(len, sequences.values()))
    with run.phase(f"reward {iteration} on held-out rows", total, outer_iteration=iteration) as advance:
        with evaluating(reward_model):
            found = score_groups(sequences, lambda s: sequence_scores(run, reward_model, s, advance))
        scores = {kind: np.array(values) for kind, values in found.items()}
    if samples is not None:
        scores.setdefault("samples", scores["rejected"])
    if run.is_main:
        rows = [{"row": r["row"], **{k: float(v[i]) for k, v in scores.items()}} for i, r in enumerate(held.rows)]
        write_pairs(run.dir / "evals" / f"reward_{iteration:04d}.parquet", rows)
    values = {name: float(column.mean()) for name, column in reward_columns(scores).items()}
    return {**values, "eval/reward/calibration_error": calibration(scores["chosen"] - scores["rejected"])[0]}


def reward_columns(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name: (rows,)} of those REWARD_METRICS that are means over rows, from the scores of chosen, rejected, ... (rows,)."""
    columns = {
        "eval/reward/accuracy": pairwise_wins(scores["chosen"], scores["rejected"]),
        "eval/reward/accuracy_shuffled": pairwise_wins(scores["chosen"], scores["shuffled"]),
        "eval/reward/margin": scores["chosen"] - scores["rejected"],
        "eval/reward/demonstrations": scores["chosen"],
    }
    return columns | ({"eval/reward/samples": scores["samples"]} if "samples" in scores else {})


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
    lines = [f"# Samples at evaluation {iteration}\n"]
    for row, text in list(zip(rows, texts, strict=True))[:SHOWN]:
        lines.append(f"## Row {row['row']}\n\n```\n{row['prompt_text'].strip()}\n```\n")
        lines.append(f"Demonstration: {row['response_text']}\n\nSample: {text}\n")
    (folder / "samples" / f"{iteration:04d}.md").write_text("\n".join(lines))


def pairwise_wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where a > b, 1/2 where equal, else 0."""
    return (a > b) + 0.5 * (a == b)


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 of Lin (2004), as the rouge-score package computes it, no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure


def print_table(run, start: str, method: str) -> None:
    """Print one line for each evaluation of the run: the policy it started from, then the method's policies."""
    if run.is_main:
        from extras.table import print_evaluations

        print_evaluations(run, start, method)
