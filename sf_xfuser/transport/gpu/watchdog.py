"""Bounds waits that a GPU stream has been given: nobody can interrupt a stream, so another thread looks after it.

When a wait takes too long, or a peer says that it gave up, the transport has failed: its result must not be taken for
an attention, the streams must get going again, and the peers must not take what comes from them now for a chunk. So,
in this order: tell the peers; when they know, release the waits; let the next call on this rank raise what happened.
What has been enqueued already runs on what happens to lie in memory, and ``OneSided.poison`` turns its result into NaN.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sf_xfuser.transport.base import TransportError

_TICK_S = 0.01  # how often the oldest wait is looked at
_LOOK_S = 1.0  # how often the flags are, while it is late
_GRACE_S = 30.0  # for the streams to get going again


@dataclass(eq=False)
class Awaited:
    """Chunks of one round: the ``number``-th of this call from each ``peer``, as pairs. None: that a call ends, its
    sends included. ``value``: what the flags are to hold: the epoch, and the call's identity below it. ``done`` is set
    once the wait is enqueued, and says whether it has ended."""

    epoch: int
    round: int = 0
    chunks: tuple[tuple[int, int], ...] = ()
    done: Callable[[], bool] | None = None
    value: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """The flags of this rank, by writer, parity of the epoch, and number, and whether a peer gave up."""

    flags: Sequence[Sequence[Sequence[int]]]
    gave_up: bool


class Watchdog:
    """Of the rank at ``position`` of ``members``. Thread-safe.

    ``hopeless(peers)`` says why waiting for these is of no use, where it is. ``enter`` is called first in the thread.
    ``look`` reads the flags (None: they cannot be read). ``tell(suspects)`` tells the peers, those who may be dead
    last, and returns in bounded time. ``release`` lifts the flags that these are waiting for; it is called again until
    they have ended.
    """

    def __init__(
        self,
        members: Sequence[int],
        position: int,
        timeout_s: float,
        *,
        hopeless: Callable[[Collection[int]], str | None],
        enter: Callable[[], object],
        look: Callable[[], Seen | None],
        tell: Callable[[Sequence[int]], object],
        release: Callable[[Sequence[Awaited]], object],
    ) -> None:
        self.error: TransportError | None = None
        self._members, self._timeout_s = members, timeout_s
        self._who = f"rank {members[position]} on {socket.gethostname()}"
        self._hopeless = hopeless
        self._enter, self._look, self._tell, self._release = enter, look, tell, release
        self._changed = threading.Condition()
        self._watched: deque[Awaited] = deque()
        self._told = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sf-xfuser watchdog", daemon=True)
        self._thread.start()

    def watch(self, awaited: Awaited) -> None:
        """To be called before the wait is enqueued: whatever comes after a failure is released, too."""
        with self._changed:
            self._watched.append(awaited)
            self._changed.notify()

    def fail(self, error: TransportError, suspects: Sequence[int] = ()) -> None:
        """From now on everything is released. The first error stays."""
        with self._changed:
            if self.error is not None:
                return
            self.error = error
        try:
            self._tell(suspects)
        except Exception as problem:  # the GPU itself has failed: there is nobody to tell
            sys.stderr.write(f"{self._who}: the peers could not be told of a failure: {problem}\n")
        self._told.set()

    @property
    def idle(self) -> bool:
        """Whether nothing is watched, so that nothing will be released."""
        return not self._watched

    def close(self) -> None:
        """The thread ends once all that is watched has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._enter()
            while (awaited := self._oldest()) is not None:
                self._attend_to(awaited)
                self._watched.popleft()
        except Exception as problem:  # whatever it is, nobody else would hear of it
            self.fail(TransportError(f"{self._who}: the GPU's state cannot be read any more: {problem}"))
            self._let_all_go()

    def _let_all_go(self) -> None:
        """What waits must not wait for ever because nobody looks after it any more."""
        deadline = time.monotonic() + _GRACE_S
        with contextlib.suppress(Exception):  # a GPU that has failed ends its waits itself
            while any(awaited.done is None or not awaited.done() for awaited in tuple(self._watched)):
                self._release(tuple(self._watched))
                if time.monotonic() >= deadline:
                    self._end()
                time.sleep(_TICK_S)

    def _oldest(self) -> Awaited | None:
        with self._changed:
            self._changed.wait_for(lambda: self._watched or self._closed)
            return self._watched[0] if self._watched else None

    def _attend_to(self, awaited: Awaited) -> None:
        """Until it has ended. Only the oldest is looked at: waits end in the order in which they were enqueued."""
        started = looked = time.monotonic()
        released_at: float | None = None
        while awaited.done is None or not awaited.done():
            now = time.monotonic()
            if self._told.is_set():
                released_at = released_at or now
                self._release(tuple(self._watched))
                if now - released_at >= _GRACE_S:
                    self._end()
            elif self.error is None and (now - looked >= _LOOK_S or now - started >= self._timeout_s):
                looked = now
                self._judge(awaited, now - started)
            time.sleep(_TICK_S)

    def _judge(self, awaited: Awaited, waited_s: float) -> None:
        seen = self._look()
        if (failed := self._hopeless([peer for peer, _ in awaited.chunks])) is not None:
            why = failed
        elif seen is not None and seen.gave_up:
            why = "a rank of its group gave up"
        elif waited_s >= self._timeout_s:
            why = f"waited {waited_s:.1f} s"
        else:
            return
        late = [
            (peer, number, flag)
            for peer, number in awaited.chunks
            if (flag := None if seen is None else seen.flags[peer][awaited.epoch % 2][number]) != awaited.value
        ]
        self.fail(TransportError(self._words(awaited, late, why)), [peer for peer, _, _ in late])

    def _words(self, awaited: Awaited, late: Sequence[tuple[int, int, int | None]], why: str) -> str:
        advice = "See that rank's log; if it is only slow, raise --sp-timeout"
        if not late:
            at = f"round {awaited.round}" if awaited.chunks else "the end"
            return f"{self._who}: {at} of call {awaited.epoch} did not come: {why}; its GPU work or sends are not done"
        peer, number, flag = late[0]
        says = "cannot be read" if flag is None else _spelled(flag)
        others = f" (nor from rank(s) {sorted({self._members[p] for p, *_ in late[1:]})})" if late[1:] else ""
        return (
            f"{self._who}: nothing came from rank {self._members[peer]}{others} in round {awaited.round}: {why}. "
            f"Expected flag of chunk {number}: {_spelled(awaited.value)}, got: {says}. {advice}"
        )

    def _end(self) -> None:
        """A stream that cannot be got going again would hang the process in whatever asks for its result."""
        sys.stderr.write(f"{self.error}\n{self._who}: its GPU streams cannot be released; ending the process\n")
        sys.stderr.flush()
        os._exit(70)


def _spelled(flag: int) -> str:
    return f"call={flag >> 32}, identity={flag & 0xFFFFFFFF:08x}"
