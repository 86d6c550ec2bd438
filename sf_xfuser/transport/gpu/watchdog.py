"""Bounds waits that are enqueued on a GPU stream. The host cannot interrupt a stream, so a thread watches the calls.

The transport fails when a call makes no progress, when a peer aborts, or when the control plane reports a failure. The
thread then acts in this order, so that no peer accepts an invalid chunk:

1. It notifies the peers, which poisons their results.
2. It releases the waits, so that the streams continue.
3. The next call on this rank raises the error.

Work that is already enqueued runs on undefined memory. The end of its call turns the result into NaN.

A call may make no progress for one timeout. While a rank has not started it, the limit is ``CALL_TIMEOUT_FACTOR``
timeouts: for that rank's flags, and for those of others that depend on them. The host does not see the calls of a
user's CUDA graph. They count themselves in two words of the block, and are watched from the first capture on.
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
from dataclasses import dataclass, field
from typing import NamedTuple

from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR, CallMismatch, TransportError
from sf_xfuser.transport.patience import Patience

_POLL_S = 0.01  # interval between checks of the oldest call
_HEAD_POLL_S = 1.0  # interval between reads of the block's head; shorter for a short timeout
_RELEASE_LIMIT_S = 30.0  # time limit for released streams to continue


class AwaitedFlag(NamedTuple):
    """Flag ``number`` of ``peer`` in a call. ``word``: its index among this rank's flags."""

    peer: int
    number: int
    word: int


class RoundWait(NamedTuple):
    round: int
    flags: tuple[AwaitedFlag, ...]


@dataclass(eq=False)
class PendingCall:
    """A call that may not have completed on the GPU. ``value``: of its flags. ``waits``: those enqueued so far, as the
    rounds of each; the host appends each before it enqueues it. ``done``: set when the host has ended the call; whether
    it completed. ``checked``: in a replay, which resets flags after each wait, ``Head.checked`` before the call."""

    epoch: int
    value: int
    waits: list[tuple[RoundWait, ...]] = field(default_factory=list)
    done: Callable[[], bool] | None = None
    checked: int | None = None

    def completed(self) -> bool:
        return self.done is not None and self.done()

    def rounds(self, head: Head | None = None) -> list[RoundWait]:
        """The rounds waited for, without those whose flags have been checked and reset."""
        first = 0 if head is None or self.checked is None else max(0, head.checked - self.checked)
        return [each for wait in tuple(self.waits)[first:] for each in wait]


@dataclass(frozen=True, slots=True)
class Head:
    """The words of this rank's block. ``aborted``: whether poison is NaN. ``begun``, ``ended``: number of calls in a
    user's CUDA graphs. ``checked``: number of waits and ends in replays."""

    flags: Sequence[int]
    aborted: bool
    begun: int = 0
    ended: int = 0
    checked: int = 0


