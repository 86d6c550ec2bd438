"""How far a run is, on stderr: a bar on a terminal, a line every 15 s elsewhere."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.table import Column

LINE_S = 15.0


class Progress:
    """Shows the steps of a run inside a ``with`` block. Local; one rank of a job has a visible one.

    ``total``: number of steps; None while it is unknown. The estimate of the remaining time assumes that the other
    steps take the median time of those that ended. It is printed when it is known, if it exceeds 15 s.
    """

    def __init__(self, title: str, total: int | None = None, *, visible: bool = True) -> None:
        self._title, self.total, self._visible = title, total, visible
        self._text, self._times_s, self._estimated = "", list[float](), False
        self._started_s = self._last_s = time.monotonic()
        self._ended = threading.Event()
        self._bar: rich.progress.Progress | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        console = Console(stderr=True)
        if self._visible and console.is_terminal:
            text = rich.progress.TextColumn("{task.description}", table_column=Column())  # wraps, and is not cut
            columns = text, rich.progress.BarColumn(12), "{task.fields[left]}"
            self._bar = rich.progress.Progress(*columns, console=console, transient=True, refresh_per_second=2)
            self._bar.add_task(self._title, total=self.total, left="")
            self._bar.start()
        elif self._visible:
            self._thread = threading.Thread(target=self._print_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()

    def doing(self, text: str) -> None:
        """Name what begins; time until now is in no step."""
        self._text, self._last_s = text, time.monotonic()
        self._update()
        left_s = self._left_s()
        if self._thread is not None and not self._estimated and left_s is not None:
            self._estimated = True
            if left_s > LINE_S:
                self._print()

    def advance(self, steps: int = 1) -> None:
        """Count steps that have ended."""
        now_s = time.monotonic()
        self._times_s += [(now_s - self._last_s) / steps] * steps
        self._last_s = now_s
        self._update()

    def _left_s(self) -> float | None:
        if self.total is None or not self._times_s:
            return None
        return statistics.median(self._times_s) * max(0, self.total - len(self._times_s))

    def _left(self) -> str:
        left_s = self._left_s()
        steps = "" if self.total is None else f"{len(self._times_s)} of {self.total} steps"
        return steps + ("" if left_s is None else f", about {_duration(left_s)} left")

    def _update(self) -> None:
        if self._bar is not None:
            task = self._bar.task_ids[0]
            text = f"{self._title}: {self._text}"
            done = len(self._times_s)
            self._bar.update(task, description=text, completed=done, total=self.total, left=self._left())

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_S):
            self._print()

    def _print(self) -> None:
        parts = self._text, self._left(), f"{_duration(time.monotonic() - self._started_s)} so far"
        print(f"{self._title}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
