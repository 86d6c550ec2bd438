"""Topology and plan, on fake machines."""

from __future__ import annotations

import sys
from fractions import Fraction
from math import gcd
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser.layout.plan import (
    UNEVEN,
    Layout,
    head_ranges,
    legal_layouts,
    make_plan,
    paper_layout,
    split_degree,
    usp_layout,
)
from sf_xfuser.layout.topology import RankFacts, Topology, probe

counts = st.integers(1, 12)


@given(counts, counts, st.integers(1, 64))
def test_paper_rule_is_the_largest_legal_degree_spread_across_machines_first(n, m, heads):
    layout = paper_layout(n, m, heads)
    assert (layout.num_machines, layout.ranks_per_machine) == (n, m)
    assert layout.ulysses_degree == gcd(n * m, heads)
    assert layout.torus == max(x.torus for x in legal_layouts(n, m, heads) if x.ulysses_degree == layout.ulysses_degree)


def test_the_papers_example():
    layout = paper_layout(4, 8, 24)
    assert (layout.torus, layout.ulysses, layout.ring_degree) == (4, 2, 4)


@given(counts, counts)
def test_any_divisor_of_the_world_can_be_placed(n, m):
    for degree in (d for d in range(1, n * m + 1) if n * m % d == 0):
        assert split_degree(n, m, degree).ulysses_degree == degree


@given(counts, counts, st.integers(1, 64))
def test_coordinates_and_groups_are_consistent(n, m, heads):
    for layout in legal_layouts(n, m, heads):
        everyone = range(layout.world_size)
        assert [layout.position(*layout.coordinates(w)) for w in everyone] == [*everyone]
        for w in everyone:
            ulysses, ring = layout.ulysses_group(w), layout.ring_group(w)
            assert len(ulysses) == layout.ulysses_degree and len(ring) == layout.ring_degree
            assert [layout.head_group(p) for p in ulysses] == [*range(layout.ulysses_degree)]
            assert {layout.head_group(p) for p in ring} == {layout.head_group(w)}
            assert set(ulysses) & set(ring) == {w}
            assert list(ulysses) == sorted(ulysses) and list(ring) == sorted(ring)


@pytest.mark.parametrize(
    ("heads", "machines", "torus", "xdit"),
    [(24, 5, 5, (1, 5)), (24, 6, 6, (6, 1)), (30, 4, 4, (2, 2)), (8, 3, 3, (1, 3)), (7, 5, 1, (1, 5))],
)
def test_torus_splits_heads_unevenly_to_send_fewer_bytes(heads, machines, torus, xdit):
    """xDiT gets degrees that divide the heads and lead to the same layout. 7 heads over 5 ranks use Ring: one rank
    would compute 10/7 of the mean."""
    plan = make_plan(machines, 1, heads=heads, max_imbalance=UNEVEN)
    assert plan.layout.torus == torus
    assert (plan.even.ulysses_degree, plan.even.ring_degree) == xdit
    assert ("heads split unevenly, xDiT's own code uses" in str(plan)) == (heads % torus > 0)
    assert plan.layout.egress() <= make_plan(machines, 1, heads=heads).layout.egress()
    again = make_plan(machines, 1, heads=heads, ulysses_degree=xdit[0], max_imbalance=UNEVEN)
    assert (again.layout, again.even) == (plan.layout, plan.even)


@given(counts, counts, st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_the_degrees_that_xdit_gets_lead_to_the_same_plan(n, m, kv_heads, repeat):
    heads = kv_heads * repeat
    plan = make_plan(n, m, heads=heads, kv_heads=kv_heads, max_imbalance=UNEVEN)
    assert kv_heads % plan.even.ulysses_degree == 0 and plan.even.world_size == n * m
    degree = plan.even.ulysses_degree
    again = make_plan(n, m, heads=heads, kv_heads=kv_heads, ulysses_degree=degree, max_imbalance=UNEVEN)
    assert (again.layout, again.even) == (plan.layout, plan.even)


def test_a_tie_in_bytes_selects_the_most_even_split():
    """40 heads on 3 machines of 8: 6 ways (maximum 7, mean 6.67 heads), not 24 ways (maximum 2, mean 1.67)."""
    plan = make_plan(3, 8, heads=40, max_imbalance=Fraction(6, 5))
    assert (plan.layout.torus, plan.layout.ulysses) == (3, 2)


def test_inside_one_machine_heads_stay_even():
    assert make_plan(1, 5, heads=24, max_imbalance=UNEVEN).layout.ring_degree == 5


def test_an_explicit_degree_is_kept_if_xdit_pads_the_heads():
    assert make_plan(2, 2, heads=30, ulysses_degree=4).layout.ulysses_degree == 4


def test_usp_layout_is_xdits_own():
    """xDiT puts Ulysses on neighbouring ranks: 2 machines x 4 with ulysses_degree 4 keeps Ulysses inside."""
    layout = usp_layout(2, 4, 4)
    assert (layout.torus, layout.ulysses, layout.ring_across, layout.ring_inside) == (1, 4, 2, 1)
    assert layout.ulysses_group(5) == (4, 5, 6, 7) and layout.ring_group(5) == (1, 5)


def test_break_even_of_two_machines_and_of_gqa():
    """Ulysses across sends (1+g)/(g*N) of the bytes of Ring across."""
    for n in (2, 3, 4, 5, 8):
        for g in (Fraction(1), Fraction(1, 4)):
            across = Layout(torus=n, ulysses=1, ring_across=1, ring_inside=8).egress(g)
            usp = Layout(torus=1, ulysses=8, ring_across=n, ring_inside=1).egress(g)
            assert across / usp == (1 + g) / (g * n)


def test_auto_selects_the_fewest_bytes_and_explains_the_other_layouts():
    mha = make_plan(4, 8, heads=24)
    assert mha.layout == paper_layout(4, 8, 24) and "paper" in mha.reason
    gqa = make_plan(2, 4, heads=32, kv_heads=8)  # g = 1/4 on two machines: Ulysses across would lose
    assert gqa.layout.torus == 1
    rejected = {c.layout: c.rejected for c in mha.options}
    assert rejected[mha.layout] == "" and all(rejected[x] for x in rejected if x != mha.layout)
    assert rejected[Layout(torus=1, ulysses=8, ring_across=4, ring_inside=1)] == "2.00x the bytes between machines"
    assert (
        "24 heads cannot be split over 16 ranks: one would have 1.33x the average"
        in rejected[Layout(torus=2, ulysses=8, ring_across=2, ring_inside=1)]
    )
    assert any("chosen" in line for line in mha.lines())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(heads=30, explicit=dict(torus=4, ulysses=1, ring=4)), "30 heads cannot be split over torus=4"),
        (dict(heads=24, explicit=dict(torus=2, ulysses=2, ring=2)), "describes 8 ranks, but .* has 16"),
        (dict(heads=24, explicit=dict(torus=1, ulysses=8, ring=2)), "ulysses must divide 4"),
        (dict(ulysses_degree=3), "ulysses_degree=3 does not divide the 16 ranks"),
        (dict(rule="paper"), "number of attention heads is unknown.*--ulysses_degree"),
    ],
)  # fmt: skip
def test_errors_name_the_allowed_values(call, message):
    with pytest.raises(ValueError, match=message):
        make_plan(4, 4, **call)


