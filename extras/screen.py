"""The live line of a run: phase k of n, loss or score, tokens a second, time left of the phase and of the run, memory of a GPU.

A terminal has one line that is drawn again four times a second by a thread. Elsewhere a plain line is printed every 15 s.
Nothing here reads a tensor, so no training step waits for the device.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from extras.schedule import Schedule

SECONDS_BETWEEN_LINES = 15  # where stderr is no terminal
REFRESH = 4  # times a second, on a terminal
SHOWN = {  # metric -> its name in the line; of several with one name the first is shown
    "loss": "loss",
    "sft/loss": "loss",
    "reward/loss": "loss",
    "policy/loss": "loss",
    "objective/scores": "score",
    "objective/kl": "KL",
    "rewards/margins": "margin",
    "reward/margin": "margin",
    "demonstrations/margin": "margin",
    "eval/return": "return",
}


@dataclass
class Phase:
    """A phase that is going on: what is done of it, and what its line shows."""

    name: str
    total: int
    place: str = ""  # "3/11", or empty for a phase that the schedule does not name
    done: int = 0
    skipped: int = 0  # of these, what a resumed run had done before: it took no time here
    tokens: int = 0
    values: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=lambda: time.monotonic())
    ended: float | None = None

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started


# ---- what is shown ----
def short(value: float) -> str:
    """A count in three digits: 873, 5.12k, 1.3M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours and days where there are any: 0:07, 12:30, 3:05:00, 2d 4h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gpu_memory() -> str:
    """Memory that torch holds on this process's GPU and the whole of it; empty without one. Both are known to the host."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"GPU {torch.cuda.memory_reserved() / 2**30:.1f}/{whole / 2**30:.0f} GB"


def parts_of(phase: Phase, left: tuple[float | None, float | None], memory: str) -> dict[str, int]:
    """{what a line says after the phase's name: its rank}; the higher a rank, the sooner it goes where room is short.

    left: seconds of the phase, and of the run.
    """
    parts = {f"{name} {value:.3g}": 1 if i == 0 else 2 + i for i, (name, value) in enumerate(phase.values.items())}
    if phase.tokens:
        parts[f"{short(phase.tokens / max(phase.seconds, 1e-3))} tok/s"] = 2
    if phase.ended is not None:
        return parts | {f"took {clock(phase.seconds)}": 0}
    of_phase, of_run = left
    eta = f"ETA {clock(of_phase)}" if of_phase is not None else f"{clock(phase.seconds)} so far"
    parts[eta + (f", run {clock(of_run)}" if of_run is not None else "")] = 0
    return parts | ({memory: 9} if memory else {})


def line(phase: Phase, left: tuple[float | None, float | None], width: int, memory: str = "") -> str:
    """The line of a phase, at most `width` columns: with a bar if there is room, else without the least important parts."""
    head = f"{phase.place} {phase.name} {phase.done}/{phase.total}".strip()
    parts = parts_of(phase, left, memory)
    while len(parts) > 1 and len(" ".join([head, *parts])) > width:
        del parts[max(parts, key=lambda part: parts[part])]
    space = "  " if len("  ".join([head, *parts])) <= width else " "
    text = space.join([head, *parts])
    room = min(width - len(text) - 2, 30)
    if room >= 8 and phase.total:
        filled = round(room * min(phase.done / phase.total, 1))
        text = "  ".join([head, "━" * filled + "─" * (room - filled), *parts])
    return text if len(text) <= width else text[: width - 1] + "…"


# ---- the phases of this process ----
class Screen:
    """The phases that are going on, the outer one first, and what shows them."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.schedule = Schedule([])
        self.trained: dict | None = None  # a row of the last update
        self.live: Any = None  # rich's Live while a terminal shows the lines
        self.visible = False
        self.spoken = time.monotonic()
        self.lock = threading.RLock()

    def left(self, phase: Phase) -> tuple[float | None, float | None]:
        skipped = phase.skipped
        return self.schedule.left(phase.name, phase.done - skipped, phase.total - skipped, phase.seconds)

    def text(self, width: int) -> str:
        """One line for each phase that is going on: an evaluation in the middle of training has its own below."""
        memory = gpu_memory()
        return "\n".join(line(phase, self.left(phase), width, memory) for phase in list(self.phases))

    def speak(self) -> None:
        """Without a terminal: a line for the inner phase, if the last one is 15 s old."""
        if self.live is None and self.visible and time.monotonic() - self.spoken > SECONDS_BETWEEN_LINES:
            self.spoken, phase = time.monotonic(), self.phases[-1]
            said = ", ".join([f"{phase.done}/{phase.total}", *parts_of(phase, self.left(phase), gpu_memory())])
            print(f"  {phase.place} {phase.name}: {said}".replace("   ", "  "), file=sys.stderr, flush=True)


screen = Screen()


def show(row: dict[str, float]) -> None:
    """Show these metrics of an update in the line of its phase."""
    if screen.phases:
        found = {name: row[key] for key, name in reversed(SHOWN.items()) if key in row}
        screen.phases[0].values = dict(reversed(found.items()))


def skip() -> None:
    """Count an item of the phase as done by the run that this one goes on with."""
    screen.phases[-1].done += 1
    screen.phases[-1].skipped += 1


def saw(tokens: int) -> None:
    """Count tokens that all ranks together have trained on, scored or sampled."""
    for phase in screen.phases:
        phase.tokens += tokens
    if screen.phases:
        screen.speak()


def saw_rows(rows: list) -> None:
    """Count the tokens of a global batch that is trained on: rows with a prompt and one or two responses. Keep the first.

    Rows of another kind have no tokens to count.
    """
    rows = [row for row in rows if isinstance(row, dict) and "prompt_ids" in row]
    names = ("response_ids", "chosen_ids", "rejected_ids")
    saw(sum(len(r["prompt_ids"]) + len(r[name]) for r in rows for name in names if r.get(name)))
    screen.trained = next(iter(rows), None)


def saw_sequences(sequences: list[tuple]) -> None:
    """Count the tokens of this rank's share of (prompt, response) sequences, for all ranks."""
    saw_ranks(sum(len(x) + len(y) for x, y in sequences))


def saw_ranks(tokens: int) -> None:
    """Count tokens of this rank, for all ranks: they share the work evenly."""
    saw(tokens * int(os.environ.get("WORLD_SIZE", 1)))


class Lines:
    """What the thread of rich draws: the lines as they are now, as wide as the terminal is now."""

    def __rich_console__(self, console, options):
        from rich.text import Text

        for text in screen.text(options.max_width).splitlines():
            yield Text(text, no_wrap=True, overflow="crop")


@contextlib.contextmanager
def progress(name: str, total: int, visible: bool = True) -> Iterator[Callable[[int], None]]:
    """The line of a phase while it goes on. Yields advance(n), which counts n items as done."""
    phase = Phase(name, total, screen.schedule.place(name) if not screen.phases else "")
    with screen.lock:
        if not screen.phases:
            screen.visible = visible and total > 0
        screen.phases.append(phase)
    opened = None
    if len(screen.phases) == 1 and screen.visible and sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        if console.is_interactive:
            to_file = not sys.stdout.isatty()  # what is printed then goes there, not above the line
            opened = Live(Lines(), console=console, refresh_per_second=REFRESH, redirect_stdout=not to_file)
            screen.live = opened
            opened.start(refresh=True)

    def advance(n: int = 1) -> None:
        phase.done += n
        screen.speak()

    whole = False
    try:
        yield advance
        whole = True
    finally:
        phase.ended = time.monotonic()
        if whole:
            screen.schedule.finished(name, total - phase.skipped, phase.seconds)
        if opened is not None:
            opened.stop()  # its last drawing stays
            screen.live = None
        elif screen.live is not None and phase.total:
            console = screen.live.console
            console.print(line(phase, (None, None), console.width), markup=False, no_wrap=True)
        with screen.lock:
            screen.phases.remove(phase)
