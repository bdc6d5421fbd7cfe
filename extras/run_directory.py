"""The directory of a run: made or opened again, held against other processes, and refused if it holds another run."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from common import UserError
from common.store import write_json
from extras import terminal
from extras.provenance import changed_inputs, digests, environment


def open_directory(run) -> None:
    """Set run.dir on all ranks. Rank 0 makes the directory, or opens it with --resume; an error is raised on all of them."""
    from accelerate.utils import broadcast_object_list

    problem = None
    if run.is_main:
        try:
            make_directory(run)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            name = "--resume" if run.args.resume else "--output-dir"
            problem = f"{name}: {run.dir} could not be opened: {error}; expected a folder that can be written"
    problem, folder = broadcast_object_list([problem, str(run.dir)])
    if problem:
        raise UserError(problem)
    run.dir = Path(folder)


def make_directory(run) -> None:
    """Rank 0's part of open_directory. Raises UserError or OSError."""
    args = run.args
    if args.output_dir == "auto" and not args.resume:
        run.dir = new_directory(Path("runs") / f"{run.script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    used = f"--output-dir: {run.dir} already holds files; expected a new or empty folder"
    used += f", or --resume {run.dir}" if run.can_resume else ""
    if not args.resume and run.dir.exists() and not untouched(run.dir):
        raise UserError(used)
    run.dir.mkdir(parents=True, exist_ok=True)
    run.lock = lock(run.dir)
    if args.resume:
        changed_inputs(args, json.loads((run.dir / "args.json").read_text()))
    elif not untouched(run.dir):  # another process was faster
        raise UserError(used)
    for name in ("samples", "evals", *(("generations", "checkpoint") if run.can_resume else ())):
        (run.dir / name).mkdir(parents=True, exist_ok=True)
    if not args.resume:
        made_by = {"script": run.script, "args": dataclasses.asdict(args), "inputs": digests(args)}
        write_json(run.dir / "args.json", {**made_by, **environment()})
    if run.can_resume:
        terminal.hint = f" continue with --resume {run.dir}"


def new_directory(path: Path) -> Path:
    """Make the folder of that name. If it is there already, because a run began in the same second, add a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            name.mkdir()
            return name
    raise FileExistsError(f"{path} and 998 more of that name are there")


def untouched(folder: Path) -> bool:
    """True if a folder is empty, or holds no more than what a run leaves if it fails at its start."""
    found = {p.name: p for p in folder.iterdir()}
    made = {"args.json", ".lock", "trained_prompts.parquet", "samples", "evals", "generations", "checkpoint"}
    ours = ".lock" in found and found.keys() <= made
    return not found or (ours and not any(any(p.iterdir()) for p in found.values() if p.is_dir()))


def lock(folder: Path):
    """Return an open file that keeps other processes out of the folder; the kernel closes it with this process.

    Raises UserError if another process has it open.
    """
    handle = open(folder / ".lock", "a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise UserError(
            f"{folder} is in use by process {handle.read().strip() or 'unknown'}; expected that it has ended"
        ) from None
    except OSError:  # a network file system without locks: the user must take care
        return handle
    handle.truncate(0)
    print(f"{os.getpid()} on {socket.gethostname()}", file=handle, flush=True)
    return handle
