"""Evaluate: measure a policy, and a reward model beside it, on held-out rows.

Measures (of the RFT paper, arXiv:2405.17888, Sec. 5, without the leaderboard, and more): log-prob gap, NLL, ROUGE-L and lengths
of the policy; accuracy and margin of its implicit reward beta log pi/pi_ref, and KL (with --ref-model); accuracy, margin and
calibration of a learned reward (--reward-model); gold score and win rates (--gold-reward-model, --baseline); win rate over the
demonstrations by an LLM judge (--judge-model). They are those the training scripts log, each with a 95% bootstrap interval over
the rows.

Three other jobs, each in place of these measures: --reward-pairs FILE, rewards on labelled pairs by subset (RewardBench's way);
--mt-bench FILE, answers to two-turn questions graded by --judge-model; --lm-eval FILE..., one table from lm-eval's results.

Samples are drawn from a random stream per row, the same for every policy, as in the training scripts.

Dims: n held-out rows.

Laptop CPU, a minute:   python evaluate.py

After a run of rft.py:  python evaluate.py --model runs/x/final --ref-model runs/x/sft --reward-model runs/x/reward
"""

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import contextlib
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from common import demos, evals, models, rewards
from common.args import BaseArgs, flag, main, parse_args, require
from common.generation import Rollout, make_generator
from common.ranges import NOT_NEGATIVE, POSITIVE
from common.run import Run
from common.store import without_nan, write_json, write_pairs
from extras import figures, metrics, statistics, tokenizers
from extras.gold import gold_columns
from extras.table import print_table

SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(dataset="pydoc", eval_samples=200, max_length=256, max_new_tokens=48, per_device_eval_batch_size=64),
    "smollm2": dict(dataset="pydoc", eval_samples=100, max_length=256, max_new_tokens=48, per_device_eval_batch_size=16),
    "pythia": dict(dataset="hh-rlhf", eval_samples=500, max_length=1024, max_new_tokens=256, per_device_eval_batch_size=32),
    "other": dict(dataset="ultrachat_200k", eval_samples=500, max_length=2048, max_new_tokens=256, per_device_eval_batch_size=16),
}  # fmt: skip


@dataclass
class Args(BaseArgs):
    model: str = "tiny"
    """policy to measure: tiny (embedded), a local folder, a short name (zephyr-7b-sft-full, pythia-1.4b, ...) or a hub id."""
    seed: Annotated[int, NOT_NEGATIVE] = 1
    """part of the directory's name; rows, samples and intervals are the same for every seed."""
    ref_model: str = ""
    """reference policy, with the tokenizer of --model; empty: no implicit reward, no KL, no win rate over it."""
    reward_model: str = ""
    """reward model to measure, a classifier with one label and the tokenizer of --model; empty: none."""
    beta: Annotated[float, POSITIVE] = 0.1
    """scale of the implicit reward beta log pi/pi_ref, reward units per nat, > 0."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of all samples, > 0; other than 1 there is no KL. irl_ppo_tldr.py measures at 0.01."""
    reward_pairs: str = ""
    """pairs (RewardBench's columns prompt, chosen, rejected, subset) on which rewards are measured instead; empty: none."""
    mt_bench: str = ""
    """two-turn questions (FastChat's question.jsonl) that --model answers and --judge-model grades instead; empty: none."""
    lm_eval: str = ""
    """result files of lm-eval, or its output folders, of which a table is made instead, without a model; empty: none."""

    def check(self) -> None:
        super().check()
        jobs = [flag(name) for name in ("reward_pairs", "mt_bench", "lm_eval") if getattr(self, name)]
        require(len(jobs) < 2, "reward_pairs", " and ".join(jobs), "one of these flags at a time")


METRICS = {**metrics.EVAL_METRICS, **metrics.REWARD_METRICS}  # name -> meaning, unit, range


# ---- what is measured against what ----
def hold_out(run, reference, samples: Rollout, rows: list[dict], tokenizer) -> evals.HeldOut:
    """Held-out rows with what reference, baseline and gold reward say of them; all of it in evals/reference.parquet.

    Without a reference (None) the policy's `samples` are the rejected responses of rows that have none of their own.
    """
    args = run.args
    if reference is not None:
        generator = make_generator(run, reference, tokenizer)
        return evals.prepare_held_out(run, reference, generator, rows, tokenizer, args.temperature)
    rejected = [r.get("rejected_ids", y) for r, y in zip(rows, samples.response_ids, strict=True)]
    columns = {"row": [r["row"] for r in rows], "rejected_ids": rejected}
    columns |= gold_columns(run, rows, None, args.temperature) if args.gold_reward_model else {}
    if run.is_main:
        stored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_pairs(run.dir / "evals" / "reference.parquet", stored)
    gold = {name[5:]: values for name, values in columns.items() if name.startswith("gold_")}
    return evals.HeldOut(rows, rejected, {}, gold)


