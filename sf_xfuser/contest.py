"""Which of several arms serves the calls of one shape: who is tried, how often, and who stays. Pure.

All arms are tried but those whose prediction is hopeless; of those tried the nearest three, then the nearest two are
timed again, ten calls in all. Two that are near to each other then take turns for longer, since calls of one arm differ
by more than such arms do.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf

OWN = "xDiT's own USP"

_MOST_CALLS = 10  # of a shape, until it is settled
_MOST_OF_NEAR, _NEAR = 30, 1.04  # where two are so near to each other: half of that is lost by taking turns
_HOPELESS = 3.0  # what is predicted slower than the best by this is not tried
_TRUSTED = 1.5  # unless what was tried is off its prediction by this
_BEHIND = (1.5, 1.2)  # slower than the best by this, after one timed call of each and after more: not tried again
_TIE = 1.02  # times as long is as fast: calls of one arm differ by more


class Contest:
    """Which arm serves the calls of one shape, from predicted and measured seconds. Pure: the caller makes the calls.

    ``arms``: by preference, where nothing is ``predicted``, and of those that turn out equal. ``times[arm]``: of its
    calls, the arm being warm. ``chosen``: None until it is settled.
    """

    def __init__(self, arms: Sequence[str], predicted: Mapping[str, float]) -> None:
        self.predicted, self._preferred = dict(predicted), tuple(arms)
        self.arms = sorted(arms, key=lambda arm: predicted.get(arm, 0.0))
        self.times: dict[str, list[float]] = {arm: [] for arm in self.arms}
        least = min(predicted.values(), default=0.0)
        self.running = [arm for arm in self.arms if predicted.get(arm, 0.0) <= _HOPELESS * least]
        self.chosen = self.arms[0] if len(self.arms) == 1 else None
        self._due = deque(self.running)

    @property
    def turn(self) -> str:
        """Who serves the next call."""
        return self.chosen or self._due[0]

    def took(self, seconds: float) -> None:
        """The call of ``turn`` took so long, on the slowest rank; infinitely long where it failed."""
        self.times[self._due.popleft()].append(seconds)
        if not self._due:
            self._next_round()

    def measured(self, arm: str) -> float | None:
        """The median of its calls."""
        return statistics.median(self.times[arm]) if self.times[arm] else None

    def state(self) -> str:
        """All that decides, as text."""
        return f"{self.arms} {self.times} {self.running} {self.chosen} {list(self._due)}"

    def _next_round(self) -> None:
        # Disturbances only ever add: the least says whom not to try again.
        best = {arm: min(self.times[arm]) for arm in self.running}
        left_out = [arm for arm in self.arms if not self.times[arm]]
        if left_out and not all(1 / _TRUSTED < best[arm] / self.predicted[arm] < _TRUSTED for arm in best):
            self.running += left_out  # they were left out by predictions that have turned out wrong
            self._due.extend(left_out)
            return
        rounds = min(len(self.times[arm]) for arm in self.running)
        behind, least = _BEHIND[rounds > 1], min(best.values())
        self.running = [arm for arm in self.running if best[arm] <= behind * least]
        calls = sum(map(len, self.times.values()))
        left = _MOST_CALLS - calls
        if len(self.running) > 1 and left > 1:
            nearest = sorted(self.running, key=best.__getitem__)[: max(2, (left + 1) // 2)]
            self._again(nearest)
            return
        # What is to come is as disturbed as these.
        usual = {arm: statistics.median(self.times[arm]) for arm in self.running}
        near = [arm for arm in self.running if usual[arm] <= _NEAR * min(usual.values())]
        if len(near) > 1 and calls + len(near) <= _MOST_OF_NEAR:
            self._again(near)
            return
        equal = [arm for arm in self._preferred if usual.get(arm, inf) <= _TIE * min(usual.values())]
        self.chosen = OWN if OWN in equal else equal[0]

    def _again(self, arms: Sequence[str]) -> None:
        self.running = [arm for arm in reversed(self.running) if arm in arms]  # none always after the same other
        self._due.extend(self.running)

    def __str__(self) -> str:
        said = []
        for arm in self.arms:
            words = [f"predicted {1e3 * self.predicted[arm]:.3g} ms"] if arm in self.predicted else []
            if (usual := self.measured(arm)) is not None:
                n = len(self.times[arm])
                words.append(f"measured {1e3 * usual:.3g} ms (median of {n})" if usual < inf else "failed")
            elif self.chosen is not None and len(self.arms) > 1:
                words.append("not tried")
            said.append(f"{arm}: {', '.join(words) or 'not measured yet'}")
        return f"{self.chosen or 'being measured'}; {'; '.join(said)}"
