"""A script and its terminal: what Ctrl-C and other signals do, and output streams that close or whose disk is full.

Scripts import it before torch, so that a signal during the imports ends in one line too. It imports nothing slow.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
asked = 0  # the signal that a run has been asked to stop by, once it has
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

    def write(self, data) -> int | None:
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
