"""How long a rank waits for its peers in a call."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR


class Patience:
    """The limits of the waits of one link. See ``CALL_TIMEOUT_FACTOR``."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._arrived_at: dict[int, float] = {}  # by peer: when its last chunk in this call arrived

    def begin_call(self) -> None:
        self._arrived_at.clear()

    def arrived(self, peer: int) -> None:
        """A chunk of ``peer`` has arrived in this call."""
        self._arrived_at[peer] = time.monotonic()

    def exceeded(self, peers: Iterable[int], started_at: float) -> str | None:
        """The limit that a wait for ``peers`` has exceeded, as text, or None. ``started_at``: ``time.monotonic``."""
        for peer in peers:
            arrived_at = self._arrived_at.get(peer)
            limit_s = self._timeout_s * (CALL_TIMEOUT_FACTOR if arrived_at is None else 1)
            if time.monotonic() >= max(started_at, arrived_at or 0.0) + limit_s:
                first = f", {CALL_TIMEOUT_FACTOR} x --sp-timeout, since nothing of this call had arrived"
                return f"{limit_s:g} s" + (first if arrived_at is None else "")
        return None
