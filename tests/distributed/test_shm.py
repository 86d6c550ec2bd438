"""Shared-memory windows between real ranks of one host: bitwise equality with TCP, errors, and faults
(``ranks/faults.py`` kills and stops ranks; ``test_protocol.py`` checks the protocol in every interleaving)."""

from __future__ import annotations

import json
import re
import sys

import pytest

from sf_xfuser.layout.plan import Layout
from sf_xfuser.torus import links
from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR
from sf_xfuser.transport.cpu import shm
from tests.launch import RANKS, check, reports, run, torchrun
from tests.ranks import faults

REASON = shm.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

EACH = 4
# case -> what each rank prints
CASES = {
    "bitwise_equal_to_tcp": ("equal",) * EACH,
    "random_pauses": ("3000 calls equal",) * EACH,
    "changing_shapes_in_a_single_half": ("300 calls equal",) * EACH,
    "inference_mode_first": ("equal",) * EACH,
    "memory": ("bounded",) * EACH,
    "file_mode": ("0o600",) * EACH,
    "no_name_remains": (r"names: \[\]",) * EACH,
    "stale_segments_are_removed": (r"removed 1 of 9, kept .*: \(True, True\)",) * EACH,
    "timeout": (
        *[r"TransportError: .*from rank 3 in round 5: .*Expected flag \(call=1, chunk=1\), got \(call=0"] * 3,
        "silent",
    ),
    "peer_aborts": (
        r"TransportError: .*no data from rank 3 in round 0: waited 0\.",
        *[r"TransportError: .*no data from rank 0 in round 0: it has aborted"] * 2,
        "silent",
    ),
    "peer_is_ahead": (
        *[r"TransportError: .*rank 3 in round 0: it is more than one call ahead.*\(call=1, .*got \(call=3"] * 3,
        "silent",
    ),
    "attention_fails_on_one_rank": (
        r"TransportError: rank 1 on \S+ failed: MemoryError: planted",
        "MemoryError: planted",
        *[r"TransportError: rank 1 on \S+ failed: MemoryError: planted"] * 2,
    ),
    "trial_fails": (r"TransportError: .*planted",) * EACH,
    "use_after_close": (r"TransportError: rank \d: the shm transport was closed",) * EACH,
    "different_windows": (r"TransportUnavailable: .* rank 0: requests 4194304 .*rank 2: requests 1048576",) * EACH,
    "too_little_memory": (r"TransportUnavailable: .* (rank 0|every rank): /dev/shm has \d+ .*--shm-size",) * EACH,
    "auto_with_too_little_memory": (r"tcp, .*fastest of tcp .*; shm cannot be used: rank 2: /dev/shm",) * EACH,
    "auto_selects_again": (r"tcp, the only one left, since shm .*; --sp-transport auto: dropping shm",) * EACH,
    "auto_without_memory": (r"tcp, the only available one; shm cannot be used: rank 2: .* needs 8192",) * EACH,
    "no_shared_memory": (r"ValueError: --sp-transport shm needs all ranks on one host, .*elsewhere",) * EACH,
    "selected_by_auto": ("tcp",) * EACH,
}  # fmt: skip


@pytest.fixture(scope="module")
def output() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    cases = [case for case in CASES if case != "selected_by_auto"]
    return reports(torchrun("shm_ranks.py", *cases, nproc=EACH, timeout=300).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_windows(case, output):
    check(case, output, CASES[case])


@pytest.mark.slow
def test_ten_thousand_calls_with_random_pauses():
    output = torchrun("shm_ranks.py", "random_pauses", nproc=EACH, timeout=300, env={"NUM_CALLS": "10000"}).output
    check("random_pauses", reports(output), ["10000 calls equal"] * EACH)


def test_shm_is_used_if_ranks_share_memory():
    layout = Layout(torus=2, ulysses=2, ring_across=1, ring_inside=1)
    rank_info = links.RankInfo(layout, range(4), 0, 1.0)

    def ways_for(names, wanted):
        """Ways to connect ranks of these memory domains; "-" is a rank without shared memory."""
        domains = [links.MemoryDomain(name, "no /dev/shm" if name == "-" else None) for name in names]
        return list(links.candidates(wanted, rank_info, links.shared_links(wanted, domains, layout), {}))

    assert ways_for("aaaa", "auto") == ["shm", "tcp"]
    assert ways_for("aabb", "auto") == ["shm inside, tcp across", "tcp"]
    for names, wanted in (("abba", "auto"), ("aa--", "auto"), ("----", "auto"), ("aaaa", "tcp")):
        assert ways_for(names, wanted) == ["tcp"]
    assert ways_for("aaaa", "shm") == ["shm"]
    for names, text in (("aabb", "'b'"), ("aaa-", "'no /dev/shm'")):
        with pytest.raises(ValueError, match=rf"shm needs all ranks on one host, .*{text}"):
            ways_for(names, "shm")
    alone = Layout(torus=2, ulysses=1, ring_across=1, ring_inside=1)
    assert links.shared_links("auto", [links.MemoryDomain("a"), links.MemoryDomain("b")], alone) == []


FAULTS = [f"shm:kill:{rank}:{where}:{3 * rank + n}" for rank in range(4) for n, where in enumerate(faults.WHERE)]
FAULTS += ["shm:stop:1:put:4", "shm:stop:2:read:7", "tcp:kill:1:attend:5", "tcp:stop:2:attend:6"]
FAULTS += [f"{kind}:kill:{n}:{faults.WHERE[n]}:{5 * n}" for kind in ("ring", "alltoall", "mixed") for n in range(4)]
FAULTS += ["shm:kill:2:attend:3", "mixed:kill:1:attend:2", "ring:stop:0:flag:5", "mixed:stop:3:wait:3"]


def test_a_rank_killed_while_windows_grow_leaves_nothing():
    """The others wait in a gather, with five times the timeout, and are notified before that."""
    output = run([sys.executable, str(RANKS / "faults.py"), "shm:kill:1:grow:0"], timeout=100).output
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert result["left"] == [] and result["statuses"] == [3, -9, 3, 3]
    for report in (result["errors"][rank] for rank in (0, 2, 3)):
        assert re.match(r"rank 1 on \S+ is gone", report["error"]), result
        assert report["after_s"] < faults.TIMEOUT_S["kill"], result


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """The result of each scenario, from one process."""
    lines = run([sys.executable, str(RANKS / "faults.py"), *FAULTS], timeout=300).output.splitlines()
    return {result["scenario"]: result for result in map(json.loads, (x for x in lines if x.startswith("{")))}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_survivor_raises_in_time_and_nothing_is_left(fault, results):
    """Every error names the rank at fault first. If all ranks live, they reconnect and the next call succeeds."""
    result = results[fault]
    _, action, victim, *_ = fault.split(":")
    assert result["left"] == []
    assert result["statuses"] == [-9 if action == "kill" and str(rank) == victim else 3 for rank in range(4)], result
    for rank, report in enumerate(result["errors"]):
        if action == "kill" and str(rank) == victim:
            continue
        limit_s = 1.5 if action == "kill" else (1 + CALL_TIMEOUT_FACTOR) * faults.TIMEOUT_S["stop"] + 3
        assert report["after_s"] < limit_s, result
        named = " is gone" if action == "kill" else "( did not|, which coordinates the group, does not) answer"
        assert str(rank) == victim or re.match(rf"rank {victim} on [^ ,]+{named}", report["error"]), result
        if action == "stop":
            assert report["next_call"] == "equal", result
