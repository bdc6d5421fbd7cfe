"""--columns: names that the columns of a source get before its rows are read."""

import functools
import shlex

from common import UserError

GROUPS = (  # columns that are read together; the answers are in them
    ("completion",), ("response",), ("messages",), ("chosen", "rejected"), ("real", "generated"), ("conversations",),
    ("output",), ("summary",), ("summaries",),
)  # fmt: skip
OTHERS = ("prompt", "label", "subreddit", "title", "post", "instruction", "input")
KNOWN = (*OTHERS, *(name for group in GROUPS for name in group))


@functools.cache
def read_columns(text: str) -> dict[str, str]:
    """The value of --columns -> {name: column of the source}. UserError, in one line, for anything but NAME=COLUMN."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark of a name
        words = [text]
    words = words if all("=" in word for word in words) else [text]
    found: dict[str, str] = {}
    for word in words:
        name, _, column = word.partition("=")
        if name not in KNOWN or not column or name in found:
            expected = f"NAME=COLUMN with a name once, one of {', '.join(KNOWN)}"
            raise UserError(f"--columns: found {word}, expected {expected}")
        found[name] = column
    return found


def rename_columns(raw: dict, text: str) -> dict:
    """A row with the names of --columns, for the columns that it has; a row that has none of them stays as it is.

    Where --columns names an answer, the other answers of the row are not read: the user has chosen one.
    """
    found = {name: column for name, column in read_columns(text).items() if column in raw}
    chosen = {name for group in GROUPS if found.keys() & group for name in group}
    unread = {name for group in GROUPS for name in group} - chosen if chosen else set()
    kept = {name: value for name, value in raw.items() if name not in unread and name not in found.values()}
    return {**kept, **{name: raw[column] for name, column in found.items()}}
