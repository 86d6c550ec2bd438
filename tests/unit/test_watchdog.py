"""The watchdog of GPU streams, without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

import pytest

from sf_xfuser.transport.base import CallMismatch, TransportError
from sf_xfuser.transport.gpu.watchdog import AwaitedFlag, Head, PendingCall, RoundWait, Watchdog

VALUE = 0x3F800000 << 32 | 0xAB
FIRST, SECOND = (RoundWait(3 + n, (AwaitedFlag(1, n, n), AwaitedFlag(2, n, 2 + n))) for n in (0, 1))


class WatchedRank:
    """Rank 4 of ranks 4, 5 and 6. In its call it waits for two rounds, each from both peers. ``flags``: two of rank 5,
    then two of rank 6. ``events``: the watchdog's actions in order."""

    def __init__(self, flags=(0, 0, 0, 0), aborted=False, timeout_s=0.2, never_released=False):
        self.events: list[str] = []
        self.completed = threading.Event()
        self.suspects = ()
        self.peer_failure, self.late_ranks = None, ""
        self.head = Head(flags, aborted)

        def notify_peers(suspects):
            self.suspects = suspects
            self.events.append("notified")

        def release(calls):
            self.events.append("released")
            self.released = [each for call in calls for each in call.rounds()]
            if not never_released:
                self.completed.set()

        self.watchdog = Watchdog(
            [4, 5, 6],
            0,
            timeout_s,
            on_start=lambda: self.events.append("started"),
            abort_reason=lambda peers: self.peer_failure,
            late_ranks=lambda: self.late_ranks,
            read_head=lambda: self.head,
            notify_peers=notify_peers,
            release=release,
        )

    def call(self, *waits, done=True):
        call = PendingCall(
            7, VALUE, [(each,) for each in waits or (FIRST, SECOND)], self.completed.is_set if done else None
        )
        self.watchdog.watch(call)
        return call

    def end_graphs(self):
        self.head = Head([0], False)
        self.watchdog.close()
        self.watchdog._thread.join(5)
        assert not self.watchdog._thread.is_alive()

    def error(self, limit_s=5.0):
        """The watchdog's error, as text, once no call is pending."""
        deadline = time.monotonic() + limit_s
        while not self.watchdog.idle and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.watchdog.idle
        return str(self.watchdog.error)


def test_the_first_late_round_is_named_and_peers_are_notified_before_waits_are_released():
    watched = WatchedRank(flags=(VALUE, 0, VALUE, 0))
    watched.call()
    message = watched.error()
    assert re.search(r"rank 4 on \S+: no data from rank 5 \(nor from rank\(s\) \[6\]\) in round 4: waited", message)
    assert "Expected flag 1 of call 7: identity=000000ab, got: not raised" in message
    assert watched.events[:3] == ["started", "notified", "released"] and watched.suspects == [1, 2]
    assert watched.released == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("flags", "late_ranks", "factor"),
    [((VALUE, 0, VALUE, 0), "", 1), ((VALUE, VALUE, 0, 0), "rank 6", 5), ((VALUE, 0, VALUE, 0), "rank 7", 5)],
)
def test_a_rank_that_has_not_started_the_call_has_five_timeouts(flags, late_ranks, factor):
    """A peer that has raised no flag, or another rank that a peer waits for. Not a rank that does not answer."""
    watched = WatchedRank(flags=flags, timeout_s=0.3)
    watched.late_ranks = late_ranks
    started = time.monotonic()
    watched.call()
    watched.error()
    assert 0.3 * factor <= time.monotonic() - started < 0.3 * (factor + 1)


def test_a_flag_of_another_call_is_detected_before_the_timeout():
    watched = WatchedRank(flags=(0, 0, VALUE + 1, 0), timeout_s=4)
    watched.call()
    message = watched.error()
    assert "no data from rank 6 (nor from rank(s) [5]) in round 3: it makes another call" in message
    assert "identity=000000ab, got: identity=000000ac" in message
    assert isinstance(watched.watchdog.error, CallMismatch)


def test_waits_of_a_replay_are_counted():
    """A replay resets flags after each wait."""
    watched = WatchedRank()
    watched.head = Head((0, 0, 0, 0), False, checked=12)
    watched.call().checked = 11
    assert "rank 5 (nor from rank(s) [6]) in round 4" in watched.error()


def test_progress_restarts_the_timeout():
    """Of the peers, or of the host, which waits for more rounds."""
    watched = WatchedRank(flags=(VALUE, 0, VALUE, 0), timeout_s=0.4)
    call = watched.call(FIRST, done=False)
    time.sleep(0.3)
    call.waits.append((SECOND,))
    time.sleep(0.3)
    watched.head = Head((VALUE, VALUE, VALUE, 0), False)
    time.sleep(0.3)
    assert watched.watchdog.error is None
    call.done = watched.completed.is_set
    assert "no data from rank 6 in round 4" in watched.error()


def test_a_host_that_has_enqueued_no_wait_is_not_late():
    watched = WatchedRank(timeout_s=0.05)
    call = watched.call(RoundWait(0, ()), done=False)
    call.waits.clear()
    time.sleep(0.5)
    call.done = lambda: True
    assert watched.error() == "None"


