"""The engine of the simulator: each rank has steps, a clock, and a queue of transfer rounds per link. Pure.

The rounds of a link start in the order in which a rank posted them:

    a put              starts at the head of its rank's queue
    a matched round    starts at the head of the queue at both ends, after both have posted it
    an NCCL kernel     also waits for the end of an attention call that occupies all SMs
    compute            slows down while an active transfer uses SMs (or CPU time)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

RoundKey = tuple[str, int]
"""A link and the index of a round on it."""

Dependency = tuple[tuple[int, ...], RoundKey]
"""The round to wait for from each of these ranks."""

Steps = Generator[Dependency | None, float, None]
"""The steps of one rank. It yields a dependency and receives its arrival time, or yields None to let ranks with an
earlier clock run first."""


@dataclass(slots=True)
class Round:
    """The simultaneous sends and receives of a rank on one link. They occupy the link for ``seconds`` and arrive
    ``latency_s`` later. ``compute_share`` and ``needs_sms`` are those of ``PatternCost``; a ``matched`` round waits for
    its peers. It forwards what arrives in the rounds ``after``."""

    seconds: float
    latency_s: float = 0.0
    compute_share: float = 0.0
    needs_sms: bool = False
    matched: bool = False
    receivers: tuple[int, ...] = ()
    senders: tuple[int, ...] = ()
    after: tuple[Dependency, ...] = ()
    name: str = ""
    nbytes: float = 0.0
    posted_s: float = 0.0
    start_s: float | None = None
    end_s: float = 0.0


@dataclass(slots=True)
class Rank:
    """The clock, queues and recorded spans of one rank."""

    now_s: float = 0.0
    computed_s: float = 0.0
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    num_scheduled: dict[str, int] = field(default_factory=dict)  # rounds of each link with a start time
    sent: dict[str, float] = field(default_factory=dict)
    occupied: tuple[float, float] = (0.0, 0.0)  # the latest interval in which attention occupies all SMs
    shares_sms: bool = False  # whether any of its rounds uses SMs or waits for them
    spans: list[dict[str, Any]] = field(default_factory=list)


class Replay:
    """Runs the steps of ``num_ranks`` ranks, or of rank 0 only if they are ``symmetric``, because its
    peers' rounds then have the same times."""

    def __init__(self, num_ranks: int, *, symmetric: bool, record_spans: bool) -> None:
        self.ranks = [Rank() for _ in range(1 if symmetric else num_ranks)]
        self.symmetric = symmetric
        self.record_spans = record_spans

    def run(self, ranks: Sequence[Steps]) -> None:
        """Run the steps of all ranks, the earliest clock first. Raises RuntimeError on a deadlock."""
        waiting: dict[int, Dependency] = {}
        turns = itertools.count()
        ready: list[tuple[float, int, int, float | None]] = [(0.0, next(turns), n, None) for n in range(len(ranks))]
        while ready:
            _, _, number, arrival_s = heapq.heappop(ready)
            steps = ranks[number]
            try:
                dependency = next(steps) if arrival_s is None else steps.send(arrival_s)
            except StopIteration:
                pass
            else:
                if dependency is None:
                    heapq.heappush(ready, (self.ranks[number].now_s, next(turns), number, None))
                else:
                    waiting[number] = dependency
            for number in list(waiting):
                arrival_s = self._arrival_s(*waiting[number])
                if arrival_s is not None:
                    del waiting[number]
                    heapq.heappush(ready, (max(arrival_s, self.ranks[number].now_s), next(turns), number, arrival_s))
        if waiting:
            raise RuntimeError(f"deadlock: ranks wait for rounds that no rank posts: {list(waiting.items())[:4]}")

    # -- actions of steps ---------------------------------------------------------------------------------------------

    def post(self, number: int, link: str, round: Round) -> RoundKey:
        rank = self.ranks[number]
        round.posted_s = rank.now_s
        rounds = rank.rounds.setdefault(link, [])
        rounds.append(round)
        rank.shares_sms = rank.shares_sms or round.compute_share > 0 or round.needs_sms
        rank.sent[link] = rank.sent.get(link, 0.0) + round.nbytes
        return link, len(rounds) - 1

    def compute(self, number: int, seconds: float, name: str = "", occupies_all: bool = True) -> None:
        """Compute for ``seconds``, or longer while this rank's transfers use SMs. ``occupies_all``: transfers that need
        SMs cannot start meanwhile."""
        rank = self.ranks[number]
        rank.computed_s += seconds
        start, now, left = rank.now_s, rank.now_s, seconds
        active = []
        if rank.shares_sms:
            for link in rank.rounds if occupies_all else ():  # rounds that started before this call
                self._schedule(number, link, len(rank.rounds[link]) - 1, before=now)
            active = [
                (r.start_s, r.end_s, r.compute_share)
                for link in rank.rounds
                for r in self._active_rounds(number, link, now)
                if r.compute_share and r.start_s is not None
            ]
        while active and left > 0:
            speed = math.prod(1.0 - share for begin, end, share in active if begin <= now < end)
            until = min((t for begin, end, _ in active for t in (begin, end) if t > now), default=math.inf)
            if left / speed <= until - now:
                break
            left -= (until - now) * speed
            now = until
        else:
            speed = 1.0
        rank.now_s = now + left / speed
        if occupies_all:
            rank.occupied = (start, rank.now_s)
        if name and self.record_spans:
            rank.spans.append({"link": "compute", "name": name, "start_s": start, "end_s": rank.now_s, "bytes": 0})

    def wait(self, number: int, until: float, name: str) -> None:
        rank = self.ranks[number]
        if until > rank.now_s:
            if self.record_spans:
                rank.spans.append({"link": "wait", "name": name, "start_s": rank.now_s, "end_s": until, "bytes": 0})
            rank.now_s = until

    # -- start times of rounds ----------------------------------------------------------------------------------------

    def _rank(self, number: int) -> Rank:
        return self.ranks[0] if self.symmetric else self.ranks[number]

    def _active_rounds(self, number: int, link: str, now: float) -> Iterable[Round]:
        """The scheduled rounds of a link that end after ``now``, latest first."""
        rounds = self.ranks[number].rounds[link]
        for index in range(len(rounds) - 1, -1, -1):
            round = rounds[index]
            if round.start_s is not None or (not round.needs_sms and self._schedule(number, link, index)):
                if round.end_s <= now:
                    return
                yield round

    def _arrival_s(self, numbers: tuple[int, ...], key: RoundKey) -> float | None:
        """The latest arrival of this round from ``numbers``; None while one of them cannot be scheduled."""
        link, index = key
        latest = 0.0
        for number in numbers[:1] if self.symmetric else numbers:
            rounds = self._rank(number).rounds.get(link, ())
            if index >= len(rounds) or not self._schedule(number, link, index):
                return None
            latest = max(latest, rounds[index].end_s + rounds[index].latency_s)
        return latest

    def _schedule(self, number: int, link: str, index: int, before: float = math.inf) -> bool:
        """Set the times of rounds up to ``index`` that start ``before``. False if round ``index`` has none yet."""
        rank = self._rank(number)
        rounds = rank.rounds.get(link, [])
        for i in range(rank.num_scheduled.get(link, 0), min(index + 1, len(rounds))):
            round = rounds[i]
            start = self._earliest_start(number, link, i, before)
            if start is None or start >= before:
                return False
            if round.needs_sms and rank.occupied[0] <= start < rank.occupied[1]:
                start = rank.occupied[1]
            round.start_s, round.end_s = start, start + round.seconds
            rank.num_scheduled[link] = i + 1
        return rank.num_scheduled.get(link, 0) > index

    def _earliest_start(self, number: int, link: str, i: int, before: float) -> float | None:
        """The time at which a round is posted and its predecessor has ended; at both ends if it is matched."""
        rounds = self._rank(number).rounds[link]
        start = max(rounds[i].posted_s, rounds[i - 1].end_s if i else 0.0)
        for dependency in rounds[i].after:
            arrival_s = self._arrival_s(*dependency)
            if arrival_s is None:
                return None
            start = max(start, arrival_s)
        if self.symmetric or not rounds[i].matched:
            return start
        for peer in {*rounds[i].receivers, *rounds[i].senders}:
            others = self._rank(peer).rounds.get(link, [])
            if i >= len(others) or (i and not self._schedule(peer, link, i - 1, before)):
                return None
            start = max(start, others[i].posted_s, others[i - 1].end_s if i else 0.0)
        return start
