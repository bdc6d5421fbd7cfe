"""Encoded rows of a large source, kept in the cache folder: made once for all processes and all later starts."""

import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa

from common.store import digest
from extras.arrow_rows import FORMAT, JSON, kept
from extras.cache import cache_folder
from extras.hub_names import hub_name
from extras.lazy import is_large, size_of
from extras.provenance import source_digest
from extras.sources import Source, looks_like_path, open_hub

TEXT, IDS = pa.large_string(), pa.list_(pa.int32())
SCHEMA = pa.schema(
    [("row", pa.int64()), pa.field("prompt", TEXT, metadata=JSON), ("prompt_ids", IDS), ("prompt_text", TEXT)]
    + [(f"{name}_{part}", kind) for name in ("response", "rejected") for part, kind in
       (("text", TEXT), ("ids", IDS), ("finished", pa.bool_()))]
)  # fmt: skip
CODE = (
    *("common/data.py", "common/demos.py", "extras/arrow_rows.py", "extras/columns.py", "extras/encoded.py"),
    *(
        "extras/hub_names.py",
        "extras/lazy.py",
        "extras/left_out.py",
        "extras/mixture.py",
        "extras/packed.py",
        "extras/retokenise.py",
    ),
    *("extras/sources.py", "extras/templates.py"),
)  # that makes the rows


def encode_source(source: Source, tokenizer, encode: Callable, make: Callable, **settings) -> list:
    """Rows of data.encode: a list made by make(None) for a small source; for a large one Rows from the cache folder.

    make(into) appends the encoded rows to `into`. encode: the function it calls. settings: all other things that the rows
    depend on, as JSON takes them. Their file is rows-<digest of everything>.arrow.
    """
    if not (content := content_of(source)):
        return make(None)
    key = cache_key(source, content, tokenizer, encode, settings)
    path = cache_folder() / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"

    def make_and_say(into) -> None:
        print(f"  {source.flag}: tokens of {source.name} are made once, for {path}", file=sys.stderr, flush=True)
        make(into)

    return kept(path, key, make_and_say, SCHEMA, sparse=True)


def content_of(source: Source) -> str:
    """Identity of what a large source holds; empty for a small one or a stream, whose rows are read anew at every start."""
    path = Path(source.name)
    if path.exists():
        return source_digest(source.name) if is_large(size_of(path)) else ""
    if source.name == "pydoc" or looks_like_path(source.name) or hub_name(source.name).streamed:
        return ""
    sets = open_hub(source.name, source.split, source.flag)[0]
    return " ".join(own._fingerprint for own in sets) if is_large(sum(own.data.nbytes for own in sets)) else ""


def cache_key(source: Source, content: str, tokenizer, encode: Callable, settings: dict) -> str:
    """Everything that encoded rows and their warnings depend on, as JSON: data, tokenizer, settings, code and libraries."""
    where = {**vars(source), "taken": sorted(source.taken)}
    root = Path(__file__).parent.parent
    code = [digest(path) for path in (*(root / name for name in CODE), Path(inspect.getfile(encode)))]
    made_by = {
        "format": FORMAT,
        "source": hashlib.sha256(json.dumps([where, content]).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": settings,
        "code": [*code, encode.__qualname__],
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2", "datasets")],
    }
    return json.dumps(made_by, sort_keys=True)


def tokenizer_digest(tokenizer) -> str:
    """Digest of the files that the tokenizer is saved as, its chat template among them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        named = [[str(p.relative_to(folder)), digest(p)] for p in files]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, named]).encode()).hexdigest()
