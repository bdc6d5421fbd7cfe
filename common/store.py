"""Files of a run: JSON, Parquet rows, metrics, and folders with a manifest. Each file is whole or absent."""

import hashlib
import json
import math
import os
from pathlib import Path

from common import UserError


def without_nan(row: dict) -> dict:
    """The row with None, null in JSON, for numbers that are not finite: JSON has no NaN, and other readers refuse it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl, NaN where it holds null. Raises UserError, naming the line, if one cannot be read."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append({k: math.nan if v is None else v for k, v in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise UserError(
                f"{path} line {number}: found {line[:40]!r}, expected a row of metrics; remove it"
            ) from None
    return rows


def write_json(path: Path, value) -> None:
    """Write JSON atomically: temporary name, fsync, rename."""
    partial = path.with_name(f".partial_{path.name}")
    with open(partial, "w") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def sync_path(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of every file below, all synced to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    for path in files:
        sync_path(path)
    manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    write_json(folder / "manifest.json", manifest)


def as_messages(prompt) -> list[dict]:
    """A prompt as messages: a text is one user turn."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


# ---- stored rows ----
def write_pairs(path: Path, rows: list[dict]) -> None:
    """Write rows to Parquet atomically. If some prompts are messages, all become messages: a column has one type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if any(isinstance(row.get("prompt"), list) for row in rows):
        rows = [{**row, "prompt": as_messages(row["prompt"])} for row in rows]
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    with open(partial, "wb") as f:
        pq.write_table(pa.Table.from_pylist(rows), f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


class BrokenFile(UserError, ValueError):
    """A Parquet file that cannot be read."""


def read_pairs(path: Path, lazy: bool = True) -> list:
    """Rows of a Parquet file: dicts, or of a large one, if lazy, Rows of extras/arrow_rows.py. BrokenFile if it is not whole."""
    from extras.arrow_rows import read_parquet

    try:
        return read_parquet(path, lazy)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        reason = " ".join(str(error).split())[:160]
        raise BrokenFile(
            f"{path}: found no readable Parquet ({reason}); if a run wrote it, delete it and --resume the run: it makes the file"
            " again, or says that it cannot"
        ) from None
