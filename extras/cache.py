"""Values that are computed once for all runs of this machine: Parquet files by key in the user's cache folder."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from common.engine import all_weights
from common.store import read_pairs, write_pairs


def cache_folder() -> Path:
    """$CLEANIRL_CACHE, else cleanirl/ in the user's cache folder."""
    base = os.environ.get("CLEANIRL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanirl"


def cached(run, path: Path, keys: list[str], work: Callable, name: str, block: int = 4096) -> list:
    """A value per key: from the Parquet file, else by work(indices, advance) in all ranks together.

    path: file of the cache. keys: one for each item. name: of the phase. block: items after which the file is written again,
    so that a run that is cut off loses one block at most.
    """
    from accelerate.utils import broadcast_object_list

    stored = {r["key"]: r["value"] for r in read_pairs(path)} if run.is_main and path.exists() else {}
    (known,) = broadcast_object_list([stored])
    missing = [i for i, key in enumerate(keys) if key not in known]
    with run.phase(name, len(missing), step=0) as advance:
        for start in range(0, len(missing), block):
            part = missing[start : start + block]
            known |= dict(zip((keys[i] for i in part), work(part, advance), strict=True))
            if run.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_pairs(path, [{"key": k, "value": v} for k, v in known.items()])
    return [known[key] for key in keys]


def weights_digest(run, model) -> str:
    """Return the SHA-256 of names, types and values of a prepared model's weights and buffers. All ranks get rank 0's."""
    from accelerate.utils import broadcast_object_list

    digest = hashlib.sha256()
    with all_weights(run.unwrap(model), cast=False) as view:
        for name, tensor in sorted(view.state_dict().items()) if run.is_main else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return broadcast_object_list([digest.hexdigest()])[0]
