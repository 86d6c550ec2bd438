"""TCP links between three real ranks: data, order, and errors."""

from __future__ import annotations

import pytest

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.links import requested_transport
from tests.launch import check, reports, torchrun

# case -> what each rank prints
CASES = {
    "all_data_arrives": ("all equal",) * 3,
    "recorded": ("all equal",) * 3,
    "sends_keep_their_order": (r"after [1-9]\.", r"after [1-9]\.", r"after [1-9]\."),
    "call_mismatch": (
        r"TransportError: rank 0 on .*: receiving round \d of exchange 0 from rank 1 failed",
        r"CallMismatch: .*expected \(call identity, .*\) \(0, 0, 2, 0, 32\) from rank 0, got \(0, 0, 1, 0, 32\)",
        "no transfer",
    ),
    "late_start": ("from 1 2", "from 0 2", "from 0 1"),
    "late_for_another": ("done",) * 3,
    "stops": (
        r"TransportError: .*no data from rank\(s\) \[1\] for round 1 of exchange 1 \(rank 1's last: round 0 of "
        r"exchange 0\) within 0.5 s \(link across, tcp\)",
        "not waiting",
        "not waiting",
    ),
    "never_starts": (
        r"TransportError: .*no data from rank\(s\) \[1\] for round 7 of exchange 0 \(rank 1's last: nothing yet\) "
        r"within 2 s, 5 x --sp-timeout \(link across, tcp\)",
        "not waiting",
        "not waiting",
    ),
    "send_timeout": (
        r"TransportError: .*rank 1 did not receive the chunks sent to it within 2 s, 5 x --sp-timeout",
        "no receive",
        "no receive",
    ),
    "peer_closes": (
        r"TransportError: .*receiving round \d of exchange 0 from rank 1 failed: the connection was closed",
        "closed",
        r"TransportError: .*receiving round \d of exchange 0 from rank 1 failed: the connection was closed",
    ),
    "use_after_close": (r"TransportError: .*the link was closed",) * 3,
    "strangers": ("from 1 2", "from 0 2", "from 0 1"),
}


@pytest.fixture(scope="module")
def output() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("tcp_links.py", *CASES, nproc=3, timeout=150).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_link(case, output):
    check(case, output, CASES[case])


def test_cpu_transports_require_gloo():
    assert requested_transport(TorusArgs(), "gloo") == "auto"
    assert requested_transport(TorusArgs(), "nccl") == "auto"
    assert requested_transport(TorusArgs(transport="two_sided"), "gloo") == "two_sided"
    for name in ("tcp", "shm"):
        assert requested_transport(TorusArgs(transport=name), "gloo") == name
        with pytest.raises(ValueError, match=rf"{name} moves tensors of CPU ranks, but .* backend is nccl"):
            requested_transport(TorusArgs(transport=name), "nccl")
    allowed = "auto, shm, tcp, two_sided, symm_mem, nccl_put, nvshmem"
    with pytest.raises(ValueError, match=f"--sp-transport must be one of {allowed}, got 'rdma'"):
        TorusArgs(transport="rdma")
