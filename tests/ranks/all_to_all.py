"""Rank side of test_yunchang_all_to_all.py: four ranks against yunchang's own all-to-all in the same groups."""

from __future__ import annotations

import os
import random
import sys
import time
from itertools import product

import torch
import torch.distributed as dist
from cases import run_cases
from yunchang.comm.all_to_all import all_to_all_4D as yunchangs

from sf_xfuser.config import MACHINE_VARIABLE, TorusArgs
from sf_xfuser.integrations.yunchang.all_to_all import all_to_all_4d
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError

FORTH, BACK = (2, 1), (1, 2)  # (scatter, gather)
TOKENS, CALLS = 8, 2000


def mesh_of(transport, topology="2x2", heads=4, timeout=20.0):
    """Four heads: one Ulysses group of four ranks. Two heads: two groups of two, and a ring."""
    return build_mesh(
        [[0, 1, 2, 3]], TorusArgs(backend="torus", topology=topology, transport=transport, timeout=timeout), heads=heads
    )


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4 * seed + dist.get_rank())).to(dtype)


def inputs():
    """[B, S, H, D] with S and H divisible by the Ulysses degree."""
    for batch, dtype in product((1, 2), (torch.float32, torch.bfloat16)):
        yield tensor(batch, 12, 8, 16, dtype=dtype)
        yield tensor(batch, 8, 4, 5, dtype=dtype)  # chunks of an odd number of elements
        yield tensor(batch, 12, 8, 32, dtype=dtype)[..., ::2]
        yield tensor(batch, 8, 12, 16, dtype=dtype).transpose(1, 2)
    yield tensor(2, 12, 8, 16).to(torch.int64)
    yield torch._neg_view(tensor(1, 12, 8, 16))  # like conj().imag
    yield tensor(1, 0, 8, 16)
    yield tensor(3, 4, 4, 1)


def equal_to_yunchangs(mesh):
    count = 0
    for given, direction in product(inputs(), (FORTH, BACK)):
        before = given.clone()
        wanted = yunchangs(given, *direction, group=mesh.ulysses_group)
        found = all_to_all_4d(given, *direction, mesh)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.is_contiguous() and wanted.is_contiguous()
        assert torch.equal(found, wanted), (given.shape, given.dtype, direction)
        assert torch.equal(given, before)
        count += 1
    return count


def over(transport):
    count = 0
    for topology, heads in product(("1x4", "2x2", "4x1"), (4, 2)):
        mesh = mesh_of(transport, topology, heads)
        count += equal_to_yunchangs(mesh)
        mesh.close()
    return f"{count} equal"


def case_shm(rank):
    return over("shm")


def case_tcp(rank):
    return over("tcp")


def case_two_sided(rank):
    return over("two_sided")


def case_ranks_out_of_order(rank):
    """Machines with ranks 0, 2 and 1, 3: positions are not in the order of ranks."""
    os.environ[MACHINE_VARIABLE] = "ab"[rank % 2]
    try:
        meshes = [mesh_of(transport, "auto") for transport in ("shm", "two_sided")]
    finally:
        del os.environ[MACHINE_VARIABLE]
    assert all(mesh.members == (0, 2, 1, 3) for mesh in meshes)
    return f"{sum(map(equal_to_yunchangs, meshes))} equal"


def interleaved(mesh, number):
    """Attention call or all-to-all ``number``, on inputs of that number."""
    q, k, v = (tensor(1, 4, TOKENS, 8, seed=3 * number + n) for n in range(3))
    if number % 3 == 1:
        return torus_attention(q, k, v, mesh=mesh, tokens=([TOKENS] * 4, [TOKENS] * 4))
    return all_to_all_4d(q.transpose(1, 2), *(FORTH, BACK)[number % 2], mesh)


def case_interleaved(rank):
    """Attention calls and all-to-alls in turn, with random pauses before accesses to shared memory, give the same bits
    as over TCP. All-to-alls send nothing to the ring neighbours."""
    wait = random.Random(rank)

    def pause(where):
        if wait.random() < 0.01:
            time.sleep(wait.random() * 2e-3)

    for topology, heads in (("2x2", 4), ("2x2", 2), ("4x1", 2), ("1x4", 2)):
        over_tcp, mesh = mesh_of("tcp", topology, heads), mesh_of("shm", topology, heads)
        wanted = [interleaved(over_tcp, number) for number in range(12)]
        mesh.window.pause = pause
        for number in range(CALLS // 4):
            assert torch.equal(interleaved(mesh, number % 12), wanted[number % 12]), f"{topology}: call {number}"
        mesh.close()
        over_tcp.close()
    return "equal"


def case_windows_grow(rank):
    """Larger and smaller shapes in turn."""
    mesh = mesh_of("shm")
    for tokens in (4, 400, 8, 4000, 4):
        given = tensor(1, tokens, 8, 16)
        assert torch.equal(all_to_all_4d(given, *FORTH, mesh), yunchangs(given, *FORTH, group=mesh.ulysses_group))
    half = mesh.window.window_bytes // 2
    assert 4000 * 8 * 16 * 4 <= half <= 4000 * 8 * 16 * 4 * 9 / 8 + 4096, half
    return "equal"


def case_many_shapes(rank):
    """The cache of known calls is bounded."""
    mesh = mesh_of("shm")
    for tokens in range(4 * 80, 0, -4):  # from large to small: a growing window clears the cache
        all_to_all_4d(tensor(1, tokens, 4, 2), *FORTH, mesh)
    return f"{len(mesh.calls)} kept"


def case_no_gradient(rank):
    """Like yunchang's function: gradients flow through SeqAllToAll4D, not through all_to_all_4D."""
    mesh = mesh_of("shm")
    given = tensor(1, 4, 4, 8).requires_grad_()
    assert not yunchangs(given, *FORTH, group=mesh.ulysses_group).requires_grad
    return f"requires_grad: {all_to_all_4d(given, *FORTH, mesh).requires_grad}"


def case_disagree(rank):
    all_to_all_4d(tensor(1, 5 if rank == 2 else 4, 4, 8), *FORTH, mesh_of("shm"))
    return "nothing was raised"


def case_a_rank_has_failed(rank):
    """All ranks fail at once with the reason of rank 3, and the next call works."""
    mesh, given = mesh_of("shm", timeout=2.0), tensor(1, 4, 4, 8)
    wanted = all_to_all_4d(given, *FORTH, mesh)
    dist.barrier()
    started, text = time.monotonic(), "nothing was raised"
    try:
        all_to_all_4d(given if rank != 3 else None, *FORTH, mesh)
    except (TransportError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
    assert time.monotonic() - started < 10
    dist.barrier()
    assert torch.equal(all_to_all_4d(given, *FORTH, mesh), wanted)
    return text


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], (TransportError, ValueError))
    dist.destroy_process_group()
