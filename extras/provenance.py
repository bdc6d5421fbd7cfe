"""Digests of a run's data and models. args.json keeps them, and --resume compares them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import tiny
from common import UserError
from common.args import flag
from common.store import digest
from extras.hub_names import cached_commit, hub_name
from extras.loading import resolve_model
from extras.mixture import names_of


def environment() -> dict:
    """Versions and commit, for args.json."""
    from importlib.metadata import version

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "versions": {"python": sys.version.split()[0], **{n: version(n) for n in names}},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv,
    }


DATA_FLAGS = ("dataset", "preference_dataset", "eval_dataset", "eval_preference_dataset")
MODEL_FLAGS = ("model", "reward_model", "expert_model", "ref_model", "gold_reward_model", "baseline")
DATA_FILES = (".json", ".jsonl", ".parquet", ".arrow", ".gz", ".zst")
WHOLE = 1 << 25  # bytes up to which a model's file is read whole
BLOCK, BLOCKS = 1 << 12, 1 << 9  # bytes of a block, and blocks that are read of a larger file


def digests(args) -> dict[str, str]:
    """{flag: digest of the content that it names}; a source on the hub has its commit, where it is known."""
    given = {name: getattr(args, name, "") for name in (*DATA_FLAGS, *MODEL_FLAGS)}
    found = {name: data_digest(given[name]) for name in DATA_FLAGS if given[name] not in ("", "auto", "none")}
    found |= {name: model_digest(given[name]) for name in MODEL_FLAGS if given[name]}
    return {name: value for name, value in found.items() if value}


def changed_inputs(args, saved: dict) -> None:
    """UserError if a flag of the run whose args.json holds `saved` names other content now."""
    before, now = saved.get("inputs"), digests(args)
    if not isinstance(before, dict):  # an older version's
        return
    changed = [f"{flag(n)} {getattr(args, n)}" for n in now if before.get(n, now[n]) != now[n]]
    if changed:
        raise UserError(
            f"--resume: found other content in {' and '.join(changed)} than when the run in {args.resume} began; expected"
            " the same: put it back, or start a new run"
        )


def data_digest(given: str) -> str:
    """Digest of the source that a data flag names, or of all that it names."""
    names = names_of(given)
    return source_digest(given) if len(names) == 1 else joined({name: source_digest(name) for name in names})


def source_digest(name: str) -> str:
    """Digest all bytes of a data file, or of the data files of a folder; a hub set has its commit, where it is known."""
    path = Path(name)
    if path.is_file():
        return digest(path)
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.suffix in DATA_FILES and not p.name.startswith("cache-"))
        return joined({str(p.relative_to(path)): digest(p) for p in files if p.is_file()})
    if name == "pydoc":
        return digest(tiny.DATA)
    hub = hub_name(name)
    return cached_commit("datasets", hub.id, hub.revision or "main")


def model_digest(name: str) -> str:
    """Digest a model's files: all bytes of small ones; the size, the names and shapes, and sampled bytes of weights."""
    path = Path(resolve_model(name))
    if not path.is_dir():
        return cached_commit("models", str(path))
    files = (p for p in path.iterdir() if p.is_file() and p.suffix != ".md" and not p.name.startswith("."))
    return joined({p.name: sampled_digest(p) for p in files})


def sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE:
        return digest(path)
    content = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        if path.suffix == ".safetensors":
            begin = f.read(8)
            content.update(begin + f.read(min(int.from_bytes(begin, "little"), WHOLE)))
        for i in range(BLOCKS):
            f.seek(i * (size - BLOCK) // (BLOCKS - 1))
            content.update(f.read(BLOCK))
    return content.hexdigest()


def joined(files: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
