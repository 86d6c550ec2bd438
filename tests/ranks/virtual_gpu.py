"""Virtual ranks of one process on one GPU, each with its own streams (``tests/virtual.py``): attention calls with
random GPU delays, each bitwise equal to the first with the same inputs. Arguments: CALLS MACHINESxRANKS ..."""

from __future__ import annotations

import random
import sys
import time

import torch

from sf_xfuser.kernels import prepare
from sf_xfuser.torus.attention import torus_attention
from tests import virtual


def inputs(rank, seed, heads, dtype, tokens=64):
    make = torch.Generator().manual_seed(seed * 16 + rank)
    return [torch.randn(1, heads, tokens, 32, generator=make).to("cuda", dtype) for _ in range(3)]


def reference(world, rank, seed, heads, dtype):
    parts = zip(*(inputs(w, seed, heads, dtype) for w in range(world)), strict=True)
    q, k, v = (torch.cat(each, dim=2) for each in parts)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).chunk(world, dim=2)[rank]


def check(machines, ranks_per_machine, heads, dtype, calls):
    world = machines * ranks_per_machine
    counts = ([64] * world, [64] * world)
    make = virtual.meshes(machines, ranks_per_machine, heads, timeout_s=60.0, device_type="cuda")
    qkv = [[inputs(w, seed, heads, dtype) for seed in range(5)] for w in range(world)]
    # Loading a kernel may synchronize the GPU, which deadlocks while one of these ranks waits for another.
    prepare(qkv[0][0][0].device, dtype, 32)
    torch.cuda.synchronize()

    def rank(position):
        rng = random.Random(position)
        with torch.cuda.stream(torch.cuda.Stream()):
            mesh = make[position]()
            first = [torus_attention(*each, mesh=mesh, tokens=counts).clone() for each in qkv[position]]
            differing = torch.zeros((), dtype=torch.int64, device="cuda")
            for number in range(calls):
                if rng.random() < 0.2:
                    torch.cuda._sleep(rng.randrange(1_000_000))
                out = torus_attention(*qkv[position][number % 5], mesh=mesh, tokens=counts)
                differing += (out != first[number % 5]).sum()
            torch.cuda.current_stream().synchronize()
            mesh.close()
            return int(differing), first

    results = virtual.succeeded(virtual.run_ranks(world, rank, timeout_s=500))
    for position, (differing, first) in enumerate(results):
        assert differing == 0, f"rank {position}: {differing} elements differ in {calls} calls"
        for seed, out in enumerate(first):
            error = (out.float() - reference(world, position, seed, heads, dtype).float()).abs().max()
            assert error < (1e-4 if dtype == torch.float32 else 2e-2), (position, seed, float(error))


if __name__ == "__main__":
    calls = int(sys.argv[1])
    for size in sys.argv[2:]:
        machines, ranks = map(int, size.split("x"))
        for heads in sorted({machines * ranks, machines}):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                started = time.monotonic()
                check(machines, ranks, heads, dtype, calls)
                print(
                    f"{size} {heads} heads {dtype}: {calls} calls equal, {time.monotonic() - started:.1f} s", flush=True
                )
