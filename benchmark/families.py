"""Families of prompts: texts that are nearly the same, so that a split keeps them on one side."""

import hashlib
import math
import re
from collections import Counter, defaultdict

WORDS = re.compile(r"[^\W\d_]+")  # without digits: version numbers make no new family
SIMILARITY = 0.5
RUN = 3  # words


def word_runs(text: str) -> frozenset[tuple[str, ...]]:
    """Every run of three words of the text in lower case; all its words where there are fewer."""
    words = WORDS.findall(text.lower()) or text.split()
    return frozenset(tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1)))


def family_names(texts: list[str]) -> list[str]:
    """For each text the name of its family: the member of it whose SHA-256 is smallest.

    Two texts are in one family if the Jaccard similarity of their word_runs is at least one half (common runs, of all
    runs of both), or if a chain of such pairs joins them. Exact: two sets that similar share one of the rarest runs of each.
    """
    runs = [word_runs(text) for text in texts]
    sets = list(dict.fromkeys(runs))
    counts = Counter(run for members in sets for run in members)
    parent = list(range(len(sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    holders = defaultdict(list)  # run -> sets that have it among their rarest ones
    for i, own in enumerate(sets):
        rarest_first = sorted(own, key=lambda run: (counts[run], run))
        rarest = rarest_first[: len(own) - math.ceil(SIMILARITY * len(own)) + 1]
        for j in {j for run in rarest for j in holders[run]}:
            if len(own & sets[j]) >= SIMILARITY * len(own | sets[j]):
                parent[root(i)] = root(j)
        for run in rarest:
            holders[run].append(i)
    place = {members: i for i, members in enumerate(sets)}
    families = [root(place[r]) for r in runs]
    name: dict[int, str] = {}
    for family, text in zip(families, texts, strict=True):
        name[family] = min(name.get(family, text), text, key=digest)
    return [name[family] for family in families]


def digest(text: str, key: str = "") -> bytes:
    return hashlib.sha256(f"{key}{text}".encode()).digest()


def in_first_half(name: str, key: str) -> bool:
    """True for a family in the first of the two halves that the key makes of all families."""
    return digest(name, key)[0] % 2 == 0
