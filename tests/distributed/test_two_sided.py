"""Links over gloo between three real ranks: data and errors."""

from __future__ import annotations

import pytest

from tests.launch import check, reports, torchrun

# case -> what each rank prints
CASES = {
    "recorded": ("all equal",) * 3,
    "late_start": ("from 1 2", "from 0 2", "from 0 1"),
    "stops": (
        r"TransportError: rank 0 on .*: receive from rank 1 failed \(round 1, .* not within 0.5 s",
        "not waiting",
        "not waiting",
    ),
    "never_starts": (
        r"TransportError: .*receive from rank 1 failed \(round 7, .* not within 2 s, 5 x --sp-timeout, since nothing",
        "not waiting",
        "not waiting",
    ),
    "another_call": (
        r"TransportError: rank 0 on .*: receive from rank 1 failed \(round 0, slot 0, 32 bytes\) \(link across",
        r"TransportError: rank 1 on .*: receive from rank 0 failed \(round 0, slot 0, 32 bytes\) \(link across",
        "no transfer",
    ),
}


@pytest.fixture(scope="module")
def output() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("two_sided_links.py", *CASES, nproc=3, timeout=150).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_link(case, output):
    check(case, output, CASES[case])
