"""--resume: find the newest checkpoint that is whole, and load it."""

import json
import os
from pathlib import Path

from common import UserError
from common.checkpoint import checkpoints
from common.store import digest


def load_checkpoint(run) -> dict | None:
    """Load the newest checkpoint that is whole; name and skip those that are not. Returns its position.

    The run goes on from there, and metrics.jsonl is cut back to it. Returns None if there is nothing to resume. Raises
    UserError if checkpoints exist and none is whole, or if the newest whole one does not fit this launch (read_checkpoint).
    """
    run.accelerator.wait_for_everyone()
    path = newest_whole(run)
    if path is None:
        return None
    run.position = read_checkpoint(run, path)
    run.print(f"resumed from {path}")
    run.saved, run.last_step = str(run.position), run.position["step"]
    return run.position


def newest_whole(run) -> Path | None:
    """Find the newest checkpoint that is whole; name those that are not. None, without metrics.jsonl, if none was written.

    Raises UserError if checkpoints exist and none is whole.
    """
    found = checkpoints(run)
    for path in reversed(found):
        if problem := shared_problem(run, path):
            run.print(f"checkpoint {path.name} is damaged ({problem}); trying the one before it")
            continue
        return path
    if found:
        raise UserError(f"--resume: none of the {len(found)} checkpoints in {run.dir / 'checkpoint'} is whole")
    if run.is_main:
        (run.dir / "metrics.jsonl").unlink(missing_ok=True)
    return None


def read_checkpoint(run, path: Path) -> dict:
    """Load the checkpoint and return its position. Cut metrics.jsonl back to it.

    Raises UserError if another engine wrote it, or ZeRO on another number of processes, for which the state of its
    optimizer is cut up; if its optimizers have other groups of parameters; if rows of metrics.jsonl are lost.
    """
    position = json.loads((path / "position.json").read_text())
    size, fresh = position.pop("metrics_bytes"), position.pop("fresh_optimizers", [])
    engine, processes = position.pop("engine", "plain"), position.pop("processes", run.world)
    if engine != run.engine.name or (engine.startswith("zero") and processes != run.world):
        raise UserError(
            f"--resume: found {path.name} of {engine} on {processes} process(es), but this is {run.engine.name} on"
            f" {run.world}; expected the same engine, and with ZeRO the same --num_processes"
        )
    # a checkpoint of adapters lacks weights that are loaded already; other engines keep all of them
    options = {"strict": False} if run.args.lora_r and engine == "plain" else {}
    try:
        run.engine.load_state(str(path), fresh, **options)
    except ValueError as error:
        raise UserError(
            f"--resume: found {path.name}, which another version wrote ({error}); expected a checkpoint of this one"
        ) from error
    cut_metrics(run, path, size)
    return position


def cut_metrics(run, path: Path, size: int) -> None:
    """Cut metrics.jsonl back to the bytes that it had at a checkpoint. Raises UserError if rows are lost."""
    metrics = run.dir / "metrics.jsonl"
    if run.is_main and metrics.exists():
        if metrics.stat().st_size < size:
            raise UserError(
                f"--resume: found {metrics} of {metrics.stat().st_size} bytes, expected {size} at {path.name}: rows are"
                " lost; put it back, or delete it to go on without them"
            )
        os.truncate(metrics, size)


def shared_problem(run, folder: Path) -> str | None:
    """manifest_problem, the same on all ranks: each reads its part of the files, so that every file is read once."""
    found = [manifest_problem(folder, run.rank, run.world)]
    if run.world > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    return next(filter(None, found), None)


def manifest_problem(folder: Path, first: int = 0, step: int = 1) -> str | None:
    """The fault of a folder that store.write_manifest has listed, or None: a file is missing, cut short, or changed.

    first, step: which of the listed files to look at, by default all.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return "manifest.json missing or unreadable"
    for name, entry in list(manifest.items())[first::step]:
        path = folder / name
        if not path.is_file():
            return f"{name} missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if digest(path) != entry["sha256"]:
            return f"{name} differs from its checksum"
    return None
