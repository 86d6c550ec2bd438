"""The control plane between real ranks: gathers, failure reports, lost ranks; and the store that it starts from."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack, closing

import pytest

from sf_xfuser.transport.rendezvous import run_with_timeout
from sf_xfuser.transport.sockets import MAX_PENDING, Acceptor
from tests.launch import check, reports, torchrun

LOST = r"rank 1 on \S+ is gone: its process ended.* \(at once\)"
# case -> what each rank prints
CASES = {
    "gathers": ("correct",) * 4,
    "large_values": ("correct",) * 4,
    "different_topics": (
        r"GroupError: ranks make different calls \(.*rank 3 on \S+ is at 'topic b'; rank 2 on \S+ is at 'topic a'\).*",
    ) * 4,
    "missing_rank": (r"GroupError: rank 2 on \S+ did not reach 'topic b' while the other ranks wait for it.*",) * 4,
    "cause_before_timeouts": (r"rank 3 on \S+ failed: KeyError: 'x'",) * 4,
    "rank_in_no_call": (
        r"rank 1 on \S+ is in no call, while the other ranks wait for it .*",
        "no failure|rank 1 on .*",
        *[r"rank 1 on \S+ is in no call, while the other ranks wait for it .*"] * 2,
    ),
    "strangers": ("correct",) * 4,
    "closed_rank": (*[r"GroupError: rank 2 on \S+ has closed its mesh.*"] * 2, "closed", "GroupError: rank 2 on .*"),
}  # fmt: skip


@pytest.fixture(scope="module")
def output() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("control.py", *CASES, nproc=4, timeout=120).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_four_ranks(case, output):
    check(case, output, [rf"({expected})\Z" for expected in CASES[case]])


def test_a_forked_child_does_not_hide_that_its_parent_ended():
    case = "forked_child"
    output = torchrun("control.py", case, nproc=4, timeout=60, expect_failure=True).output
    check(case, reports(output), [LOST, "ended", LOST, LOST])


def test_the_wait_for_a_silent_store_is_bounded():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"waiting: waited 0.2 s, the store of torch.distributed did not answer"):
        run_with_timeout(lambda: time.sleep(5), 0.2, "waiting")
    assert time.monotonic() - started < 2
    assert run_with_timeout(lambda: "value", 1.0, "waiting") == "value"
    with pytest.raises(KeyError):
        run_with_timeout(lambda: {}["missing"], 1.0, "waiting")


def test_the_oldest_pending_connection_is_closed_even_while_it_sends():
    with ExitStack() as opened, closing(Acceptor("127.0.0.1", MAX_PENDING, handshake_bytes=4)) as acceptor:

        def connect():
            return opened.enter_context(socket.create_connection(("127.0.0.1", acceptor.port)))

        connections = []
        for _ in range(MAX_PENDING):
            connections.append(connect())
            assert acceptor.poll(1.0) == []
        connections.append(connect())
        connections[0].sendall(b"no")
        connections[-1].sendall(b"here")
        accepted = []
        while not accepted:
            accepted = acceptor.poll(1.0)
        assert [handshake for _, handshake in accepted] == [b"here"]
        accepted[0][0].close()