def evaluate(args: Args) -> None:
    if args.lm_eval:
        from extras import lm_eval_table

        return lm_eval_table.tabulate(args)
    if args.reward_pairs or args.mt_bench:
        from extras import mt_bench, reward_pairs

        return reward_pairs.measure(args) if args.reward_pairs else mt_bench.measure(args)
    tokenizer = models.load_tokenizer(args)
    if args.ref_model:
        tokenizers.check_same_tokenizer(args, tokenizer, args.ref_model, "--ref-model")
    if args.reward_model:
        tokenizers.check_same_tokenizer(args, tokenizer, args.reward_model, "--reward-model")
    rows = demos.load_held_out(args, tokenizer, [])
    if args.reward_model:
        scalar = rewards.load_scalar_model(args, args.reward_model, "--reward-model").eval()

    run = Run(args, "evaluate", METRICS)
    run.print(f"evaluate: {args.model} on {len(rows)} held-out rows, {run.world} process(es), {run.dir}")
    policy = models.for_inference(run, models.load_model(args))
    reference = None
    if args.ref_model:
        reference = models.for_inference(run, models.load_model(args, args.ref_model, "--ref-model"))
    generator = make_generator(run, policy, tokenizer)
    with run.phase("samples", len(rows), step=0) as advance:
        samples = evals.sample_rows(run, generator, rows, demos.EVAL_SEED, args.temperature, advance)
    held = hold_out(run, reference, samples, rows, tokenizer)
    against = None if reference is None else contextlib.nullcontext(reference)
    values = evals.evaluate(
        run, policy, generator, held, tokenizer, args.beta, against, 0, rollout=samples, temperature=args.temperature
    )
    if args.reward_model:
        del policy, reference, generator, against  # their memory, before another model comes
        values |= evals.evaluate_reward(run, models.for_inference(run, scalar), held, 0, samples.response_ids)
    run.log({name: values[name] for name in METRICS if name in values}, step=0)
    if run.is_main:
        report(run, held, values)
    run.end()


# ---- the report ----
def report(run, held: evals.HeldOut, values: dict[str, float]) -> None:
    """evaluation.json, figure.png and the table on the console, from the values and the rows in evals/."""
    args, folder = run.args, run.dir / "evals"
    stored = statistics.read_columns(folder / "0000.parquet").items()
    columns = {
        f"eval/{name}": c for name, c in stored if name != "row" and not name.startswith("judge/")
    }  # has its interval
    reward = statistics.read_columns(folder / "reward_0000.parquet") if args.reward_model else {}
    measures = {name: {"value": values[name], "low": None, "high": None} for name in METRICS if name in values}
    for name, column in (columns | (evals.reward_columns(reward) if reward else {})).items():
        measures[name]["low"], measures[name]["high"] = statistics.bootstrap_interval(column)
    if (win := measures.get("eval/judge/win_rate_demonstrations")) is not None:
        win["low"], win["high"] = (measures.pop(f"eval/judge/win_rate_{end}")["value"] for end in ("low", "high"))
    result = {"rows": len(held.rows), "measures": {name: without_nan(m) for name, m in measures.items()}}
    if reward:
        margins = reward["chosen"] - reward["rejected"]
        bins = [
            dict(zip(("confidence", "accuracy", "pairs"), b, strict=True)) for b in statistics.calibration(margins)[1]
        ]
        low, high = statistics.calibrated_range(margins)
        result["calibration"] = {"bins": bins, "if_calibrated": {"low": low, "high": high}}
    names = ("model", "ref_model", "reward_model", "gold_reward_model", "baseline", "judge_model", "judge_base_url")
    names += ("judge_task", "dataset", "eval_dataset", "beta")
    write_json(run.dir / "evaluation.json", {**{name: getattr(args, name) for name in names}, **result})
    draw_figure(run.dir / "figure.png", held, columns, reward, result)
    show_measures(run, result)
    run.print(f"values: {run.dir / 'evaluation.json'}   figure: {run.dir / 'figure.png'}   rows: {folder}")


