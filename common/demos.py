"""Rows to train and to measure on: loaded, drawn by the seed, encoded, and held out."""

import warnings

from common import models
from common.args import require
from common.data import encode
from extras.sources import Source

EVAL_SEED = 20_240_528  # sampling seed of every evaluation: runs that are compared share their random streams


def encode_subset(args, tokenizer, source: Source, n: int, *key: int, encode=encode, **how) -> list[dict]:
    """Draw n of the source's rows that can be used (all if n is 0) and encode them. The key decides which; their order stays.

    Rows are drawn until n are kept, so prompts that are too long do not make them fewer. how: more arguments of encode.
    Several sources under one flag give their shares of n (extras/mixture.py).
    """
    from extras.encoded import encode_source
    from extras.mixture import encode_parts

    def encode_part(part: Source, n: int, key: tuple, how: dict) -> list[dict]:
        def make(into):
            return encode(part.draw(n, key), tokenizer, *lengths, limit=n, into=into, **how)

        return encode_source(part, tokenizer, encode, make, n=n, key=key, lengths=lengths, how=how)

    lengths = args.max_length, args.max_prompt_length
    return encode_parts(source, n, key, how, encode_part)


def longest_response(args) -> int:
    """Return the length of cut demonstrations: --max-new-tokens with --cut-demonstrations, else 0 (the window alone)."""
    return args.max_new_tokens if args.cut_demonstrations else 0


def load_demonstrations(args, tokenizer, encode=encode) -> list[dict]:
    """Load and encode --max-samples training rows of --dataset. The seed decides which.

    encode: turns rows into tokens; data.encode, or a function of a script with the same arguments.
    """
    source = Source(args.dataset, "train", turns=args.turns, columns=args.columns, whole=args.eval_dataset != "auto")
    how = dict(encode=encode, longest_response=longest_response(args))
    encoded = encode_subset(args, tokenizer, source, args.max_samples, args.seed, **how)
    long = [d for d in encoded if len(d["response_ids"]) > args.max_new_tokens]
    if long:
        found = f"found {len(long)} of {len(encoded)} demonstrations longer than --max-new-tokens {args.max_new_tokens}"
        detail = f"(row {long[0]['row']} has {len(long[0]['response_ids'])} tokens), where sampled answers are cut"
        warnings.warn(f"--dataset: {found} {detail}; --cut-demonstrations cuts both", stacklevel=2)
    expected = f"at most {len(encoded)}, the demonstrations"
    require(args.select_top_k <= len(encoded), "select_top_k", args.select_top_k, expected)
    return encoded


def load_held_out(args, tokenizer, training: list[dict], preferences: str = "", encode=encode) -> list[dict]:
    """Load and encode --eval-samples held-out rows, the same ones for every seed. UserError for a judge, gold or baseline model
    that cannot be used.

    training: rows that are trained on; held-out prompts that are among theirs are counted.
    preferences: the source of held-out preferences if --eval-dataset is auto; their chosen responses serve as
    demonstrations beside the rejected ones. encode: as in load_demonstrations.
    """
    from extras import gold, judge
    from extras.records import count_shared, say_known

    gold.refuse_unusable(args)
    models.check_window(args)
    judge.refuse_unusable(args)
    if args.eval_dataset != "auto":
        source = Source(args.eval_dataset, "all", flag="--eval-dataset", turns=args.turns, columns=args.columns)
    elif preferences:
        source = Source(preferences, "test", "preferences", "--preference-dataset", columns=args.columns)
    else:
        source = Source(args.dataset, "test", turns=args.turns, columns=args.columns)
    how = dict(flag="--eval-dataset", encode=encode, longest_response=longest_response(args))
    rows = encode_subset(args, tokenizer, source, args.eval_samples, EVAL_SEED, **how)
    if known := count_shared(rows, training):
        found = f"found {known} of {len(rows)} held-out prompts among those trained on"
        warnings.warn(f"--eval-dataset: {found}: what is measured on them is not held out", stacklevel=2)
    say_known(args, rows)
    return rows


def select_demonstrations(run, demonstrations: list[dict]) -> list[dict]:
    """The --select-top-k demonstrations that the gold reward scores highest, in their old order; all without the flag."""
    if not run.args.select_top_k:
        return demonstrations
    from extras.gold import select_top

    return select_top(run, demonstrations)
