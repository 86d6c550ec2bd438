"""Attention calls over one-sided GPU transports without a GPU: threads are the streams (``virtual.py``), on the host
and in CUDA graphs. ``gpu/test_one_sided.py`` runs calls on a GPU."""

from __future__ import annotations

import random
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sf_xfuser.integrations.xdit import usp
from sf_xfuser.integrations.yunchang import all_to_all
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.torus import graphs, run
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.call import Joint
from sf_xfuser.torus.trace import Trace
from sf_xfuser.transport.base import Transfer, Transport
from sf_xfuser.transport.gpu import memory
from tests import virtual
from tests.virtual import succeeded

# -- autotuning -------------------------------------------------------------------------------------------------------


def test_auto_keeps_the_fastest_and_frees_the_memory_of_the_others(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    freed: list[tuple[str, int]] = []

    class Fast(virtual.Virtual):
        name = "fast"

        def _free(self):
            freed.append((self.name, self._position))

    class Slow(Fast):
        name = "slow"

        def begin(self):
            time.sleep(0.02)
            return super().begin()

    class Absent(Fast):
        name = "absent"

        def _allocate(self, nbytes):
            raise RuntimeError("no such memory")

    make = virtual.meshes(2, 1, heads=2)
    q = torch.randn(1, 2, 12, 8)

    def work(rank):
        mesh = make[rank]()
        mesh.window.close()

        def connect(kind):
            return lambda control: dict.fromkeys(("inside", "across"), kind(control, range(2), rank, [1 - rank], 30.0))

        mesh.transports, mesh.transport_reason = {kind.name: connect(kind) for kind in (Slow, Absent, Fast)}, ""
        own = q[:, :, 6 * rank : 6 * rank + 6]
        return mesh, torus_attention(own, own, own, mesh=mesh)

    results = virtual.run_ranks(2, work)
    out = torch.cat([each[1] for each in results], 2)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-6)
    for mesh, _ in results:
        assert mesh.transport == "fast" and isinstance(mesh.window, Fast) and not isinstance(mesh.window, Slow)
        assert re.match(
            r"the fastest of slow [\d.]+ ms, fast [\d.]+ ms, .*; absent cannot be used: .*no such",
            mesh.transport_reason,
        )
    assert {("slow", 0), ("slow", 1)} <= set(freed) and freed.count(("slow", 0)) == freed.count(("slow", 1)) == 1
    assert not [window for window in memory.closed_windows if window.window_bytes and window._memory is not None]
    for mesh, _ in results:
        mesh.close()


# -- the protocol, with threads as streams ---------------------------------------------------------------------------


def inputs(rank, seed, tokens, heads, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed * 16 + rank)
    return [torch.randn(1, heads, tokens, 8, generator=make).to(dtype) for _ in range(3)]


def reference(world, seed, tokens, heads):
    """Single-device attention, split by rank."""
    q, k, v = (
        torch.cat(parts, dim=2) for parts in zip(*(inputs(w, seed, tokens, heads) for w in range(world)), strict=True)
    )
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).split(tokens, dim=2)


