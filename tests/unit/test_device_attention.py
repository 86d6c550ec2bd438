"""The protocol of one-sided GPU transports without a GPU: memory layout, and transfers with threads as streams
(``virtual.py``). ``gpu/test_one_sided.py`` runs it on a GPU."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time

import pytest
import torch

from sf_xfuser.integrations.xdit import usp
from sf_xfuser.integrations.yunchang import all_to_all
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.call import Joint
from sf_xfuser.transport.base import Parcel, Ticket, Transport, TransportError
from sf_xfuser.transport.gpu import device, memory
from sf_xfuser.transport.gpu.block import MAX_CHUNKS, Block, Staging, round_up_window
from tests import virtual
from tests.virtual import succeeded

# -- memory layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "half_bytes"), [(2, 2 << 20), (7, 6 << 20)])
def test_regions_of_a_block_do_not_overlap(ranks, half_bytes):
    block = Block(ranks=ranks, half_bytes=half_bytes)
    flags = [block.flag(w, chunk, epoch) for w in range(ranks) for chunk in range(MAX_CHUNKS) for epoch in (1, 2)]
    assert all(flag % 8 == 0 for flag in flags) and len(set(flags)) == len(flags)
    assert block.poison + 4 <= min(flags) and max(flags) + 8 <= block.head_bytes
    starts = [block.head_bytes, *sorted({block.half(1), block.half(2)}), block.staging]
    assert starts == [block.head_bytes, block.head_bytes, block.head_bytes + half_bytes, starts[-1]]
    assert block.half(3) == block.half(1) and block.staging + half_bytes == block.nbytes
    assert all(start % 512 == 0 for start in starts)


def test_the_docstring_example_of_a_block():
    block = Block(ranks=2, half_bytes=2 << 20)
    assert (block.flags, block.half(0), block.half(1), block.staging) == (512, 33280, 2130432, 4227584)
    assert block.flag(1, 3, epoch=7) == 25112


def test_staged_chunks_do_not_overlap_until_the_allocator_wraps():
    staging = Staging(10_240)
    chunks = [(*staging.allocate(nbytes), nbytes) for nbytes in (1, 5000, 513, 512, 10_240, 7)]
    assert [(offset, wrapped) for offset, wrapped, _ in chunks] == [
        (0, False), (512, False), (5632, False), (6656, False), (0, True), (0, True)
    ]  # fmt: skip
    staging.reset()
    assert staging.allocate(10_240) == (0, False)
    spans = [(offset, offset + nbytes) for offset, _, nbytes in chunks[:4]]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_windows_grow_rarely_and_by_an_eighth_at_most():
    sizes = [round_up_window(nbytes, 1 << 21) for nbytes in range(1, 1 << 28, 99_991)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 50
    assert all(
        size <= max(1 << 21, nbytes * 9 / 8 + 1)
        for size, nbytes in zip(sizes[300:], range(1, 1 << 28, 99_991)[300:], strict=True)
    )


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

        def exchange(self, *args):
            time.sleep(0.02)
            return super().exchange(*args)

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


def test_flags_reach_other_hosts_as_copies(monkeypatch):
    """In an NVLink domain, stream memory operations write local memory only."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Virtual, "_other_hosts", range(4))
    monkeypatch.setattr(virtual.Stream, "pause_s", 2e-3)
    make = virtual.meshes(2, 2, 2)

    def rank(position):
        mesh, written = make[position](), []
        write = mesh.window._driver.write_64
        mesh.window._driver.write_64 = lambda target, *rest: (written.append(target), write(target, *rest))
        out = [torus_attention(*inputs(position, seed, 40, 2), mesh=mesh) for seed in range(4)]
        mesh.close()
        return out, set(written) - {word.data_ptr() for word in mesh.window._flag_sources.values()}

    for position, (out, remote) in enumerate(succeeded(virtual.run_ranks(4, rank))):
        assert not remote
        for seed in range(4):
            assert (out[seed] - reference(4, seed, 40, 2)[position]).abs().max() < 1e-5


class DictTransport(Transport):
    """A second transport between threads: chunks go through one dictionary."""

    def __init__(self, rank, box):
        self._rank, self._box, self._round = rank, box, 0

    def exchange(self, round, sends, receives):
        self._round += 1
        for parcel in sends:
            self._box[self._round, self._rank, parcel.peer, parcel.slot] = parcel.packed().clone()
        return DictTicket(
            self._box, {(self._round, parcel.peer, self._rank, parcel.slot): parcel for parcel in receives}
        )

    def drain(self):
        pass


