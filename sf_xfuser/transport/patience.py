"""How long a rank waits for its peers in a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR


class Patience:
    """The limits of the waits of one link. ``late_ranks()``: as ``ControlPlane.late_ranks``.

    Each chunk must arrive within one timeout. While a rank that is alive has not started the call, the limit is
    ``CALL_TIMEOUT_FACTOR`` timeouts: for that rank's chunks, and for chunks of others that depend on them. A rank
    that has started since the last look has one more timeout."""

    def __init__(self, timeout_s: float, late_ranks: Callable[[], str]) -> None:
        self._timeout_s, self._late_ranks = timeout_s, late_ranks
        self._arrived_at: dict[int, float] = {}  # by peer: when its last chunk in this call arrived
        self._late, self._late_at = False, 0.0  # whether a rank was late at the last look, and when that look was

    def begin_call(self) -> None:
        self._arrived_at.clear()
        self._late = False

    def arrived(self, peer: int, at: float | None = None) -> None:
        """A chunk of ``peer`` has arrived in this call, now or ``at`` this time (``time.monotonic``)."""
        self._arrived_at[peer] = time.monotonic() if at is None else at

    def exceeded(self, peers: Iterable[int], started_at: float) -> str | None:
        """The limit that a wait for ``peers`` has exceeded, as text, or None. ``started_at``: ``time.monotonic``. Takes
        a second at most, once per timeout."""
        for peer in peers:
            now, arrived_at = time.monotonic(), self._arrived_at.get(peer)
            waited_s = now - max(started_at, arrived_at or 0.0)
            if waited_s >= CALL_TIMEOUT_FACTOR * self._timeout_s:
                return f"{CALL_TIMEOUT_FACTOR * self._timeout_s:g} s, {CALL_TIMEOUT_FACTOR} x --sp-timeout"
            if min(waited_s, now - self._late_at) >= self._timeout_s:
                was_late, self._late, self._late_at = self._late, bool(self._late_ranks()), now
                if not (self._late or was_late):
                    return f"{self._timeout_s:g} s"
        return None