@pytest.mark.parametrize(
    ("machines", "ranks_per_machine", "heads"),
    [(1, 2, 2), (2, 1, 2), (2, 2, 4), (2, 2, 2), (3, 1, 3), (1, 3, 1), (4, 1, 2)],
)
def test_attention_is_correct_and_deterministic(machines, ranks_per_machine, heads, monkeypatch):
    """Fewer heads than ranks need a ring."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    world = machines * ranks_per_machine
    make = virtual.meshes(machines, ranks_per_machine, heads)

    def rank(position):
        mesh = make[position]()
        first = [torus_attention(*inputs(position, seed, 40 + 8 * seed, heads), mesh=mesh) for seed in range(4)]
        again = [torus_attention(*inputs(position, seed, 40 + 8 * seed, heads), mesh=mesh) for seed in range(4)]
        mesh.close()
        return first, again

    for position, (first, again) in enumerate(succeeded(virtual.run_ranks(world, rank))):
        for seed in range(4):
            assert torch.equal(first[seed], again[seed])
            expected = reference(world, seed, 40 + 8 * seed, heads)[position]
            assert (first[seed] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("machines", "ranks_per_machine", "heads", "kv_heads", "split"),
    [(2, 2, 8, 4, 4), (2, 2, 12, 3, 2), (2, 2, 9, 3, 2), (3, 1, 6, 6, 3), (1, 3, 4, 2, 1), (1, 1, 4, 1, 1)],
)
def test_the_fused_kernel_matches_the_library(machines, ranks_per_machine, heads, kv_heads, split, dtype, monkeypatch):
    """With the kernel's reference: with and without a ring, grouped queries also across head groups, joint tokens at
    either end, a different token count on each rank, one rank without tokens."""
    virtual.use_cpu_streams(monkeypatch)
    world = machines * ranks_per_machine
    make = virtual.meshes(machines, ranks_per_machine, split)
    tokens = [0 if w == 1 else 17 + 5 * w for w in range(world)]

    def rank(position):
        own = torch.Generator().manual_seed(position)
        joint = torch.Generator().manual_seed(99)
        q, k, v = (
            torch.randn(2, tokens[position], H, 64, generator=own).to(dtype).transpose(1, 2)
            for H in (heads, kv_heads, kv_heads)
        )
        joint_kv = torch.randn(2, 2, kv_heads, 5, 64, generator=joint).to(dtype)
        mesh, results = make[position](), []
        for tokens_of_all in (None, Joint(*joint_kv, "front"), Joint(*joint_kv, "rear")):
            results.append(
                [torus_attention(q, k, v, mesh=mesh, attention=x, joint=tokens_of_all) for x in (sdpa_attend, "fused")]
            )
        mesh.close()
        return results

    rounding = max(4 * torch.finfo(dtype).eps, 1e-5)
    for position, results in enumerate(succeeded(virtual.run_ranks(world, rank))):
        for library, fused in results:
            assert fused.shape == (2, heads, tokens[position], 64) and fused.isfinite().all()
            torch.testing.assert_close(fused, library, rtol=rounding, atol=rounding)


def test_many_calls_with_delays_are_bitwise_equal(monkeypatch):
    """Random delays on streams and on the host. Ranks run up to two calls apart."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 3e-3)
    make = virtual.meshes(2, 2, 4)

    def rank(position):
        mesh, rng = make[position](), random.Random(position)
        qkv = [inputs(position, seed, 24 + 8 * seed, 4) for seed in range(3)]
        first = [torus_attention(*each, mesh=mesh) for each in qkv]
        for number in range(200):
            if rng.random() < 0.1:
                time.sleep(rng.random() * 1e-2)
            counts = [24 + 8 * (number % 3)] * 4
            out = torus_attention(*qkv[number % 3], mesh=mesh, tokens=(counts, counts))
            assert torch.equal(out, first[number % 3]), number
        mesh.close()

    succeeded(virtual.run_ranks(4, rank))


class DictTransport(Transport):
    """A second transport between threads: chunks go through one dictionary."""

    def __init__(self, rank, box):
        self._rank, self._box, self._round = rank, box, 0

    def record(self, round, sends, receives):
        return DictTransfer(self, sends, receives)

    def drain(self):
        pass


class DictTransfer(Transfer):
    def __init__(self, transport, sends, receives):
        self._transport, self._sends, self._receives = transport, sends, receives

    def post(self):
        transport = self._transport
        transport._round += 1
        self._round = transport._round
        for parcel in self._sends:
            transport._box[self._round, transport._rank, parcel.peer, parcel.slot] = parcel.data.clone()
        self._due = list(self._receives)

    def wait(self):
        box = self._transport._box
        while self._due:
            parcel = self._due.pop()
            key = self._round, parcel.peer, self._transport._rank, parcel.slot
            while key not in box:
                time.sleep(1e-3)
            parcel.data.copy_(box.pop(key))


@pytest.mark.parametrize("heads", [4, 2])  # with 2, KV stays split inside machines
def test_the_result_of_a_failed_window_is_nan_on_other_machines(heads, monkeypatch):
    """Windows inside machines and another transport between them, which does not report the failure."""
    virtual.use_cpu_streams(monkeypatch)
    make, box = virtual.meshes(2, 2, heads), {}

    def rank(position):
        mesh = make[position]()
        mesh.links["across"] = DictTransport(position, box)
        out = [torus_attention(*inputs(position, 0, 40, heads), mesh=mesh)]
        if position < 2:  # machine 0
            mesh.window._poison.fill_(float("nan"))
        out.append(torus_attention(*inputs(position, 0, 40, heads), mesh=mesh))
        mesh.close()
        return out

    for position, (valid, lost) in enumerate(succeeded(virtual.run_ranks(4, rank))):
        assert (valid - reference(4, 0, 40, heads)[position]).abs().max() < 1e-5
        assert lost.isnan().all() if position < 2 else lost.isnan().any()