def show_measures(run, result: dict) -> None:
    rows = []
    for name, m in result["measures"].items():
        interval = "" if m["low"] is None else f"{m['low']:.3f}..{m['high']:.3f}"
        if name == "eval/reward/calibration_error":
            interval = "{low:.3f}..{high:.3f} if calibrated".format(**result["calibration"]["if_calibrated"])
        rows.append([name, f"{m['value']:.3f}", interval])
    title = f"{run.args.model}, {result['rows']} held-out rows, {run.dir}"
    print_table(title, ["measure", "value", "95% interval"], rows, run.dir / "evaluation.json")


# ---- the figure ----
BLUE, RED, GREY = *figures.COLORS[:2], figures.GREY


def draw_figure(path, held: evals.HeldOut, columns: dict, reward: dict, result: dict) -> None:
    """Up to four panels, by what was measured: log-prob gap; calibration and rewards; gold scores; else lengths."""
    gaps = {"model": columns["eval/logps/gap"]}
    if held.ref:
        gaps["reference"] = np.array(held.ref["chosen"]) - np.array(held.ref["rejected"])
    panels = [(draw_histograms, gaps, "log-prob gap", "log π(chosen) − log π(rejected), nats")]
    if reward:
        panels += [
            (draw_calibration, result["calibration"]["bins"]),
            (draw_rewards, reward["chosen"], reward["samples"]),
        ]
    if held.gold:
        gold = {"demonstrations": held.gold["demonstrations"], "reference": held.gold.get("base")}
        gold |= {"baseline": held.gold.get("baseline"), "model": columns["eval/gold/score"]}
        panels.append((draw_gold, {name: scores for name, scores in gold.items() if scores is not None}))
    if len(panels) < 4:
        names = {"model's samples": "eval/completions/mean_length", "demonstrations": "eval/lengths/demonstrations"}
        lengths = {label: columns[name] for label, name in names.items()}
        panels.append((draw_histograms, lengths, "lengths", "response, tokens with EOS"))
    fig, (axes,) = figures.subplots(1, len(panels), (3.6 * len(panels), 3.2))
    for ax, (draw, *data) in zip(axes, panels, strict=True):
        draw(ax, *data)
    figures.save(fig, path)


def draw_histograms(ax, values: dict[str, np.ndarray], title: str, xlabel: str) -> None:
    """Distributions over the same bins: the first filled, the second as a line."""
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=24)
    styles = (dict(color=BLUE, alpha=0.5), dict(color=RED, histtype="step", lw=1.5))
    for style, (label, column) in zip(styles, values.items(), strict=False):
        ax.hist(column, edges, label=label, **style)
    ax.margins(y=0.2)  # room for the legend
    ax.legend(frameon=False, fontsize=8)
    ax.set(title=title, xlabel=xlabel, ylabel="held-out rows")


def draw_calibration(ax, bins: list[dict]) -> None:
    """A point per bin, its area by the number of pairs, with the 95% Wilson interval of the accuracy."""
    confidence, accuracy, n = (np.array([b[k] for b in bins]) for k in ("confidence", "accuracy", "pairs"))
    z = 1.96
    middle = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    ax.plot([0.5, 1], [0.5, 1], color=GREY, ls="--", lw=1)
    ax.vlines(confidence, middle - half, middle + half, color=BLUE, lw=1)
    ax.scatter(confidence, accuracy, s=10 + 150 * n / n.sum(), color=BLUE)
    ax.set(
        title="calibration of the reward model",
        xlabel="confidence σ(|margin|)",
        ylabel="share with chosen scored higher",
    )
    ax.set(xlim=(0.48, 1.02), ylim=(-0.04, 1.04))


def draw_rewards(ax, x: np.ndarray, y: np.ndarray) -> None:
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color=GREY, ls="--", lw=1)
    ax.scatter(x, y, s=8, color=BLUE, alpha=0.5, lw=0)
    ax.set(xlabel="demonstration, reward units", ylabel="model's sample, reward units")
    ax.set_title(f"reward: demonstration higher in {evals.pairwise_wins(x, y).mean():.0%} of rows")


def draw_gold(ax, scores: dict[str, np.ndarray]) -> None:
    """Quartiles, 5th and 95th percentile, and the mean as a diamond."""
    diamond = dict(marker="D", markerfacecolor=BLUE, markeredgecolor=BLUE, ms=4)
    ax.boxplot(
        list(scores.values()), orientation="horizontal", tick_labels=list(scores), whis=(5, 95), widths=0.5,
        showfliers=False, showmeans=True, medianprops=dict(color=BLUE), meanprops=diamond,
    )  # fmt: skip
    ax.invert_yaxis()
    ax.set(title="gold scores (mean: diamond)", xlabel="gold reward units")


if __name__ == "__main__":
    main(lambda: evaluate(parse_args(Args, __doc__, SETTINGS)))
