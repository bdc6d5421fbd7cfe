"""Ranges of numbers. A flag has its range in its type: Annotated[int, AT_LEAST_1]."""

from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """A range of numbers, in words and as a test."""

    expected: str
    holds: Callable[[float], bool]


POSITIVE = Range("a number above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or more", lambda x: x >= 0)
AT_LEAST_1 = Range("1 or more", lambda x: x >= 1)
AT_LEAST_2 = Range("2 or more, to choose a pair from", lambda x: x >= 2)
BELOW_1 = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
SHARE = Range("a share above 0 and below 1", lambda x: 0 < x < 1)
UP_TO_1 = Range("a number above 0 and at most 1", lambda x: 0 < x <= 1)
ZERO_TO_1 = Range("between 0 and 1", lambda x: 0 <= x <= 1)
ANY_NUMBER = Range("any number", lambda x: True)
