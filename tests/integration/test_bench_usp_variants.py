"""xDiT's own USP as variants of a benchmark: correct in every configuration, alternating in one process group."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from sf_xfuser.layout.usp_layouts import XditConfig, legal_configs
from tests.launch import records, torchrun


def test_legal_configs():
    assert [str(config) for config in legal_configs(8, 2, 24)] == [
        "ulysses=8 ring=1",
        "ulysses=4 ring=2 allgather",
        "ulysses=4 ring=2 alltoall",
        "ulysses=2 ring=4 allgather",
        "ulysses=2 ring=4 alltoall",
        "ulysses=1 ring=8 allgather",
        "ulysses=1 ring=8 alltoall",
    ]
    assert {config.ulysses_degree for config in legal_configs(8, 2, 6)} == {2, 1}
    assert {config.ulysses_degree for config in legal_configs(8, 2, 8, 4)} == {4, 2, 1}  # KV stays compact
    assert {config.ulysses_degree for config in legal_configs(8, 2, 7)} == {1}
    # Flat Ulysses and flat Ring have no placement.
    mapped = legal_configs(8, 2, 24, placement="machines-first")
    assert {config.ulysses_degree for config in mapped} == {4, 2}
    assert legal_configs(4, 1, 24, placement="machines-first") == []
    with pytest.raises(ValueError, match="8 ranks cannot be split into machines of 3"):
        legal_configs(8, 3, 24)


def test_groups_of_a_config():
    degrees = {"ulysses_degree": 4, "ring_degree": 2}
    assert XditConfig(**degrees).groups(4, 2) == (
        [(0, 1, 2, 3), (4, 5, 6, 7)],
        [(0, 4), (1, 5), (2, 6), (3, 7)],
    )
    assert XditConfig(**degrees, placement="machines-first").groups(4, 2) == (
        [(0, 2, 4, 6), (1, 3, 5, 7)],
        [(0, 1), (2, 3), (4, 5), (6, 7)],
    )
    with pytest.raises(ValueError, match="describes 8 ranks, not 4"):
        XditConfig(**degrees).groups(2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        XditConfig(ulysses_degree=0, ring_degree=2)
    with pytest.raises(ValueError, match="rotation 'gather'"):
        XditConfig(ulysses_degree=2, ring_degree=2, rotation="gather")


def test_variants_alternate_and_equal_one_process():
    output = torchrun("bench_usp_variants.py", nproc=4).output
    seen = defaultdict(list)
    for _, _, record in records(output):
        seen[record["heads"], record["kv_heads"], record["config"]].append(record)

    mapped = ["ulysses=2 ring=2 allgather machines-first", "ulysses=2 ring=2 alltoall machines-first"]
    rings = ["ulysses=2 ring=2 allgather", "ulysses=2 ring=2 alltoall", "ulysses=1 ring=4 allgather",
             "ulysses=1 ring=4 alltoall"]  # fmt: skip
    plain = ["ulysses=4 ring=1", *rings, *mapped]
    expected = {(8, 8, name) for name in plain} | {(6, 6, name) for name in [*rings, *mapped]}
    assert set(seen) == expected | {(8, 4, name) for name in plain}
    for case, calls in seen.items():
        assert len(calls) == 8, case  # twice on each of four ranks
        ring_degree = int(re.search(r"ring=(\d)", case[2])[1])
        for record in calls:
            assert record["error"] < 2e-6, record
            assert record["kernels"] == ring_degree, record  # every local attention call is timed, in all variants
            assert record["kernels_in_order"] and record["repeats"], record
