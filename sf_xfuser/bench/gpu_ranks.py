"""The parts of ``bench.gpu`` with several ranks: processes on one GPU, or as many GPUs as there are. Several ranks on
one GPU check results; their times say nothing about NVLink. Without a GPU, ``shm`` runs in place of ``symm_mem``."""

from __future__ import annotations

import random
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sf_xfuser.bench.document import print_row
from sf_xfuser.bench.timing import Bench, error_ratio, summary
from sf_xfuser.config import GPU_WINDOWS, TorusArgs, set_defaults
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.torus import links
from sf_xfuser.torus.attention import attend_nothing, torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import TransportUnavailable
from sf_xfuser.transport.gpu import nvshmem

ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "GLOO_SOCKET_IFNAME": "lo",
}
UNAVAILABLE = {name: links.UNAVAILABLE[name] for name in GPU_WINDOWS}
_HEADS, _D, _SEEDS = 8, 128, 3
_GRIDS = {2: "2x1", 4: "2x2"}


def attention(bench: Bench, transport: str, ranks: int) -> None:
    """Attention against one process; repeated calls with random delays, bitwise; times of calls and of transfers."""
    _launch(_attention, bench, transport, ranks)


def graph(bench: Bench, transport: str) -> None:
    """A CUDA graph of two calls on two ranks, replayed with new inputs, against the same calls without a graph."""
    if bench.on_gpu:
        _launch(_graph, bench, transport, 2)
    else:
        bench.skip("graph", "no GPU")


def _launch(work: Callable[[Rank], None], bench: Bench, transport: str, ranks: int) -> None:
    """Run ``work`` in each rank. If the transport is unavailable, the row says why."""
    if not bench.on_gpu and transport == "symm_mem":
        transport = "shm"
    elif reason := UNAVAILABLE[transport]():
        return bench.skip(f"{transport}, {ranks} ranks", reason)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    set_defaults({"CUDA_MODULE_LOADING": "EAGER"})  # loading a kernel may wait for all streams
    tokens, calls = (4096, 200) if bench.on_gpu else (16, 10)
    mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _start, (ranks, port, work, transport, bench.device.type, tokens, calls), nprocs=ranks
    )


def _start(
    position: int,
    ranks: int,
    port: int,
    work: Callable[[Rank], None],
    transport: str,
    device: str,
    tokens: int,
    calls: int,
) -> None:
    if device == "cuda":
        torch.cuda.set_device(position % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=position, world_size=ranks)
    args = TorusArgs(backend="torus", topology=_GRIDS[ranks], transport=transport, timeout=20.0)
    try:
        mesh = build_mesh([list(range(ranks))], args, heads=_HEADS)
    except TransportUnavailable as refusal:  # on every rank
        if position == 0:
            print_row({"name": f"{transport}, {ranks} ranks", "skipped": str(refusal)})
        return
    with torch.no_grad():
        work(Rank(mesh, position, ranks, transport, device, tokens, calls))
    dist.barrier()
    mesh.close()
    nvshmem.finalize()
    dist.destroy_process_group()


class Rank:
    """One rank: its mesh and inputs. Rows are those of rank 0."""

    def __init__(
        self, mesh: Mesh, position: int, ranks: int, transport: str, device: str, tokens: int, calls: int
    ) -> None:
        self.mesh, self.position, self.ranks, self.device = mesh, position, ranks, device
        self.tokens, self.calls = tokens, calls
        self.name = f"{transport}, {ranks} ranks"
        self.inputs = [self._inputs(position, seed) for seed in range(_SEEDS)]

    def _inputs(self, of: int, seed: int) -> list[torch.Tensor]:
        make = torch.Generator().manual_seed(seed * 16 + of)
        shape = (1, _HEADS, self.tokens, _D)
        return [torch.randn(shape, generator=make).to(self.device, torch.bfloat16) for _ in range(3)]

    def whole(self, seed: int) -> list[torch.Tensor]:
        """Q, K and V of all ranks."""
        return [torch.cat(x, 2) for x in zip(*(self._inputs(w, seed) for w in range(self.ranks)), strict=True)]

    def call(self, inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
        counts = (self.tokens,) * self.ranks
        query, key, value = inputs
        return torus_attention(query, key, value, mesh=self.mesh, tokens=(counts, counts), **options)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()

    def us(self, **options: Any) -> list[float]:
        """Microseconds of each of 30 calls, until its result is there."""
        taken = []
        for number in range(33):
            started_s = time.perf_counter()
            self.call(self.inputs[0], **options)
            self.synchronize()
            if number >= 3:
                taken.append(1e6 * (time.perf_counter() - started_s))
        return taken

    def row(self, name: str, value: float, unit: str, goal: str | None = None, **more: Any) -> None:
        """The largest value of all ranks. Collective."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        if self.position == 0:
            what = f"{self.tokens} tokens a rank, H={_HEADS} D={_D}"
            print_row(
                {"name": f"{self.name}: {name}", "what": what, "value": max(values), "unit": unit, "goal": goal, **more}
            )


def _attention(rank: Rank) -> None:
    first = [rank.call(inputs).clone() for inputs in rank.inputs]
    ratio = 0.0
    for seed, out in enumerate(first):
        query, (_, keys, values) = rank.inputs[seed][0], rank.whole(seed)
        ratio = max(ratio, error_ratio(out, sdpa_attend(query, keys, values)[0], query, keys, values))
    rank.row("against one process", ratio, "x SDPA's error", "error")
    rng = random.Random(rank.position)
    differing = torch.zeros((), dtype=torch.int64, device=rank.device)
    for number in range(rank.calls):
        if rng.random() < 0.1:
            time.sleep(rng.random() * 2e-3)
        if rng.random() < 0.1 and rank.device == "cuda":
            torch.cuda._sleep(rng.randrange(2_000_000))  # type: ignore[no-untyped-call]
        differing += (rank.call(rank.inputs[number % _SEEDS]) != first[number % _SEEDS]).sum()
    rank.row(f"{rank.calls} calls with delays", int(differing), "elements", "exact")
    us = rank.us()
    rank.row("a call", statistics.median(us), "us", **summary(us))
    us = rank.us(attention=attend_nothing)
    rank.row("the transfers of a call", statistics.median(us), "us", **summary(us))


def _graph(rank: Rank) -> None:
    inputs = [[x.clone() for x in rank.inputs[half]] for half in range(2)]  # a call for each half of the window
    for _ in range(2):
        for each in inputs:
            rank.call(each)
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            outs = [rank.call(each) for each in inputs]
    except ValueError as refusal:  # the transport's, on every rank
        if rank.position == 0:
            print_row({"name": f"{rank.name}: graph", "skipped": str(refusal)})
        return
    differing = 0
    for replay in range(10):
        seeds = [(replay + half) % _SEEDS for half in range(2)]
        for each, seed in zip(inputs, seeds, strict=True):
            for x, new in zip(each, rank.inputs[seed], strict=True):
                x.copy_(new)
        captured.replay()
        got = [out.clone() for out in outs]
        differing += sum(int((x != rank.call(rank.inputs[seed])).sum()) for x, seed in zip(got, seeds, strict=True))
    rank.row("10 replays of a graph", differing, "elements", "exact")
    taken = []
    for _ in range(30):
        started_s = time.perf_counter()
        captured.replay()
        taken.append(1e6 * (time.perf_counter() - started_s) / 2)
        rank.synchronize()
    rank.row("a replayed call, host", statistics.median(taken), "us", **summary(taken))