class DictTicket(Ticket):
    def __init__(self, box, due):
        self._box, self._due = box, due

    def wait(self):
        while self._due:
            key, parcel = self._due.popitem()
            while key not in self._box:
                time.sleep(1e-3)
            parcel.parts[0].copy_(self._box.pop(key))


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
            mesh.window._poison_view(mesh.window._memory).fill_(float("nan"))
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
        mesh.window._poison_view(mesh.window._memory).fill_(float("nan"))  # as a failing peer does
        lost = all_to_all.all_to_all_4d(inputs[position], 2, 1, mesh)
        mesh.close()
        return out, lost

    for position, (out, lost) in enumerate(succeeded(virtual.run_ranks(4, rank))):
        expected = torch.cat([x.chunk(4, dim=2)[position] for x in inputs], dim=1)
        assert all(torch.equal(x, expected) for x in out) and lost.isnan().all()


def links(timeout_s=20.0):
    """For two ranks, a function that creates the transport of a rank."""
    group = virtual.ThreadGroup(2)
    return lambda rank: virtual.Virtual(virtual.ThreadControl(group, rank), [4, 5], rank, [1 - rank], timeout_s)


def byte(peer, value=0, offset=0):
    return Parcel((torch.full((1,), value, dtype=torch.uint8),), torch.uint8, peer, 0, offset)


def test_sends_may_exceed_the_staging_area(monkeypatch):
    """More strided chunks than fit: the allocator wraps after earlier puts have completed."""
    virtual.use_cpu_streams(monkeypatch)
    make, tokens = links(), 1 << 19

    def rank(position):
        link = make(position)
        for call in range(3):
            window = link.begin()
            sent = [torch.full((tokens, 2), 1 + call + n, dtype=torch.uint8) for n in range(4)]
            parcels = [Parcel((x[:, 0],), torch.uint8, 1 - position, 0, n * tokens) for n, x in enumerate(sent)]
            parcels += [Parcel((x[:, 1],), torch.uint8, 1 - position, 0, n * tokens) for n, x in enumerate(sent)]
            arrival = link.exchange(0, parcels, [byte(1 - position)] * 8)
            arrival.wait()
            arrival.wait()
            link.drain()
            for n in range(4):
                assert (window[n * tokens : (n + 1) * tokens] == 1 + call + n).all()
        assert link.window_bytes == 2 * (2 << 20)
        link.close()

    succeeded(virtual.run_ranks(2, rank))


def test_staging_wraps_only_after_the_puts_of_all_streams(monkeypatch):
    """Two peers on two streams, one of them slow. Each receives as much as the area holds."""
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setattr(virtual.Stream, "pause_chance", 1.0)
    group, nbytes = virtual.ThreadGroup(3), 2 << 20

    def rank(position):
        others = [peer for peer in range(3) if peer != position]
        link = virtual.Virtual(virtual.ThreadControl(group, position), [0, 1, 2], position, others, 20.0)
        link._put_streams[0].pause_s = 0.05
        for call in range(8):
            window = link.begin()
            chunks = {peer: torch.full((nbytes, 2), 10 * call + peer, dtype=torch.uint8)[:, 0] for peer in (1, 2)}
            sends = [Parcel((chunks[peer],), torch.uint8, peer, 0) for peer in others] if position == 0 else []
            link.exchange(0, sends, [] if position == 0 else [byte(0)]).wait()
            link.drain()
            assert position == 0 or (window == 10 * call + position).all()
        link.close()

    succeeded(virtual.run_ranks(3, rank))


