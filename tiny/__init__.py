"""The embedded data and model: what every script runs on without a flag, a download or a wait.

pydoc.parquet holds definitions of Python's standard library with their docstrings, model/ a small GPT-NeoX trained on them.
make.py made both, once; README.md says from what and how.
"""

import functools
from pathlib import Path

FOLDER = Path(__file__).parent
DATA = FOLDER / "pydoc.parquet"
MODEL = FOLDER / "model"


@functools.cache
def stored_rows(path: Path) -> list[dict]:
    """Rows of pydoc.parquet. A run asks for them several times: to train on, to measure on, to know what --model has seen."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def pydoc_rows(kind: str) -> list[tuple[bool, dict]]:
    """[(held out?, row)] of the embedded data; a row's id is its place in the file.

    kind demonstrations: {row, prompt, response}. kind preferences: {row, prompt, chosen, rejected}: the definition's own
    summary is chosen over that of the next documented one of the same module, which is of the same author and subject.
    Modules with one summary have no preference.
    """
    rows = list(enumerate(stored_rows(DATA)))
    if kind == "preferences":
        columns = {"prompt": "prompt", "chosen": "response", "rejected": "next_response"}
        rows = [(i, r) for i, r in rows if r["next_response"]]
    else:
        columns = {"prompt": "prompt", "response": "response"}
    return [(r["test"], {"row": i} | {name: r[column] for name, column in columns.items()}) for i, r in rows]


def is_tiny(name: str) -> bool:
    """True if a name means the embedded model: `tiny`, unless another local folder has that name."""
    return name == "tiny" and (not Path(name).is_dir() or Path(name).samefile(FOLDER))
