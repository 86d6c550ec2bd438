"""Which of several candidates runs the calls of one shape: who is timed, how often, and which is selected. Pure.

All candidates are timed once. The nearest three, then the nearest two are timed again, ten calls in all. Two that are
near to each other then take turns for longer, since calls of one candidate differ by more than such candidates do.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from math import inf

OWN = "xDiT's own USP"

_MOST_CALLS = 10  # of a shape, before one is selected
_MOST_OF_NEAR, _NEAR = 30, 1.04  # where two are so near to each other: half of that is lost by taking turns
_BEHIND = (1.5, 1.2)  # slower than the best by this, after one timed call of each and after more: not timed again
_TIE = 1.02  # times as long is as fast: calls of one candidate differ by more


class Contest:
    """The trial of one call shape, by measured seconds. Pure: the caller makes the calls.

    ``candidates``: by preference among equals. ``times``: of a candidate's calls after its warm-up. ``chosen``: the
    selected one; None while the trial runs.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        self.times: dict[str, list[float]] = {name: [] for name in candidates}
        self.running = list(candidates)
        self.chosen = candidates[0] if len(candidates) == 1 else None
        self._due = deque(candidates)

    @property
    def turn(self) -> str:
        """The candidate that runs the next call."""
        return self.chosen or self._due[0]

    def took(self, seconds: float) -> None:
        """The call of ``turn`` took this long on the slowest rank; infinity if it failed."""
        self.times[self._due.popleft()].append(seconds)
        if not self._due:
            self._next_round()

    def state(self) -> str:
        """All that decides, as text."""
        return f"{self.times} {self.running} {self.chosen} {list(self._due)}"

    def _next_round(self) -> None:
        # Disturbances only ever add: the least says which one not to time again.
        best = {name: min(self.times[name]) for name in self.running}
        rounds = min(len(self.times[name]) for name in self.running)
        behind, least = _BEHIND[rounds > 1], min(best.values())
        self.running = [name for name in self.running if best[name] <= behind * least]
        calls = sum(map(len, self.times.values()))
        left = _MOST_CALLS - calls
        if len(self.running) > 1 and left > 1:
            nearest = sorted(self.running, key=best.__getitem__)[: max(2, (left + 1) // 2)]
            self._again(nearest)
            return
        # What is to come is as disturbed as these.
        usual = {name: statistics.median(self.times[name]) for name in self.running}
        near = [name for name in self.running if usual[name] <= _NEAR * min(usual.values())]
        if len(near) > 1 and calls + len(near) <= _MOST_OF_NEAR:
            self._again(near)
            return
        equal = [name for name in self.candidates if usual.get(name, inf) <= _TIE * min(usual.values())]
        self.chosen = OWN if OWN in equal else equal[0]

    def _again(self, names: Sequence[str]) -> None:
        self.running = [name for name in reversed(self.running) if name in names]  # none always after the same other
        self._due.extend(self.running)

    def __str__(self) -> str:
        said = [f"{name}: {_spelled(times)}" for name, times in self.times.items()]
        return "; ".join([f"selected {self.chosen}" if self.chosen else "trial running", *said])


def _spelled(times: Sequence[float]) -> str:
    if not times:
        return "not timed"
    return "failed" if times == [inf] else f"{1e3 * statistics.median(times):.3g} ms (median of {len(times)})"
