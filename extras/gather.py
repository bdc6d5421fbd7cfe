"""Results of work that processes share, gathered on all of them as Arrow columns, without a pickle."""

import pyarrow as pa
import torch

from extras.arrow_rows import column_reader

LEAVES = {int: pa.int32(), float: pa.float64(), bool: pa.bool_()}  # of numbers, tried before what pyarrow infers


def gather_rows(accelerator, shares: list[list[int]], mine: list) -> list:
    """Results in order on all ranks. shares: the indices of each rank, all of range(n) together. mine: those of this rank.

    A result is a number, a text, a list of such, or a tuple or dict of these; all results have one form. Numbers come back to
    the bit. TypeError for what no Arrow column takes, ValueError if a rank has not one result for each of its indices.
    """
    parts = [mine] if len(shares) == 1 else map(unpack, gather_bytes(accelerator, pack(mine)))
    found = {
        i: result for share, part in zip(shares, parts, strict=True) for i, result in zip(share, part, strict=True)
    }
    return [found[i] for i in range(len(found))]


def pack(results: list) -> pa.Buffer:
    """Results as an Arrow stream of one record batch; nothing if there are none."""
    if not results:
        return pa.py_buffer(b"")
    form = type(results[0])
    names = list(results[0]) if form is dict else [str(i) for i in range(len(results[0]))] if form is tuple else ["0"]
    columns = (
        zip(*(r.values() if form is dict else r for r in results), strict=True) if form in (dict, tuple) else [results]
    )
    try:
        arrays = [as_array(list(values)) for values in columns]
    except (ValueError, OverflowError) as error:  # pyarrow's errors are of these types
        raise TypeError(f"no Arrow column takes these results: {error}") from error
    batch = pa.RecordBatch.from_arrays(arrays, names).replace_schema_metadata({"form": form.__name__})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def as_array(values: list) -> pa.Array:
    try:
        return pa.array(values, leaf_type(values))
    except (TypeError, ValueError, OverflowError):  # numbers above 32 bits, or other things
        return pa.array(values)


def leaf_type(values: list) -> pa.DataType | None:
    """Type of a column by the first number in it; None without one."""
    for value in values:
        if not isinstance(value, list):
            return LEAVES.get(type(value))
        if (inner := leaf_type(value)) is not None:
            return pa.list_(inner)
    return None


def unpack(part: pa.Buffer) -> list:
    """Results of `pack`."""
    if not part.size:
        return []
    batch = pa.ipc.open_stream(part).read_next_batch()
    form, names = batch.schema.metadata[b"form"], batch.schema.names
    columns = [[read(i) for i in range(batch.num_rows)] for read in map(column_reader, batch.columns)]
    if form == b"dict":
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return list(zip(*columns, strict=True)) if form == b"tuple" else columns[0]


def gather_bytes(accelerator, own: pa.Buffer) -> list[pa.Buffer]:
    """What each rank has, on all of them; padded to the longest on the way."""
    sizes = accelerator.gather(torch.tensor([own.size], device=accelerator.device)).tolist()
    padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8)
    if own.size:
        padded[: own.size] = torch.frombuffer(own, dtype=torch.uint8)
    every = accelerator.gather(padded.to(accelerator.device)).view(len(sizes), -1).cpu().numpy()
    return [pa.py_buffer(row[:size]) for row, size in zip(every, sizes, strict=True)]
