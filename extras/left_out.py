"""Rows that cannot be used: counted, and named in one warning of each kind."""

import warnings

from common import UserError


def warn_left_out(unusable: list[str], total: int, kept: int) -> None:
    """Warn in one line how many of `total` rows were left out, with the first one's reason; UserError if none is `kept`."""
    if unusable and not kept:
        rest = f"all {total} rows are like this" if len(unusable) == total else f"none of {total} rows can be used"
        raise UserError(f"{unusable[0]}; {rest}")
    if unusable:
        found = f"{unusable[0]}; {len(unusable)} of {total} rows cannot be used and were left out"
        warnings.warn(found, stacklevel=3)


class LeftOut:
    """Counts the rows that `data.encode` leaves out, cuts, or takes as they are. flag: the source that the warnings name."""

    def __init__(self, flag: str):
        self.flag = flag
        self.unusable: list[str] = []  # reasons
        self.rendered: list[int] = []  # rows whose prompt is in the form of the template already
        self.long: list[tuple[int, int]] = []  # (row, tokens) of prompts that are too long
        self.same: list[int] = []  # rows of pairs with equal responses
        self.cut: list[tuple[int, int, int]] = []  # (row, tokens, room) of responses that were cut
        self.responses = 0  # cut or not

    def leave_out(self, row: dict, reason: str) -> None:
        self.unusable.append(f"{self.flag} row {row['row']}: {reason}")

    def warn(self, seen: int, kept: int, longest: int, limit: int) -> None:
        """Warn of everything counted in `seen` rows. UserError if none is `kept`; longest, limit: as in encode."""
        if self.rendered:
            found = f"found {len(self.rendered)} of {seen} prompts in the form of the template already"
            warnings.warn(f"{self.flag}: {found} (row {self.rendered[0]}): they are not rendered again", stacklevel=3)
        if self.long:
            row, length = self.long[0]
            found = f"{self.flag}: found {len(self.long)} of {seen} prompts longer than --max-prompt-length {longest}"
            found += f" (row {row} has {length} tokens)"
            if not kept and not self.unusable and not self.same:
                raise UserError(f"{found}: no row is left; expected shorter prompts or a larger window")
            warnings.warn(f"{found}: left out", stacklevel=3)
        warn_left_out(self.unusable, seen, kept or len(self.same))
        if self.same:
            found = (
                f"{self.flag}: found {len(self.same)} of {len(self.same) + kept} pairs with chosen equal to rejected"
            )
            found += f" (row {self.same[0]})"
            if not kept:
                raise UserError(f"{found}, expected responses that differ")
            warnings.warn(f"{found}: left out", stacklevel=3)
        if self.cut:
            row, length, room = self.cut[0]
            found = f"{self.flag}: found {len(self.cut)} of {self.responses} responses longer than their room"
            warnings.warn(f"{found} (row {row} has {length} tokens for {room}): cut there, without EOS", stacklevel=3)
        if kept < limit and seen > kept:
            found = f"found {kept} rows that can be used, fewer than the {limit} asked for"
            warnings.warn(f"{self.flag}: {found}", stacklevel=3)
