"""JSON files that are packed by gzip or Zstandard: x.jsonl.gz, x.json.zst."""

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

PACKED = (".gz", ".zst")
RATIO = 5  # bytes of JSON text for a packed byte, about: it decides if a file is large
BROKEN = (OSError, EOFError, zlib.error)  # what reading a damaged packed file raises


def kind_of(path: Path) -> str:
    """Suffix that says what a file holds: that before .gz or .zst where these follow .json or .jsonl."""
    inner = Path(path.stem).suffix if path.suffix in PACKED else ""
    return inner if inner in (".json", ".jsonl") else path.suffix


def is_packed(path: Path) -> bool:
    return kind_of(path) != path.suffix


def bytes_of(path: Path) -> int:
    """Bytes of a file, or about those that a packed one holds."""
    return path.stat().st_size * (RATIO if is_packed(path) else 1)


def open_plain(path: Path) -> IO[bytes]:
    """The bytes of a file. A packed one is unpacked first, to a file without a name in the cache folder."""
    if not is_packed(path):
        return open(path, "rb")
    from extras.cache import cache_folder

    cache_folder().mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=cache_folder())
    with open_packed(path) as source:
        shutil.copyfileobj(source, file, 1 << 20)
    file.seek(0)
    return file


def open_packed(path: Path) -> Any:
    """The unpacked bytes of a packed file, as a file that can be read once."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else pa.input_stream(str(path), compression="zstd")


def read_text(path: Path) -> str:
    """The text of a file, packed or not. ValueError for what is not UTF-8; one of BROKEN for a damaged packed file."""
    if not is_packed(path):
        return path.read_text(encoding="utf-8-sig")
    with open_packed(path) as file:
        return file.read().decode("utf-8-sig")
