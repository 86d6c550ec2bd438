"""Counts of ``stats()`` on meshes of threads; ``integration/test_serving.py`` checks those of xDiT."""

from __future__ import annotations

import dataclasses
import json
from weakref import WeakSet

import pytest
import torch

from sf_xfuser import metrics
from sf_xfuser.integrations import fallback
from sf_xfuser.integrations.yunchang.all_to_all import MeshAllToAll4D
from sf_xfuser.torus.attention import torus_attention
from tests import virtual
from tests.virtual import succeeded

B, H, S, D = 1, 4, 12, 8


@pytest.fixture
def meshes(monkeypatch):
    """One mesh per rank: two machines with two ranks."""
    virtual.use_cpu_streams(monkeypatch)
    counted = WeakSet()
    monkeypatch.setattr(metrics, "meshes", made := [])
    for module in (metrics, fallback):
        monkeypatch.setattr(module, "drop_ins", counted)
    make = virtual.meshes(2, 2, heads=H)
    made += succeeded(virtual.run_ranks(4, lambda rank: make[rank]()))
    return made


def attend(meshes, **options):
    def work(rank):
        q, k, v = torch.randn(3, B, H, S, D)
        torus_attention(q, k, v, mesh=meshes[rank], **options)

    succeeded(virtual.run_ranks(4, work))


def test_received_bytes_are_those_of_the_layout(meshes):
    attend(meshes)
    attend(meshes)
    layout = meshes[0].layout
    blhd = B * H * (4 * S) * D * 4  # bytes of Q of all ranks, in fp32
    assert metrics.stats().received_bytes["across"] == 2 * layout.num_machines * layout.egress() * blhd


def test_traced_calls_count_their_waits(meshes):
    attend(meshes)
    assert (metrics.stats().traced_calls, metrics.stats().exposed_ms) == (0, 0)
    with metrics.tracing():
        attend(meshes)
    found = metrics.stats()
    assert found.traced_calls == 4 and found.exposed_ms > 0
    attend(meshes)
    assert metrics.stats().exposed_ms == found.exposed_ms


def test_calls_and_fallbacks_are_counted_by_path_and_reason(meshes):
    inputs = torch.randn(B, 3, H, D)
    replaced = MeshAllToAll4D(original=lambda x, *_, **__: x, mesh=meshes[0], strict=False, log=str)
    other = MeshAllToAll4D(original=lambda x, *_, **__: x, mesh=meshes[1], strict=False, log=str)
    for each in (replaced, replaced, other):
        each(inputs, group="another group")
    found = metrics.stats()
    reason = "its process group is not the mesh's Ulysses group"
    assert found.fallbacks == {reason: 3} and found.calls == {"yunchang's own all-to-all": 3}
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)
    meshes[1].guard.closed = True
    assert metrics.stats().fallbacks == {reason: 2}
