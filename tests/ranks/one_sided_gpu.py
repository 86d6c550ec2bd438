"""Rank side of gpu/test_one_sided.py: ranks of one host, control over gloo. Ranks share GPUs if there are too few. The
first argument is the transport. Each rank prints the outcome of each case."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time

import torch
import torch.distributed as dist
from cases import run_cases

from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.yunchang.all_to_all import all_to_all_4d
from sf_xfuser.torus import links
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import Parcel, TransportError
from sf_xfuser.transport.gpu import nvshmem

TRANSPORT = sys.argv[1]
EPOCHS = int(os.environ.get("GPU_EPOCHS", "2000"))


def mesh_of(timeout=60.0, heads=None):
    world = dist.get_world_size()
    args = TorusArgs(backend="torus", topology=f"{world}x1", transport=TRANSPORT, timeout=timeout)
    return build_mesh([list(range(world))], args, heads=heads or world)


def delay(rng):
    """A random delay on the GPU or on the host."""
    if rng.random() < 0.05:
        torch.cuda._sleep(rng.randrange(2_000_000))
    if rng.random() < 0.02:
        time.sleep(rng.random() * 5e-3)


def exchange_with_all(link, call, chunks, rng):
    """Send a strided column of ``chunks[peer]`` [n, 2] to each peer. Returns the received chunks by peer."""
    rank = dist.get_rank()
    delay(rng)
    window, nbytes = link.begin(), {peer: x[:, 0].numel() * x.element_size() for peer, x in enumerate(chunks)}
    others = [peer for peer in range(len(chunks)) if peer != rank]
    offset = max(nbytes.values())
    sends = [Parcel((chunks[peer][:, 0],), chunks[peer].dtype, peer, 0, rank * offset) for peer in others]
    receives = [
        Parcel((window[peer * offset : peer * offset + nbytes[peer]],), torch.uint8, peer, 0) for peer in others
    ]
    ticket = link.exchange(call, sends, receives)
    delay(rng)
    ticket.wait()
    received = {parcel.peer: parcel.parts[0].clone() for parcel in receives}
    link.drain()
    return received


def case_bitwise_equal_to_gloo(rank):
    """All dtypes, with delays, for three transports in a row: the second replaces the memory of the first, the third
    starts after all memory was freed and NVSHMEM was finalized."""
    world, rng = dist.get_world_size(), random.Random(rank)
    for run in range(3):
        mesh = mesh_of()
        for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
            make = torch.Generator().manual_seed(rank)
            n = 5000
            whole = [torch.randint(0, 100, (n, 2), generator=make).to(dtype) for _ in range(world)]
            sent = torch.cat([x[:, 0].contiguous().view(torch.uint8) for x in whole])
            expected = torch.empty_like(sent)
            dist.all_to_all_single(expected, sent)
            mesh.window.reserve(n * 8 * world)
            for call in range(20):
                received = exchange_with_all(mesh.window, call, [x.cuda() for x in whole], rng)
                for peer, chunk in received.items():
                    assert torch.equal(chunk.cpu(), expected.chunk(world)[peer]), (run, dtype, call, peer)
        if run == 1:
            mesh.window.close()
            links.release_unused(mesh.control, mesh.members, mesh.position, used="nothing")
        mesh.close()
    return "equal"


def case_attention(rank):
    """Thousands of calls with delays on the GPU and the host, each bitwise equal to the first with the same inputs."""
    world, rng = dist.get_world_size(), random.Random(rank)
    mesh, counts = mesh_of(), ([64] * world, [64] * world)

    def inputs(of, seed):
        make = torch.Generator().manual_seed(seed * 16 + of)
        return [torch.randn(1, world, 64, 32, generator=make).cuda().bfloat16() for _ in range(3)]

    qkv = [inputs(rank, seed) for seed in range(5)]
    first = [torus_attention(*each, mesh=mesh, tokens=counts) for each in qkv]
    for seed, out in enumerate(first):
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(inputs(w, seed) for w in range(world)), strict=True))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).chunk(world, dim=2)[rank]
        assert (out - expected).abs().max() < 2e-2
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(EPOCHS):
        delay(rng)
        differing += (torus_attention(*qkv[number % 5], mesh=mesh, tokens=counts) != first[number % 5]).sum()
    mesh.close()
    return f"{int(differing)} differ in {EPOCHS} calls"


def case_all_to_all(rank):
    """yunchang's all-to-all over windows, forth and back."""
    world, mesh = dist.get_world_size(), mesh_of()
    inputs = [
        torch.randn(2, 6, 2 * world, 32, generator=torch.Generator().manual_seed(w)).bfloat16() for w in range(world)
    ]
    expected = torch.cat([x.chunk(world, dim=2)[rank] for x in inputs], dim=1)
    for _ in range(100):
        out = all_to_all_4d(inputs[rank].cuda(), 2, 1, mesh)
        assert torch.equal(out.cpu(), expected)
        assert torch.equal(all_to_all_4d(out, 1, 2, mesh).cpu(), inputs[rank])
    mesh.close()
    return "equal"


def case_graph_capture_is_rejected(rank):
    mesh = mesh_of()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            mesh.window.begin()
    finally:
        dist.barrier()
        mesh.close()


def case_a_lost_peer(rank):
    """Run this case last: it leaves the group unusable."""
    mesh = mesh_of(timeout=3.0)
    link = mesh.window
    link.begin()
    if rank == 0:
        time.sleep(10)
        return "silent"
    result = torch.ones(4, device="cuda")
    link.exchange(4, [], [Parcel((result,), torch.float32, 0, 0)]).wait()
    link.drain()
    link.poison(result)
    torch.cuda.current_stream().synchronize()
    assert result.isnan().all()
    link.begin()


def case_rows(rank):
    """Latency and bandwidth of a put with flag between ranks 0 and 1, next to those of a copy on the device."""
    link = mesh_of().window
    for exponent in range(12, 28, 3):
        nbytes, times = 1 << exponent, []
        link.reserve(nbytes)
        chunk = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
        for call in range(30):
            torch.cuda.synchronize()
            dist.barrier()
            started = time.perf_counter()
            link.begin()
            if rank < 2:
                send, receive = Parcel((chunk,), torch.uint8, 1 - rank, 0), Parcel((chunk,), torch.uint8, 1 - rank, 0)
                if rank == 1:
                    link.exchange(0, [], [receive]).wait()
                ticket = link.exchange(1, [send], [receive] if rank == 0 else [])
                ticket.wait()
            link.drain()
            torch.cuda.synchronize()
            if call >= 10:
                times.append(time.perf_counter() - started)
        target, copies = torch.empty_like(chunk), []
        for _ in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(chunk)
            torch.cuda.synchronize()
            copies.append(time.perf_counter() - started)
        if rank == 0:
            put, copy = statistics.median(times) / 2, statistics.median(copies)
            print(
                f"row: {TRANSPORT}, {torch.cuda.get_device_name()}, {nbytes} bytes: put and flag {put * 1e6:.1f} us, "
                f"{nbytes / put / 1e9:.2f} GB/s; a copy {copy * 1e6:.1f} us, {nbytes / copy / 1e9:.2f} GB/s",
                flush=True,
            )
    link.close()
    return "measured"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    run_cases(globals(), sys.argv[2:], (TransportError, ValueError))
    if "a_lost_peer" not in sys.argv:
        nvshmem.finalize()
        dist.destroy_process_group()
