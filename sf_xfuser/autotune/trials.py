"""The trial of one call shape: chooses the candidate of each call and selects the fastest. Pure.

All candidates are timed once, then the fastest three again, then the fastest two: ten calls. Candidates within 4 % of
each other continue in turns, up to thirty calls, because the calls of one candidate vary by more than that.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from math import inf

OWN = "xDiT's own USP"

_CALLS = 10  # timed calls of a trial
_CALLS_IF_CLOSE, _CLOSE = 30, 1.04  # more calls if medians differ by less; each costs half of the difference
_DROP = (1.5, 1.2)  # drop candidates that take longer than this times the fastest: after the first round, and later
_TIE = 1.02  # medians within this factor are tied: calls of one candidate vary by more


class Trial:
    """Collects the measured seconds of each candidate until one is selected. The caller makes the calls.

    ``candidates``: names, in order of preference on a tie. ``times``: seconds of each timed call. ``selected``: None
    while the trial runs.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        self.times: dict[str, list[float]] = {name: [] for name in candidates}
        self.selected = candidates[0] if len(candidates) == 1 else None
        self._remaining = list(candidates)
        self._queue = deque(candidates)

    @property
    def next(self) -> str:
        """The candidate of the next call."""
        return self.selected or self._queue[0]

    def record(self, seconds: float) -> None:
        """Add the seconds that the call of ``next`` took on the slowest rank; infinity if it failed."""
        self.times[self._queue.popleft()].append(seconds)
        if not self._queue:
            self._next_round()

    def state(self) -> str:
        """The whole state as text, to compare ranks."""
        return f"{self.times} {self._remaining} {self.selected} {list(self._queue)}"

    def _next_round(self) -> None:
        # Disturbances only add time, so the minimum decides which candidates are dropped.
        best = {name: min(self.times[name]) for name in self._remaining}
        rounds = min(len(self.times[name]) for name in self._remaining)
        limit = _DROP[rounds > 1] * min(best.values())
        self._remaining = [name for name in self._remaining if best[name] <= limit]
        calls = sum(map(len, self.times.values()))
        calls_left = _CALLS - calls
        if len(self._remaining) > 1 and calls_left > 1:
            self._repeat(sorted(self._remaining, key=best.__getitem__)[: max(2, (calls_left + 1) // 2)])
            return
        # Later calls will be disturbed as often as these, so the median decides which candidate is selected.
        median = {name: statistics.median(self.times[name]) for name in self._remaining}
        close = [name for name in self._remaining if median[name] <= _CLOSE * min(median.values())]
        if len(close) > 1 and calls + len(close) <= _CALLS_IF_CLOSE:
            self._repeat(close)
            return
        tied = [name for name in self.candidates if median.get(name, inf) <= _TIE * min(median.values())]
        self.selected = OWN if OWN in tied else tied[0]

    def _repeat(self, names: Sequence[str]) -> None:
        # The order is reversed in each round, so that no candidate always follows the same one.
        self._remaining = [name for name in reversed(self._remaining) if name in names]
        self._queue.extend(self._remaining)

    def __str__(self) -> str:
        times = [f"{name}: {_format(seconds)}" for name, seconds in self.times.items()]
        return "; ".join([f"selected {self.selected}" if self.selected else "trial running", *times])


def _format(times: Sequence[float]) -> str:
    if not times:
        return "not timed"
    return "failed" if times == [inf] else f"{1e3 * statistics.median(times):.3g} ms (median of {len(times)})"
