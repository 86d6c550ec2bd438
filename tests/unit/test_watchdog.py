"""The watchdog of GPU streams, without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.gpu.watchdog import FlagSnapshot, PendingWait, Watchdog


class WatchedRank:
    """Rank 4 of ranks 4 and 5, which waits for chunk 0 of rank 5. ``events``: the watchdog's actions in order."""

    def __init__(self, flag=0, aborted=False, timeout_s=0.2, never_released=False):
        self.events: list[str] = []
        self.completed = threading.Event()
        self.suspects = ()
        self.peer_failure = None

        def notify_peers(suspects):
            self.suspects = suspects
            self.events.append("notified")

        def release(waits):
            self.events.append("released")
            if not never_released and all(each.done is not None for each in waits):
                self.completed.set()

        self.watchdog = Watchdog(
            [4, 5],
            0,
            timeout_s,
            on_start=lambda: self.events.append("started"),
            abort_reason=lambda peers: self.peer_failure,
            read_flags=lambda: FlagSnapshot([[[0] * 3] * 2, [[0] * 3, [flag << 32 | 0xAB] * 3]], aborted),
            notify_peers=notify_peers,
            release=release,
        )

    def wait(self, **changes):
        usual = {"epoch": 7, "value": 7 << 32 | 0xAB, "round": 3, "chunks": ((1, 0),), "done": self.completed.is_set}
        wait = PendingWait(**usual | changes)
        self.watchdog.watch(wait)
        return wait

    def error(self, limit_s=5.0):
        """The watchdog's error, as text, once no wait is pending."""
        deadline = time.monotonic() + limit_s
        while self.watchdog._pending and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.watchdog._pending
        return str(self.watchdog.error)


def test_a_late_chunk_is_named_and_peers_are_notified_before_the_wait_is_released():
    watched = WatchedRank(flag=6)
    watched.wait()
    message = watched.error()
    assert re.search(r"rank 4 on \S+: no data from rank 5 in round 3: waited [\d.]+ s", message)
    assert "Expected flag of chunk 0: call=7, identity=000000ab, got: call=6, identity=000000ab" in message
    assert watched.events[:3] == ["started", "notified", "released"] and watched.suspects == [1]


def test_an_aborted_peer_is_detected_before_the_timeout():
    watched = WatchedRank(aborted=True, timeout_s=60)
    watched.wait()
    assert "a rank of its group aborted" in watched.error()


def test_a_control_plane_failure_ends_a_wait_before_the_timeout():
    watched = WatchedRank(timeout_s=60)
    watched.peer_failure = "rank 7 failed: KeyError"
    watched.wait()
    assert "rank 7 failed: KeyError" in watched.error()


def test_waits_that_complete_in_time_are_no_failure():
    watched = WatchedRank(timeout_s=1.0)
    for _ in range(20):
        watched.wait()
    watched.wait(chunks=())
    watched.completed.set()
    assert watched.error() == "None" and watched.events == ["started"]


def test_the_end_of_a_call_is_bounded():
    watched = WatchedRank()
    watched.wait(chunks=())
    assert "the end of call 7 did not complete on the GPU: waited" in watched.error()


def test_a_wait_enqueued_after_the_failure_is_released():
    watched = WatchedRank()
    watched.watchdog.fail(TransportError("first"))
    watched.watchdog.fail(TransportError("second"))
    late = watched.wait(done=None)
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
    watched.wait()
    watched.watchdog.fail(TransportError("raised on the host thread"))
    assert watched.error() == "raised on the host thread"
    assert watched.events.index("notified") < watched.events.index("released")


def test_a_failing_event_query_is_a_failure():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    watched = WatchedRank()
    watched.wait(done=broken)
    watched.watchdog._thread.join(5)
    assert "illegal memory access" in str(watched.watchdog.error) and "notified" in watched.events


def test_waits_are_released_if_flags_cannot_be_read():
    def broken():
        raise RuntimeError("no such memory")

    watched = WatchedRank(timeout_s=60)
    watched.watchdog._read_flags = broken
    watched.wait()
    watched.watchdog._thread.join(5)
    assert "cannot read the GPU's state: no such memory" in str(watched.watchdog.error) and watched.completed.is_set()


def test_the_watchdog_thread_ends_after_close():
    watched = WatchedRank(timeout_s=60)
    watched.wait()
    watched.watchdog.close()
    assert watched.watchdog._thread.is_alive()
    watched.completed.set()
    watched.watchdog._thread.join(5)
    assert not watched.watchdog._thread.is_alive()


def test_streams_that_cannot_be_released_end_the_process():
    program = (
        "import time; from sf_xfuser.transport.gpu import watchdog; from tests.unit.test_watchdog import WatchedRank\n"
        "watchdog._RELEASE_LIMIT_S = 0.1; watched = WatchedRank(never_released=True); watched.wait(); time.sleep(20)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 70
    assert "no data from rank 5" in finished.stderr and "cannot be released" in finished.stderr
