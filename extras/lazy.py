"""Raw rows of a large source that are read when they are asked for, in place of a list of all of them."""

import itertools
import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from common import UserError
from extras.packed import bytes_of

LARGE = 1 << 23  # bytes of a source, or of a Parquet file's columns, from which on its rows are not held as a list


class Lazy(Sequence):
    """n values, read by read(indices) -> list; a slice is a list."""

    def __init__(self, n: int, read: Callable[[Sequence[int]], list]):
        self.n, self.read = n, read

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index):
        places = range(self.n)[index]  # as a list has it: negative indices, IndexError beyond the end
        return self.read(places) if isinstance(index, slice) else self.read([places])[0]

    def __iter__(self):
        for begin in range(0, self.n, 1024):
            yield from self.read(range(begin, min(begin + 1024, self.n)))


def pick(values: Sequence, indices: Sequence[int]) -> Sequence:
    """The values at these indices, in their order: a list of a list, else Lazy."""
    if isinstance(values, list):
        return [values[i] for i in indices]
    return Lazy(len(indices), lambda places: read_at(values, [indices[i] for i in places]))


def mapped(values: Sequence, change: Callable) -> Sequence:
    """change(value) of each value: a list of a list, else Lazy."""
    if isinstance(values, list):
        return [change(value) for value in values]
    return Lazy(len(values), lambda places: [change(value) for value in read_at(values, places)])


def joined(parts: list[Sequence]) -> Sequence:
    """The values of all parts, one after the other: a list of lists, else Lazy."""
    if all(isinstance(part, list) for part in parts):
        return [value for part in parts for value in part]
    starts = list(itertools.accumulate(map(len, parts), initial=0))

    def read(places: Sequence[int]) -> list:
        which = [bisect_right(starts, i) - 1 for i in places]
        return [parts[k][i - starts[k]] for i, k in zip(places, which, strict=True)]

    return Lazy(starts[-1], read)


def sequences(rows: list[dict], response: str) -> Lazy:
    """(prompt ids, ids in the column `response`) of each row, so that no list of all tokens is made."""
    return Lazy(len(rows), lambda places: [(rows[i]["prompt_ids"], rows[i][response]) for i in places])


def read_at(values: Sequence, places: Sequence[int]) -> list:
    return values.read(places) if isinstance(values, Lazy) else [values[i] for i in places]


# ---- sources ----
def is_large(size: int) -> bool:
    """True for a source of so many bytes that its rows are not held as a list."""
    return size >= LARGE


def size_of(*paths: Path) -> int:
    """Bytes of files, and of all files of folders; of a packed file, about those that it holds."""
    files = itertools.chain.from_iterable(path.rglob("*") if path.is_dir() else [path] for path in paths)
    return sum(bytes_of(p) for p in files if p.is_file())


def read_lines(file: IO[bytes], path: Path, flag: str) -> Lazy:
    """Rows of a file of JSON Lines, open at its beginning; `path` names it.

    Each line is read once here, so that a broken one is named before anything else is done.
    """
    starts, ends, begin = array("q"), array("q"), 0
    for number, line in enumerate(file, 1):
        skipped = 3 if begin == 0 and line.startswith(b"\xef\xbb\xbf") else 0  # the mark of UTF-8 at the beginning
        if line.strip():
            parse_line(line[skipped:], path, number, flag)
            starts.append(begin + skipped)
            ends.append(begin + len(line))
        begin += len(line)
    text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Lazy(len(starts), lambda places: [json.loads(text[starts[i] : ends[i]].decode()) for i in places])


def parse_line(line: bytes, path: Path, number: int, flag: str):
    """UserError that names the line if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: found {path}, expected UTF-8 text (line {number}: {error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {path} line {number}: found broken JSON ({error}), expected an object") from None


def read_dataset(dataset) -> Sequence:
    """Rows of a `datasets` set, which is an Arrow file already: a list of a small one, else Lazy."""
    if not is_large(dataset.data.nbytes):
        return dataset.to_list()
    table = dataset.with_format("arrow")

    def read(places: Sequence[int]) -> list:
        return table[places if isinstance(places, range) else list(places)].to_pylist()

    return Lazy(len(dataset), read)
