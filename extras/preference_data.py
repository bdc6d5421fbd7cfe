"""People's preferences: pairs to train on beside demonstrations, and held-out pairs to measure a reward model on."""

import warnings

import numpy as np

from common import demos
from common.data import encode
from common.demos import EVAL_SEED, encode_subset
from common.evals import pairwise_wins, sequence_scores
from common.store import write_pairs
from extras.mixture import share_a_source, used_rows
from extras.records import count_shared
from extras.sources import Source

PREFERENCE_METRICS = {  # a learned reward model, with --eval-preference-dataset
    "eval/reward/accuracy_preferences": "share of people's held-out pairs with r(chosen) > r(rejected), ties half (IRL Fig. 2a)",
    "eval/reward/margin_preferences": "mean of r(chosen) - r(rejected) on these, reward units",
}


def load_both(args, tokenizer) -> tuple[list[dict], list[dict]]:
    """(demonstrations, preferences) to train on; either may be empty, demonstrations where the settings have no use for them.

    A source of both is shared out all the same: what the preferences are does not depend on the use of the rest.
    """
    demonstrations, preferences = [], []
    if args.needs_demonstrations() or share_a_source(args.dataset, args.preference_dataset):
        demonstrations = demos.load_demonstrations(args, tokenizer)
    if args.preference_dataset != "none":
        preferences = load_preferences(args, tokenizer, demonstrations)
    return demonstrations if args.needs_demonstrations() else [], preferences


def load_preferences(args, tokenizer, demonstrations: list[dict]) -> list[dict]:
    """--max-preferences training rows of --preference-dataset, encoded: prompt_ids, chosen_ids, rejected_ids.

    Where it shares a source with --dataset, no row serves as demonstration and as preference. Pairs whose responses have
    the same tokens are dropped and counted; prompts shared with the demonstrations are counted.
    """
    from extras.arrow_rows import renamed

    flag, name = "--preference-dataset", args.preference_dataset
    taken = used_rows(args.dataset, demonstrations, name)
    whole = args.eval_dataset != "auto"  # else a tenth of a source without a held-out part is what is measured on
    source = Source(name, "train", "preferences", flag, taken=taken, columns=args.columns, whole=whole)
    rows = encode_subset(args, tokenizer, source, args.max_preferences, args.seed, 1, flag=flag, distinct=True)
    names = ("row", "prompt", "prompt_ids", "prompt_text", "rejected_text", "rejected_ids", "rejected_finished")
    kept = renamed(rows, {**dict(zip(names, names, strict=True)), "chosen_ids": "response_ids"})
    if shared := count_shared(kept, demonstrations):
        warnings.warn(f"{flag}: found {shared} of {len(kept)} prompts among the demonstrations' too", stacklevel=2)
    return kept


def load_eval_preferences(args, tokenizer, encode=encode) -> list[dict]:
    """--eval-samples held-out pairs of --eval-preference-dataset, encoded: response_ids is the chosen one. Empty without it."""
    flag, name = "--eval-preference-dataset", args.eval_preference_dataset
    if name == "none":
        return []
    source = Source(name, "all", "preferences", flag, columns=args.columns)
    return encode_subset(args, tokenizer, source, args.eval_samples, EVAL_SEED, flag=flag, encode=encode)


def evaluate_preferences(run, reward_model, pairs: list[dict], iteration: int) -> dict[str, float]:
    """PREFERENCE_METRICS of a reward model on load_eval_preferences' pairs -> {name: mean}; empty without pairs.

    Scores of every pair go to evals/preferences_<iteration>.parquet.
    """
    if not pairs:
        return {}
    both = [(p["prompt_ids"], p[kind]) for kind in ("response_ids", "rejected_ids") for p in pairs]
    with run.phase(f"reward {iteration} on preferences", len(both), outer_iteration=iteration) as advance:
        chosen, rejected = np.array(sequence_scores(run, reward_model, both, advance)).reshape(2, -1)
    if run.is_main:
        rows = zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
        columns = [{"row": p["row"], "chosen": c, "rejected": r} for p, c, r in rows]
        write_pairs(run.dir / "evals" / f"preferences_{iteration:04d}.parquet", columns)
    return {
        "eval/reward/accuracy_preferences": float(pairwise_wins(chosen, rejected).mean()),
        "eval/reward/margin_preferences": float((chosen - rejected).mean()),
    }
