"""Rows that are read one after the other, only as far as they are needed."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from common import UserError
from common.data import UnusableRow
from extras.left_out import warn_left_out

MOST_UNUSABLE = 1000  # at the beginning of a stream: then it is taken for one of another form


class Stream(Sequence):
    """parse(raw, index) of each raw row; None leaves it out. UserError with the text `empty` if that leaves none.

    The length is known at the end alone; until then it is the largest that a sequence can have. Rows stay in memory, since
    a stream cannot be read again. A warning names the first row that cannot be used, when it comes.
    """

    def __init__(self, raw: Iterable, parse: Callable[[Any, int], dict | None], empty: str):
        self.read: list[dict] = []
        self.rows, self.ended = self.usable(raw, parse, empty), False

    def usable(self, raw: Iterable, parse: Callable, empty: str) -> Iterator[dict]:
        count, unusable = 0, []
        for i, r in enumerate(raw):
            count += 1
            try:
                row = parse(r, i)
            except UnusableRow as error:
                unusable.append(str(error))
                if len(unusable) == count == MOST_UNUSABLE:
                    break
                if len(unusable) == 1:
                    warnings.warn(f"{error}; rows of a stream that cannot be used are left out", stacklevel=4)
                continue
            if row is not None:
                yield row
        warn_left_out(unusable, count, count - len(unusable))
        if not self.read:
            raise UserError(f"{empty} ({count} rows read)")

    def __len__(self) -> int:
        return len(self.read) if self.ended else sys.maxsize

    def __getitem__(self, index):
        end = index.stop if isinstance(index, slice) else index + 1
        while not self.ended and len(self.read) < end:
            row = next(self.rows, None)
            self.ended = row is None
            self.read += [] if row is None else [row]
        return self.read[index]
