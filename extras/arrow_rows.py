"""Rows of an Arrow file that is mapped into memory: one process makes it, every process reads it.

A token id takes 4 bytes there, and the pages are shared by the processes of a machine. In Python's own lists it takes 40.

Layout of a file: an Arrow IPC file; a trailer in JSON (key, bytes and checksum of the Arrow part, warnings); its length.
"""

import bisect
import contextlib
import io
import itertools
import json
import mmap
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from common.store import digest, sync_path
from extras.lazy import is_large

FORMAT = 1  # of the files; another number makes all of them anew
SIZE = 1024  # rows of a record batch
END = 8  # bytes of the trailer's length
JSON = {"json": "1"}  # metadata of a field whose texts are JSON


# ---- rows ----
class Row(Mapping):
    """One row of a mapped table. A value is read when it is asked for; token ids and log-probs come as lists.

    It is as a dict, also with `row | {...}` and with an assignment, which holds for this object alone.
    """

    __slots__ = ("_store", "_i", "_own")

    def __init__(self, store: "Store", i: int, own: dict | None = None):
        self._store, self._i, self._own = store, i, own

    def __getitem__(self, name: str) -> Any:
        if self._own and name in self._own:
            return self._own[name]
        return self._store.value(self._i, name)

    def __setitem__(self, name: str, value) -> None:
        self._own = {**(self._own or {}), name: value}

    def __or__(self, other) -> "Row":
        return Row(self._store, self._i, {**(self._own or {}), **other})

    def __contains__(self, name) -> bool:
        return bool(self._own and name in self._own) or self._store.has(self._i, name)

    def __iter__(self) -> Iterator[str]:
        own = self._own or {}
        yield from (name for name in self._store.names if name in own or self._store.has(self._i, name))
        yield from (name for name in own if name not in self._store.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Store:
    """Columns of record batches. names: {key of a row: column}. sparse: a null is a key that the row does not have.

    place: (k, m) of a source among several: its row i has the number i m + k in the column row.
    """

    def __init__(
        self, batches: list[pa.RecordBatch], sparse: bool = False, names: dict[str, str] | None = None,
        place: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.batches, self.sparse, self.place = batches, sparse, place
        self.names = names or {name: name for name in (batches[0].schema.names if batches else ())}
        self.starts = list(itertools.accumulate((b.num_rows for b in batches), initial=0))
        self.readers: dict[tuple[int, str], Callable[[int], Any]] = {}

    def rows(self) -> list[Row]:
        return [Row(self, i) for i in range(self.starts[-1])]

    def locate(self, i: int) -> tuple[int, int]:
        """(batch, row of it) of row i."""
        batch = bisect.bisect_right(self.starts, i) - 1
        return batch, i - self.starts[batch]

    def has(self, i: int, name) -> bool:
        if name not in self.names:
            return False
        batch, local = self.locate(i)
        return not self.sparse or self.batches[batch].column(self.names[name])[local].is_valid

    def value(self, i: int, name: str) -> Any:
        """KeyError for a name that the row does not have."""
        batch, local = self.locate(i)
        if (batch, name) not in self.readers:
            column = self.names[name]
            field = self.batches[batch].schema.field(column)
            as_json = (field.metadata or {}).get(b"json") is not None
            self.readers[batch, name] = column_reader(self.batches[batch].column(column), as_json)
        value = self.readers[batch, name](local)
        if value is None and self.sparse:
            raise KeyError(name)
        return value * self.place[1] + self.place[0] if self.place[1] > 1 and name == "row" else value


def column_reader(column: pa.Array, as_json: bool = False) -> Callable[[int], Any]:
    """A function i -> value i of the column, as to_pylist gives it; lists of numbers are read from memory in one piece."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner, offsets, nulls = column.values, column.offsets.to_numpy(), column.null_count
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
        if inner.null_count == 0 and any(holds(inner.type) for holds in kinds):
            values = inner.to_numpy(zero_copy_only=False)
            read = lambda begin, end: number_list(values[begin:end])  # noqa: E731
        else:
            single = column_reader(inner)
            read = lambda begin, end: [single(k) for k in range(begin, end)]  # noqa: E731
        return lambda i: None if nulls and not column[i].is_valid else read(offsets[i], offsets[i + 1])
    if as_json:
        return lambda i: json.loads(column[i].as_py())
    return lambda i: column[i].as_py()


INTS = np.empty(0, dtype=object)  # number i at place i
MOST_INTS = 1 << 20


def number_list(values: np.ndarray) -> list:
    """The numbers as a list. Lists share their token ids, so that one takes 8 bytes a token in place of 40."""
    global INTS
    if not len(values) or values.dtype.kind not in "iu" or values.min() < 0 or (most := int(values.max())) >= MOST_INTS:
        return values.tolist()
    if most >= len(INTS):
        INTS = np.arange(1 << (most + 1).bit_length()).astype(object)
    return INTS[values].tolist()


def renamed(rows: list, names: dict[str, str]) -> list:
    """The rows with other keys, {new: old}; a key that a row does not have stays absent."""
    stores: dict[Store, Store] = {}
    out: list = []
    for row in rows:
        if isinstance(row, Row):
            old = row._store
            if old not in stores:
                columns = {new: old.names[name] for new, name in names.items() if name in old.names}
                stores[old] = Store(old.batches, old.sparse, columns, old.place)
            out.append(Row(stores[old], row._i))
        else:
            out.append({new: row[name] for new, name in names.items() if name in row})
    return out


def renumbered(rows: list, k: int, m: int) -> list:
    """The rows of source k of m with their numbers in the mixture: row i is i m + k."""
    if not rows or not isinstance(rows[0], Row):
        return [{**row, "row": row["row"] * m + k} for row in rows]
    stores = {old: Store(old.batches, old.sparse, old.names, (k, m)) for old in {row._store for row in rows}}
    return [Row(stores[row._store], row._i) for row in rows]


# ---- files ----
class Unstorable(Exception):
    """A row that the Arrow columns do not take."""


class Checked:
    """A binary file that counts and sums up what is written to it."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.sum = file, 0, 0

    def write(self, data) -> int:
        self.sum, self.size = zlib.crc32(data, self.sum), self.size + memoryview(data).nbytes
        return self.file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()


class Writer:
    """Record batches on their way to a file. Rows are appended as dicts, SIZE of them make a batch; a missing key is null."""

    def __init__(self, file: BinaryIO, schema: pa.Schema):
        self.file, self.schema, self.count = Checked(file), schema, 0
        self.waiting: list[dict] = []
        self.json = [field.name for field in schema if b"json" in (field.metadata or {})]
        self.ipc = pa.ipc.new_file(pa.PythonFile(self.file, mode="w"), schema)

    def __len__(self) -> int:
        return self.count

    def append(self, row: Mapping) -> None:
        """Unstorable for a row with other keys than the schema's, or with values that would come back as others."""
        try:
            texts = {name: json.dumps(row[name]) for name in self.json if name in row}
        except (TypeError, ValueError):
            raise Unstorable from None
        if row.keys() - set(self.schema.names) or any(json.loads(text) != row[name] for name, text in texts.items()):
            raise Unstorable
        self.waiting.append({**row, **texts})
        self.count += 1
        if len(self.waiting) == SIZE:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait for their batch to be full."""
        if self.waiting:
            try:
                columns = [pa.array([row.get(field.name) for row in self.waiting], field.type) for field in self.schema]
            except (TypeError, ValueError, OverflowError):  # pyarrow's errors are of these types
                raise Unstorable from None
            self.waiting = []
            self.ipc.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    def write(self, batch: pa.RecordBatch) -> None:
        self.count += batch.num_rows
        self.ipc.write_batch(batch)

    def close(self, key: str, said: list[str]) -> None:
        """End the file with its trailer. said: warnings that every reader tells again."""
        self.flush()
        self.ipc.close()
        trailer = {"key": key, "bytes": self.file.size, "sum": self.file.sum, "warnings": said}
        end = json.dumps(trailer).encode()
        self.file.file.write(end + len(end).to_bytes(END, "big"))
        self.file.flush()


def read_trailer(file: BinaryIO) -> dict:
    """ValueError if the file does not end in one, or is not as long as it says."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - END, 0))
    begin = size - END - int.from_bytes(file.read(END), "big")
    file.seek(max(begin, 0))
    trailer = json.loads(file.read(size - END - begin)) if 0 <= begin < size - END else None
    if not isinstance(trailer, dict) or trailer.get("bytes") != begin:
        raise ValueError("no trailer")
    return trailer


def map_batches(file: BinaryIO) -> list[pa.RecordBatch]:
    """Record batches of a file that a Writer has closed, mapped into memory; those of a BytesIO lie in memory."""
    trailer = read_trailer(file)
    mapped = file.getbuffer() if isinstance(file, io.BytesIO) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = pa.ipc.open_file(pa.py_buffer(mapped).slice(0, trailer["bytes"]))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def open_whole(path: Path, key: str) -> tuple[list[pa.RecordBatch], list[str]] | None:
    """(record batches, warnings) of the file made for this key; None if there is none, and with a warning if it is damaged."""
    try:
        with open(path, "rb") as file:
            trailer, summed = read_trailer(file), 0
            left = trailer["bytes"]
            file.seek(0)
            while block := file.read(min(left, 1 << 20)):
                summed, left = zlib.crc32(block, summed), left - len(block)
            if trailer["key"] != key or trailer["sum"] != summed:
                raise ValueError("another key or another checksum")
            return map_batches(file), [str(text) for text in trailer["warnings"]]
    except OSError:  # there is none
        return None
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{path}: found a damaged file, expected the rows that were kept there; made again", stacklevel=3)
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, which one process has at a time; yields False at once where the file system has no locks."""
    lock = path.with_name(f".lock_{path.name}")
    with open(lock, "wb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except (ImportError, OSError):
            held = False
        try:
            yield held
        finally:
            lock.unlink(missing_ok=True)  # who waits for it has it open, and finds the file of rows in its place


def kept(path: Path, key: str, make: Callable, schema: pa.Schema, sparse: bool = False) -> list:
    """Rows of the Arrow file at `path`; where no whole one for `key` is there, one process makes it and the others wait.

    make(rows) appends the rows to a Writer of that schema, or to a list if they do not fit the schema. Its warnings are kept
    in the file, and every process that reads it tells them. If the folder cannot be written or the disk is full, one line
    says so and the rows stay in this process's memory. sparse: as in Store.
    """
    try:
        found = open_whole(path, key)
        if found is None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path) as alone:
                    for stale in path.parent.glob(f".partial_*_{path.name}") if alone else ():
                        stale.unlink(missing_ok=True)  # its process was killed
                    found = open_whole(path, key) or write_whole(path, key, make, schema)
            except OSError as error:
                reason = error.strerror or str(error)
                warnings.warn(
                    f"{path.parent}: found no place for rows ({reason}): they are kept in memory", stacklevel=2
                )
                memory = io.BytesIO()
                said = fill(Writer(memory, schema), make, key)
                found = map_batches(memory), said
    except Unstorable:
        rows: list = []
        make(rows)
        return rows
    batches, said = found
    for text in said:
        warnings.warn(text, stacklevel=2)
    return Store(batches, sparse).rows()


def write_whole(path: Path, key: str, make: Callable, schema: pa.Schema) -> tuple[list[pa.RecordBatch], list[str]]:
    """Make the file under another name, have the disk take it, and then give it its own name."""
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    try:
        with open(partial, "wb+") as file:
            said = fill(Writer(file, schema), make, key)
            os.fsync(file.fileno())
            batches = map_batches(file)
        os.replace(partial, path)
        sync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return batches, said


def fill(writer: Writer, make: Callable, key: str) -> list[str]:
    """make(writer), then the trailer. Returns the texts of the warnings of `make`, which are not shown yet."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(writer)
    own = [str(w.message) for w in caught if w.category is UserWarning]
    for w in caught:
        if w.category is not UserWarning:  # of a library, about this process
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    writer.close(key, own)
    return own


# ---- Parquet ----
def read_parquet(path: Path, lazy: bool) -> list:
    """Rows of a Parquet file: dicts, or if lazy and its columns take LARGE bytes or more, Rows.

    These lie in cache-<name>.arrow beside it, which all processes share.
    """
    import pyarrow.parquet as pq

    found = pq.read_metadata(path)
    if not lazy or not is_large(sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))):
        return pq.read_table(path).to_pylist()
    schema = pq.read_schema(path).remove_metadata()
    return kept(path.with_name(f"cache-{path.stem}.arrow"), digest(path), lambda rows: copy_parquet(path, rows), schema)


def spool_parquet(path: Path) -> list[Row]:
    """Rows of a Parquet file through an Arrow file without a name in the cache folder, gone when this process ends."""
    import pyarrow.parquet as pq

    from extras.cache import cache_folder

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as file:
            fill(Writer(file, pq.read_schema(path).remove_metadata()), lambda rows: copy_parquet(path, rows), "")
            return Store(map_batches(file)).rows()
    except (
        OSError,
        ValueError,
    ):  # no place, or columns with a dictionary for each batch; errors of the file are raised again
        return Store(pq.read_table(path).to_batches()).rows()


def copy_parquet(path: Path, rows: Writer) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as source:
        for batch in source.iter_batches(SIZE):
            rows.write(batch)
