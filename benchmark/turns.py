"""Processes that are measured take turns: one works when its parent says so, and is idle while another one works.

The child's standard output carries JSON lines alone; what libraries print goes to standard error.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class Clock:
    """Time since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """By the clock, and summed over all threads of the process, which other processes on the machine hardly change."""
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


class Turns:
    """The side of the child."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def report(self, **row) -> None:
        print(json.dumps(row), file=self.out, flush=True)

    def wait(self) -> bool:
        """Wait for the next turn. False if there is none."""
        return bool(sys.stdin.readline())


class Child:
    """The side of the parent: a started process. What it prints beside its JSON lines goes to the file `log`."""

    def __init__(self, words: list[str], log: Path, env: dict[str, str]):
        self.words, self.log = words, log
        with open(log, "w") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=env)

    def row(self) -> dict:
        """Return the next JSON line. RuntimeError with the end of the log if the process has ended without one."""
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            end = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"found exit status {status} of {' '.join(self.words)}: {' / '.join(end)}")
        return json.loads(line)

    def turn(self) -> dict:
        """Let the process work for one turn, and return its JSON line."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.row()

    def end(self) -> None:
        """Close the pipes, after which the process ends by itself; one that does not is killed."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()
