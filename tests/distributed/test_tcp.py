"""TCP links between three real ranks: what arrives, in which order, and what is said when something goes wrong."""

from __future__ import annotations

import pytest

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.links import wanted
from tests.launch import check, reports, torchrun

# case -> what ranks 0, 1 and 2 print
CASES = {
    "everything_arrives": ("all equal",) * 3,
    "a_later_send_waits_for_an_earlier_one": (r"after [1-9]\.", r"after [1-9]\.", r"after [1-9]\."),
    "another_call": (
        r"TransportError: rank 0 on .*: receiving round \d of exchange 0 from rank 1 failed",
        r"OtherCall: .*expected \(call's identity, .*\) \(0, 0, 2, 0, 32\) from rank 0, got \(0, 0, 1, 0, 32\)",
        "not concerned",
    ),
    "nothing_comes": (
        r"TransportError: .*nothing came from rank\(s\) \[1\] for round 7 of exchange 0 \(rank 1's last: nothing yet\) "
        r"within 2 s \(link across, tcp\)",
        "sent or not",
        "sent or not",
    ),
    "nobody_takes_it": (
        r"TransportError: .*what was to be sent was not taken within 2 s",
        "did not ask",
        "did not ask",
    ),
    "a_peer_leaves": (
        r"TransportError: .*receiving round \d of exchange 0 from rank 1 failed: the connection was closed",
        "left",
        r"TransportError: .*receiving round \d of exchange 0 from rank 1 failed: the connection was closed",
    ),
    "use_after_close": (r"TransportError: .*the link was closed",) * 3,
    "strangers": ("from 1 2", "from 0 2", "from 0 1"),
}


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("tcp_links.py", *CASES, nproc=3, timeout=150).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_link(case, said):
    check(case, said, CASES[case])


def test_tcp_is_for_cpu_ranks():
    assert wanted(TorusArgs(), "gloo") == "auto"
    assert wanted(TorusArgs(), "nccl") == "auto"
    assert wanted(TorusArgs(transport="two_sided"), "gloo") == "two_sided"
    for name in ("tcp", "shm"):
        assert wanted(TorusArgs(transport=name), "gloo") == name
        with pytest.raises(ValueError, match=rf"{name} moves tensors of CPU ranks, but .* backend is nccl"):
            wanted(TorusArgs(transport=name), "nccl")
    with pytest.raises(
        ValueError, match="--sp-transport must be one of auto, shm, tcp, two_sided, symm_mem, nvshmem, got 'rdma'"
    ):
        TorusArgs(transport="rdma")
