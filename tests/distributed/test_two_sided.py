"""Links over gloo between three real ranks, and the host side of links over NCCL: data and errors."""

from __future__ import annotations

import pytest

from tests.launch import check, reports, torchrun

# case -> what each rank prints
CASES = {
    "recorded": ("all equal",) * 3,
    "late_start": ("from 1 2", "from 0 2", "from 0 1"),
    "late_for_another": ("done",) * 3,
    "stops": (
        r"TransportError: rank 0 on .*: receive from rank 1 failed \(round 1, .* not within 0.5 s",
        "not waiting",
        "not waiting",
    ),
    "never_starts": (
        r"TransportError: .*receive from rank 1 failed \(round 7, .* not within 2 s, 5 x --sp-timeout",
        "not waiting",
        "not waiting",
    ),
    "another_call": (
        r"TransportError: rank 0 on .*: receive from rank 1 failed \(round 0, slot 0, 32 bytes\) \(link across",
        r"TransportError: rank 1 on .*: receive from rank 0 failed \(round 0, slot 0, 32 bytes\) \(link across",
        "no transfer",
    ),
    "nccl_recorded": ("all equal, 15 all-to-alls",) * 3,
    "nccl_another_call": tuple(
        rf"got \[{first}\]; got \[nan, nan\]; CallMismatch: rank {rank} on .*: ranks have made different calls"
        for rank, first in enumerate(("1.0, 2.0", "0.0, 2.0", "0.0, 1.0"))
    ),
    "nccl_failed_rank": (
        r"\[nan, nan\]; rank 1 on .* failed: ValueError: no",
        "reported",
        r"\[nan, nan\]; rank 1 on .* failed: ValueError: no",
    ),
    "nccl_stopped_rank": (
        r"\[nan, nan\]; .*a call did not complete on the GPU within 2 s, 5 x --sp-timeout \(link across\)",
        "no call",
        r"\[nan, nan\]; .*a call did not complete on the GPU within 2 s, 5 x --sp-timeout \(link across\)",
    ),
}


@pytest.fixture(scope="module")
def output() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("two_sided_links.py", *CASES, nproc=3, timeout=150).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_link(case, output):
    check(case, output, CASES[case])
