"""Rank side of gpu/test_one_sided.py: ranks of one host, control over gloo. Ranks share GPUs if there are too few. The
first argument is the transport, ``shm`` without a GPU. Each rank prints the outcome of each case."""

from __future__ import annotations

import random
import sys
import time

import torch
import torch.distributed as dist
from cases import run_cases

from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.yunchang.all_to_all import all_to_all_4d
from sf_xfuser.torus import links
from sf_xfuser.torus.all_gather import all_gather
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.gpu import nvshmem

TRANSPORT, CALLS = sys.argv[1], int(sys.argv[2])
DEVICE = "cpu" if TRANSPORT == "shm" else "cuda"
silent = []  # meshes of ranks that make no call: they stay connected


def mesh_of(timeout=60.0):
    world = dist.get_world_size()
    args = TorusArgs(backend="torus", topology=f"{world}x1", transport=TRANSPORT, timeout=timeout)
    return build_mesh([list(range(world))], args, heads=world)


def delay(rng):
    """A random delay on the GPU or on the host."""
    if rng.random() < 0.05 and DEVICE == "cuda":
        torch.cuda._sleep(rng.randrange(2_000_000))
    if rng.random() < 0.02:
        time.sleep(rng.random() * 5e-3)


def case_gather(rank):
    """All dtypes, with delays, for three transports in a row: the second replaces the memory of the first, the third
    starts after all memory was freed and NVSHMEM was finalized."""
    world, rng = dist.get_world_size(), random.Random(rank)
    for run in range(3):
        mesh = mesh_of()
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            parts = [torch.randn(5000, 2, generator=torch.Generator().manual_seed(w)).to(dtype) for w in range(world)]
            own, expected = parts[rank].to(DEVICE)[:, 0], torch.cat(parts)[:, 0]  # strided
            for call in range(20):
                delay(rng)
                assert torch.equal(all_gather(own, 0, mesh).cpu(), expected), (run, dtype, call)
        if run == 1:
            if mesh.window is not None:
                mesh.window.close()
            links.release_unused(mesh.control, mesh.members, mesh.position, used="nothing")
        mesh.close()
    return "equal"


def case_attention(rank):
    """Calls with delays on the GPU and the host, each bitwise equal to the first with the same inputs."""
    world, rng = dist.get_world_size(), random.Random(rank)
    mesh, counts = mesh_of(), ([64] * world, [64] * world)

    def inputs(of, seed):
        make = torch.Generator().manual_seed(seed * 16 + of)
        return [torch.randn(1, world, 64, 32, generator=make).to(DEVICE, torch.bfloat16) for _ in range(3)]

    qkv = [inputs(rank, seed) for seed in range(5)]
    first = [torus_attention(*each, mesh=mesh, tokens=counts).clone() for each in qkv]
    for seed, out in enumerate(first):
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(inputs(w, seed) for w in range(world)), strict=True))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).chunk(world, dim=2)[rank]
        assert (out - expected).abs().max() < 2e-2
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for number in range(CALLS):
        delay(rng)
        differing += (torus_attention(*qkv[number % 5], mesh=mesh, tokens=counts) != first[number % 5]).sum()
    mesh.close()
    return f"{int(differing)} differ in {CALLS} calls"


def case_all_to_all(rank):
    """yunchang's all-to-all over windows, forth and back."""
    world, mesh = dist.get_world_size(), mesh_of()
    inputs = [
        torch.randn(2, 6, 2 * world, 32, generator=torch.Generator().manual_seed(w)).bfloat16() for w in range(world)
    ]
    expected = torch.cat([x.chunk(world, dim=2)[rank] for x in inputs], dim=1)
    for _ in range(100):
        out = all_to_all_4d(inputs[rank].to(DEVICE), 2, 1, mesh)
        assert torch.equal(out.cpu(), expected)
        assert torch.equal(all_to_all_4d(out, 1, 2, mesh).cpu(), inputs[rank])
    mesh.close()
    return "equal"


def case_a_lost_peer(rank):
    """Rank 0 makes one call, rank 1 a second one. Run this case last: it leaves the group unusable."""
    mesh, counts = mesh_of(timeout=2.0), ([64] * 2, [64] * 2)
    qkv = [torch.ones(1, 2, 64, 32, device=DEVICE) for _ in range(3)]
    assert (torus_attention(*qkv, mesh=mesh, tokens=counts) == 1).all()
    if rank == 0:
        silent.append(mesh)
        return "silent"
    out = torus_attention(*qkv, mesh=mesh, tokens=counts)  # on a CPU, this call raises
    torch.cuda.current_stream().synchronize()
    assert out.isnan().all()
    torus_attention(*qkv, mesh=mesh, tokens=counts)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if DEVICE == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    run_cases(globals(), sys.argv[3:], (TransportError, ValueError))
    if "a_lost_peer" not in sys.argv:
        nvshmem.finalize()
        dist.destroy_process_group()
