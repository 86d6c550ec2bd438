"""How long a wait in a call may take."""

from __future__ import annotations

import time

from sf_xfuser.transport.patience import Patience

LIMIT_S = 0.1


def waits(patience, looks):
    """What ``exceeded`` returns for rank 1 at each of so many looks, a timeout apart."""
    started_at = time.monotonic()
    found = []
    for _ in range(looks):
        time.sleep(LIMIT_S * 1.05)
        found.append(patience.exceeded([1], started_at))
    return found


def test_a_rank_that_has_just_started_its_call_has_a_timeout_from_then():
    """Otherwise a wait would fail if it asks just after a late rank has started, before its chunk arrives."""
    answers = iter(["rank 1", "", ""])
    patience = Patience(LIMIT_S, lambda: next(answers))
    assert waits(patience, 3) == [None, None, "0.1 s"]


def test_a_rank_that_was_late_in_an_earlier_call_has_one_timeout():
    answers = iter(["rank 1", ""])
    patience = Patience(LIMIT_S, lambda: next(answers))
    assert waits(patience, 1) == [None]
    patience.begin_call()
    time.sleep(LIMIT_S)
    assert waits(patience, 1) == ["0.1 s"]


def test_a_rank_that_never_starts_has_five_timeouts():
    assert waits(Patience(LIMIT_S, lambda: "rank 1"), 5) == [None] * 4 + ["0.5 s, 5 x --sp-timeout"]
