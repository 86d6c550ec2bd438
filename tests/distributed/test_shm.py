"""Shared-memory windows between real ranks of one host: the same bits as over TCP, and what is said when something goes
wrong. (``test_protocol.py`` has the argument; ``ranks/faults.py`` kills and stops ranks.)"""

from __future__ import annotations

import json
import re
import sys

import pytest

from sf_xfuser.layout.plan import Layout
from sf_xfuser.torus import links as links
from sf_xfuser.transport.cpu import shm
from tests.launch import RANKS, check, reports, run, torchrun
from tests.ranks import faults

REASON = shm.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

EACH = 4
# case -> what ranks 0 to 3 print
CASES = {
    "the_same_bits_as_over_tcp": ("equal",) * EACH,
    "chaos": ("3000 calls equal",) * EACH,
    "shapes_that_change_in_a_single_half": ("300 calls equal",) * EACH,
    "first_in_inference_mode": ("equal",) * EACH,
    "memory": ("as small as they should be",) * EACH,
    "only_the_user_may_open_it": ("0o600",) * EACH,
    "no_name_is_left": (r"names: \[\]",) * EACH,
    "what_the_dead_left_is_removed": (r"removed 1 of 9, kept .*: \(True, True\)",) * EACH,
    "nothing_comes": (
        *[r"TransportError: .*from rank 3 in round 5: .*Expected flag \(call=1, chunk=1\), got \(call=0"] * 3,
        "silent",
    ),
    "one_gives_up": (
        r"TransportError: .*nothing came from rank 3 in round 0: waited 1\.",
        *[r"TransportError: .*nothing came from rank 0 in round 0: it gave up"] * 2,
        "silent",
    ),
    "one_is_ahead": (
        *[r"TransportError: .*rank 3 in round 0: it is calls ahead.*\(call=1, chunk=1\), got \(call=3"] * 3,
        "silent",
    ),
    "attention_fails_on_one_rank": (
        r"TransportError: rank 1 on \S+ failed: MemoryError: as it should",
        "MemoryError: as it should",
        *[r"TransportError: rank 1 on \S+ failed: MemoryError: as it should"] * 2,
    ),
    "a_transport_cannot_be_tried": (r"TransportError: .*as it should",) * EACH,
    "use_after_close": (r"TransportError: rank \d: the shm transport was closed",) * EACH,
    "different_windows": (r"Unusable: shm cannot be used: rank 0: wants 4194304 .*rank 2: wants 1048576",) * EACH,
    "too_little_memory": (r"Unusable: shm cannot be used: (rank 0|every rank): /dev/shm has \d+ .*--shm-size",) * EACH,
    "auto_does_without_too_little_memory": (r"tcp, .*fastest of tcp .*; shm cannot be used: rank 2: /dev/shm",) * EACH,
    "auto_chooses_again": (r"tcp, the only one left, since shm .*; --sp-transport auto: another one than shm",) * EACH,
    "auto_does_without_any_memory": (r"tcp, the only one here; shm cannot be used: rank 2: .* needs 8192",) * EACH,
    "shared_memory_is_not_there": (r"ValueError: --sp-transport shm needs ranks that share .*elsewhere",) * EACH,
    "what_auto_takes": ("tcp",) * EACH,
}  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    programs = [case for case in CASES if case != "what_auto_takes"]
    return reports(torchrun("shm_ranks.py", *programs, nproc=EACH, timeout=300).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_windows(case, said):
    check(case, said, CASES[case])


@pytest.mark.slow
def test_ten_thousand_calls_with_pauses():
    output = torchrun("shm_ranks.py", "chaos", nproc=EACH, timeout=300, env={"CHAOS_EPOCHS": "10000"}).output
    check("chaos", reports(output), ["10000 calls equal"] * EACH)


def test_shared_memory_is_used_where_ranks_share_it():
    layout = Layout(torus=2, ulysses=2, ring_across=1, ring_inside=1)
    rank_info = links.RankInfo(layout, range(4), 0, 1.0)

    def of(names, wanted):
        """MemoryDomain names; - for a rank that cannot."""
        domains = [links.MemoryDomain(name, "no /dev/shm" if name == "-" else None) for name in names]
        return list(links.ways(wanted, rank_info, links.shared_links(wanted, domains, layout), {}))

    assert of("aaaa", "auto") == ["shm", "tcp"]
    assert of("aabb", "auto") == ["shm inside, tcp across", "tcp"]
    assert of("abba", "auto") == of("aa--", "auto") == of("----", "auto") == of("aaaa", "tcp") == ["tcp"]
    assert of("aaaa", "shm") == ["shm"]
    for names, told in (("aabb", "'b'"), ("aaa-", "'no /dev/shm'")):
        with pytest.raises(ValueError, match=rf"shm needs ranks that share the memory of one host; .*{told}"):
            of(names, "shm")
    alone = Layout(torus=2, ulysses=1, ring_across=1, ring_inside=1)
    assert links.shared_links("auto", [links.MemoryDomain("a"), links.MemoryDomain("b")], alone) == []


FAULTS = [f"shm:kill:{rank}:{where}:{3 * rank + n}" for rank in range(4) for n, where in enumerate(faults.WHERE)]
FAULTS += ["shm:stop:1:put:4", "shm:stop:2:read:7", "tcp:kill:1:attend:5", "tcp:stop:2:attend:6"]
FAULTS += [f"{kind}:kill:{n}:{faults.WHERE[n]}:{5 * n}" for kind in ("ring", "alltoall", "mixed") for n in range(4)]
FAULTS += ["shm:kill:2:attend:3", "mixed:kill:1:attend:2", "ring:stop:0:flag:5", "mixed:stop:3:wait:3"]


def test_a_rank_that_dies_while_windows_grow_leaves_nothing():
    """Ranks that agree would wait for five time-outs, but hear of it."""
    output = run([sys.executable, str(RANKS / "faults.py"), "shm:kill:1:grow:0"], timeout=100).output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert found["left"] == [] and found["statuses"] == [3, -9, 3, 3]
    for told in (found["told"][rank] for rank in (0, 2, 3)):
        assert re.match(r"rank 1 on \S+ is gone", told["error"]), found
        assert told["after_s"] < faults.TIMEOUT_S, found


@pytest.fixture(scope="module")
def fared() -> dict[str, dict]:
    """scenario -> how the ranks fared."""
    lines = run([sys.executable, str(RANKS / "faults.py"), *FAULTS], timeout=300).output.splitlines()
    return {found["scenario"]: found for found in map(json.loads, (x for x in lines if x.startswith("{")))}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_survivor_raises_in_time_and_nothing_is_left(fault, fared):
    """All name the rank at fault first. Where all live, ranks meet again and the next call succeeds."""
    found = fared[fault]
    _, how, victim, *_ = fault.split(":")
    assert found["left"] == []
    assert found["statuses"] == [-9 if how == "kill" and str(rank) == victim else 3 for rank in range(4)], found
    for rank, told in enumerate(found["told"]):
        if how == "kill" and str(rank) == victim:
            continue
        assert told["after_s"] < (1.5 if how == "kill" else faults.TIMEOUT_S + 4), found
        how_named = " is gone" if how == "kill" else "( did not|, which coordinates the group, does not) answer"
        assert str(rank) == victim or re.match(rf"rank {victim} on [^ ,]+{how_named}", told["error"]), found
        if how == "stop":
            assert told["again"] == "equal", found
