"""The control plane of a group: values, failures and deaths between real ranks, and the store that it starts from."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import pytest

from sf_xfuser.transport.control_plane import _STRANGERS, Greeter
from sf_xfuser.transport.rendezvous import bounded
from tests.launch import check, reports, torchrun

GONE = r"rank 1 on \S+ is gone: its process ended.* \(at once\)"
# case -> what ranks 0 to 3 print
CASES = {
    "values": ("right",) * 4,
    "large_values": ("True",) * 4,
    "another_topic": (
        r"GroupError: ranks make different calls \(.*rank 3 on \S+ is at 'dinner'; rank 2 on \S+ is at 'lunch'\).*",
    ) * 4,
    "nobody_comes": (r"GroupError: rank 2 on \S+ did not come to 'dinner', for which the other ranks wait.*",) * 4,
    "first_reason_stays": (r"rank 3 on \S+ failed: KeyError: 'it'",) * 4,
    "who_makes_no_call": (
        r"rank 1 on \S+ is in no call, while the other ranks wait for it .*",
        "nothing|rank 1 on .*",
        *[r"rank 1 on \S+ is in no call, while the other ranks wait for it .*"] * 2,
    ),
    "strangers": ("right",) * 4,
    "one_closes": (*[r"GroupError: rank 2 on \S+ has closed its mesh.*"] * 2, "closed", "GroupError: rank 2 on .*"),
}  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("control.py", *CASES, nproc=4, timeout=120).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_four_ranks(case, said):
    check(case, said, [rf"({expected})\Z" for expected in CASES[case]])


def test_a_forked_child_that_outlives_its_parent_hides_nothing():
    case = "a_forked_child_hides_nothing"
    output = torchrun("control.py", case, nproc=4, timeout=60, expect_failure=True).output
    check(case, reports(output), [GONE, "gone", GONE, GONE])


def test_a_store_that_does_not_answer_is_not_waited_for():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"waiting: the store of torch.distributed did not answer within 0.2 s"):
        bounded(lambda: time.sleep(5), 0.2, "waiting")
    assert time.monotonic() - started < 2
    assert bounded(lambda: "value", 1.0, "waiting") == "value"
    with pytest.raises(KeyError):
        bounded(lambda: {}["missing"], 1.0, "waiting")


def test_the_oldest_stranger_speaks_while_it_makes_room():
    with ExitStack() as open_links, socket.create_server(("127.0.0.1", 0), backlog=_STRANGERS) as listener:
        greeter = Greeter(listener, 4)
        connections = []
        for _ in range(_STRANGERS):
            connections.append(open_links.enter_context(socket.create_connection(listener.getsockname())))
            assert greeter.poll(1.0) == []
        connections.append(open_links.enter_context(socket.create_connection(listener.getsockname())))
        connections[0].sendall(b"no")
        connections[-1].sendall(b"here")
        found = []
        while not found:
            found = greeter.poll(1.0)
        assert [said for _, said in found] == [b"here"]
        found[0][0].close()
        greeter.close()