class Watchdog:
    """Watches the calls of the rank at ``position`` of ``members``. Thread-safe. Callbacks:

    ``abort_reason(peers)``: why a wait for these peers cannot complete, or None.
    ``late_ranks()``: names of the ranks that have not started this call. Takes a second at most.
    ``on_start()``: called first on the watchdog's thread.
    ``read_head()``: the current words, or None if they cannot be read.
    ``notify_peers(suspects)``: report the failure to the peers, suspects last. Bounded.
    ``release(calls)``: raise the flags that these calls wait for, and those of all calls in users' CUDA graphs. Called
    repeatedly until the calls complete.
    """

    def __init__(
        self,
        members: Sequence[int],
        position: int,
        timeout_s: float,
        *,
        abort_reason: Callable[[Collection[int]], str | None],
        late_ranks: Callable[[], str],
        on_start: Callable[[], object],
        read_head: Callable[[], Head | None],
        notify_peers: Callable[[Sequence[int]], object],
        release: Callable[[Sequence[PendingCall]], object],
    ) -> None:
        self.error: TransportError | None = None
        self._members, self._timeout_s = members, timeout_s
        self._head_poll_s = min(_HEAD_POLL_S, timeout_s / 4)
        self._name = f"rank {members[position]} on {socket.gethostname()}"
        self._others = [peer for peer in range(len(members)) if peer != position]
        self._abort_reason, self._patience = abort_reason, Patience(timeout_s, late_ranks)
        self._on_start, self._read_head = on_start, read_head
        self._notify_peers, self._release = notify_peers, release
        self._changed = threading.Condition()
        self._pending: deque[PendingCall] = deque()
        self._notified = threading.Event()
        self._closed = False
        self._graphs: _GraphCalls | None = None
        self._thread = threading.Thread(target=self._run, name="sf-xfuser watchdog", daemon=True)
        self._thread.start()

    def watch(self, call: PendingCall) -> None:
        """Call before anything of the call is enqueued, so that waits enqueued after a failure are released too."""
        with self._changed:
            self._pending.append(call)
            self._changed.notify()

    def watch_graphs(self) -> None:
        """Watch the calls of CUDA graphs from now on."""
        with self._changed:
            self._graphs = self._graphs or _GraphCalls(self._head_poll_s)
            self._changed.notify()

    def fail(self, error: TransportError, suspects: Sequence[int] = ()) -> None:
        """Notify the peers and release all waits, present and future. Keeps the first error."""
        with self._changed:
            if self.error is not None:
                return
            self.error = error
        try:
            self._notify_peers(suspects)
        except Exception as problem:  # the GPU itself has failed
            sys.stderr.write(f"{self._name}: could not notify the peers of a failure: {problem}\n")
        self._notified.set()

    @property
    def idle(self) -> bool:
        """Whether no call is pending."""
        return not self._pending and (self._graphs is None or self._graphs.idle)

    def close(self) -> None:
        """End the thread once no call is pending."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._on_start()
            while not (self._closed and self.idle):
                if self._pending:
                    self._watch_one(self._pending[0])
                    self._pending.popleft()
                    continue
                limit_s = None if self._graphs is None else self._graphs.next_check_s()
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._closed or self._graphs_are_due(), limit_s)
                self._watch_graphs()
        except Exception as problem:
            self.fail(TransportError(f"{self._name}: cannot read the GPU's state: {problem}"))
            self._release_all()

    def _release_all(self) -> None:
        """Release every wait, since no thread watches them any more."""
        deadline = time.monotonic() + _RELEASE_LIMIT_S
        with contextlib.suppress(Exception):  # a failed GPU ends its waits itself
            while not all(call.completed() for call in tuple(self._pending)):
                self._release(tuple(self._pending))
                if time.monotonic() >= deadline:
                    self._exit_process()
                time.sleep(_POLL_S)

    def _watch_one(self, call: PendingCall) -> None:
        """Return once the call has completed. Watching the oldest suffices: calls complete in order."""
        self._patience.begin_call()
        checked = since = time.monotonic()
        seen: object = None
        released_at: float | None = None
        while not call.completed():
            now = time.monotonic()
            if self._notified.is_set():
                released_at = released_at or now
                self._release(tuple(self._pending))
                # The caller may not have ended the call yet: no stream is stuck then.
                if call.done is not None and now - released_at >= _RELEASE_LIMIT_S:
                    self._exit_process()
            elif self.error is None and now - checked >= self._head_poll_s:
                checked = now
                head = self._read_head()
                late = self._late(call, head)
                num_checked = 0 if head is None else head.checked
                progress = len(late), len(call.waits), num_checked, call.done is not None
                if progress != seen:
                    seen, since = progress, now
                self._fail_if_aborted(call, head, late, since)
                self._watch_graphs()
            time.sleep(_POLL_S)

    def _late(self, call: PendingCall, head: Head | None) -> list[tuple[int, AwaitedFlag, int | None]]:
        """The flags that have not arrived, as (round, flag, its value), in the order of the waits."""
        flags = [(each.round, flag) for each in call.rounds(head) for flag in each.flags]
        if head is None:
            return [(round, flag, None) for round, flag in flags]
        found = [(round, flag, head.flags[flag.word]) for round, flag in flags]
        return [each for each in found if each[2] != call.value]

    def _fail_if_aborted(
        self, call: PendingCall, head: Head | None, late: list[tuple[int, AwaitedFlag, int | None]], since: float
    ) -> None:
        peers = list(dict.fromkeys(flag.peer for _, flag, _ in late))
        reason = self._abort_reason(peers)
        kind = TransportError
        if reason is None and head is not None and head.aborted:
            reason = "a rank of its group aborted"
        if reason is None and any(value for *_, value in late):
            reason, kind = "it makes another call", CallMismatch
        if reason is None and (call.waits or call.done) and self._patience.exceeded(self._others, since):
            time.sleep(_POLL_S)  # the end of a call resets its flags just before it completes
            reason = f"waited {time.monotonic() - since:.1f} s"
        if reason is not None and not call.completed():
            self.fail(kind(self._message(call, late, reason)), peers)

    def _message(self, call: PendingCall, late: Sequence[tuple[int, AwaitedFlag, int | None]], reason: str) -> str:
        if not late:
            rounds = call.rounds()
            stage = f"round {rounds[-1].round}" if rounds and call.done is None else "the end"
            return f"{self._name}: {stage} of call {call.epoch} did not complete on the GPU: {reason}"
        round, first, value = next((each for each in late if each[2]), late[0])
        others = sorted({self._members[flag.peer] for _, flag, _ in late} - {self._members[first.peer]})
        return (
            f"{self._name}: no data from rank {self._members[first.peer]}"
            f"{f' (nor from rank(s) {others})' if others else ''} in round {round}: {reason}. Expected flag "
            f"{first.number} of call {call.epoch}: {_format_flag(call.value)}, got: "
            f"{'unreadable' if value is None else _format_flag(value)}. See that rank's log; if it is only slow, "
            "raise --sp-timeout"
        )

    # -- calls in CUDA graphs -----------------------------------------------------------------------------------------

    def _graphs_are_due(self) -> bool:
        return self._graphs is not None and self._graphs.next_check_s() == 0

    def _watch_graphs(self) -> None:
        graphs = self._graphs
        if graphs is None or not self._graphs_are_due():
            return
        head = self._read_head()
        waited_s = graphs.check(head, hurry=self._notified.is_set())
        if self._notified.is_set():
            if not graphs.idle:
                self._release(tuple(self._pending))
                if waited_s >= _RELEASE_LIMIT_S:
                    self._exit_process()
            return
        reason = None if graphs.idle else self._abort_reason(self._others)
        if head is not None and head.aborted:
            reason = reason or "a rank of its group aborted, or made another call"
        if waited_s >= CALL_TIMEOUT_FACTOR * self._timeout_s:
            reason = reason or f"waited {waited_s:.1f} s"
        if reason is not None:
            counts = f"{graphs.begun} have begun, {graphs.ended} have ended"
            self.fail(
                TransportError(f"{self._name}: calls in a CUDA graph did not complete: {reason} ({counts})"),
                self._others,
            )

    def _exit_process(self) -> None:
        """Synchronizing with a stream that never continues would hang the process."""
        sys.stderr.write(f"{self.error}\n{self._name}: its GPU streams cannot be released; ending the process\n")
        sys.stderr.flush()
        os._exit(70)


def _format_flag(value: int) -> str:
    return f"identity={value & 0xFFFFFFFF:08x}" if value else "not raised"


class _GraphCalls:
    """Progress of the calls in CUDA graphs."""

    def __init__(self, poll_s: float) -> None:
        self.begun = self.ended = 0
        self._poll_s = poll_s
        self._seen: object = None
        self._since = time.monotonic()
        self._check_at = self._since

    @property
    def idle(self) -> bool:
        return self.begun == self.ended

    def next_check_s(self) -> float:
        return max(0.0, self._check_at - time.monotonic())

    def check(self, head: Head | None, hurry: bool) -> float:
        """Note the words that were read. Returns for how many seconds nothing has changed during a call."""
        now = time.monotonic()
        if head is not None:
            self.begun, self.ended = head.begun, head.ended
            seen = head.begun, head.ended, tuple(head.flags)
            if seen != self._seen or self.idle:
                self._seen, self._since = seen, now
        self._check_at = now + (_POLL_S if hurry and not self.idle else self._poll_s)
        return now - self._since
