"""A script and its terminal: what Ctrl-C and other signals do, and output streams that close or whose disk is full.

Scripts call `catch` before they import torch, so that a signal during the imports ends in one line too. It imports nothing slow.
"""

import errno
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from common import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
asked = 0  # signal by which the run was asked to stop; 0 before
hint = ""  # how to continue the run of this process; empty until it can be continued
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
    """The error by which printed text was lost; None if nothing was lost, or if the reader closed the pipe, as head does."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    lost = getattr(raw, "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else lost


def one_line_warning(message, category, filename, lineno, line=None) -> str:
    """Replacement of warnings.formatwarning: the message without a source line, from rank 0 alone."""
    return f"warning: {' '.join(str(message).split())}\n" if os.environ.get("RANK", "0") == "0" else ""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NOT_DETERMINISTIC = "does not have a deterministic implementation"  # torch, of an operation under --deterministic
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")


def report_failure(error: Exception) -> int:
    """Print what ended a script and return its exit status. Raise an error that is not the user's again, with a note."""
    if isinstance(error, UserError):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # rank 0 has most likely found the same, and the launcher then ends this process
        print("error: " + str(error).replace("\n", " "), file=sys.stderr, flush=True)
        return 2
    if NOT_DETERMINISTIC in str(error):
        operation = str(error).partition(NOT_DETERMINISTIC)[0].split()[-1]
        expected = "operations that torch can do deterministically: leave the flag out"
        return report_failure(UserError(f"--deterministic: found {operation}, expected {expected}"))
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


def run(script_main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit status 2, a warning one line of rank 0.

    A signal ends it with one line and status 128 + its number (on_signal). If an output stream is closed, or its disk
    is full, the script goes on and only what is printed is lost; a full disk gives status 1 at the end.
    """
    catch()
    be_patient()
    shown, warnings.formatwarning = warnings.formatwarning, one_line_warning
    status: int | str | None = 0
    try:
        try:
            script_main()
        except Exception as error:
            status = report_failure(error)
        else:
            if lost := lost_output():
                print(f"error: stdout: {lost}; what was printed is lost, nothing else is", file=sys.stderr)
                status = 1
    except SystemExit as stop:
        status = stop.code
    finally:
        warnings.formatwarning = shown
    if "RANK" in os.environ:
        leave_ranks(status)
    if status:
        sys.exit(status)


def leave_ranks(status: int | str | None) -> None:
    """End a process of a launcher at once: everything is saved, and after a failure the launcher ends the other ranks.

    If the interpreter took itself down first, a thread of gloo could still hold a tensor and abort a run that had finished
    (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


# ---- a run that is told to stop ----
def on_signal(run, number: int, _=None) -> None:
    """Leave the stop to run.stop_if_asked in a phase that changes weights; elsewhere stop at once.

    A launcher passes a signal on to its processes, which have had it already: a second one within 10 s is the same.
    """
    global asked
    if not run.in_updates or (run.stop_requested and time.time() - run.stop_requested > 10):
        stop(run, number)
    if not run.stop_requested and run.is_main and sys.stderr.isatty():
        tell(f"{signal.Signals(number).name}: stopping after this update", 2)
    run.stop_requested, run.stop_signal = run.stop_requested or time.time(), run.stop_signal or number
    asked = number


def stop(run, number: int) -> None:
    """Say on rank 0 how to continue the run, and end the process with status 128 + the signal's number."""
    if run.is_main:
        tell(f"{signal.Signals(number).name}: stopped{hint and f';{hint}'}", 1)
    leave(number)
