"""Words of a command line and values of a file, against the type of a flag."""

import itertools
import types
from typing import Literal, Union, get_args, get_origin

PLANNED = ("tokens_per_second", "generation_tokens_per_second", "num_processes")  # flags of the plan alone
# no settings of a run that is resumed, or that is made again from its args.json
CHOSEN_ANEW = ("resume", "dry_run", "output_dir", "config", "stop_after", *PLANNED)


def last_value(words: list[str], name: str) -> str | None:
    """The value that a command line gives a flag, the last one of several; None if it gives none."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        before, given, value = word.partition("=")
        if before == name:
            found = value if given else following
    return found


def kinds_of(kind) -> tuple:
    """The types of a union, else the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def reads(text: str, kind) -> bool:
    """True if a word of the command line is a value of a flag's type."""

    def one(kind) -> bool:
        if get_origin(kind) is Literal:
            return text in map(str, get_args(kind))
        try:
            return kind(text) is not None
        except ValueError:
            return False

    return any(map(one, kinds_of(kind)))


def holds(value, kind) -> bool:
    """True if a value from a JSON file is of a flag's type."""

    def one(kind) -> bool:
        if get_origin(kind) is Literal:
            return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
        return type(value) is kind or (kind is float and type(value) is int)

    return any(map(one, kinds_of(kind)))


def in_words(kind) -> str:
    """A flag's type as an error names it: a number or auto."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    choices = [", ".join(map(str, get_args(k))) if get_origin(k) is Literal else names[k] for k in kinds_of(kind)]
    return "one of " * (", " in choices[0]) + " or ".join(choices)