def test_all_to_alls_are_correct_and_poisoned_like_attention(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = virtual.meshes(2, 2, 4)
    inputs = [torch.randn(1, 6, 8, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]

    def rank(position):
        mesh = make[position]()
        out = [all_to_all.all_to_all_4d(inputs[position], 2, 1, mesh) for _ in range(3)]
        mesh.window._poison.fill_(float("nan"))  # as a failing peer does
        lost = all_to_all.all_to_all_4d(inputs[position], 2, 1, mesh)
        mesh.close()
        return out, lost

    for position, (out, lost) in enumerate(succeeded(virtual.run_ranks(4, rank))):
        expected = torch.cat([x.chunk(4, dim=2)[position] for x in inputs], dim=1)
        assert all(torch.equal(x, expected) for x in out) and lost.isnan().all()


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def use_graphs(monkeypatch):
    """Let programs be captured as ``virtual.Graph``. Returns attention whose work is captured too."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    cuda = SimpleNamespace(CUDAGraph=virtual.Graph, graph=lambda graph, **options: graph.capture())
    monkeypatch.setattr(graphs, "torch", virtual._Override(torch, cuda=cuda))
    monkeypatch.setattr(graphs.Graphs, "unavailable_reason", lambda self, mesh, device: None)
    monkeypatch.setattr(run, "merge_partial", virtual.launch(run.merge_partial))
    monkeypatch.setattr(run, "fix_fully_masked_lse", lambda q, k, out, lse: lse)

    class Copies(run.Copies):
        def run(self, tensors):
            virtual.launch(super().run)(tensors)

    monkeypatch.setattr(run, "Copies", Copies)

    def attend(q, k, v):
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3])

        def kernel():
            for target, source in zip((out, lse), sdpa_attend(q, k, v), strict=True):
                target.copy_(source)

        virtual.launch(kernel)()
        return out, lse

    return attend


@pytest.mark.parametrize(("machines", "ranks_per_machine", "heads"), [(2, 1, 2), (2, 2, 4), (2, 2, 2), (3, 1, 3)])
def test_calls_become_replays_of_a_graph(machines, ranks_per_machine, heads, monkeypatch):
    """Each call has other inputs, every second one from new memory. Rank 1 cannot capture, and makes eager calls."""
    attend = use_graphs(monkeypatch)
    world, calls = machines * ranks_per_machine, 2 * graphs.EAGER_CALLS + 6
    make = virtual.meshes(machines, ranks_per_machine, heads)

    def rank(position):
        mesh, results = make[position](), []
        if position == 1:
            monkeypatch.setattr(mesh.graphs, "capture", partial(refuse, mesh.graphs))
        for call in range(calls):
            results.append(torus_attention(*inputs(position, call, 40, heads), mesh=mesh, attention=attend))
        captured, problem = mesh.graphs.captured, mesh.graphs.problem
        mesh.close()
        return results, captured, problem

    def refuse(kept, *arguments):
        kept.problem = "planted"

    for position, (results, captured, problem) in enumerate(succeeded(virtual.run_ranks(world, rank))):
        assert (captured, problem) == ((0, "planted") if position == 1 else (2, ""))  # one for each half
        for call, result in enumerate(results):  # also: no later call has overwritten it
            assert (result - reference(world, call, 40, heads)[position]).abs().max() < 1e-5


@pytest.mark.parametrize("fails", ["attention", "driver"])
def test_a_failed_capture_leaves_the_call_to_the_eager_program(fails, monkeypatch):
    attend = use_graphs(monkeypatch)
    make = virtual.meshes(2, 1, 2)

    def rank(position):
        mesh = make[position]()

        def refuse(*arguments):
            raise RuntimeError("operation not permitted when stream is capturing")

        def attend_without_capture(q, k, v):
            return (attend if virtual._capture() is None else refuse)(q, k, v)

        function = attend_without_capture if (position, fails) == (0, "attention") else attend
        if (position, fails) == (0, "driver"):
            copy = mesh.window.driver.copy  # flags are copied in a capture only
            mesh.window.driver.copy = lambda *given: (copy if virtual._capture() is None else refuse)(*given)
        results = [torus_attention(*inputs(position, call, 40, 2), mesh=mesh, attention=function) for call in range(12)]
        line = mesh.graphs.line(mesh)
        mesh.close()
        return results, line

    found = succeeded(virtual.run_ranks(2, rank))
    assert re.search("0 captured; a capture failed: .*operation not permitted", found[0][1])
    assert "2 captured" in found[1][1]
    for position, (results, _) in enumerate(found):
        for call, result in enumerate(results):
            assert (result - reference(2, call, 40, 2)[position]).abs().max() < 1e-5


@pytest.mark.parametrize("changes", ["attention", "trace", "off"])
def test_what_is_not_captured(changes, monkeypatch):
    attend = use_graphs(monkeypatch)
    make = virtual.meshes(2, 1, 2)
    if changes == "off":
        monkeypatch.undo()
        attend = use_graphs(monkeypatch)
        monkeypatch.setattr(graphs.Graphs, "unavailable_reason", lambda self, mesh, device: "--sp-graphs off")

    def rank(position):
        mesh = make[position]()
        if changes == "trace":
            mesh.trace = Trace()
        for call in range(12):
            function = (lambda q, k, v: attend(q, k, v)) if changes == "attention" else attend
            torus_attention(*inputs(position, call, 40, 2), mesh=mesh, attention=function)
        captured = mesh.graphs.captured
        mesh.close()
        return captured

    assert succeeded(virtual.run_ranks(2, rank)) == [0, 0]


def test_a_user_captures_whole_calls(monkeypatch):
    """A graph of three calls, replayed between eager calls. A new shape cannot be captured."""
    attend = use_graphs(monkeypatch)
    make = virtual.meshes(2, 2, 2)

    def rank(position):
        mesh, results = make[position](), []
        mesh.graphs.enabled = False
        static = [torch.empty(1, 2, 40, 8) for _ in range(3)]

        def call():
            return torus_attention(*static, mesh=mesh, attention=attend)

        def load(seed):
            for target, source in zip(static, inputs(position, seed, 40, 2), strict=True):
                target.copy_(source)

        for seed in range(3):
            load(seed)
            results.append(call().clone())
        graph = virtual.Graph()
        with graph.capture():
            captured = [call() for _ in range(3)]
            with pytest.raises(ValueError, match="run the model once before the capture"):
                torus_attention(*(x[:, :, :8] for x in static), mesh=mesh, attention=attend)
        for seed in range(3, 9):
            load(seed)
            if seed % 3:
                graph.replay()
                results.append(captured[seed % 3].clone())
            else:
                results.append(call().clone())
        mesh.close()
        return results

    for position, results in enumerate(succeeded(virtual.run_ranks(4, rank))):
        for seed, result in enumerate(results):
            assert (result - reference(4, seed, 40, 2)[position]).abs().max() < 1e-5


def test_a_capture_before_a_transport_is_selected_falls_back(monkeypatch):
    """To xDiT's USP, and to yunchang's all-to-all. All ranks decide alike."""
    virtual.use_cpu_streams(monkeypatch)
    make = virtual.meshes(1, 2, 4)
    mesh = succeeded(virtual.run_ranks(2, lambda position: make[position]()))[0]
    torus_usp = usp.TorusUSP(original=None, host=PlainHost(), mesh=mesh, ring_degree=1, strict=False, log=print)
    torus_all_to_all = all_to_all.MeshAllToAll4D(original=None, mesh=mesh, strict=False, log=print)
    plain = ("FLASH", 0.0, False, None, None, None, 1, {})
    with virtual.Graph().capture():
        assert torus_usp.fallback_reason(*plain) is None
        mesh.transport_reason = ""
        reason = torus_usp.fallback_reason(*plain)
        assert reason == "a CUDA graph is being captured, and no transport has been selected yet"
        assert torus_all_to_all.fallback_reason(torch.empty(1, 4, 4, 8), 2, 1, None) == reason


class PlainHost:
    """xDiT without FP8 communication or PipeFusion."""

    def fp8_communication(self):
        return False

    def cached_by_pipefusion(self, layer):
        return False