def test_a_window_grows_and_a_new_transport_replaces_it(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = links()

    def rank(position):
        for _ in range(2):
            link = make(position)
            for nbytes in (1, 3 << 20, 2 << 20, 9 << 20):
                link.reserve(nbytes)
                assert link.begin().numel() >= nbytes
                link.exchange(0, [byte(1 - position, 9, nbytes - 1)], [byte(1 - position)]).wait()
                link.drain()
            link.close()
            link.close()
            with pytest.raises(TransportError, match=f"rank {4 + position}: the virtual transport is closed"):
                link.begin()

    succeeded(virtual.run_ranks(2, rank))


def test_ranks_that_request_different_windows_raise_the_same_error(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = links()
    errors = virtual.run_ranks(2, lambda position: make(position).reserve((4 + 4 * position) << 20))
    assert len(set(map(str, errors))) == 1 and isinstance(errors[0], TransportError)
    assert re.search(r"virtual cannot be used: rank 4: requests 4194304 .*rank 5: requests 8388608", str(errors[0]))


def test_ranks_that_share_a_gpu_need_memory_for_all_of_them(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    free = Block(ranks=2, half_bytes=2 << 20).nbytes * 3 // 2
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda: (free, free))
    make = links()
    for link in succeeded(virtual.run_ranks(2, make)):
        link.close()
    monkeypatch.setattr(virtual.Virtual, "_ranks_on_gpu", 2)
    monkeypatch.setattr(memory, "closed_windows", [])  # no memory that could be freed
    make = links()
    errors = virtual.run_ranks(2, make)
    assert all(re.search(rf"virtual cannot be used: .*the GPU has {free} bytes free", str(each)) for each in errors)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_missing_chunk_poisons_the_result_and_the_next_call_raises(mode, monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make, silent = links(timeout_s=0.5), threading.Event()

    def rank(position):
        with mode():
            link = make(position)
        link.begin()
        if position == 1:
            link.exchange(0, [], [])
            silent.wait()
            return link
        result = torch.ones(3)
        link.exchange(5, [byte(1)], [byte(1)]).wait()  # returns when the watchdog releases it
        with pytest.raises(TransportError, match="no data from rank 5 in round 5: waited"):
            link.drain()
        link.poison(result)
        assert result.isnan().all()
        with pytest.raises(TransportError, match="no data from rank 5"):
            link.begin()
        link.close()
        silent.set()

    _, peer = succeeded(virtual.run_ranks(2, rank))
    result = torch.ones(3)
    peer.poison(result)  # the other rank was notified
    assert result.isnan().all()


def test_a_rank_that_closes_during_a_call_is_detected(monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    make = links(timeout_s=60.0)

    def rank(position):
        link = make(position)
        link.begin()
        if position == 1:
            link.close()
            return
        started = time.monotonic()
        link.exchange(0, [], [byte(1)]).wait()
        assert time.monotonic() - started < 10
        link.begin()

    error, _ = virtual.run_ranks(2, rank)
    assert isinstance(error, TransportError) and "a rank of its group aborted" in str(error)


def test_graph_capture_is_rejected(monkeypatch):
    virtual.use_cpu_streams(monkeypatch, capturing=True)
    with pytest.raises(ValueError, match="over virtual cannot be captured in a CUDA graph"):
        links()(0)


def test_calls_during_a_capture_fall_back(monkeypatch):
    """To xDiT's USP, and to yunchang's all-to-all. All ranks decide alike."""
    virtual.use_cpu_streams(monkeypatch)
    make = virtual.meshes(1, 2, 4)
    mesh = succeeded(virtual.run_ranks(2, lambda position: make[position]()))[0]
    torus_usp = usp.TorusUSP(original=None, host=PlainHost(), mesh=mesh, ring_degree=1, strict=False, log=print)
    torus_all_to_all = all_to_all.MeshAllToAll4D(original=None, mesh=mesh, strict=False, log=print)
    plain = ("FLASH", 0.0, False, None, None, None, 1, {})
    assert torus_usp.fallback_reason(*plain) is None
    monkeypatch.setattr(device, "is_capturing", lambda: True)
    assert torus_usp.fallback_reason(*plain) == "a CUDA graph is being captured, and the flags of virtual count calls"
    assert torus_all_to_all.fallback_reason(torch.empty(1, 4, 4, 8), 2, 1, None) == torus_usp.fallback_reason(*plain)


class PlainHost:
    """xDiT without FP8 communication or PipeFusion."""

    def fp8_communication(self):
        return False

    def cached_by_pipefusion(self, layer):
        return False


@pytest.mark.parametrize("queues", ["1", "unset"])
def test_few_hardware_queues_warn(queues, monkeypatch):
    virtual.use_cpu_streams(monkeypatch)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    if queues == "unset":
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    make = links()
    with pytest.warns(UserWarning, match=f"CUDA_DEVICE_MAX_CONNECTIONS={queues}: --sp-transport virtual can deadlock"):
        succeeded(virtual.run_ranks(2, lambda position: make(position).close()))
