"""The figures of a cluster, found again from the times and CPU seconds that they make."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from sf_xfuser.bench import calibrate as probe
from sf_xfuser.bench.loopback import Loopback, OneRank
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.plan import Layout
from sf_xfuser.simulator import CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import PATTERNS, Cluster, Compute, Link, Way

LAYOUT = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=1)
ORDER = probe.Order(
    attend=sdpa_attend, heads=8, head_dim=64, dtype=torch.float32, device=torch.device("cpu"), seq_len=4096
)


def a_cluster(put: Way, slots: float | None) -> Cluster:
    """Eight ranks on ``slots`` cores, four machines at 100 Mbit/s, whose way of ``put`` is given."""
    compute = Compute(
        attention_tflops=(("float32", 64, 0.065),), linear_tflops=0.065, memory_gbs=30.0, attend_us=20.0, slots=slots
    )
    others = tuple((pattern, 2, Way(efficiency=1.0)) for pattern in PATTERNS if pattern != "put")
    across = Link(rank_gbps=0.1, machine_gbps=0.1, ways=(*others, ("put", 2, put)))
    inside = Link(rank_gbps=1.0, ways=(*others, ("put", 2, replace(put, efficiency=1.0))))
    return Cluster(
        name="by hand",
        num_machines=4,
        ranks_per_machine=2,
        compute=compute,
        inside=inside,
        across=across,
        device="cpu",
    )


def seen_on(cluster: Cluster, tokens: int) -> probe.Timing:
    """A call with nothing computed, as the replay has it: its CPU is what ranks compute and what moving takes."""
    nothing = replace(cluster.compute, attention_tflops=(("float32", 64, 1e9),), attend_us=0.0)
    shape = CallShape(seq_len=tokens, heads=8, kv_heads=8, head_dim=64, dtype="float32")
    found = predict(replace(cluster, compute=nothing), shape, TorusVariant(layout=LAYOUT))
    takes, cores = cluster.across.way("put").takes, cluster.compute.slots or 0.0
    computed_s = found.seconds - found.exposed_s
    return probe.Timing(seconds=found.seconds, cpu_s=cores * (computed_s + takes * found.seconds))


@pytest.mark.parametrize("slots", [2.0, None])
@pytest.mark.parametrize(("efficiency", "host_us"), [(0.9, 250.0), (1.0, 0.0), (0.6, 40.0)])
def test_the_figures_behind_calls_with_nothing_computed_are_found_again(slots, efficiency, host_us):
    true = Way(efficiency=efficiency, host_us=host_us, takes=0.15 if slots else 0.0)
    cluster = a_cluster(true, slots)
    seen = {tokens: seen_on(cluster, tokens) for tokens in (32, 2048)}
    unknown = a_cluster(Way(efficiency=1.0), slots)
    fitted = probe._fitted(unknown, LAYOUT, ORDER, "put", seen).across.way("put")
    assert fitted.efficiency == pytest.approx(efficiency, rel=0.02)
    assert fitted.host_us == pytest.approx(host_us, rel=0.05, abs=3)
    assert fitted.takes == pytest.approx(true.takes, abs=0.02)


def test_the_pace_beside_other_calls_scales_what_computes():
    """Attention takes three times what the cluster says: its rates are a third, links and cores stay as they are."""
    cluster = a_cluster(Way(efficiency=0.9), 2.0)
    x = torch.zeros(1, 8, 8, 64)
    mesh = OneRank(LAYOUT, x, x, x, Loopback(x.device)).mesh

    def attend(q, k, v):
        time.sleep(3 * order.flop(q.shape[2]) / 0.065e12 * 8 / 2)  # eight ranks on two cores

    order = replace(ORDER, attend=attend, heads=1)
    pace = probe.Pace(cluster, mesh, order, lambda value: [value] * 8)
    for _ in range(3):
        pace.sample()
    found = pace.cluster()
    assert found.compute.attention_rate("float32", 64) == pytest.approx(0.065e12 / 3, rel=0.05)
    assert found.compute.attend_us == pytest.approx(60.0, rel=0.05)
    assert found.compute.memory_gbs == pytest.approx(10.0, rel=0.05)
    assert found.compute.slots == 2.0 and (found.inside, found.across) == (cluster.inside, cluster.across)
    assert "0.33x of that pace" in found.sources[-1]


def test_each_collective_of_xdits_is_measured_on_the_link_that_it_uses(monkeypatch):
    """4 x 2."""
    x = torch.zeros(1, 8, 8, 64)
    found = probe._Probe(OneRank(LAYOUT, x, x, x, Loopback(x.device)).mesh, ORDER, list)
    seen = []

    def collective(pattern, members):
        seen.append((pattern, members))
        return probe.Timing(seconds=0.001, cpu_s=0.0), probe.Timing(seconds=0.1, cpu_s=0.1), 1 << 20

    monkeypatch.setattr(found._groups, "mine", lambda groups, ranks: len(groups[0]))
    monkeypatch.setattr(found, "_collective", collective)
    rings = [(rotation, size) for size in (2, 4, 8) for rotation in ("allgather", "alltoall")]
    for is_inside, wanted in ((False, [("exchange", 4), ("exchange", 8), *rings]), (True, [("exchange", 2)])):
        link = found._link(2.0, inside=is_inside)
        assert sorted(seen) == sorted(wanted)
        assert {pattern for pattern, _, _ in link.ways} >= set(PATTERNS) - {"put", "message"} and link.rank_gbps > 0
        seen.clear()
