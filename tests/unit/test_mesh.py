"""The selection of a transport, on one rank with a clock of its own; the process groups of links."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sf_xfuser.layout.plan import make_plan
from sf_xfuser.layout.topology import Topology
from sf_xfuser.torus import mesh as mesh_module
from sf_xfuser.torus.links import Group
from sf_xfuser.transport.base import TransportError, TransportUnavailable
from tests.virtual import ThreadControl, ThreadGroup

CPU = torch.device("cpu")


class Clock:
    """``seconds[name]``: of the calls over each transport, in order; the last one of all further calls."""

    def __init__(self, monkeypatch, **seconds):
        self.now_s, self.seconds, self.calls = 0.0, seconds, {name: 0 for name in seconds}
        monkeypatch.setattr(mesh_module, "time", SimpleNamespace(perf_counter=lambda: self.now_s))
        topology, no_group, control = Topology.uniform(1, 1), None, ThreadControl(ThreadGroup(1), 0)
        self.mesh = mesh_module.Mesh(
            plan=make_plan(1, 1, heads=1),
            grid=topology.fold([0]),
            topology=topology,
            position=0,
            links={},
            ulysses_group=no_group,
            ring_group=no_group,
            control=control,
            transport="",
            transports={name: lambda control: {} for name in seconds},
        )

    def call(self):
        name = self.mesh.transport
        self.now_s += self.seconds[name][min(self.calls[name], len(self.seconds[name]) - 1)]
        self.calls[name] += 1

    def select(self):
        self.mesh.select_transport(self.call, CPU)
        return self.mesh.transport


def test_the_first_call_does_not_count(monkeypatch):
    """It compiles kernels and makes communicators, which takes a second; the transport tried first pays for more."""
    clock = Clock(monkeypatch, two_sided=[1.2, 0.002], symm_mem=[0.7, 0.003])
    assert clock.select() == "two_sided"
    assert clock.calls == {"two_sided": 6, "symm_mem": 6}
    assert "two_sided 2 ms, symm_mem 3 ms" in clock.mesh.transport_reason


@pytest.mark.parametrize("order", [("two_sided", "symm_mem"), ("symm_mem", "two_sided")])
def test_one_slow_call_does_not_decide(order, monkeypatch):
    seconds = {"two_sided": [1.0, 0.003], "symm_mem": [1.0, 0.002, 0.4, 0.002, 0.09, 0.002]}
    assert Clock(monkeypatch, **{name: seconds[name] for name in order}).select() == "symm_mem"


def test_the_time_of_long_calls_is_limited(monkeypatch):
    clock = Clock(monkeypatch, shm=[9.0, 8.0], tcp=[0.4, 0.2, 0.3, 0.1])
    assert clock.select() == "tcp"
    assert clock.calls == {"shm": 2, "tcp": 3} and "tcp 250 ms" in clock.mesh.transport_reason


def test_a_transport_that_fails_while_it_is_timed_is_not_used(monkeypatch):
    clock = Clock(monkeypatch, nvshmem=[0.1, 0.001], two_sided=[0.1, 0.002])

    def call():
        clock.call()
        if clock.calls["nvshmem"] == 3 and clock.mesh.transport == "nvshmem":
            raise TransportUnavailable("no memory")

    clock.mesh.select_transport(call, CPU)
    assert clock.mesh.transport == "two_sided" and clock.mesh.transport_reason.endswith("; no memory")
    clock = Clock(monkeypatch, nvshmem=[0.1])

    def refuse(control):
        raise TransportUnavailable("no driver")

    clock.mesh.transports["nvshmem"] = refuse
    with pytest.raises(TransportError, match="no transport is available: no driver"):
        clock.select()


class Options:
    """Stands for ``ProcessGroupNCCL.Options`` in a build without NCCL."""

    def __init__(self, is_high_priority_stream):
        self.is_high_priority_stream = is_high_priority_stream


@pytest.mark.parametrize(("backend", "built"), [("nccl", True), ("cpu:gloo,cuda:nccl", True), ("nccl", False)])
def test_nccl_groups_get_streams_of_high_priority(backend, built, monkeypatch):
    """As far as PyTorch's own function, which checks the options and makes the group."""
    made, world = [], dist.distributed_c10d._World()
    monkeypatch.setattr(dist.distributed_c10d, "_world", world)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    monkeypatch.setattr(
        dist.distributed_c10d,
        "_new_process_group_helper",
        lambda *arguments, timeout: made.append((arguments[6], timeout)) or (object(), None),
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: built)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    Group("across", [1, 3], {0: 0, 1: 1}, backend, 30.0).open(SimpleNamespace(session="s"))
    ((options, timeout),) = made
    assert timeout.total_seconds() == 30
    assert (options is not None) == built
    if built:
        assert options.is_high_priority_stream and options._timeout == timeout
