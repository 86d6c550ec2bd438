"""Virtual ranks of one process on one GPU, each with its own streams (``tests/virtual.py``): attention calls with
random GPU delays, each bitwise equal to the first with the same inputs. Arguments: CALLS MACHINES RANKS HEADS."""

from __future__ import annotations

import random
import sys

import torch

from sf_xfuser.bench.gpu_parts import call
from sf_xfuser.bench.loopback import OneRank, StreamLoopback
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.plan import make_plan
from sf_xfuser.torus.attention import torus_attention
from tests import virtual

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS, TOKENS, D = 5, 64, 32


def inputs(rank, seed, heads, dtype):
    make = torch.Generator().manual_seed(seed * 16 + rank)
    return [torch.randn(1, heads, TOKENS, D, generator=make).to(DEVICE, dtype) for _ in range(3)]


def whole(world, seed, heads, dtype):
    """Q, K and V of all ranks."""
    return [torch.cat(x, dim=2) for x in zip(*(inputs(w, seed, heads, dtype) for w in range(world)), strict=True)]


def warm_up(layout, heads, streams):
    """Run every operation of the check once, on every stream, without a wait for a peer.

    A first kernel load, a plan of cuDNN or an allocation may wait for all streams of the process. During the check that
    is a deadlock, because a stream waits there for another rank of the process."""
    ranks = layout.world_size
    link = StreamLoopback(ranks, 0, range(1, ranks), DEVICE)
    for dtype in DTYPES:
        rank = OneRank(layout, *whole(ranks, 0, heads, dtype), link)
        for stream in streams:
            with torch.cuda.stream(stream):
                for _ in range(2):  # the halves of the window
                    differing(call(rank, sdpa_attend).clone(), call(rank, sdpa_attend))
            torch.cuda.synchronize()
    link.close()


def differing(out, expected):
    torch.cuda._sleep(1)
    return torch.zeros((), dtype=torch.int64, device=DEVICE) + (out != expected).sum()


def check(calls, machines, ranks_per_machine, heads):
    world = machines * ranks_per_machine
    counts = ([TOKENS] * world, [TOKENS] * world)
    make = virtual.meshes(machines, ranks_per_machine, heads, timeout_s=60.0, device_type=DEVICE.type)
    streams = [torch.cuda.Stream() for _ in range(world)]
    qkv = {dtype: [[inputs(w, seed, heads, dtype) for seed in range(SEEDS)] for w in range(world)] for dtype in DTYPES}
    warm_up(make_plan(machines, ranks_per_machine, heads=heads).layout, heads, streams)

    def rank(position):
        """dtype -> (number of differing elements, first results). One mesh for all, since its streams are never
        destroyed, and streams beyond 32 share hardware queues."""
        rng, results = random.Random(position), {}
        with torch.cuda.stream(streams[position]):
            mesh = make[position]()
            for dtype in DTYPES:
                own = qkv[dtype][position]
                first = [torus_attention(*each, mesh=mesh, tokens=counts).clone() for each in own]
                total = torch.zeros((), dtype=torch.int64, device=DEVICE)
                for number in range(calls):
                    if rng.random() < 0.2:
                        torch.cuda._sleep(rng.randrange(1_000_000))
                    total += differing(
                        torus_attention(*own[number % SEEDS], mesh=mesh, tokens=counts), first[number % SEEDS]
                    )
                torch.cuda.current_stream().synchronize()
                results[dtype] = int(total), first
            mesh.close()
        return results

    for position, results in enumerate(virtual.succeeded(virtual.run_ranks(world, rank, timeout_s=300))):
        for dtype, (total, first) in results.items():
            assert total == 0, f"rank {position}, {dtype}: {total} elements differ in {calls} calls"
            for seed, out in enumerate(first):
                expected = torch.nn.functional.scaled_dot_product_attention(*whole(world, seed, heads, dtype))
                error = (out.float() - expected.chunk(world, dim=2)[position].float()).abs().max()
                assert error < (1e-4 if dtype == torch.float32 else 2e-2), (position, dtype, seed, float(error))


if __name__ == "__main__":
    check(*map(int, sys.argv[1:]))
    print(f"{sys.argv[1]} calls equal")
