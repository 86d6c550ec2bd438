"""Bounds waits that are enqueued on a GPU stream. The host cannot interrupt a stream, so a thread watches the waits.

The transport fails when a wait exceeds the timeout, when a peer aborts, or when the control plane reports a failure.
The thread then acts in this order, so that no peer accepts an invalid chunk:

1. It notifies the peers, which poisons their results.
2. It releases the waits, so that the streams continue.
3. The next call on this rank raises the error.

Work that is already enqueued runs on undefined memory. ``OneSided.poison`` turns its result into NaN.
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

_POLL_S = 0.01  # interval between checks of the oldest wait
_FLAGS_POLL_S = 1.0  # interval between reads of the flags while a wait is pending
_RELEASE_LIMIT_S = 30.0  # time limit for released streams to continue


@dataclass(eq=False)
class PendingWait:
    """A wait for ``chunks`` of one round, as (peer, chunk number of this call). Without chunks: the end of a call,
    including its sends. ``value``: the expected value of each flag, ``epoch << 32 | identity``. ``done`` is set when
    the wait is enqueued, and returns whether it has completed."""

    epoch: int
    round: int = 0
    chunks: tuple[tuple[int, int], ...] = ()
    done: Callable[[], bool] | None = None
    value: int = 0


@dataclass(frozen=True, slots=True)
class FlagSnapshot:
    """This rank's flags as [writer][epoch % 2][chunk], and whether a peer has aborted."""

    flags: Sequence[Sequence[Sequence[int]]]
    aborted: bool


class Watchdog:
    """Watches the waits of the rank at ``position`` of ``members``. Thread-safe. Callbacks:

    ``abort_reason(peers)``: why a wait for these peers cannot complete, or None.
    ``on_start()``: called first on the watchdog's thread.
    ``read_flags()``: the current flags, or None if they cannot be read.
    ``notify_peers(suspects)``: report the failure to the peers, suspects last. Bounded.
    ``release(waits)``: write the flags that these waits expect. Called repeatedly until they complete.
    """

    def __init__(
        self,
        members: Sequence[int],
        position: int,
        timeout_s: float,
        *,
        abort_reason: Callable[[Collection[int]], str | None],
        on_start: Callable[[], object],
        read_flags: Callable[[], FlagSnapshot | None],
        notify_peers: Callable[[Sequence[int]], object],
        release: Callable[[Sequence[PendingWait]], object],
    ) -> None:
        self.error: TransportError | None = None
        self._members, self._timeout_s = members, timeout_s
        self._name = f"rank {members[position]} on {socket.gethostname()}"
        self._abort_reason, self._on_start, self._read_flags = abort_reason, on_start, read_flags
        self._notify_peers, self._release = notify_peers, release
        self._changed = threading.Condition()
        self._pending: deque[PendingWait] = deque()
        self._notified = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sf-xfuser watchdog", daemon=True)
        self._thread.start()

    def watch(self, wait: PendingWait) -> None:
        """Call before the wait is enqueued, so that a wait enqueued after a failure is released too."""
        with self._changed:
            self._pending.append(wait)
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
        """Whether no wait is pending."""
        return not self._pending

    def close(self) -> None:
        """End the thread once no wait is pending."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._on_start()
            while (wait := self._oldest()) is not None:
                self._watch_one(wait)
                self._pending.popleft()
        except Exception as problem:
            self.fail(TransportError(f"{self._name}: cannot read the GPU's state: {problem}"))
            self._release_all()

    def _release_all(self) -> None:
        """Release every wait, since no thread watches them any more."""
        deadline = time.monotonic() + _RELEASE_LIMIT_S
        with contextlib.suppress(Exception):  # a failed GPU ends its waits itself
            while any(wait.done is None or not wait.done() for wait in tuple(self._pending)):
                self._release(tuple(self._pending))
                if time.monotonic() >= deadline:
                    self._exit_process()
                time.sleep(_POLL_S)

    def _oldest(self) -> PendingWait | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed)
            return self._pending[0] if self._pending else None

    def _watch_one(self, wait: PendingWait) -> None:
        """Return once the wait has completed. Watching the oldest suffices: waits complete in enqueue order."""
        started = checked = time.monotonic()
        released_at: float | None = None
        while wait.done is None or not wait.done():
            now = time.monotonic()
            if self._notified.is_set():
                released_at = released_at or now
                self._release(tuple(self._pending))
                if now - released_at >= _RELEASE_LIMIT_S:
                    self._exit_process()
            elif self.error is None and (now - checked >= _FLAGS_POLL_S or now - started >= self._timeout_s):
                checked = now
                self._fail_if_aborted(wait, now - started)
            time.sleep(_POLL_S)

    def _fail_if_aborted(self, wait: PendingWait, waited_s: float) -> None:
        snapshot = self._read_flags()
        reason = self._abort_reason([peer for peer, _ in wait.chunks])
        if reason is None and snapshot is not None and snapshot.aborted:
            reason = "a rank of its group aborted"
        if reason is None and waited_s >= self._timeout_s:
            reason = f"waited {waited_s:.1f} s"
        if reason is None:
            return
        late = [
            (peer, chunk, flag)
            for peer, chunk in wait.chunks
            if (flag := None if snapshot is None else snapshot.flags[peer][wait.epoch % 2][chunk]) != wait.value
        ]
        self.fail(TransportError(self._message(wait, late, reason)), [peer for peer, _, _ in late])

    def _message(self, wait: PendingWait, late: Sequence[tuple[int, int, int | None]], reason: str) -> str:
        if not late:
            stage = f"round {wait.round}" if wait.chunks else "the end"
            return f"{self._name}: {stage} of call {wait.epoch} did not complete on the GPU: {reason}"
        peer, chunk, flag = late[0]
        others = f" (nor from rank(s) {sorted({self._members[p] for p, *_ in late[1:]})})" if late[1:] else ""
        return (
            f"{self._name}: no data from rank {self._members[peer]}{others} in round {wait.round}: {reason}. "
            f"Expected flag of chunk {chunk}: {_format_flag(wait.value)}, got: "
            f"{'unreadable' if flag is None else _format_flag(flag)}. See that rank's log; if it is only slow, raise "
            "--sp-timeout"
        )

    def _exit_process(self) -> None:
        """Synchronizing with a stream that never continues would hang the process."""
        sys.stderr.write(f"{self.error}\n{self._name}: its GPU streams cannot be released; ending the process\n")
        sys.stderr.flush()
        os._exit(70)


def _format_flag(flag: int) -> str:
    return f"call={flag >> 32}, identity={flag & 0xFFFFFFFF:08x}"