def facts(*machines: str) -> list[RankFacts]:
    return [RankFacts(machine=name, host=name) for name in machines]


def test_topology_follows_hosts_not_rank_arithmetic():
    interleaved = Topology.from_facts(facts("a", "b", "a", "b"))
    assert interleaved.machines == ((0, 2), (1, 3))
    assert interleaved.fold([0, 1, 2, 3]).members == (0, 2, 1, 3)
    assert interleaved.fold([0, 2]).num_machines == 1  # this group sits inside one machine
    assert interleaved.fold([0, 1]).rows == ((0,), (1,))


def test_unequal_machines_become_equal_virtual_machines_within_one_host():
    topology = Topology.from_facts(facts(*"aaaabb"))
    grid = topology.fold(range(6))
    assert grid.rows == ((0, 1), (2, 3), (4, 5)) and "unequal size" in grid.note
    assert Topology.from_facts(facts(*"aaab")).fold(range(4)).rows == ((0,), (1,), (2,), (3,))


def test_topology_overridden_by_flag():
    assert Topology.parse("2x3", 6).machines == ((0, 1, 2), (3, 4, 5))
    with pytest.raises(ValueError, match="describes 8 ranks, but the job has 6"):
        Topology.parse("2x4", 6)
    with pytest.raises(ValueError, match="NxM"):
        Topology.parse("two", 6)
    with pytest.raises(ValueError, match="each of the ranks"):
        Topology(machines=((0, 1), (1, 2)), source="test")


def test_probe_returns_this_host_or_the_override(monkeypatch):
    here = probe()
    assert here.machine == here.host and "/" in here.host
    monkeypatch.setenv("SF_XFUSER_MACHINE", "rack7")
    assert probe().machine == "rack7"


@pytest.fixture
def gb200(monkeypatch):
    """A process that sees four GPUs of a GB200 NVL72."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GB200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"00-{device}"))


def test_a_missing_nvml_is_reported(gb200, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = probe()
    assert (found.accelerator, found.machine, found.nvlink_domain) == ("NVIDIA GB200", found.host, None)
    topology = Topology.from_facts([found, *facts("b")])
    assert topology.source == (
        "hosts of the ranks (NVLink domains that span hosts are unknown: pip install nvidia-ml-py)"
    )
    assert Topology.from_facts(facts("a", "b")).source == "hosts of the ranks"


@pytest.mark.parametrize("state", [2, 3])  # in progress, completed
def test_hosts_of_one_nvlink_domain_are_one_machine(gb200, state, monkeypatch):
    """With the structures of the real NVML bindings, and the answers that a driver would give."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    asked = []

    def fabric_info(handle, reference):
        fabric = reference._obj
        fabric.clusterUuid[0], fabric.cliqueId, fabric.state = 0xAB, 7, state

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: asked.append("init"))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: asked.append("shutdown"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", asked.append)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetGpuFabricInfo", fabric_info)
    monkeypatch.setenv("LOCAL_RANK", "2")
    found = probe()
    assert asked == ["init", b"GPU-00-2", "shutdown"]
    domain = f"nvlink:ab{'0' * 30}:7"
    assert (found.nvlink_domain, found.machine) == ((domain, domain) if state == 3 else (None, found.host))
    source = "NVLink domains and hosts" if state == 3 else "hosts"
    assert Topology.from_facts([found]).source == f"{source} of the ranks"


def test_without_a_driver_the_host_is_the_machine(gb200):
    """The real NVML bindings do not find the driver's library here, or no GPU with this name."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    found = probe()
    assert (found.machine, found.nvlink_domain, found.nvlink_unknown) == (found.host, None, "")


def test_head_groups_cover_all_heads_and_share_kv_heads_if_needed():
    assert head_ranges(8, 8, 3) == (((0, 3), (3, 6), (6, 8)),) * 2
    # 6 query heads on 2 KV heads, 4 ways: the second KV head is in groups 1 (head 3), 2 and 3.
    assert head_ranges(6, 2, 4) == (((0, 2), (2, 4), (4, 5), (5, 6)), ((0, 1), (0, 2), (1, 2), (1, 2)))
