"""Flags that take several words: --dataset a:0.7 b:0.3."""

import os
import shlex

LISTS = ("--dataset", "--eval-dataset", "--preference-dataset", "--eval-preference-dataset", "--columns", "--lm-eval")


def join_values(words: list[str]) -> list[str]:
    """The words of a command line, with the values of each flag of LISTS in one: --dataset a:0.7 b:0.3.

    They are joined as a shell would need them. A single value stays as it is.
    """
    joined: list[list[str]] = []
    for word in words:
        last = joined[-1][0].partition("=")[0].replace("_", "-") if joined else ""
        if last in LISTS and not word.startswith("-"):
            joined[-1].append(word)
        else:
            joined.append([word])
    out: list[str] = []
    for first, *values in joined:
        name, is_given, value = first.partition("=")
        many = [value, *values] if is_given else values
        out += [name, shlex.join(many)] if len(many) > 1 else [first, *values]
    return out


def words_of(value: str) -> list[str]:
    """The words that join_values has joined. One word that names a file or a folder stays whole."""
    # pathlib's exists() fails on a text too long for a name
    return [value] if os.path.exists(value) else shlex.split(value)
