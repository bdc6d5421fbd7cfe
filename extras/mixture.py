"""Several sources under one flag, each with its share of the rows: --dataset a:0.7 b:0.3."""

import dataclasses
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from common import UserError
from extras.arrow_rows import renumbered
from extras.hub_names import hub_name
from extras.sources import Source, looks_like_path, source_id
from extras.value_lists import words_of


def split_names(given: str, flag: str = "--dataset") -> list[tuple[str, Fraction | None]]:
    """[(name, weight or None)] of what stands behind a data flag, as the command line joins its words (join_values).

    One word, what exists as a path, and words that are not all names of sources are one source without a weight, whatever
    it holds. UserError for a weight that is not above 0, for a weight that only some sources have, and for a source that is
    there twice.
    """
    try:
        words = words_of(given)
    except ValueError:  # a quotation mark of a name
        words = []
    named = [split_weight(word, flag) for word in words]
    if len(named) < 2 or not all(weight is not None or names_source(name) for name, weight in named):
        return [(given, None)]
    lacking = [name for name, weight in named if weight is None]
    if lacking and len(lacking) < len(named):
        raise UserError(f"{flag}: found no weight for {lacking[0]}, expected one for every source, or for none")
    ids = [source_id(name) for name, _ in named]
    if twice := [name for i, (name, _) in enumerate(named) if ids[i] in ids[:i]]:
        raise UserError(f"{flag}: found {twice[0]} twice, expected different sources")
    return named


def names_source(word: str) -> bool:
    """False for a word that may be a part of a file's name, as in "my rows.jsonl"."""
    return word == "pydoc" or "/" in word or looks_like_path(word) or Path(word).exists() or bool(hub_name(word).train)


def split_weight(word: str, flag: str) -> tuple[str, Fraction | None]:
    """name:weight -> (name, weight). The colon of C:\\data or of a file's name begins no weight."""
    name, _, text = word.rpartition(":")
    if not name or Path(word).exists():
        return word, None
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return word, None
    if weight <= 0:
        raise UserError(f"{flag}: found the weight {text} of {name}, expected a number above 0")
    return name, weight


def names_of(given: str, flag: str = "--dataset") -> list[str]:
    """The sources behind a data flag, without their weights."""
    return [name for name, _ in split_names(given, flag)]


def shares(n: int, weights: list[Fraction]) -> list[int]:
    """n rows shared out by the weights: whole numbers with the sum n, each less than one row from its exact share.

    The rows that are left after rounding down go to the largest remainders, the first source first.
    """
    exact = [n * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda k: counts[k] - exact[k])
    for k in order[: n - sum(counts)]:
        counts[k] += 1
    return counts


def split_source(source: Source, n: int) -> list[tuple[Source, int]]:
    """[(source, its number of rows)] behind a Source that may name several; 0 rows: all of them.

    Row i of source k of m is row i m + k of the mixture, so `taken` of the mixture are rows of its sources.
    """
    named = split_names(source.name, source.flag)
    m = len(named)
    if m > 1 and not n and named[0][1] is not None:
        found = "found weights beside 0 rows, which means all, expected a number of rows to share out"
        warnings.warn(f"{source.flag}: {found}: all rows of every source are taken", stacklevel=4)
    counts = shares(n, [weight or Fraction(1) for _, weight in named])
    parts = []
    for k, (name, _) in enumerate(named):
        taken = frozenset(row // m for row in source.taken if row % m == k)
        parts.append((dataclasses.replace(source, name=name, taken=taken), counts[k]))
    return parts


def encode_parts(source: Source, n: int, key: tuple, how: dict, encode_part: Callable) -> list[dict]:
    """Encoded rows of one source, or of several by their shares of n, in the order of their row numbers.

    encode_part(source, n, key, how) -> rows of one source with its own row numbers. key: of the draw. how: arguments of
    encode, whose flag becomes the name of the source in its warnings.
    """
    parts = split_source(source, n)
    if len(parts) == 1:
        return sorted(encode_part(source, n, key, how), key=lambda row: row["row"])
    rows: list[dict] = []
    for k, (part, count) in enumerate(parts):
        if n and not count:
            found = f"found no row for {part.name} among {n}, expected a larger weight, or more rows"
            warnings.warn(f"{source.flag}: {found}: left out", stacklevel=3)
            continue
        named = {**how, "flag": f"{how.get('flag', '--dataset')} {part.name}"}
        own = encode_part(part, count, (*key, k, len(parts)), named)
        if len(own) < count:
            found = f"found {len(own)} rows that can be used, fewer than its share of {count}"
            warnings.warn(f"{named['flag']}: {found}", stacklevel=3)
        rows += renumbered(own, k, len(parts))
    return sorted(rows, key=lambda row: row["row"])


def share_a_source(dataset: str, preferences: str) -> bool:
    """True if --dataset and --preference-dataset name a source in common."""
    return not set(source_ids(dataset)).isdisjoint(source_ids(preferences, "--preference-dataset"))


def used_rows(dataset: str, rows: list[dict], preferences: str) -> frozenset[int]:
    """Numbers that the demonstrations, `rows` of --dataset, have in --preference-dataset, where both share a source."""
    if not share_a_source(dataset, preferences):
        return frozenset()
    mine, theirs = source_ids(dataset), source_ids(preferences, "--preference-dataset")
    place = {k: theirs.index(own) for k, own in enumerate(mine) if own in theirs}
    m, n = len(mine), len(theirs)
    return frozenset(row["row"] // m * n + place[k] for row in rows if (k := row["row"] % m) in place)


def source_ids(given: str, flag: str = "--dataset") -> list[str]:
    return [source_id(name) for name in names_of(given, flag)]
