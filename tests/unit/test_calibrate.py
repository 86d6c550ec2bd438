"""Calibration: the fit recovers known costs from simulated timings, and uses the right link for each collective."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from sf_xfuser.bench import calibrate
from sf_xfuser.bench.loopback import Loopback, OneRank
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.plan import Layout
from sf_xfuser.simulator import CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import PATTERNS, Cluster, Compute, LinkSpec, PatternCost

LAYOUT = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=1)
SETTINGS = calibrate.CalibrationSettings(
    attend=sdpa_attend, heads=8, head_dim=64, dtype=torch.float32, device=torch.device("cpu"), seq_len=4096
)


def make_cluster(put: PatternCost, slots: float | None) -> Cluster:
    """Four machines of two ranks at 100 Mbit/s, on ``slots`` cores."""
    compute = Compute(
        attention_tflops=(("float32", 64, 0.065),), linear_tflops=0.065, memory_gbs=30.0, attend_us=20.0, slots=slots
    )
    others = tuple((pattern, 2, PatternCost(efficiency=1.0)) for pattern in PATTERNS if pattern != "put")
    across = LinkSpec(rank_gbps=0.1, machine_gbps=0.1, costs=(*others, ("put", 2, put)))
    inside = LinkSpec(rank_gbps=1.0, costs=(*others, ("put", 2, replace(put, efficiency=1.0))))
    return Cluster(
        name="by hand",
        num_machines=4,
        ranks_per_machine=2,
        compute=compute,
        inside=inside,
        across=across,
        device="cpu",
    )


def simulated_timing(cluster: Cluster, tokens: int) -> calibrate.Timing:
    """A replayed call without attention. Its CPU time is that of the ranks' compute and of the transfers."""
    no_attention = replace(cluster.compute, attention_tflops=(("float32", 64, 1e9),), attend_us=0.0)
    shape = CallShape(seq_len=tokens, heads=8, kv_heads=8, head_dim=64, dtype="float32")
    predicted = predict(replace(cluster, compute=no_attention), shape, TorusVariant(layout=LAYOUT))
    share, cores = cluster.across.cost("put").compute_share, cluster.compute.slots or 0.0
    computed_s = predicted.seconds - predicted.exposed_s
    return calibrate.Timing(seconds=predicted.seconds, cpu_s=cores * (computed_s + share * predicted.seconds))


@pytest.mark.parametrize("slots", [2.0, None])
@pytest.mark.parametrize(("efficiency", "host_us"), [(0.9, 250.0), (1.0, 0.0), (0.6, 40.0)])
def test_fit_recovers_the_cost_of_puts(slots, efficiency, host_us):
    true = PatternCost(efficiency=efficiency, host_us=host_us, compute_share=0.15 if slots else 0.0)
    cluster = make_cluster(true, slots)
    timings = {tokens: simulated_timing(cluster, tokens) for tokens in (32, 2048)}
    unknown = make_cluster(PatternCost(efficiency=1.0), slots)
    fitted = calibrate._fitted(unknown, LAYOUT, SETTINGS, "put", timings).across.cost("put")
    assert fitted.efficiency == pytest.approx(efficiency, rel=0.02)
    assert fitted.host_us == pytest.approx(host_us, rel=0.05, abs=3)
    assert fitted.compute_share == pytest.approx(true.compute_share, abs=0.02)


def test_sampled_speed_scales_the_compute_rates_only():
    """Attention is three times slower than calibrated: compute rates fall to a third, links and cores do not change."""
    cluster = make_cluster(PatternCost(efficiency=0.9), 2.0)
    x = torch.zeros(1, 8, 8, 64)
    mesh = OneRank(LAYOUT, x, x, x, Loopback(x.device)).mesh

    def attend(q, k, v):
        time.sleep(3 * settings.flop(q.shape[2]) / 0.065e12 * 8 / 2)  # eight ranks on two cores

    settings = replace(SETTINGS, attend=attend, heads=1)
    sampler = calibrate.SpeedSampler(cluster, mesh, settings, lambda value: [value] * 8)
    for _ in range(3):
        sampler.sample()
    scaled = sampler.cluster()
    assert scaled.compute.attention_rate("float32", 64) == pytest.approx(0.065e12 / 3, rel=0.05)
    assert scaled.compute.attend_us == pytest.approx(60.0, rel=0.05)
    assert scaled.compute.memory_gbs == pytest.approx(10.0, rel=0.05)
    assert scaled.compute.slots == 2.0 and (scaled.inside, scaled.across) == (cluster.inside, cluster.across)
    assert "0.33x of the calibrated speed" in scaled.sources[-1]


def test_each_collective_is_measured_on_the_link_that_it_uses(monkeypatch):
    x = torch.zeros(1, 8, 8, 64)
    calibration = calibrate._Calibration(OneRank(LAYOUT, x, x, x, Loopback(x.device)).mesh, SETTINGS, list)
    measured = []

    def collective(pattern, members):
        measured.append((pattern, members))
        return calibrate.Timing(seconds=0.001, cpu_s=0.0), calibrate.Timing(seconds=0.1, cpu_s=0.1), 1 << 20

    monkeypatch.setattr(calibration._groups, "own_group", lambda groups, ranks: len(groups[0]))
    monkeypatch.setattr(calibration, "_collective", collective)
    rings = [(rotation, size) for size in (2, 4, 8) for rotation in ("allgather", "alltoall")]
    for is_inside, expected in ((False, [("exchange", 4), ("exchange", 8), *rings]), (True, [("exchange", 2)])):
        link = calibration._link(2.0, inside=is_inside)
        assert sorted(measured) == sorted(expected)
        assert {pattern for pattern, _, _ in link.costs} >= set(PATTERNS) - {"put", "message"} and link.rank_gbps > 0
        measured.clear()
