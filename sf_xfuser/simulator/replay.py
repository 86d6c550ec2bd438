"""Ranks that run programs, with a clock each, and their rounds of transfers: the engine of ``simulate``. Pure.

Each rank has a queue for each link, in which its rounds leave in the order in which they were posted:

    a put leaves       when it is at the head of its queue
    a matched round    when it is at the head at both ends, and both have posted it
    NCCL's kernels     besides, when no attention call that fills the GPU is running
    compute            slows down while a transfer that takes multiprocessors (or CPU time) is under way
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, int]
"""A link and the number of a round on it."""

Wanted = tuple[tuple[int, ...], Key]
"""Whose round, and which one."""

Program = Generator[Wanted | None, float, None]
"""One rank: yields what it waits for and is sent when that round's chunks of all of them are here; or None, so that
others whose clocks are not ahead come first."""


@dataclass(slots=True)
class Round:
    """What a rank sends and receives at once on one link, for which its link is taken for ``seconds``; it is there
    ``latency_s`` later. ``takes``, ``queues``: as of ``cluster.Way``; ``matched``: its peers must have come to it."""

    posted_s: float
    seconds: float
    latency_s: float
    takes: float
    queues: bool
    matched: bool
    receivers: tuple[int, ...]
    senders: tuple[int, ...]
    name: str
    nbytes: float
    start_s: float | None = None
    end_s: float = 0.0


@dataclass(slots=True)
class Rank:
    """A clock, queues, and what is to be shown."""

    now: float = 0.0
    computed_s: float = 0.0
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    resolved: dict[str, int] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    full: tuple[float, float] = (0.0, 0.0)  # the last time in which all multiprocessors were taken
    disturbed: bool = False  # whether any of its rounds has to do with multiprocessors
    spans: list[dict[str, Any]] = field(default_factory=list)


class Replay:
    """Ranks that run programs. ``mirrored``: one rank stands for all; its peers' rounds go as its own."""

    def __init__(self, num_ranks: int, *, mirrored: bool, spans: bool) -> None:
        self.ranks = [Rank() for _ in range(1 if mirrored else num_ranks)]
        self.mirrored = mirrored
        self.keep_spans = spans

    def run(self, programs: Sequence[Program]) -> None:
        """Until all have ended, the rank whose clock is least ahead first. Raises RuntimeError if they wait for each
        other for ever."""
        waiting: dict[int, Wanted] = {}
        turns = itertools.count()
        ready: list[tuple[float, int, int, float | None]] = [(0.0, next(turns), n, None) for n in range(len(programs))]
        while ready:
            _, _, number, arrived = heapq.heappop(ready)
            program = programs[number]
            try:
                wanted = next(program) if arrived is None else program.send(arrived)
            except StopIteration:
                wanted = None
            else:
                if wanted is None:
                    heapq.heappush(ready, (self.ranks[number].now, next(turns), number, None))
                else:
                    waiting[number] = wanted
            for number in list(waiting):
                arrived = self._arrival(*waiting[number])
                if arrived is not None:
                    del waiting[number]
                    heapq.heappush(ready, (max(arrived, self.ranks[number].now), next(turns), number, arrived))
        if waiting:
            raise RuntimeError(f"ranks wait for each other for ever: {list(waiting.items())[:4]}")

    # -- verbs of programs --------------------------------------------------------------------------------------------

    def post(self, number: int, link: str, round: Round) -> None:
        rank = self.ranks[number]
        round.posted_s = rank.now
        rank.rounds.setdefault(link, []).append(round)
        rank.disturbed = rank.disturbed or round.takes > 0 or round.queues
        rank.sent[link] = rank.sent.get(link, 0.0) + round.nbytes

    def work(self, number: int, seconds: float, name: str = "", fills: bool = True) -> None:
        """Compute; slower while transfers of this rank take some of what computes. ``fills``: nothing else that needs
        multiprocessors can begin meanwhile."""
        rank = self.ranks[number]
        rank.computed_s += seconds
        start, now, left = rank.now, rank.now, seconds
        takers = []
        if rank.disturbed:
            for link in rank.rounds if fills else ():  # what found room before this began
                self._resolve(number, link, len(rank.rounds[link]) - 1, before=now)
            takers = [
                (r.start_s, r.end_s, r.takes)
                for link in rank.rounds
                for r in self._under_way(number, link, now)
                if r.takes and r.start_s is not None
            ]
        while takers and left > 0:
            speed = math.prod(1.0 - takes for begin, end, takes in takers if begin <= now < end)
            until = min((t for begin, end, _ in takers for t in (begin, end) if t > now), default=math.inf)
            if left / speed <= until - now:
                break
            left -= (until - now) * speed
            now = until
        else:
            speed = 1.0
        rank.now = now + left / speed
        if fills:
            rank.full = (start, rank.now)
        if name and self.keep_spans:
            rank.spans.append({"link": "compute", "name": name, "start_s": start, "end_s": rank.now, "bytes": 0})

    def wait(self, number: int, until: float, name: str) -> None:
        rank = self.ranks[number]
        if until > rank.now:
            if self.keep_spans:
                rank.spans.append({"link": "wait", "name": name, "start_s": rank.now, "end_s": until, "bytes": 0})
            rank.now = until

    # -- when rounds leave --------------------------------------------------------------------------------------------

    def _at(self, number: int) -> Rank:
        return self.ranks[0] if self.mirrored else self.ranks[number]

    def _under_way(self, number: int, link: str, now: float) -> Iterable[Round]:
        """Rounds of a link that have a time and do not end before now, latest first."""
        rounds = self.ranks[number].rounds[link]
        for index in range(len(rounds) - 1, -1, -1):
            round = rounds[index]
            if round.start_s is not None or (not round.queues and self._resolve(number, link, index)):
                if round.end_s <= now:
                    return
                yield round

    def _arrival(self, whose: tuple[int, ...], key: Key) -> float | None:
        link, index = key
        latest = 0.0
        for number in whose[:1] if self.mirrored else whose:
            rounds = self._at(number).rounds.get(link, ())
            if index >= len(rounds) or not self._resolve(number, link, index):
                return None
            latest = max(latest, rounds[index].end_s + rounds[index].latency_s)
        return latest

    def _resolve(self, number: int, link: str, index: int, before: float = math.inf) -> bool:
        """Give rounds up to ``index`` their times, where their peers have come to them and they begin ``before``."""
        rank = self._at(number)
        rounds = rank.rounds.get(link, [])
        for at in range(rank.resolved.get(link, 0), min(index + 1, len(rounds))):
            round = rounds[at]
            begin = self._may_begin(number, link, at, before)
            if begin is None or begin >= before:
                return False
            if round.queues and rank.full[0] <= begin < rank.full[1]:
                begin = rank.full[1]
            round.start_s, round.end_s = begin, begin + round.seconds
            rank.resolved[link] = at + 1
        return rank.resolved.get(link, 0) > index

    def _may_begin(self, number: int, link: str, at: int, before: float) -> float | None:
        """When a round is posted and those before it are through: at both ends, if it is matched."""
        rounds = self._at(number).rounds[link]
        begin = max(rounds[at].posted_s, rounds[at - 1].end_s if at else 0.0)
        if self.mirrored or not rounds[at].matched:
            return begin
        for peer in {*rounds[at].receivers, *rounds[at].senders}:
            theirs = self._at(peer).rounds.get(link, [])
            if at >= len(theirs) or (at and not self._resolve(peer, link, at - 1, before)):
                return None
            begin = max(begin, theirs[at].posted_s, theirs[at - 1].end_s if at else 0.0)
        return begin
