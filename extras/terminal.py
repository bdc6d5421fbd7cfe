"""A script and its terminal: what Ctrl-C and other signals do, and output streams that close or whose disk is full.

Scripts import it before torch, so that a signal during the imports ends in one line too. It imports nothing slow.
"""

import contextlib
import errno
import functools
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from common import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
asked = 0  # the signal that a run has been asked to stop by, once it has
hint = ""  # how to continue the run of this process, once it can be continued
PATIENCE = 5.0  # seconds in which a script that was told to stop must have ended


def catch(handler: Callable | int | None = None) -> None:
    """Call handler(number, frame) on Ctrl-C, SIGTERM and SIGHUP; unless given, it ends the process with one line.

    A signal that the shell has told the process to ignore, as nohup does with SIGHUP, stays ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler or stop_before_start)


def stop_before_start(number: int, _) -> None:
    """No run has begun that could be continued: end at once."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"{signal.Signals(number).name}: stopped", 2)
    os._exit(128 + number)


def tell(text: str, stream: int) -> None:
    """Write a line past the buffers of Python, which a signal handler may have interrupted."""
    for handle in dict.fromkeys((stream, 2)):
        try:
            os.write(handle, f"{text}\n".encode())
            return
        except OSError:  # closed, or its disk is full
            continue


def leave(number: int) -> None:
    """End the script with status 128 + the signal's number: SystemExit, and by force where something holds that up."""
    for other in SIGNALS:  # one that is passed on by a launcher comes again
        signal.signal(other, signal.SIG_IGN)
    timer = threading.Timer(PATIENCE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
    sys.exit(128 + number)


class PatientFile(io.FileIO):
    """A stream to write to that outlives its reader: what can no longer be written is dropped, and the script goes on."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            return len(data)


def be_patient() -> None:
    """Make stdout and stderr patient; one that the script was started without becomes the null device."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__"):  # else a test or a notebook has put its own there
            raw = PatientFile(stream.fileno(), "wb", closefd=False)
            try:
                stream.flush()
            except OSError as error:
                raw.lost = error
            patient = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, patient)


def lost_output() -> OSError | None:
    """Why something printed to stdout was lost; None if nothing was, or if its reader had gone away, as head does."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    lost = getattr(raw, "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else lost


def one_line_warning(message, category, filename, lineno, line=None) -> str:
    """warnings.formatwarning for users: what is said, without our source line, once for all ranks."""
    return f"warning: {' '.join(str(message).split())}\n" if os.environ.get("RANK", "0") == "0" else ""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")


def report_failure(error: Exception) -> int:
    """Say what ended a script -> its exit status. An error that is not the user's is raised again, with what is saved in it."""
    if isinstance(error, UserError):
        print("error: " + str(error).replace("\n", " "), file=sys.stderr, flush=True)
        return 2
    if asked:  # another rank, or vLLM's process, has followed the signal and was missed
        name, rank = signal.Signals(asked).name, os.environ.get("RANK", "0")
        if rank == "0":
            tell(f"{name}: stopped ({type(error).__name__} on the way){hint and f';{hint}'}", 1)
        return 128 + asked
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        after = hint and f"; free space, then{hint}"
        print(f"error: {error}{after}", file=sys.stderr, flush=True)
        return 2
    if "RANK" not in os.environ:
        if hint:
            error.add_note(f"What is saved is kept;{hint}")
        raise error
    rank = os.environ["RANK"]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in str(error) for word in PEER_ENDED):
        time.sleep(1)  # a signal to all ranks may be on its way to this one
        reason = " ".join(str(error).split())[:120]
        print(f"rank {rank} lost another rank, whose message says why ({reason})", file=sys.stderr, flush=True)
        return 1
    traceback.print_exception(error)
    print(
        f"rank {rank} failed: {type(error).__name__}: {error}. What is saved is kept;{hint}",
        file=sys.stderr,
        flush=True,
    )
    return 1


@contextlib.contextmanager
def progress(phase: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with ETA on a terminal, a line every 15 s elsewhere. Yields advance(n)."""
    from rich import progress as bars

    if show and sys.stderr.isatty():
        from rich.console import Console

        columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()]
        columns += [bars.TimeElapsedColumn(), bars.TextColumn("ETA"), bars.TimeRemainingColumn()]
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(phase, total=total)
            yield functools.partial(bar.advance, task)
        return
    done, started, spoken = 0, time.time(), time.time()

    def advance(n: int = 1) -> None:
        nonlocal done, spoken
        done += n
        if show and time.time() - spoken > 15:
            spoken = time.time()
            eta = (spoken - started) * (total - done) / max(done, 1)
            print(f"  {phase}: {done}/{total}, ETA {eta:.0f} s", file=sys.stderr, flush=True)

    yield advance