def test_a_call_that_ends_while_its_flags_are_read_is_no_failure():
    """The end of a call resets its flags."""
    watched = WatchedRank()

    def read_head():
        threading.Timer(0.003, watched.completed.set).start()
        return Head((0, 0, 0, 0), False)

    watched.watchdog._read_head, watched.watchdog._patience.exceeded = read_head, lambda *call: "0 s"
    watched.call()
    assert watched.error() == "None" and "notified" not in watched.events


def test_an_aborted_peer_is_detected_before_the_timeout():
    watched = WatchedRank(aborted=True, timeout_s=60)
    watched.call()
    assert "a rank of its group aborted" in watched.error()


def test_a_control_plane_failure_ends_a_wait_before_the_timeout():
    watched = WatchedRank(timeout_s=60)
    watched.peer_failure = "rank 7 failed: KeyError"
    watched.call()
    assert "rank 7 failed: KeyError" in watched.error()


def test_calls_that_complete_in_time_are_no_failure():
    watched = WatchedRank(timeout_s=1.0)
    for _ in range(20):
        watched.call()
    watched.completed.set()
    assert watched.error() == "None" and watched.events == ["started"]


def test_the_end_of_a_call_is_bounded():
    watched = WatchedRank(flags=[VALUE] * 4)
    watched.call()
    assert "the end of call 7 did not complete on the GPU: waited" in watched.error()


def test_a_wait_enqueued_after_the_failure_is_released():
    watched = WatchedRank()
    watched.watchdog.fail(TransportError("first"))
    watched.watchdog.fail(TransportError("second"))
    late = watched.call(done=False)
    time.sleep(0.1)
    assert watched.events.count("released") > 1
    late.done = watched.completed.is_set
    assert watched.error() == "first"


def test_no_wait_is_released_before_peers_are_notified():
    watched = WatchedRank(timeout_s=60)
    notify_peers = watched.watchdog._notify_peers

    def notify_slowly(suspects):
        time.sleep(0.2)
        notify_peers(suspects)

    watched.watchdog._notify_peers = notify_slowly
    watched.call()
    watched.watchdog.fail(TransportError("raised on the host thread"))
    assert watched.error() == "raised on the host thread"
    assert watched.events.index("notified") < watched.events.index("released")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (Head([0], False, 5, 4), "waited"),
        (Head([0], True, 5, 4), "a rank of its group aborted, or made another call"),
        (Head([0], True, 5, 5), "a rank of its group aborted, or made another call"),
    ],
)
def test_calls_in_graphs_are_bounded(head, reason):
    """With no call of the host pending. A replay after the failure is released too."""
    watched = WatchedRank(timeout_s=0.05)
    watched.head = Head([0], False, 4, 4)
    watched.watchdog.watch_graphs()
    time.sleep(0.5)
    assert watched.watchdog.error is None
    watched.head = head
    time.sleep(0.5)
    assert re.search(rf"calls in a CUDA graph did not complete: {reason}", str(watched.watchdog.error))
    assert f"(5 have begun, {head.ended} have ended)" in str(watched.watchdog.error)
    watched.head = Head([0], True, 5, 5)
    time.sleep(0.1)
    watched.events.clear()
    watched.head = Head([0], True, 6, 5)
    time.sleep(0.2)
    assert watched.events.count("released") > 1
    watched.end_graphs()


def test_calls_in_graphs_that_make_progress_are_no_failure():
    watched = WatchedRank(timeout_s=0.1)
    watched.watchdog.watch_graphs()
    for number in range(10):
        watched.head = Head([0], False, 5 + number, 4 + number)
        time.sleep(0.1)
    assert watched.watchdog.error is None
    watched.end_graphs()


def test_a_failing_event_query_is_a_failure():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    watched = WatchedRank()
    watched.call().done = broken
    watched.watchdog._thread.join(5)
    assert "illegal memory access" in str(watched.watchdog.error) and "notified" in watched.events


def test_waits_are_released_if_flags_cannot_be_read():
    def broken():
        raise RuntimeError("no such memory")

    watched = WatchedRank(timeout_s=60)
    watched.watchdog._read_head = broken
    watched.call()
    watched.watchdog._thread.join(5)
    assert "cannot read the GPU's state: no such memory" in str(watched.watchdog.error) and watched.completed.is_set()


def test_the_watchdog_thread_ends_after_close():
    watched = WatchedRank(timeout_s=60)
    watched.call()
    watched.watchdog.close()
    assert watched.watchdog._thread.is_alive()
    watched.completed.set()
    watched.watchdog._thread.join(5)
    assert not watched.watchdog._thread.is_alive()


def test_streams_that_cannot_be_released_end_the_process():
    program = (
        "import time; from sf_xfuser.transport.gpu import watchdog; from tests.unit.test_watchdog import WatchedRank\n"
        "watchdog._RELEASE_LIMIT_S = 0.1; watched = WatchedRank(never_released=True); watched.call(); time.sleep(20)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 70
    assert "no data from rank 5" in finished.stderr and "cannot be released" in finished.stderr
