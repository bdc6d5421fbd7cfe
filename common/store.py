"""Files of a run: each is whole or absent. JSON, Parquet rows, metrics, and folders with a manifest."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
from pathlib import Path

from common import UserError


def without_nan(row: dict) -> dict:
    """The row with None, null in JSON, for numbers that are not finite: JSON has no NaN, and other readers refuse it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl, NaN where it holds null. UserError, naming the line, if one cannot be read."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append({k: math.nan if v is None else v for k, v in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise UserError(
                f"{path} line {number}: found {line[:40]!r}, expected a row of metrics; remove it"
            ) from None
    return rows


def new_directory(path: Path) -> Path:
    """Make the folder of that name; with a number behind it if that is there already, as of a run of the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            name.mkdir()
            return name
    raise FileExistsError(f"{path} and 998 more of that name are there")


def untouched(folder: Path) -> bool:
    """True if a folder is empty, or holds no more than a run leaves that failed before it had anything."""
    found = {p.name: p for p in folder.iterdir()}
    made = {"args.json", ".lock", "trained_prompts.parquet", "samples", "evals", "generations", "checkpoint"}
    ours = ".lock" in found and found.keys() <= made
    return not found or (ours and not any(any(p.iterdir()) for p in found.values() if p.is_dir()))


def lock(folder: Path):
    """A file that keeps other processes out of the folder while it is open; the kernel closes it with this process.

    UserError if another process has it open.
    """
    handle = open(folder / ".lock", "a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise UserError(
            f"{folder} is in use by process {handle.read().strip() or 'unknown'}; expected that it has ended"
        ) from None
    except OSError:  # a network file system that has no locks: the user must take care
        return handle
    handle.truncate(0)
    print(f"{os.getpid()} on {socket.gethostname()}", file=handle, flush=True)
    return handle


def write_json(path: Path, value) -> None:
    """Atomically: temporary name, fsync, rename."""
    partial = path.with_name(f".partial_{path.name}")
    with open(partial, "w") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of every file below, all synced to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    for path in files:
        sync_path(path)
    manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    write_json(folder / "manifest.json", manifest)


def broken_seal(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None: file missing, cut short, or changed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return "manifest.json missing or unreadable"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if digest(path) != entry["sha256"]:
            return f"{name} differs from its checksum"
    return None


# ---- the cache ----
def cache_folder() -> Path:
    """$CLEANIRL_CACHE, else cleanirl/ in the user's cache folder."""
    base = os.environ.get("CLEANIRL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanirl"


def as_messages(prompt) -> list[dict]:
    """A prompt as messages: a text is one user turn."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


# ---- stored rows ----
def write_pairs(path: Path, rows: list[dict]) -> None:
    """Parquet, atomically: temporary name, fsync, rename. Where some prompts are messages, all are: a column has one type."""
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


def read_pairs(path: Path) -> list[dict]:
    """Rows of a Parquet file. BrokenFile, in one line, if it is not whole."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        reason = " ".join(str(error).split())[:160]
        raise BrokenFile(
            f"{path}: found no readable Parquet ({reason}); if a run wrote it, delete it and --resume the run: it makes the file"
            " again, or says that it cannot"
        ) from None
